"""Folders of weights, a model's or a checkpoint's: which files count, and what is in them."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from lacuna.config import ConfigError, blame
from lacuna.parallel import local

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of a model in several files


class Part(NamedTuple):
    """Rows of a tensor, in one file; a scalar is one row."""

    file: Path
    first: int  # their place in the whole tensor
    values: torch.Tensor  # the file itself, mapped into memory: read where it is looked at


def weight_folder(name: str) -> Path:
    """The folder of a model, by its path or its name on the Hub."""
    return Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def fingerprint(folder: Path) -> str:
    """Tells a folder's weights from other ones, by some 2**18 bytes a file: all of 16 GB would take 10 s."""
    stored = [np.memmap(file, mode="r") for file in weight_files(folder)]
    samples = [content[:: 1 + len(content) // 2**18].tobytes() for content in stored]
    return hashlib.sha256(b"".join(samples)).hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that count: of a checkpoint, or else as transformers finds them."""
    index = folder / INDEX
    if (folder / "state.json").exists():
        written = json.loads((folder / "state.json").read_text()).get("files")
        files = sorted(folder.glob("rank_*.safetensors"))
        if written not in (None, len(files)):
            raise ConfigError(f"{folder} has {len(files)} of its {written} files rank_*.safetensors: take another one")
        return files
    if index.exists():
        with blame(f"{index} cannot be read"):
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if not (folder / WHOLE).exists():
        raise ConfigError(f"{folder} has neither {WHOLE} nor {INDEX}: see model.from_scratch")
    return [folder / WHOLE]


def stored_parts(folder: Path) -> dict[str, list[Part]]:
    """The parts of each tensor, in order. ConfigError where rows are missing, or there twice."""
    stored = {}
    for file in weight_files(folder):
        with blame(f"{file} is no whole safetensors file; of git-lfs, `git lfs pull` brings it"):
            content = safe_open(file, "pt")
            places = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in content.keys():  # noqa: SIM118
                values = torch.atleast_1d(content.get_tensor(name))
                [first, *_] = places.get(name, {}).get("saved_offsets") or [0]
                stored.setdefault(name, []).append(Part(file, first, values))
    for name, parts in stored.items():
        parts.sort(key=lambda part: part.first)
        rows = 0
        for part in parts:
            if part.first != rows or part.values.shape[1:] != parts[0].values.shape[1:]:
                raise ConfigError(f"{part.file}: {name} begins at {part.first}, not {rows}: a file is lost or doubled")
            rows += len(part.values)
    return stored


def whole_shape(parts: list[Part]) -> list[int]:
    return [sum(len(part.values) for part in parts), *parts[0].values.shape[1:]]


@torch.no_grad()
def read_tensors(tensors: dict[str, torch.Tensor], folder: Path):
    """Fill tensors, sharded or not, from a folder's files, however many ranks wrote them."""
    stored = stored_parts(folder)
    for name, tensor in tensors.items():
        wanted = list(tensor.shape) or [1]
        found = whole_shape(stored[name]) if name in stored else None
        if found != wanted:
            raise ConfigError(f"{folder} does not fit: {name} is {found or 'missing'}, and should be {wanted}")
        share = torch.atleast_1d(local(tensor))
        first = 0
        if isinstance(tensor, DTensor):  # FSDP shards rows
            _, [first, *_] = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        for part in stored[name]:
            begin = max(first, part.first)
            end = min(first + len(share), part.first + len(part.values))
            if begin < end:
                share[begin - first : end - first] = part.values[begin - part.first : end - part.first]


def read_whole(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in a folder, by name, without an optimizer's state."""
    stored = {name: parts for name, parts in stored_parts(folder).items() if not name.startswith("optimizer.")}
    weights = {name: torch.empty(whole_shape(parts), dtype=dtype) for name, parts in stored.items()}
    read_tensors(weights, folder)
    return weights


def held(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a folder of the model holds, by name: no adapters, and nothing that is tied to another."""
    tied = set(model.all_tied_weights_keys)
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in tied and ".lora_" not in name}


def load_weights(model: PreTrainedModel, folder: Path):
    """Read this rank's part of every parameter. ConfigError where they are not the model's."""
    stored = stored_parts(folder)
    places = held(model)
    for tied, source in model.all_tied_weights_keys.items():
        if tied in stored and source not in stored:  # the one that is there counts
            places[tied] = places.pop(source)
        elif tied in stored and not torch.equal(stored[tied][0].values, stored[source][0].values):
            raise ConfigError(f"{tied} differs from {source}: set model.overrides.tie_word_embeddings = false")
    missing = sorted(places.keys() - stored)
    unknown = sorted(stored.keys() - places - set(model.all_tied_weights_keys))
    # a checkpoint also holds the optimizer, old folders the rotary frequencies
    unknown = [name for name in unknown if not name.startswith("optimizer.") and not name.endswith("inv_freq")]
    if any(".lora_" in name for name in unknown):
        raise ConfigError(f"model.name {folder} holds LoRA's adapters alone: `lacuna export` makes a model of them")
    if missing or unknown:
        misfit = f"model.name {folder} does not fit {type(model).__name__}"
        raise ConfigError(f"{misfit}: missing {missing[:3]}, unknown {unknown[:3]}")
    read_tensors(places, folder)
