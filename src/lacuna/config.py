"""Every knob of a run: strict pydantic models, read from a TOML file and from `--section.key value`.

Nothing here imports torch, so that `--help` and a wrong key answer at once. Later sources win: defaults, file, command
line. Unknown keys are errors that name the nearest key; contradictions name the keys and the values that would work.
"""

import difflib
import tomllib
from argparse import ArgumentParser
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliImplicitFlag, CliSettingsSource


class ConfigError(Exception):
    """What the user asked for cannot be done; the message says which key is wrong and what would be right."""


class NonFinite(Exception):
    """A loss or gradient is not a number; the parameters are those of the step before."""


class Preempted(Exception):
    """A signal ended the run, after a checkpoint: started again, it goes on from there."""


def key(default, meaning: str, **limits):
    """One key of the config, with its meaning and unit for --help."""
    return Field(default, description=meaning, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelConfig(Section):
    name: str = key("examples/tiny", "Hub id, or local folder with config.json (and *.safetensors)")
    from_scratch: bool = key(False, "initialise the weights from `seed` instead of reading them")
    overrides: dict[str, int | float | str | bool] = key({}, "fields of the model's config to replace")
    tokenizer: str | None = key(None, "Hub id or folder of the tokenizer, if not the model's own")
    dtype: Literal["auto", "bfloat16", "float32"] = key("auto", "of computation alone; auto: bfloat16 on GPUs")
    fp8: bool = key(False, "matrix products of the layers in fp8 (extra fp8), on Hopper GPUs and later")
    attention: Literal["auto", "varlen", "fa4", "sdpa"] = key("auto", "fa4: extra fa4, fastest; sdpa: on any device")
    kernels: Literal["auto", "none", "liger", "hub"] = key("auto", "auto: liger on a GPU without compile, else none")
    kernel_mapping: dict[str, str] = key({}, "for hub: layer -> owner/repo:Layer@version or folder:Layer")
    head: Literal["chunked", "liger"] = key("chunked", "LM head and loss without full logits: lacuna's, or Liger's")
    accum_dtype: Literal["float32", "model"] = key("float32", "of the sum of the head's gradient over chunks")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")


class Source(Section):
    path: str = key(..., "Hub id, folder, or file, glob or URL (https://, s3://) of .parquet, .jsonl or .txt")
    name: str | None = key(None, "configuration of a Hub dataset")
    split: str = key("train", "split, slices allowed: train[:1000]")
    data_files: str | list[str] | None = key(None, "files inside `path`, globs allowed")
    streaming: bool = key(False, "read while training instead of tokenising everything first")
    weight: float | None = key(None, "share of the mixture's tokens; none: all data once an epoch", gt=0)
    column: str = key("text", "pt: column that holds the text")


SOURCE = "; ".join(f"{name} ({field.description})" for name, field in Source.model_fields.items())


class DataConfig(Section):
    sources: list[Source] = key([], "where documents come from: [[data.sources]] in TOML, JSON here; keys: " + SOURCE)
    chat_template: str | None = key(None, "sft: file, text or name of a Jinja template; default: the tokenizer's own")
    overlong: Literal["drop", "truncate", "error"] = key("drop", "sft: what becomes of conversations over seq_len")
    mask_boundary: bool = key(True, "a document's last token does not predict the next document's first")
    num_streams: int | None = key(None, "virtual streams; default: the number of shards, at most 64", ge=1)
    context_len: int | None = key(None, "longest piece of a document, tokens; default: seq_len", ge=1)
    context_warmup_steps: int = key(0, "steps in which context_len grows linearly to seq_len", ge=0)
    workers: int | None = key(None, "loader processes a rank; default: 1 if data streams, else 0", ge=0)
    cache: str = key("~/.cache/lacuna", "folder of the token cache")


class TrainConfig(Section):
    seq_len: int = key(1024, "slots a row, tokens", ge=8)
    micro_batch_size: int = key(8, "rows a device takes through the model at once", ge=1)
    global_batch_size: int = key(8, "rows an optimizer step, over all devices and micro-batches", ge=1)
    steps: int | None = key(None, "optimizer steps (this or train.epochs)", ge=1)
    epochs: int | None = key(None, "passes over map-style data (this or train.steps)", ge=1)
    compile: Literal["auto"] | bool = key("auto", "torch.compile each layer; auto: on a GPU")
    activation_checkpointing: Literal["none", "full", "selective"] | Annotated[int, Field(ge=1)] = key(
        "none", "recompute in the backward: all layers, cheap operators only (selective), or every n-th layer (n)"
    )
    max_grad_norm: float = key(1.0, "gradients are scaled down to this global L2 norm", gt=0)
    on_nonfinite: Literal["stop", "skip"] = key("stop", "what a loss or gradient that is not finite does to a step")
    max_skipped: int = key(10, "steps that may be skipped in a run before it stops after all", ge=0)
    deterministic: bool = key(False, "deterministic GPU kernels, where they exist (slower)")


Rate = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    lr: float | None = key(None, "peak learning rate; default: 3e-4 for pt, 2e-5 for sft", gt=0)
    weight_decay: float = key(0.1, "decay of matrices; embeddings, norms and biases have none", ge=0)
    betas: list[Rate] = key([0.9, 0.95], "AdamW's two decay rates", min_length=2, max_length=2)
    eps: float = key(1e-8, "AdamW's epsilon", gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = key("cosine", "wsd: constant, then linear decay")
    warmup_steps: int = key(0, "steps of linear warmup from 0", ge=0)
    decay_steps: int | None = key(None, "wsd: steps of decay at the end; default: a tenth", ge=1)
    min_lr_ratio: float = key(0.1, "last learning rate over the peak (linear, cosine, wsd)", ge=0, le=1)


class DistConfig(Section):
    dp_replicate: int = key(1, "copies of the sharded model (HSDP)", ge=1)
    dp_shard: int | None = key(None, "ranks that share one copy (FSDP2); default: all that are left", ge=1)
    reshard_after_forward: Literal["auto"] | bool = key("auto", "free layers till their backward; auto: if large")
    timeout: int = key(600, "seconds after which a collective that hangs ends the run", ge=10)
    max_restarts: int = key(0, "times that torchrun starts all ranks again after one has died", ge=0)


class CheckpointConfig(Section):
    every: int = key(500, "steps between checkpoints; there is one at the end in any case", ge=1)
    keep: int = key(2, "newest checkpoints that are kept", ge=1)
    resume: str = key("auto", "auto: go on from the run folder's newest checkpoint; or the folder of one")
    resume_changed: bool = key(False, "go on even if the config has changed in a way that changes the run")


class SlurmConfig(Section):
    nodes: int = key(1, "nodes of the job", ge=1)
    gpus: int = key(8, "GPUs a node, one rank each; 0: one rank a node, on its CPUs", ge=0)
    options: dict[str, str] = key({}, "more options of sbatch, such as partition, account, time, cpus-per-task")
    grace: int = key(120, "seconds before the time limit at which the run saves and is queued again", ge=1)


class LogConfig(Section):
    every: int = key(10, "steps between two lines of metrics", ge=1)
    profile: CliImplicitFlag[bool] = key(False, "trace a few steps, with a memory snapshot, into the run folder")
    show: int = key(2, "rows that lacuna explain prints", ge=1)
    show_ids: bool = key(False, "lacuna explain: token ids too")
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = key([], "where else metrics go")


class EvalConfig(Section):
    sources: list[Source] = key([], "held-out data, same keys as data.sources")
    fraction: float | None = key(None, "or this share of the documents of data.sources, held out", gt=0, lt=1)
    every: int | None = key(None, "steps between evaluations; none: only at start and end", ge=1)
    rows: int = key(512, "rows evaluated at most", ge=1)


class Config(Section):
    task: Literal["pt", "sft"] = key("pt", "pt: text, every token; sft: conversations, what the assistant says")
    name: str = key("run", "the run's name: everything lands in out/name", pattern=r"^[\w.-]+$")
    seed: int = key(0, "of the order of data and of initial weights", ge=0, lt=2**32)
    out: str = key("runs", "folder of runs")
    model: ModelConfig = key(ModelConfig(), "what is trained")
    data: DataConfig = key(DataConfig(), "on what")
    train: TrainConfig = key(TrainConfig(), "how much at a time, how long")
    optim: OptimConfig = key(OptimConfig(), "AdamW and its learning rate")
    dist: DistConfig = key(DistConfig(), "over which devices")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "what survives")
    slurm: SlurmConfig = key(SlurmConfig(), "what lacuna slurm asks for")
    log: LogConfig = key(LogConfig(), "what is reported")
    eval: EvalConfig = key(EvalConfig(), "on what it is measured")

    @model_validator(mode="after")
    def check(self):
        """Refuse what contradicts itself: the first rule that is broken."""
        train, data, model, held_out = self.train, self.data, self.model, self.eval.sources
        rows, micro, context = train.global_batch_size, train.micro_batch_size, data.context_len or 0
        weights, streams = [source.weight for source in data.sources], any(s.streaming for s in data.sources)
        fraction = self.eval.fraction
        sft, sizes = self.task == "sft", f"train.global_batch_size {rows}, train.micro_batch_size {micro}"
        near = nearest_multiple(rows, micro)
        flash = model.attention in ("varlen", "fa4") and model.dtype == "float32"
        for broken, message in [
            (not data.sources, "data.sources is empty: add a [[data.sources]] table with a path"),
            ((train.steps is None) == (train.epochs is None), "give exactly one of train.steps and train.epochs"),
            (train.epochs and streams, "train.epochs needs data of known size: set train.steps, or streaming = false"),
            (train.epochs and any(weights), "train.epochs of a weighted mixture: set train.steps, or drop the weights"),
            (any(weights) and not all(weights), "data.sources: give every source a weight, or none"),
            (streams and len(weights) > 1 and not all(weights), "data.sources: a mixture that streams needs weights"),
            (rows % micro, f"{sizes}: the first must be a multiple of the second; the nearest is {near}"),
            (context > train.seq_len, f"data.context_len {context} is over train.seq_len {train.seq_len}: lower it"),
            (data.context_warmup_steps and not context, "data.context_warmup_steps needs data.context_len"),
            (sft and context, "data.context_len would cut conversations apart: it belongs to lacuna pt"),
            (not sft and data.chat_template, "data.chat_template belongs to lacuna sft: text has no template"),
            (self.optim.decay_steps and self.optim.schedule != "wsd", 'optim.decay_steps needs optim.schedule = "wsd"'),
            (model.kernel_mapping and model.kernels != "hub", 'model.kernel_mapping needs model.kernels = "hub"'),
            (flash, f'model.attention = "{model.attention}" needs model.dtype = "bfloat16"; or use "sdpa"'),
            (any(s.weight for s in held_out), "eval.sources have no weight: all of their data counts"),
            (fraction and held_out, "give eval.sources or eval.fraction, not both"),
            (fraction and (streams or any(weights)), "eval.fraction: data streams or has weights: name eval.sources"),
            (self.eval.every and not (held_out or fraction), "eval.every needs eval.sources or eval.fraction"),
            (len(held_out) > 1 and any(s.streaming for s in held_out), "eval.sources: what streams must stand alone"),
        ]:
            if broken:
                raise ValueError(message)
        self.optim.lr = self.optim.lr or (2e-5 if sft else 3e-4)
        return self


class CommandLine(Config, BaseSettings):
    """The same keys, as pydantic-settings wants them for a command line."""


class Parser(ArgumentParser):
    def error(self, message):
        unknown = [word.split("=")[0].lstrip("-") for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            message = unknown_key(unknown[0])
        raise ConfigError(message)


def unknown_key(key: str) -> str:
    """An error text for a key that does not exist, with the nearest one that does."""
    known = []
    for name, field in Config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        known += [name, *(f"{name}.{k}" for k in inner)]
        known += [f"{name}.sources.{k}" for k in Source.model_fields if "sources" in inner]
    same_word = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = same_word or difflib.get_close_matches(key, known, 1)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "; `lacuna pt --help` lists all keys")


def nearest_multiple(n: int, of: int) -> str:
    """The multiples of `of` on both sides of n, as words."""
    below, above = n // of * of, -(-n // of) * of
    return f"{below} or {above}" if 0 < below < above else str(above)


def load_config(path: str | None, argv: list[str], task: str = "pt") -> Config:
    """The config of a task (pt, sft) from a TOML file (or none) and command-line words.

    Raises ConfigError with one sentence a problem; exits 0 after printing help where argv asks for it.
    """
    parser = Parser(usage=f"lacuna {task} [CONFIG.toml] [--section.key VALUE ...]", allow_abbrev=False)
    given = CliSettingsSource(CommandLine, None, argv, root_parser=parser, parse_args_method=Parser.parse_args)()
    merged = {}
    if path is not None:
        try:
            merged = tomllib.loads(Path(path).read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read config {path} as TOML: {error}") from None
    if len({"steps", "epochs"} & set(given.get("train", {}))) == 1 and isinstance(merged.get("train"), dict):
        # they exclude each other: the one on the command line replaces the one in the file
        merged["train"] = {k: v for k, v in merged["train"].items() if k not in ("steps", "epochs")}
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    if merged.setdefault("task", task) != task:
        raise ConfigError(f"{path or 'the command line'} has task = {merged['task']!r}: run lacuna {merged['task']}")
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(problem(k, list(e)) for k, e in groupby(error.errors(), key_of))) from None


def key_of(error: dict) -> str:
    """The key that a pydantic error is about, as it is written in TOML: without the kinds that a value may have."""
    kinds = ("bool", "int", "float", "str")
    return ".".join(str(p) for p in error["loc"] if isinstance(p, int) or (p.isidentifier() and p not in kinds))


def problem(key: str, errors: list[dict]) -> str:
    """The pydantic errors of one key as one sentence; a key that takes several kinds of values has one for each."""
    if errors[0]["type"] == "extra_forbidden":
        return unknown_key(".".join(part for part in key.split(".") if not part.isdigit()))
    message = " or ".join(error["msg"].removeprefix("Value error, ") for error in errors)
    return f"{key}: {message.replace(' or Input should be', ' or')}, not {errors[0]['input']!r}" if key else message


def to_toml(config: Config) -> str:
    """The whole config as TOML text: enough to repeat the run. None is left out: it is every such key's default."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
