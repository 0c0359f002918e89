"""Checkpoints to go on from (docs/runs-that-stop.md; of LoRA the adapters), and models out to disk.

One is written as .step_N beside training, and renamed once all is on disk: step_N is whole.
"""

import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lacuna.config import Config, ConfigError, LoraConfig, blame, log
from lacuna.data.loader import merge_states
from lacuna.lora import merge, write_adapter
from lacuna.parallel import Ranks, local
from lacuna.weights import SEALS, check_base, held, load_weights, refuse_damaged, seal, stored_parts, weight_folder

FORMAT = 5  # counted up when no run can go on from older ones
# What may change when a run goes on: places, reports, hardware. With another value of any other key it is another run.
FREE = ("name", "out", "log.", "checkpoint.", "dist.", "eval.every", "eval.rows", "eval.sources", "data.cache")
FREE += ("train.micro_batch_size", "train.activation_checkpointing", "train.deterministic")


def find_checkpoint(config: Config, folder: Path, rank: int) -> tuple[Path | None, dict]:
    """What this run goes on from, and its state, on all ranks. A killed save is removed."""
    found = [None, {"format": FORMAT, "config": {}, "step": 0, "tokens": 0, "trained_tokens": 0, "data": None}]
    if rank == 0:
        for half in [*folder.glob("checkpoints/.step_*"), *folder.glob("checkpoints/.old_step_*")]:
            shutil.rmtree(half)
        own = in_order(folder / "checkpoints")[-1:]
        signs = [*folder.glob("hf"), *folder.glob("checkpoints/[!.]*")] or not (folder / "checkpoints").exists()
        if signs and not own and (folder / "metrics.jsonl").exists():  # before its first, checkpoints/ is empty
            raise ConfigError(f"{folder} has lost its checkpoints: set another name")
        [newest] = own or [config.checkpoint.resume]
        if newest:
            found = [Path(newest), state_of(Path(newest))]
    if dist.is_initialized():
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    return tuple(found)


def state_of(checkpoint: Path) -> dict:
    """What its state.json says. ConfigError where a file of it is not what was saved."""
    if not {"state.json", SEALS} <= {file.name for file in checkpoint.glob("*.json")}:
        raise ConfigError(f"{checkpoint} is no whole checkpoint of this version, such as runs/x/checkpoints/step_N")
    return json.loads((refuse_damaged(checkpoint) / "state.json").read_text())


def in_order(checkpoints: Path) -> list[Path]:
    """Only step_<number> is a checkpoint: what people put beside them is theirs."""
    found = [path for path in checkpoints.glob("step_*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=lambda checkpoint: int(checkpoint.name[5:]))


def refuse_another(checkpoint: Path | None, state: dict, config: Config) -> str:
    """ConfigError where the run from there would be another one; what differs, if it is to."""
    if state.get("format") != FORMAT:
        raise ConfigError(f"{checkpoint} is of another version of lacuna: begin a run with it as model.name")
    if checkpoint and checkpoint in in_order(checkpoint.parent) and checkpoint.name != f"step_{state['step']}":
        raise ConfigError(f"{checkpoint} holds step_{state['step']}: rename it, or take it away")
    old = flat(state["config"])
    new = flat(config.model_dump(mode="json"))
    keys = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key] and not key.startswith(FREE)]
    changed = ", ".join(f"{key} (was {old[key]!r})" for key in keys)
    if changed and not config.checkpoint.resume_changed:
        cure = "change it back, set another name, or checkpoint.resume_changed = true"
        raise ConfigError(f"{checkpoint} cannot go on with another {changed}: {cure}")
    return changed


def flat(config: dict) -> dict:
    """A config by its keys as on a command line: section.key."""
    keys = {name: value for name, value in config.items() if name == "recipe" or not isinstance(value, dict)}
    for section in config.keys() - keys.keys():
        keys |= {f"{section}.{key}": value for key, value in config[section].items()}
    return keys


