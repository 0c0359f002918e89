"""Checkpoints to go on from, and models out to disk.

runs/NAME/checkpoints/step_N/ holds the model under its Hugging Face names and the optimizer's state as `optimizer.*`,
float32, in one safetensors file a rank: the sharded format of torch's distributed checkpoint, whose reader puts them
together on any other number of ranks. No pickle. Beside them state.json (step, counters, place in the data, config),
the model's config and the tokenizer, so `model.name = …/step_N` begins a new run from it. It is written as .step_N
while training goes on, and renamed once every rank's file is on disk: what is named step_N is whole.
"""

import itertools
import json
import mmap
import os
import shutil
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig, PreTrainedModel

from lacuna.config import Config, ConfigError, log
from lacuna.data.loader import merge_states
from lacuna.model import read_tensors
from lacuna.parallel import Ranks, local

FORMAT = 2  # of names and state in a checkpoint: counted up when no run can go on from those of before
PIECE = 2**26  # float32 values, 256 MiB: so much host memory is pinned at once
# What may change when a run goes on: where things are, how they are reported, on what hardware. All else changes rows
# or losses.
FREE = ("name", "out", "log.", "checkpoint.", "dist.", "eval.every", "eval.rows", "eval.sources", "data.workers")
FREE += ("data.cache", "train.micro_batch_size", "train.activation_checkpointing", "train.deterministic")


def find_checkpoint(config: Config, folder: Path, rank: int) -> Path | None:
    """Where this run goes on from, the same on all ranks. What a killed save left is removed."""
    found = [None]
    if rank == 0:
        for leftover in (folder / "checkpoints").glob(".*step_*"):
            shutil.rmtree(leftover)
        found = [choose_checkpoint(config.checkpoint.resume, in_order(folder / "checkpoints"))]
    if dist.is_initialized():
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def choose_checkpoint(asked: str | None, own: list[Path]) -> Path | None:
    """The checkpoint that was asked for, or else the newest of the run's own."""
    newest = own[-1] if own else None
    restarted = any(int(os.environ.get(key, 0)) for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if asked is None or restarted:  # a run that began at `asked` has its own by now
        return newest
    if not (Path(asked) / "state.json").exists():
        raise ConfigError(f"checkpoint.resume {asked} is no checkpoint; here are {own}")
    if newest and step_of(newest) > step_of(Path(asked)):
        cure = f"remove those to go back to {asked}, leave checkpoint.resume out, or set another name"
        raise ConfigError(f"{newest.parent} has later checkpoints, such as {newest.name}: {cure}")
    return Path(asked)


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "state.json").read_text())["step"]


def in_order(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step_*"), key=step_of)


def read_state(checkpoint: Path | None, config: Config) -> dict:
    """Step, counters and place in the data. ConfigError where the run that goes on would be another one."""
    if checkpoint is None:
        return {"step": 0, "tokens": 0, "trained_tokens": 0, "data": None}
    state = json.loads((checkpoint / "state.json").read_text())
    if state.get("format") != FORMAT:
        cure = f"finish the run with that one, or begin a new one from its weights, --model.name {checkpoint}"
        raise ConfigError(f"{checkpoint} was written by another version of lacuna: {cure}")
    old = flat(state["config"])
    new = flat(config.model_dump(mode="json"))
    changed = [key for key in old.keys() & new.keys() if old[key] != new[key] and not key.startswith(FREE)]
    if changed and not config.checkpoint.resume_changed:
        keys = ", ".join(f"{key} (was {old[key]!r})" for key in sorted(changed))
        cure = "change it back, set another name for another run, or set checkpoint.resume_changed = true"
        raise ConfigError(f"{checkpoint} cannot go on exactly with another {keys}: {cure}")
    return state


def flat(config: dict) -> dict:
    """A config by its keys as they are written on a command line: section.key."""
    keys = {name: value for name, value in config.items() if not isinstance(value, dict)}
    for section in config.keys() - keys.keys():
        keys |= {f"{section}.{key}": value for key, value in config[section].items()}
    return keys


class HostMemory:
    """Room on the host for the float32 tensors of a checkpoint, pinned for a GPU: else copies take ten times as long.

    While the driver pins, launches of kernels wait for it: .8 s for 20 GB at once, and up to 8 s were seen. In pieces
    of huge pages none waits longer than 8 ms (H100). A copy may not cross from one piece to the next.
    """

    def __init__(self, sizes: list[int], pinned: bool):
        spans = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]  # no two tensors on one page
        offsets = [0, *itertools.accumulate(spans)]
        pages = mmap.mmap(-1, 4 * offsets[-1] + 4, mmap.MAP_PRIVATE)  # shared memory would have small pages only
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.float32)
        self.places = [memory[at : at + size].zero_() for at, size in zip(offsets, sizes, strict=False)]  # flat
        cuda = torch.cuda.cudart() if pinned else None
        for place in self.places if pinned else []:
            for piece in place.split(PIECE):
                cuda.cudaHostRegister(piece.data_ptr(), piece.nbytes, 0)
                # or else, in a process that lives on, copies from what lies there next would read the old memory
                weakref.finalize(self, cuda.cudaHostUnregister, piece.data_ptr()).atexit = False
                time.sleep(0.02)  # what has waited goes first

    def fill(self, tensors: list[torch.Tensor]):
        for place, tensor in zip(self.places, tensors, strict=True):
            for piece, part in zip(place.split(PIECE), tensor.flatten().split(PIECE), strict=True):
                piece.copy_(part, non_blocking=True)


