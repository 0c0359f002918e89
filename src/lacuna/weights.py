"""Folders of weights, a model's or a checkpoint's: which files count, whether all is there, and reading them."""

import json
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from lacuna.config import ConfigError, blame, log
from lacuna.parallel import local


def in_order(checkpoints: Path, prefix: str = "step_") -> list[Path]:
    """A run's checkpoints, oldest first: folders that are called step_ and a number. Anything else is left alone."""
    named = [path for path in checkpoints.glob(f"{prefix}*") if re.fullmatch("[0-9]+", path.name.removeprefix(prefix))]
    folders = [path for path in named if path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(prefix)))


def fingerprint(file: Path) -> list[int]:
    """A file's size, and the sum of its 8-byte words: 3 GiB/s on one core, where crc32 makes .8."""
    if not file.is_file():
        return []
    total = 0
    with open(file, "rb") as content:
        while block := content.read(2**24):
            total += int(np.frombuffer(block + bytes(-len(block) % 8), dtype="<u8").sum())
    return [file.stat().st_size, total % 2**64]


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or nothing; of an older version's nothing is known."""
    try:
        files = json.loads((checkpoint / "state.json").read_text()).get("files", {})
    except (AttributeError, OSError, ValueError):
        return "its state.json is missing or broken"
    foreign = {file.name for file in checkpoint.glob("*.safetensors")} - files.keys()
    if files and foreign:
        return f"{min(foreign)} does not belong there"
    with ThreadPoolExecutor() as pool:  # those of several ranks at once
        marks = list(pool.map(lambda name: fingerprint(checkpoint / name), files))
    wrong = [name for name, mark in zip(files, marks, strict=True) if mark != files[name]]
    return f"{wrong[0]} is missing, cut off or changed" if wrong else ""


def refuse_damaged(checkpoint: Path, key: str):
    """ConfigError where what `key` names is no whole checkpoint; it names the newest one there that is."""
    wrong = damage(checkpoint)
    if wrong:
        whole = [other.name for other in in_order(checkpoint.parent) if not damage(other)]
        newest = whole[-1] if whole else "none"
        raise ConfigError(f"{key} {checkpoint} is no checkpoint that is whole: {wrong}; the newest there: {newest}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that count: of a checkpoint, or else as transformers finds them. Others are ignored."""
    index = folder / "model.safetensors.index.json"
    alone = folder / "model.safetensors"
    if (folder / "state.json").exists():
        return sorted(folder.glob("rank_*.safetensors"))
    if index.exists():
        if alone.exists():
            log.info("%s: what %s names is read, and %s is not", folder, index.name, alone.name)
        with blame(f"{index} cannot be read"):
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if not alone.exists():
        cure = "to begin without weights, set model.from_scratch = true"
        raise ConfigError(f"model.name {folder} has neither {alone.name} nor {index.name}; {cure}")
    return [alone]


def stored_tensors(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Each tensor's parts, which follow one another by rows (a scalar is one): mapped files, not read yet."""
    stored = defaultdict(list)
    for file in weight_files(folder):
        with blame(f"{file} is no whole safetensors file (cut off, or a pointer: git lfs pull)"):
            content = safe_open(file, "pt")
            places = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in content.keys():  # noqa: SIM118
                values = torch.atleast_1d(content.get_tensor(name))
                begin = places.get(name, {}).get("saved_offsets") or [0] * values.ndim
                stored[name].append((begin, values))
    for name, parts in stored.items():
        parts.sort(key=lambda part: part[0])
        rows = 0
        for begin, values in parts:
            if begin != [rows] + [0] * (values.ndim - 1) or values.shape[1:] != parts[0][1].shape[1:]:
                raise ConfigError(f"{folder}: {name} is not whole, or there twice: at row {begin[0]}, not {rows}")
            rows += len(values)
        stored[name] = [values for _, values in parts]
    return stored


@torch.no_grad()
def read_tensors(tensors: dict[str, torch.Tensor], stored: dict[str, list[torch.Tensor]]):
    """Fill tensors, sharded by rows or not, from what a folder holds, however many ranks wrote it."""
    for name, tensor in tensors.items():
        parts = stored.get(name, [])
        found = [sum(map(len, parts)), *parts[0].shape[1:]] if parts else "missing"
        wanted = list(tensor.shape) or [1]
        if found != wanted:
            raise ConfigError(f"the weights do not fit the model: {name} is {found}, the model wants {wanted}")
        share = torch.atleast_1d(local(tensor))
        first = 0
        if isinstance(tensor, DTensor):
            _, [first, *_] = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        for part in parts:  # `first` is the first row of this rank's share, counted from this part
            begin = max(first, 0)
            end = min(first + len(share), len(part))
            if begin < end:
                share[begin - first : end - first] = part[begin:end]
            first -= len(part)


def held(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a folder of the model holds, by name: everything but what is tied to something else."""
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}


def untie(model: PreTrainedModel, stored: dict[str, list[torch.Tensor]]):
    """As transformers does: a head that differs from the embedding in the files is not tied to it, whatever is said."""
    for tied, source in list(model.all_tied_weights_keys.items()):
        if stored.keys() >= {tied, source} and not torch.equal(stored[tied][0], stored[source][0]):
            log.info("%s differs from %s in the files, and is not tied to it", tied, source)
            owner, _, name = tied.rpartition(".")
            weight = nn.Parameter(torch.empty_like(model.get_parameter(source)))
            setattr(model.get_submodule(owner), name, weight)
            del model.all_tied_weights_keys[tied]
            model.config.tie_word_embeddings = False


def load_weights(model: PreTrainedModel, stored: dict[str, list[torch.Tensor]]):
    """Read this rank's part of every parameter. ConfigError where names or shapes are not the model's."""
    places = held(model)
    missing = sorted(places.keys() - stored)
    unknown = sorted(stored.keys() - places - set(model.all_tied_weights_keys))
    # a checkpoint also holds the optimizer, old folders the rotary frequencies
    unknown = [name for name in unknown if not name.startswith("optimizer.") and not name.endswith("inv_freq")]
    if missing or unknown:
        misfit = f"the weights of model.name do not fit {type(model).__name__}"
        raise ConfigError(f"{misfit}: missing {missing[:3]}, unknown {unknown[:3]}")
    read_tensors(places, stored)
