"""Folders of weights, a model's or a checkpoint's: which files count, and what is in them."""

import copy
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lacuna.config import ConfigError, blame, log
from lacuna.parallel import local

SEALS = "seals.json"  # size and fingerprint of each other file of a checkpoint
WHOLE = "model.safetensors"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX = "model.safetensors.index.json"  # of a model that is stored in several files
TEXT = re.compile(r"^(model\.)?language_model\.")  # the text part of models that see or hear


def weight_folder(name: str) -> Path:
    """The folder of a model, by its path or its name on the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    return refuse_damaged(folder)


def refuse_damaged(folder: Path) -> Path:
    """The folder, if each file that its seals.json lists is what was written."""
    seals = folder / SEALS
    if seals.exists():
        with blame(f"{seals} cannot be read"):
            for name, written in json.loads(seals.read_text()).items():
                file = folder / name
                if not file.exists() or [file.stat().st_size, fingerprint([file])] != written:
                    raise ConfigError(f"{folder}: {name} is missing or changed: remove the folder")
    return folder


def fingerprint(files: list[Path]) -> str:
    """Tells files apart by 2**18 bytes of each: all of 16 GB would take 10 s."""
    stored = [np.memmap(file, mode="r") for file in files if file.stat().st_size]
    samples = [content[:: len(content) // 2**18 | 1].tobytes() for content in stored]  # odd: every byte of a float
    return hashlib.sha256(b"".join(samples)).hexdigest()[:16]


def seal(files: list[Path]) -> dict[str, list]:
    """Size and fingerprint of each file, once on disk: a power failure could leave it empty."""
    for file in files:
        file.chmod(file.parent.stat().st_mode & 0o664)  # safetensors: 0600
        with open(file, "rb") as content:
            os.fsync(content.fileno())
    return {file.name: [file.stat().st_size, fingerprint([file])] for file in files}


def check_base(name: str, state: dict) -> str:
    """The fingerprint of a run's first weights; ConfigError where its state has another."""
    found = fingerprint(weight_files(weight_folder(name)))
    if state.get("base_weights", found) != found:
        raise ConfigError(f"model.name {name} has other weights than when this run began")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that count: a checkpoint's, those of an index, or the one."""
    index = folder / INDEX
    if (folder / "state.json").exists():
        return sorted(folder.glob("rank_*.safetensors"))
    if index.exists():
        with blame(f"{index} cannot be read"):
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if not (folder / WHOLE).exists():
        raise ConfigError(f"{folder} has neither {WHOLE} nor {INDEX}: convert to safetensors")
    return [folder / WHOLE]


def stored_parts(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Rows of each tensor, a part a file. ConfigError where some are missing or doubled."""
    stored = {}
    for file in weight_files(folder):
        with blame(f"{file} is no whole safetensors file (git lfs pull?), or without permission"):
            content = safe_open(file, "pt")
            places = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in content.keys():  # noqa: SIM118
                values = torch.atleast_1d(content.get_tensor(name))
                [first, *_] = places.get(name, {}).get("saved_offsets") or [0]
                parts = stored.setdefault(name, [])
                rows = sum(map(len, parts))
                if first != rows or (parts and values.shape[1:] != parts[0].shape[1:]):
                    raise ConfigError(f"{file}: {name} begins at {first}, not {rows}: a file is lost or doubled")
                parts.append(values)
    return stored


def read_tensors(tensors: dict[str, torch.Tensor], folder: Path):
    """Fill tensors, sharded or not, from a folder's files of any number of ranks."""
    stored = stored_parts(folder)
    for name, tensor in tensors.items():
        fill(tensor, stored.get(name, []), f"{folder} does not fit: {name}")


@torch.no_grad()
def fill(tensor: torch.Tensor, parts: list[torch.Tensor], where: str):
    """Copy this rank's rows of a tensor out of its parts."""
    wanted = list(tensor.shape) or [1]
    rows = sum(map(len, parts))
    found = [rows, *parts[0].shape[1:]] if parts else "missing"
    if found != wanted:
        raise ConfigError(f"{where} is {found}, and should be {wanted}")
    if tensor.is_floating_point() and parts[0].dtype not in FLOATS:
        raise ConfigError(f"{where} is {parts[0].dtype}: lacuna reads no quantized weights")
    share = torch.atleast_1d(local(tensor))
    first = 0
    if isinstance(tensor, DTensor):  # FSDP shards rows
        _, [first, *_] = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    at = -first  # where a part begins, from the share's first row
    for part in parts:
        begin = max(0, at)
        end = max(begin, min(len(share), at + len(part)))
        share[begin:end] = part[begin - at : end - at]
        at += len(part)


def held(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a folder of the model holds, by name: no adapters, and nothing tied to another."""
    tied = set(model.all_tied_weights_keys)
    state = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if name not in tied and ".lora_" not in name}


def in_memory(model: PreTrainedModel, stored: dict, places: dict) -> dict[str, WeightConverter]:
    """Name stored tensors as the model does, in place; those made of several are returned."""
    # transformers knows which names were others once, and that experts are stored one by one
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    made = {}
    for name in sorted(stored.keys() - places, key=dot_natural_key):
        new, pattern = rename_source_key(TEXT.sub("", name), renamings, converters, model.base_model_prefix, places)
        new = model.all_tied_weights_keys.get(new, new)
        parts = stored.pop(name)
        if new in stored and not torch.equal(parts[0], stored[new][0]):
            raise ConfigError(f"{name} differs from {new}: see model.overrides.tie_word_embeddings")
        if pattern is None:
            stored[new] = parts
            continue
        if new not in made:
            made[new] = copy.deepcopy(next(rule for rule in converters if pattern in rule.source_patterns))
        made[new].add_tensor(new, name, pattern, parts[0])
    return made


def load_weights(model: PreTrainedModel, folder: Path):
    """Read this rank's part of every parameter and buffer that a folder holds."""
    stored = stored_parts(folder)
    places = held(model)
    if any(map(TEXT.match, stored)):
        text = {name: parts for name, parts in stored.items() if TEXT.match(name) or name.startswith("lm_head.")}
        log.warning("%s: %d tensors that see or hear are left out", folder, len(stored) - len(text))
        stored = text
    made = in_memory(model, stored, places)
    missing = sorted(places.keys() - stored.keys() - made.keys())
    # a checkpoint also holds the optimizer, old folders the rotary frequencies, some a part that guesses ahead
    ignored = "|".join([r"^optimizer\.", "inv_freq$", *model._keys_to_ignore_on_load_unexpected])
    unknown = [name for name in sorted({*stored, *made} - places.keys()) if not re.search(ignored, name)]
    if missing or unknown:
        what = f"missing {missing[:3]}, unknown {unknown[:3]} (adapters: `lacuna export` first)"
        raise ConfigError(f"{folder} does not fit {type(model).__name__}: {what}")
    kept = model._keep_in_fp32_modules_strict or ()  # in float32, as transformers does
    for name, tensor in places.items():
        if any(re.search(pattern, name) for pattern in kept) and not isinstance(tensor, DTensor):
            tensor.data = tensor.data.float()
        if name in made:  # all would be a second model in memory
            converted = made.pop(name).convert(name, model=model, config=model.config)
            stored[name] = [converted[name]]
        fill(tensor, stored.pop(name), f"{folder} does not fit: {name}")
