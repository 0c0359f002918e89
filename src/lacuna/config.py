"""Every key of a run, from TOML and `--section.key value`, which wins. No torch: --help is fast."""

import difflib
import logging
import os
import re
import sys
import tomllib
from argparse import ArgumentError, ArgumentParser
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

log = logging.getLogger("lacuna")

# ANSI's: red is 31, yellow 33; none in a pipe, or under NO_COLOR (no-color.org)
COLOUR = "\033[{}m{}\033[m" if sys.stderr and sys.stderr.isatty() and not os.environ.get("NO_COLOR") else "{1}"
AGAIN = "the same command goes on from the last checkpoint"
# by what an error says or is: some libraries pass on no errno
CURES = {
    "No space left|quota exceeded|too large": f". The disk is full: make room, and {AGAIN}",
    "Read-only file|Permission denied|Operation not permitted": ". Change who may, or name another place",
    "OutOfMemory": ". Lower train.micro_batch_size: see examples/memory.py",
    "torch._dynamo|torch._inductor": ". Set train.compile = false: it runs, or says why",
    "StopIteration|corresponds to no data|Unable to find": ": there is no data, or no such file",
    "KeyError.*lacuna": ": attention that cannot be replaced",
    "gloo/transport|Gloo|distributed.Dist": f". Another rank has ended: see what it says; {AGAIN}",
}

OneOrSeveral = BeforeValidator(lambda value: [value] if isinstance(value, str | dict) else value)


class ConfigError(Exception):
    """What the user asked for cannot be done; the message names key and cure."""


class Preempted(Exception):
    """A signal ended the run, after a checkpoint: started again, it goes on from there."""


