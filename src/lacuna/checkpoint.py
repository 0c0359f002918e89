"""Models out to disk. (Checkpoints to resume from are not here yet: a run that is cut off begins again.)"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lacuna.model import Trainee


@torch.no_grad()
def export(trainee: Trainee, tokenizer, folder: Path, rank: int, shard_bytes: int = 5 * 10**9):
    """Write a Hugging Face folder in the computation's dtype, gathering one tensor at a time; all ranks call it."""
    model = trainee.model
    dtype = model.config.dtype
    parts, size = [[]], 0
    for name, parameter in model.named_parameters():
        size += parameter.numel() * dtype.itemsize
        if size > shard_bytes and parts[-1]:
            parts.append([])
            size = parameter.numel() * dtype.itemsize
        parts[-1].append((name, parameter))
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= {name: file for name, _ in part}
        whole = {}
        for name, parameter in part:
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            if rank == 0:
                whole[name] = full.detach().to("cpu", dtype).contiguous()
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(whole, folder / file, metadata={"format": "pt"})
    if rank == 0:
        if len(parts) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