class Save(NamedTuple):
    copied: Future  # the host has all of this rank's share: parameters may change again
    written: Future  # the checkpoint is whole


class Checkpoints:
    """Saves in a thread: training waits only where it would change what is not copied to the host yet."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path, tensors: dict, model: PreTrainedModel, tokenizer):
        """tensors: what a checkpoint holds, parameters and optimizer state by name, sharded or not."""
        self.config = config
        self.ranks = ranks
        self.folder = folder / "checkpoints"
        self.tensors = {name: tensor for name, tensor in tensors.items() if writes(ranks, tensor)}
        self.small_files = [model.config, model.generation_config, tokenizer]
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.memory = None  # Future of HostMemory
        self.under_way = None  # the last Save
        self.group = None
        if ranks.mesh is not None:
            # the thread's own: two threads that use one group could meet in different orders on different ranks
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.dist.timeout))

    def after_step(self):
        """After every step: says at once that a save has failed. After the first, begins to allocate.

        Not before it: beside compilation, 20 GB for a 1.7B model cost that 2 s.
        """
        if self.memory is None:
            sizes = [local(tensor).numel() for tensor in self.tensors.values()]
            self.memory = self.thread.submit(HostMemory, sizes, self.ranks.device.type == "cuda")
        if self.under_way and self.under_way.written.done():
            self.finish()

    def save(self, step: int, facts: dict, data: dict):
        """Begin to save the run as it stands after `step`; facts: counters, data: this rank's Loader.state."""
        self.finish()
        states = [data] * self.ranks.world
        if self.group:
            dist.all_gather_object(states, data, group=self.group)
        state = {"format": FORMAT, "step": step, **facts, "data": merge_states(states)}
        state["config"] = self.config.model_dump(mode="json")
        # taken here, since FSDP2 may give a parameter other memory at its first use
        shares = [local(tensor).detach() for tensor in self.tensors.values()]
        copied = self.thread.submit(self.copy, shares)
        self.under_way = Save(copied, self.thread.submit(self.write, step, state, copied))

    def wait_for_copy(self):
        """Before parameters change: whatever is being saved must be on the host."""
        if self.under_way:
            self.under_way.copied.result()

    def finish(self):
        """Wait until what is being saved is whole. ConfigError where it cannot be."""
        if self.under_way:
            self.under_way.written.result()

    def copy(self, shares: list[torch.Tensor]) -> tuple[float, float]:
        """Copy this rank's shares to the host, beside the computation of the next step; returns begin and end."""
        memory = self.memory.result()
        begin = time.perf_counter()
        stream = torch.cuda.Stream() if self.ranks.device.type == "cuda" else None
        with torch.cuda.stream(stream):  # does nothing without a stream
            memory.fill(shares)
        if stream:
            stream.synchronize()
        return begin, time.perf_counter()

    def write(self, step: int, state: dict, copied: Future):
        """Write this rank's file and, once all ranks have, make the checkpoint of them."""
        path = self.folder / f".step_{step}"
        errors = [""] * self.ranks.world
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.write_safetensors(path / f"rank_{self.ranks.rank:05}.safetensors")
        except Exception as error:  # of any kind: the other ranks must hear of it
            errors[self.ranks.rank] = str(error)
        if self.group:
            dist.all_gather_object(errors, errors[self.ranks.rank], group=self.group)
        if self.ranks.rank == 0 and not any(errors):
            try:
                self.publish(path, state)
            except Exception as error:
                errors[0] = str(error)
        if any(errors):
            last = in_order(self.folder)[-1:]
            what = f"{last[0]} is whole, and the run goes on from it" if last else "there is none before it"
            raise ConfigError(f"no checkpoint of step {step}: {next(filter(None, errors))}. Make room there; {what}")
        begin, end = copied.result()
        seconds = (end - begin, time.perf_counter() - end)
        log.info("step %d: checkpoint in %s, copied in %.2f s, written in %.2f s", step, self.folder, *seconds)

    def write_safetensors(self, file: Path):
        """One file of float32 tensors, with their offsets in the whole ones for HuggingFaceStorageReader.

        Not by torch's own writer: it joins all bytes in memory once more and holds the interpreter's lock, up to 3 s a
        GB (measured on a CPU), in which training stands still.
        """
        shares = {}
        offsets = {}
        for (name, tensor), place in zip(self.tensors.items(), self.memory.result().places, strict=True):
            shares[name] = place.view(local(tensor).shape)
            begin = [0] * tensor.ndim
            if isinstance(tensor, DTensor):
                where = (tensor.shape, tensor.device_mesh, tensor.placements)
                begin = list(compute_local_shape_and_global_offset(*where)[1])
            offsets[name] = {"saved_offsets": begin}
        save_file(shares, file, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
        sync(file)

    def publish(self, path: Path, state: dict):
        """Add the small files, and give the folder its name; then remove the oldest checkpoints."""
        for content in self.small_files:
            content.save_pretrained(path)
        (path / "state.json").write_text(json.dumps(state))
        sync(path / "state.json")  # before the rename, or after a power failure it could be empty
        done = path.with_name(path.name[1:])
        if done.exists():  # the same step again, after resume_changed
            os.rename(done, done.with_name(f".old_{done.name}"))
        os.rename(path, done)
        for old in in_order(self.folder)[: -self.config.checkpoint.keep]:
            os.rename(old, old.with_name(f".old_{old.name}"))  # gone at once, whatever happens while it is deleted
        for old in self.folder.glob(".old_*"):
            shutil.rmtree(old)


def writes(ranks: Ranks, tensor: torch.Tensor) -> bool:
    """Whether this rank writes its part: of a sharded tensor the first replica does, of any other rank 0."""
    replica = ranks.mesh.get_coordinate()[0] if isinstance(tensor, DTensor) else ranks.rank
    return replica == 0 and local(tensor).numel() > 0


def sync(file: Path):
    """Wait until a file is on the disk, and not only in the system's memory."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())


def match_eos(config: Config, model: PreTrainedModel, tokenizer):
    """Model and generation stop where the tokenizer does: at what documents or turns ended with in training."""
    eos = tokenizer.eos_token_id
    model.config.architectures = [type(model).__name__]
    model.config.eos_token_id = eos
    with suppress(OSError):  # where the model has none, it stays as made from its config
        model.generation_config = GenerationConfig.from_pretrained(config.model.name)
    ends = model.generation_config.eos_token_id
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (eos, None)]
    model.generation_config.eos_token_id = [eos, *others] if others else eos


def export(checkpoint: Path, out: Path):
    """Make a plain Hugging Face folder of a checkpoint, in the dtype of its config; holds one such copy in memory."""
    if not (checkpoint / "state.json").exists():
        raise ConfigError(f"{checkpoint} is no checkpoint: give a folder such as runs/NAME/checkpoints/step_N")
    stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    dtype = getattr(torch, json.loads((checkpoint / "config.json").read_text())["dtype"])
    names = [name for name in stored if not name.startswith("optimizer.")]
    weights = {name: torch.empty(stored[name].size, dtype=dtype) for name in names}
    read_tensors(weights, checkpoint, no_dist=True)
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, out)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors" and file.name != "state.json":
            shutil.copy(file, out)