class Checkpoints:
    """Saves: training waits for a copy to the host; a thread writes it."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path, tensors: dict, model, tokenizer):
        self.config = config
        self.ranks = ranks
        self.folder = folder / "checkpoints"
        self.tensors = tensors  # by name, the optimizer's too; those that this rank writes:
        self.small_files = []
        if ranks.rank > 0:
            # each rank of the first replica writes its part of sharded tensors, rank 0 all others
            first = ranks.mesh.get_coordinate()[0] == 0
            self.tensors = {name: t for name, t in tensors.items() if first and isinstance(t, DTensor)}
        else:
            self.small_files = [model.config, model.generation_config, tokenizer]
            # tried now, since it would fail after hours: room on the disk, and what transformers refuses to write
            hf = model.num_parameters() * model.config.dtype.itemsize
            needed = max(hf, 4 * sum(tensor.numel() for tensor in tensors.values())) / 2**30
            free = shutil.disk_usage(config.out).free / 2**30
            if free < needed:
                raise ConfigError(f"out: {config.out} has {free:.3f} GiB of space and needs {needed:.3f}: make room")
            with blame("TMPDIR, or model.name's config, tokenizer"), TemporaryDirectory() as place:
                for content in self.small_files:
                    content.save_pretrained(place)
        sizes = [local(tensor).numel() for tensor in self.tensors.values()]
        memory = torch.zeros(sum(sizes))  # float32
        self.places = memory.split(sizes)  # flat
        if ranks.device.type == "cuda" and memory.nbytes:
            # else copies take ten times as long; `pin_memory` rounds up to a power of two
            torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
            # else, in a process that lives on, copies from what is there next would read the old memory
            weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr()).atexit = False
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.written = self.thread.submit(lambda: None)  # the last save, here none
        # for this thread alone: two that share a group could meet in other orders on other ranks
        timeout = timedelta(seconds=config.dist.timeout)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if ranks.mesh is not None else None

    def save(self, step: int, facts: dict, data: dict):
        """Begin to save the run after `step`; facts: counters, data: this rank's Loader.state."""
        self.written.result()
        for place, tensor in zip(self.places, self.tensors.values(), strict=True):
            place.copy_(local(tensor).detach().flatten())
        self.written = self.thread.submit(self.write, step, facts, data)

    def write(self, step: int, facts: dict, data: dict):
        """Write this rank's file; once all have, rank 0 the others. The oldest checkpoint goes."""
        path = self.folder / f".step_{step}"
        file = path / f"rank_{self.ranks.rank:05}.safetensors"
        outcome = {"data": data, "error": ""}
        try:
            with blame(f"no checkpoint of step {step}"):
                path.mkdir(parents=True, exist_ok=True)
                self.write_safetensors(file)
                outcome["fingerprints"] = seal([file])
                for content in self.small_files:
                    content.save_pretrained(path)
        except ConfigError as error:  # the other ranks must hear of it
            outcome["error"] = str(error)
        outcomes = [outcome] * self.ranks.world
        if self.group:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        fingerprints = {}
        for outcome in outcomes:
            if outcome["error"]:
                raise ConfigError(outcome["error"])
            fingerprints |= outcome["fingerprints"]
        if self.ranks.rank > 0:
            return
        state = {"format": FORMAT, "step": step, **facts, "config": self.config.model_dump(mode="json")}
        state["data"] = merge_states([outcome["data"] for outcome in outcomes])
        with blame(f"no checkpoint of step {step}"):
            (path / "state.json").write_text(json.dumps(state))
            fingerprints |= seal([file for file in path.glob("[!.]*.*") if file.name not in fingerprints])
            (path / SEALS).write_text(json.dumps(fingerprints))
            seal([path / SEALS])
            path = path.rename(self.folder / f"step_{step}")
        log.info("step %d: checkpoint in %s", step, path)
        for old in in_order(self.folder)[: -self.config.checkpoint.keep]:
            # gone at once; what stays of it is removed when the run starts again
            shutil.rmtree(old.rename(old.with_name(f".old_{old.name}")), ignore_errors=True)

    def write_safetensors(self, file: Path):
        """One file of float32 tensors, with the offsets of sharded ones in the whole."""
        # torch's own writer holds the interpreter's lock: training would stand still, up to 3 s a GB
        shares = {}
        offsets = {}
        for (name, tensor), place in zip(self.tensors.items(), self.places, strict=True):
            shares[name] = place.view(local(tensor).shape)
            if isinstance(tensor, DTensor):
                _, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
                offsets[name] = {"saved_offsets": begin}
        save_file(shares, file, {"DCP_SHARDING_INFO": json.dumps(offsets)})  # one key: two have no order


def match_eos(config: Config, model: PreTrainedModel, tokenizer):
    """Model and generation stop where the tokenizer does: at what ends documents or turns."""
    eos = tokenizer.eos_token_id
    model.config.eos_token_id = eos
    generation = model.generation_config
    with blame(f"{config.model.name}/generation_config.json"), suppress(OSError):
        generation = GenerationConfig.from_pretrained(config.model.name)
    ends = np.atleast_1d(generation.eos_token_id).tolist()
    try:
        generation.validate(strict=True)
    except ValueError as error:
        log.info("generation_config is left out, since transformers refuses it: %s", error)
        generation = GenerationConfig(bos_token_id=tokenizer.bos_token_id)
    if config.model.tokenizer:  # its ids mean other words
        generation.bos_token_id = tokenizer.bos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
        ends = []
    others = [end for end in ends if end not in (eos, None)]
    generation.eos_token_id = [eos, *others]
    model.generation_config = generation


def export(checkpoint: Path, out: Path, dtype: str | None = None):
    """A Hugging Face folder of a checkpoint, in its own dtype or another; of LoRA with adapter/."""
    state = state_of(checkpoint)
    config = state["config"]
    base = config["model"]["name"]
    there = out.resolve()
    is_base = "base_weights" in state and there == Path(base).resolve()
    if is_base or checkpoint.resolve() in there.parents or (out / "state.json").exists():
        raise ConfigError(f"{out} holds what a model is made of: name another folder")
    hf_config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype or hf_config.dtype, attn_implementation="eager")
    model.generation_config = GenerationConfig()
    model.to_empty(device="cpu").requires_grad_(False)
    model.tie_weights(recompute_mapping=False)
    if config.get("lora", {}).get("rank"):
        lora = LoraConfig(**config["lora"])
        check_base(base, state)
        load_weights(model, weight_folder(base))
        stored = stored_parts(checkpoint)
        adapters = {name: torch.cat(parts) for name, parts in stored.items() if not name.startswith("optimizer.")}
        merge(held(model), adapters, lora)
        if held(model).keys() <= stored_parts(weight_folder(base)).keys():
            write_adapter(adapters, lora, base, out / "adapter")
        else:  # peft would lose some
            log.warning("no adapter/: peft names %s otherwise", base)
    else:
        load_weights(model, checkpoint)
    for old in (*out.glob("model.safetensors*"), *out.glob("model-*-of-*.safetensors")):
        old.unlink()
    model.save_pretrained(out, max_shard_size="5GB")  # under the names that were read
    seal([*out.glob("model*.safetensors"), *out.glob("adapter/*.safetensors")])
    others = shutil.ignore_patterns("*.safetensors", "state.json", SEALS, "config.json")
    shutil.copytree(checkpoint, out, ignore=others, dirs_exist_ok=True)
