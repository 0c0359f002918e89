"""Checkpoints to go on from, and models out to disk.

runs/NAME/checkpoints/step_N/ holds the model under its Hugging Face names and the optimizer's state as `optimizer.*`,
float32, in one safetensors file a rank: the sharded format of torch's distributed checkpoint, whose reader puts them
together on any other number of ranks. No pickle. Beside them state.json (step, counters, place in the data, config),
the model's config and the tokenizer, so `model.name = …/step_N` begins a new run from it. It is written as .step_N
while training goes on, and renamed once every rank's file is on disk: what is named step_N is whole.
"""

import json
import os
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig

from lacuna.config import Config, ConfigError
from lacuna.data.loader import merge_states
from lacuna.metrics import log
from lacuna.model import Trainee, read_tensors
from lacuna.parallel import Ranks, local

# What may change when a run goes on: where things are, how they are reported, on what hardware. All else changes rows
# or losses.
FREE = ("name", "out", "log.", "checkpoint.", "dist.", "eval.every", "eval.rows", "eval.sources")
FREE += ("data.workers", "data.cache", "train.micro_batch_size", "train.activation_checkpointing")
FREE += ("train.deterministic",)


def find_checkpoint(config: Config, folder: Path, rank: int) -> Path | None:
    """Where this run goes on from, the same on all ranks. What a killed save left is removed."""
    found, checkpoints, given = [None], folder / "checkpoints", Path(config.checkpoint.resume or "")
    restarted = any(int(os.environ.get(key, 0)) for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if rank == 0:
        for leftover in checkpoints.glob(".*step_*"):
            shutil.rmtree(leftover)
        found = in_order(checkpoints)[-1:] or [None]
        if config.checkpoint.resume and not restarted:  # a run that began at `given` has its own by now
            if not (given / "state.json").exists():
                raise ConfigError(f"checkpoint.resume {given} is no checkpoint; here are {in_order(checkpoints)}")
            if found[0] and step_of(found[0]) > step_of(given):
                cure = f"remove those to go back to {given}, leave checkpoint.resume out, or set another name"
                raise ConfigError(f"{checkpoints} has later checkpoints, such as {found[0].name}: {cure}")
            found = [given]
    if dist.is_initialized():
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "state.json").read_text())["step"]