@contextmanager
def blame(where: str):
    """Whatever goes wrong inside becomes one sentence that begins with `where`: a ConfigError."""
    try:
        yield
    except (ConfigError, FloatingPointError, Preempted, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise  # these have their sentence
    except BaseException as error:  # tokenizers, written in Rust, panics with one
        log.debug("%s", where, exc_info=True)  # to log.txt, if there is one
        if type(error).__name__ == "DatasetGenerationError":
            error = error.__cause__ or error
        text = " ".join(str(error).split())[:300].rstrip(".")
        cures = [cure for sign, cure in CURES.items() if re.search(sign, f"{type(error)} {error}")]
        raise ConfigError("".join([f"{where}: {type(error).__name__}: {text}", *cures[:1]])) from error


def key(default, meaning: str, **limits):
    """One key of the config, with its meaning and unit for --help; None means "choose for me"."""
    return Field(default, description=meaning, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelConfig(Section):
    name: str = key("examples/tiny", "Hub id, or folder of a model (base_model)", max_length=500)
    from_scratch: bool = key(False, "initialise the weights instead of reading them")
    overrides: dict[str, Any] = key({}, "fields of the model's config to replace")
    tokenizer: str | None = key(None, "Hub id or folder; default: the model's own")
    patch: str | None = key(None, "file.py:function, called first with the empty model")
    dtype: Literal["bfloat16", "float32"] | None = key(None, "of computation and hf/; default: bf16 on GPUs")
    attention: Literal["fa4", "varlen", "sdpa"] | None = key(None, "default: the first that runs")


class Source(Section):
    path: str = key(..., "Hub id, folder, or .parquet, .jsonl, .txt: file, glob, https://, s3://")
    name: str | None = key(None, "configuration of a Hub dataset")
    split: str = key("train", "split, slices allowed: train[:1000]")
    data_files: Annotated[list[str] | None, OneOrSeveral] = key(None, "files in `path`, or globs")
    streaming: bool = key(False, "read while training, not tokenised before")
    weight: float | None = key(None, "share of tokens; default: all once an epoch", ge=1e-9, le=1e9)
    column: str = key("text", "pt: column that holds the text")
    fields: dict[str, str] = key({}, 'renamed columns: {instruction = "question"}')
    roles: dict[str, str] = key({}, 'sft: who else speaks: {expert = "assistant"}')


SOURCE = "; ".join(f"{name} ({field.description})" for name, field in Source.model_fields.items())


class DataConfig(Section):
    sources: Annotated[list[Source], OneOrSeveral] = key([], "[[data.sources]] in TOML, JSON here; keys: " + SOURCE)
    chat_template: str | None = key(None, "sft: file, text or name; default: the tokenizer's")
    unrendered: Literal["error", "drop"] = key("error", "sft: rows the template renders in part")
    overlong: Literal["drop", "truncate"] = key("drop", "sft: conversations over seq_len")
    mask_boundary: bool = key(True, "a document does not predict the next one's first token")
    cache: str = key("~/.cache/lacuna", "folder of cached tokens")


class TrainConfig(Section):
    seq_len: int = key(1024, "slots a row, tokens (sequence_len) (max_length)", ge=8, le=2**24)
    micro_batch_size: int = key(8, "rows a device takes at once", ge=1, le=2**16)
    global_batch_size: int = key(8, "rows a step over all devices (gradient_accumulation_steps)", ge=1, le=2**24)
    steps: int | None = key(None, "optimizer steps, or train.epochs (max_steps)", ge=1, le=10**9)
    epochs: int | None = key(None, "passes over the data, or train.steps (num_epochs)", ge=1)
    compile: bool | None = key(None, "torch.compile each layer; default: on a GPU")
    activation_checkpointing: Literal["none", "full", "selective"] = key("none", "recompute all, or what is cheap")
    max_grad_norm: float = key(1.0, "gradients are scaled down to this L2 norm", gt=0)
    deterministic: bool = key(False, "deterministic GPU kernels (slower)")


class OptimConfig(Section):
    lr: float | None = key(None, "peak (learning_rate); default: pt 3e-4, sft 2e-5, LoRA 2e-4", gt=0, le=100)
    weight_decay: float = key(0.1, "of matrices; embeddings, norms and biases have none", ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = key([0.9, 0.95], "AdamW's decays", min_length=2, max_length=2)
    eps: float = key(1e-8, "AdamW's epsilon", gt=0, le=1)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = key("cosine", "wsd: constant, then linear")
    warmup_steps: int = key(0, "steps of linear warmup from 0 (warmup_ratio)", ge=0)
    decay_steps: int | None = key(None, "wsd: steps of decay at the end; default: a tenth", ge=1)
    min_lr_ratio: float = key(0.1, "last learning rate over the peak", ge=0, le=1)


class LoraConfig(Section):
    rank: int | None = key(None, "of adapters (lora_r); default: train all weights", ge=1, le=4096)
    alpha: float | None = key(None, "adapters count alpha / rank times; default: 2 x rank", gt=0)
    targets: list[str] = key([], "linear layers, such as q_proj; default: all of the decoder's")


class DistConfig(Section):
    dp_replicate: int = key(1, "copies of the sharded model (HSDP)", ge=1)
    timeout: int = key(600, "seconds until a collective that hangs ends the run", ge=10, le=10**6)


class CheckpointConfig(Section):
    every: int = key(500, "steps between checkpoints; the last step has one too", ge=1)
    keep: int = key(2, "newest checkpoints kept", ge=1)
    resume: str | None = key(None, "folder to begin from, without a checkpoint of its own")
    resume_changed: bool = key(False, "go on though a key has changed")


class LogConfig(Section):
    every: int = key(10, "steps between lines of metrics", ge=1)


class EvalConfig(Section):
    sources: Annotated[list[Source], OneOrSeveral] = key([], "held-out data; keys of data.sources")
    fraction: float | None = key(None, "or this share of the documents (val_set_size)", gt=0, lt=1)
    every: int | None = key(None, "steps between; default: only at start and end", ge=1)
    rows: int = key(512, "rows evaluated at most", ge=1)


class Config(Section):
    task: str = key("pt", "pt: text; sft: conversations; file.py: a recipe")
    name: str = key("run", "its folder is out/name", pattern=r"^\.*[\w-][\w.-]*$", max_length=200)
    seed: int = key(0, "of the order of data and initial weights", ge=0, lt=2**32)
    out: str = key("runs", "folder of runs (output_dir)")
    model: ModelConfig = key(ModelConfig(), "what is trained")
    data: DataConfig = key(DataConfig(), "on what")
    train: TrainConfig = key(TrainConfig(), "how much at a time, how long")
    optim: OptimConfig = key(OptimConfig(), "AdamW and its learning rate")
    lora: LoraConfig = key(LoraConfig(), "train adapters instead of all weights")
    recipe: dict[str, Any] = key({}, "keys of a recipe's own")
    dist: DistConfig = key(DistConfig(), "over which devices")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "what survives")
    log: LogConfig = key(LogConfig(), "what is reported")
    eval: EvalConfig = key(EvalConfig(), "on what it is measured")


def refuse_contradictions(config: Config):
    """ConfigError where keys contradict each other."""
    data = config.data.sources
    train = config.train
    optim = config.optim
    held_out = config.eval.sources
    fraction = config.eval.fraction
    rows = train.micro_batch_size * (int(os.environ.get("WORLD_SIZE", 1)) or 1)
    is_recipe = config.task.endswith(".py")
    weighted = [source for source in data if source.weight]
    unweighted = [source for source in data if not source.weight]
    streams = [source for source in data if source.streaming]
    mixed = weighted or streams
    problems = {
        "data.sources is empty: add a [[data.sources]] table with a path": not data,
        "data.sources: give every source a weight, or none": weighted and unweighted,
        "data.sources: a mixture that streams needs weights": streams and len(unweighted) > 1,
        "give exactly one of train.steps and train.epochs": bool(train.steps) == bool(train.epochs),
        "train.epochs of a stream, or with weights: set train.steps, or streaming = false": train.epochs and mixed,
        f"train.global_batch_size is no multiple of micro_batch_size x ranks, {rows}": train.global_batch_size % rows,
        "lora.rank adapts a model: not from_scratch": config.lora.rank and config.model.from_scratch,
        "recipe: these keys are for lacuna RECIPE.py": config.recipe and not is_recipe,
        "model.overrides: no null: change its config.json": None in config.model.overrides.values(),
        "optim.lr: a recipe has no default: give one": is_recipe and not optim.lr,
        "data.chat_template is for lacuna sft": config.task == "pt" and config.data.chat_template,
        'optim.decay_steps needs optim.schedule = "wsd"': optim.decay_steps and optim.schedule != "wsd",
        "eval.sources have no weight: all data counts": any(source.weight for source in held_out),
        "eval.sources: what streams must stand alone": len(held_out) > 1 and any(s.streaming for s in held_out),
        "give eval.sources ([] for none) or eval.fraction, not both": fraction and held_out,
        "eval.fraction: data streams or has weights: name eval.sources": fraction and mixed,
        "eval.every needs eval.sources or eval.fraction": config.eval.every and not (held_out or fraction),
    }
    for problem, there in problems.items():
        if there:
            raise ConfigError(problem)


def load_config(path: str | None, argv: list[str], task: str = "pt") -> Config:
    """The config from a TOML file and a command line's words; exits if they ask for help."""
    usage = f"lacuna {task} [CONFIG.toml] [--section.key VALUE ...]"
    parser = ArgumentParser(usage=usage, allow_abbrev=False, exit_on_error=False)
    source = CliSettingsSource(Config, root_parser=parser)
    try:
        words, unknown = parser.parse_known_args(argv)
        given = source(parsed_args=words)()
    except (ArgumentError, SettingsError) as error:
        raise ConfigError(f"the command line: {str(error).partition(' from ')[0]}: --section.key VALUE") from error
    if unknown:
        raise ConfigError(sentence({"type": "extra_forbidden", "loc": [unknown[0].strip("-").partition("=")[0]]}))
    with blame(f"cannot read config {path} as TOML"):
        merged = tomllib.loads(Path(path).read_text("utf-8-sig")) if path else {}
    for section, value in given.items():
        if isinstance(value, dict) and isinstance(merged.get(section), dict):
            if section == "train" and {"steps", "epochs"} & value.keys():
                # they exclude each other: one on the command line takes back the file's
                merged[section] |= {"steps": None, "epochs": None}
            value = merged[section] | value
        merged[section] = value
    if merged.setdefault("task", task) != task:
        raise ConfigError(f"the config has task = {merged['task']!r} (pt|sft): run lacuna {merged['task']}")
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(map(sentence, error.errors()[:20]))) from None
    refuse_contradictions(config)
    rate = 3e-4 if config.task == "pt" else 2e-5
    if config.lora.rank:
        rate = 2e-4  # ten times full fine-tuning's
        config.lora.alpha = config.lora.alpha or 2.0 * config.lora.rank
    config.optim.lr = config.optim.lr or rate
    return config


def sentence(problem: dict) -> str:
    """pydantic's error, with the key as TOML has it; of an unknown one, the nearest."""
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        message = re.sub(r" or instance of \w+", "", problem["msg"])
        message = re.sub("String should match.*", "use letters, digits, . _ -", message)
        return f"{place}: {message}, not {problem['input']!r:.100}"
    wrong = re.sub(r"\.\d+\.", ".", place)  # data.sources.0.path -> data.sources.path
    last = wrong.split(".")[-1]
    sections = {"": Config, "data.sources.": Source, "eval.sources.": Source}
    sections |= {f"{name}.": field.annotation for name, field in Config.model_fields.items()}
    known = {}
    for prefix, section in sections.items():
        for name, field in getattr(section, "model_fields", {}).items():
            known[prefix + name] = f"({name}) {field.description}"  # other trainers' names are in brackets
    near = [key for key, names in known.items() if f"({last})" in names]
    near += difflib.get_close_matches(wrong, known, 1, cutoff=0.65)
    if near and not f"{wrong}.".startswith(f"{near[0]}."):
        return f"unknown key {wrong}: did you mean {near[0]}?"
    return f"unknown key {wrong}: take it out, or see docs/coming-from.md"
