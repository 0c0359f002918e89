"""Every knob of a run: strict pydantic models, read from a TOML file and from `--section.key value`.

Nothing here imports torch, so that `--help` and a wrong key answer at once. Later sources win: defaults, file, command
line. Unknown keys are errors that name the nearest key; contradictions name the keys and the values that would work.
"""

import difflib
import json
import tomllib
from argparse import ArgumentParser
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource


class ConfigError(Exception):
    """What the user asked for cannot be done; the message says which key is wrong and what would be right."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelConfig(Section):
    name: str = Field("examples/tiny", description="Hub id, or local folder with config.json (and *.safetensors)")
    from_scratch: bool = Field(False, description="initialise the weights from `seed` instead of reading them")
    overrides: dict[str, int | float | str | bool] = Field({}, description="fields of the model's config to replace")
    tokenizer: str | None = Field(None, description="Hub id or folder of the tokenizer, if not the model's own")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="dtype of the computation; parameters stay float32. auto: bfloat16 on a GPU, float32 on a CPU",
    )
    attention: Literal["auto", "varlen", "fa4", "sdpa"] = Field(
        "auto",
        description="varlen: torch's FlashAttention; fa4: FlashAttention-4 (extra fa4); sdpa: masked rows, any device",
    )
    kernels: Literal["auto", "none", "liger", "hub"] = Field(
        "auto", description="fused layers: Liger's or the Hub's. auto: liger on a GPU without train.compile, else none"
    )
    kernel_mapping: dict[str, str] = Field(
        {}, description="for kernels = hub: layer name -> owner/repo:Layer@version, or /folder:Layer"
    )
    head: Literal["auto", "chunked", "liger"] = Field(
        "auto", description="LM head + cross-entropy without full logits: lacuna's (auto) or Liger's fused one"
    )
    accum_dtype: Literal["float32", "model"] = Field(
        "float32", description="dtype in which the head's weight gradient is summed over chunks (model: model.dtype)"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class Source(Section):
    path: str = Field(description="Hub id, folder, or file, glob or URL (https://, s3://) of .parquet, .jsonl or .txt")
    name: str | None = Field(None, description="configuration of a Hub dataset")
    split: str = Field("train", description="split, slices allowed: train[:90%%]")
    data_files: str | list[str] | None = Field(None, description="files inside `path`, globs allowed")
    streaming: bool = Field(False, description="read while training instead of tokenising everything first")
    weight: float | None = Field(None, gt=0, description="share of the mixture's tokens; none: all data once an epoch")
    column: str = Field("text", description="column that holds the text")


class DataConfig(Section):
    sources: list[Source] = Field([], description="where documents come from: [[data.sources]] in TOML, JSON here")
    mask_boundary: bool = Field(True, description="a document's last token does not predict the next document's first")
    num_streams: int | None = Field(
        None, ge=1, description="virtual streams of streaming data; default: the number of shards, at most 64"
    )
    context_len: int | None = Field(None, ge=1, description="longest piece of a document, tokens; default: seq_len")
    context_warmup_steps: int = Field(0, ge=0, description="steps in which context_len grows linearly to seq_len")
    workers: int | None = Field(
        None, ge=0, description="loader processes a rank; default: 1 if anything streams, else 0 (in this process)"
    )
    cache: str = Field("~/.cache/lacuna", description="folder of the token cache")


class TrainConfig(Section):
    seq_len: int = Field(1024, ge=8, description="slots a row, tokens")
    micro_batch_size: int = Field(8, ge=1, description="rows a device takes through the model at once")
    global_batch_size: int = Field(8, ge=1, description="rows an optimizer step, over all devices and micro-batches")
    steps: int | None = Field(None, ge=1, description="optimizer steps (this or train.epochs)")
    epochs: int | None = Field(None, ge=1, description="passes over map-style data (this or train.steps)")
    compile: Literal["auto", True, False] = Field(
        "auto", description="torch.compile each layer; auto: on a GPU only (on a CPU it needs a C++ compiler)"
    )
    activation_checkpointing: Literal["none", "full", "selective"] | Annotated[int, Field(ge=1)] = Field(
        "none", description="recompute activations: of every layer (full), every n-th (a number), or cheap ops only"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this global L2 norm")
    deterministic: bool = Field(False, description="deterministic GPU kernels, where they exist (slower)")


class OptimConfig(Section):
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices; embeddings, norms and biases have none")
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2, description="AdamW's two decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="learning rate after warmup; wsd: constant, then linear decay in the last decay_steps"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warmup from 0")
    decay_steps: int | None = Field(None, ge=1, description="wsd: steps of decay at the end; default: a tenth")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak (linear, cosine, wsd)")


class DistConfig(Section):
    dp_replicate: int = Field(1, ge=1, description="copies of the sharded model (HSDP)")
    dp_shard: int | None = Field(
        None, ge=1, description="ranks that share one copy (FSDP2); default: all that are left"
    )
    timeout: int = Field(600, ge=10, description="seconds after which a collective that hangs ends the run")


class LogConfig(Section):
    every: int = Field(10, ge=1, description="steps between two lines of metrics")
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = Field([], description="where else metrics go")


class EvalConfig(Section):
    sources: list[Source] = Field([], description="held-out data, same keys as data.sources")
    every: int | None = Field(
        None, ge=1, description="steps between evaluations; default: before the first, after the last"
    )
    rows: int = Field(512, ge=1, description="rows evaluated at most")


class Config(Section):
    name: str = Field("run", pattern=r"^[\w.-]+$", description="the run's name: everything lands in out/name")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of data and of initial weights")
    out: str = Field("runs", description="folder of runs")
    model: ModelConfig = Field(ModelConfig(), description="what is trained")
    data: DataConfig = Field(DataConfig(), description="on what")
    train: TrainConfig = Field(TrainConfig(), description="how much at a time, how long")
    optim: OptimConfig = Field(OptimConfig(), description="AdamW and its learning rate")
    dist: DistConfig = Field(DistConfig(), description="over which devices")
    log: LogConfig = Field(LogConfig(), description="what is reported")
    eval: EvalConfig = Field(EvalConfig(), description="on what it is measured")

    @model_validator(mode="after")
    def check(self):
        train, data, weights = self.train, self.data, [source.weight for source in self.data.sources]
        if not data.sources:
            raise ValueError("data.sources is empty: add a [[data.sources]] table with a path")
        if (train.steps is None) == (train.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        if train.epochs and any(source.streaming for source in data.sources):
            raise ValueError(
                "train.epochs needs data of known size: set train.steps, or streaming = false in data.sources"
            )
        if train.epochs and any(weights):
            raise ValueError("train.epochs has no meaning for a weighted mixture: set train.steps, or drop the weights")
        if any(weights) and not all(weights):
            raise ValueError("data.sources: give every source a weight, or none")
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
                f"{train.micro_batch_size}: the nearest that is, "
                f"is {nearest_multiple(train.global_batch_size, train.micro_batch_size)}"
            )
        if data.context_len and data.context_len > train.seq_len:
            raise ValueError(
                f"data.context_len {data.context_len} > train.seq_len {train.seq_len}: lower one or raise the other"
            )
        if data.context_warmup_steps and not data.context_len:
            raise ValueError("data.context_warmup_steps needs data.context_len, the length that it starts from")
        if train.steps and self.optim.warmup_steps >= train.steps:
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} must be below train.steps {train.steps}")
        if self.optim.decay_steps and self.optim.schedule != "wsd":
            raise ValueError('optim.decay_steps belongs to optim.schedule = "wsd"')
        if self.model.kernel_mapping and self.model.kernels != "hub":
            raise ValueError('model.kernel_mapping belongs to model.kernels = "hub"')
        if self.model.dtype == "float32" and self.model.attention in ("varlen", "fa4"):
            raise ValueError(
                f'model.attention = "{self.model.attention}" needs model.dtype = "bfloat16", or use "sdpa"'
            )
        if self.eval.every and not self.eval.sources:
            raise ValueError("eval.every without eval.sources: there is nothing to evaluate on")
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
        known += [f"{name}.{k}" for k in inner] or [name]
        known += [f"{name}.sources.{k}" for k in Source.model_fields if "sources" in inner]
    same_word = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = same_word or difflib.get_close_matches(key, known, 1)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "; `lacuna pt --help` lists all keys")


def nearest_multiple(n: int, of: int) -> str:
    """The multiples of `of` on both sides of n, as words."""
    below, above = n // of * of, -(-n // of) * of
    return f"{below} or {above}" if 0 < below < above else str(above)


def load_config(path: str | None, argv: list[str], prog: str = "lacuna pt") -> Config:
    """The config from a TOML file (or none) and command-line words.

    Raises ConfigError with one sentence a problem; exits 0 after printing help where argv asks for it.
    """
    parser = Parser(prog=f"{prog} [CONFIG.toml]", allow_abbrev=False, description="Keys of CONFIG.toml, as options:")
    given = CliSettingsSource(
        CommandLine, cli_parse_args=argv, root_parser=parser, parse_args_method=Parser.parse_args
    )()
    merged = {}
    if path is not None:
        try:
            merged = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if len({"steps", "epochs"} & set(given.get("train", {}))) == 1 and isinstance(merged.get("train"), dict):
        # they exclude each other: the one on the command line replaces the one in the file
        merged["train"] = {k: v for k, v in merged["train"].items() if k not in ("steps", "epochs")}
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(problem(e) for e in error.errors())) from None


def problem(error: dict) -> str:
    """One pydantic error as one sentence that names the key as it is written in TOML."""
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, int) or "[" not in part)
    if error["type"] == "extra_forbidden":
        return unknown_key(".".join(part for part in key.split(".") if not part.isdigit()))
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, not {error['input']!r}" if key else message


def to_toml(config: Config) -> str:
    """The whole config as TOML text: enough to repeat the run. None is left out: it is every such key's default."""
    dump = config.model_dump(exclude_none=True)
    sections = {key: value for key, value in dump.items() if isinstance(value, dict)}
    lines = [f"{key} = {toml_value(value)}" for key, value in dump.items() if key not in sections]
    for name, section in sections.items():
        lines += ["", f"[{name}]"] + [f"{key} = {toml_value(value)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def toml_value(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return json.dumps(value)