def in_order(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step_*"), key=step_of)


def read_state(checkpoint: Path | None, config: Config) -> dict:
    """Step, counters and place in the data. ConfigError where the run that goes on would be another one."""
    if checkpoint is None:
        return {"step": 0, "tokens": 0, "trained_tokens": 0, "data": None}
    state = json.loads((checkpoint / "state.json").read_text())
    state["data"]["streams"] = {int(stream): place for stream, place in state["data"]["streams"].items()}
    old, new = flat(state["config"]), flat(config.model_dump(mode="json"))
    changed = [f"{key} (was {old[key]!r})" for key in old.keys() & new.keys() if old[key] != new[key]]
    changed = sorted(key for key in changed if not key.startswith(FREE))
    if changed and not config.checkpoint.resume_changed:
        cure = "change it back, set another name for another run, or set checkpoint.resume_changed = true"
        raise ConfigError(f"{checkpoint} cannot go on exactly with another {', '.join(changed)}: {cure}")
    return state


def flat(config: dict) -> dict:
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    inner = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return inner | {key: value for key, value in config.items() if key not in sections}


def optimizer_tensors(trainee: Trainee, optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by name, float32, sharded like the parameters."""
    moments = {"exp_avg": optimizer.averages, "exp_avg_sq": optimizer.squares}
    named = [(key, name, p) for key in moments for name, p in trainee.model.named_parameters()]
    return {"optimizer.step": optimizer.count} | {f"optimizer.{key}.{name}": moments[key][p] for key, name, p in named}


class Checkpoints:
    """Saves in a thread: training waits only where it would change what is not copied to the host yet."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path, trainee: Trainee, optimizer, tokenizer):
        self.config, self.ranks, self.folder = config, ranks, folder / "checkpoints"
        self.model, self.tokenizer = trainee.model, tokenizer
        self.copying = self.writing = None
        # the thread's own group: two threads that use one could meet in different orders on different ranks
        timeout = timedelta(seconds=config.dist.timeout)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if ranks.mesh is not None else None
        tensors = dict(self.model.named_parameters()) | optimizer_tensors(trainee, optimizer)
        # a sharded tensor is written by the first replica, any other by rank 0
        replica = ranks.mesh.get_coordinate()[0] if ranks.mesh is not None else 0
        mine = [(k, t) for k, t in tensors.items() if (replica if isinstance(t, DTensor) else ranks.rank) == 0]
        self.tensors = {name: tensor for name, tensor in mine if local(tensor).numel()}
        self.stream = torch.cuda.Stream() if ranks.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(max_workers=1)
        match_eos(config, self.model, tokenizer)

    def prepare(self):
        """Begin to allocate. After the first step: beside compilation, 20 GB for a 1.7B model cost it 2 s."""
        self.allocating = self.thread.submit(self.allocate)

    def allocate(self):
        """Host memory for all saves."""
        self.buffer = torch.zeros(sum(local(tensor).numel() for tensor in self.tensors.values()))
        if self.stream:  # pinned, or else copied at a tenth of the speed
            place = self.buffer.data_ptr()
            torch.cuda.cudart().cudaHostRegister(place, self.buffer.nbytes, 0)
            # or else, in a process that lives on, copies from what lies there next would read the old memory
            weakref.finalize(self.buffer, torch.cuda.cudart().cudaHostUnregister, place).atexit = False

    def save(self, step: int, facts: dict, data: dict):
        """Begin to save the run as it stands after `step`; facts: counters, data: this rank's Loader.state."""
        self.finish()
        states = [data] * self.ranks.world
        if self.group:
            dist.all_gather_object(states, data, group=self.group)
        state = {"step": step, **facts, "data": merge_states(states), "config": self.config.model_dump(mode="json")}
        # taken here, since FSDP2 may give a parameter other memory at its first use
        self.copying = self.thread.submit(self.copy, [local(tensor).detach() for tensor in self.tensors.values()])
        self.writing = self.thread.submit(self.write, step, state)

    def wait_for_copy(self):
        """Before parameters change: whatever is being saved must be on the host."""
        if self.copying:
            self.copying.result()

    def finish(self):
        """Wait until what is being saved is whole. ConfigError where it cannot be."""
        if self.writing:
            self.writing.result()

    def check(self):
        """As soon as a save has failed, say so."""
        if self.writing and self.writing.done():
            self.writing.result()

    def copy(self, shares: list[torch.Tensor]):
        """Copy this rank's shares to the host, beside the computation of the next step."""
        self.allocating.result()
        self.begin = time.perf_counter()
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            places = self.buffer.split([share.numel() for share in shares])
            for place, share in zip(places, shares, strict=True):
                place.view(share.shape).copy_(share, non_blocking=True)
        if self.stream:
            self.stream.synchronize()
        self.copied = time.perf_counter()

    def write(self, step: int, state: dict):
        path, errors = self.folder / f".step_{step}", [""] * self.ranks.world
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.write_safetensors(path / f"rank_{self.ranks.rank:05}.safetensors")
        except OSError as error:
            errors[self.ranks.rank] = str(error)
        if self.group:
            dist.all_gather_object(errors, errors[self.ranks.rank], group=self.group)
        if self.ranks.rank == 0 and not any(errors):
            try:
                self.publish(path, state)
            except OSError as error:
                errors[0] = str(error)
        if any(errors):
            last = in_order(self.folder)[-1:]
            what = f"{last[0]} is whole, and the run goes on from it" if last else "there is none before it"
            raise ConfigError(f"no checkpoint of step {step}: {next(filter(None, errors))}. Make room there; {what}")

    def write_safetensors(self, file: Path):
        """One file of float32 tensors with their offsets in the whole ones, as HuggingFaceStorageReader wants them.

        torch's own writer joins all bytes in memory once more, and holds the interpreter's lock meanwhile, up to 3 s a
        GB (measured on a CPU): training would stand still. This one writes them from where they are.
        """
        places = json.dumps({name: {"saved_offsets": offsets_of(tensor)} for name, tensor in self.tensors.items()})
        header, at = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": places}}, 0
        for name, tensor in self.tensors.items():
            assert tensor.dtype == torch.float32
            share = local(tensor)
            header[name] = {"dtype": "F32", "shape": list(share.shape), "data_offsets": [at, at + share.nbytes]}
            at += share.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.write(self.buffer.numpy().data)
            out.flush()
            os.fsync(out.fileno())

    def publish(self, path: Path, state: dict):
        self.model.config.save_pretrained(path)
        self.model.generation_config.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        with open(path / "state.json", "w") as out:
            json.dump(state, out)
            out.flush()
            os.fsync(out.fileno())  # before the rename, or after a power failure it could be empty
        done = path.with_name(path.name[1:])
        if done.exists():  # the same step again, after resume_changed
            os.rename(done, done.with_name(f".old_{done.name}"))
        os.rename(path, done)
        for old in in_order(self.folder)[: -self.config.checkpoint.keep]:
            os.rename(old, old.with_name(f".old_{old.name}"))  # gone at once, whatever happens while it is deleted
        for old in self.folder.glob(".old_*"):
            shutil.rmtree(old)
        times = (self.copied - self.begin, time.perf_counter() - self.copied)
        log.info("step %d: checkpoint in %s, copied in %.2f s, written in %.2f s", state["step"], done, *times)


def offsets_of(tensor: torch.Tensor) -> list[int]:
    """Where this rank's part lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return [0] * tensor.ndim
    return list(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def match_eos(config: Config, model, tokenizer):
    """Model and generation stop where the tokenizer does: at what documents or turns ended with in training."""
    model.config.architectures = [type(model).__name__]
    model.config.eos_token_id = eos = tokenizer.eos_token_id
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
