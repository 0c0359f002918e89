"""Makes keys.md, every key of a config, from src/lacuna/config.py: `uv run python docs/keys.py > docs/keys.md`."""

import json
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lacuna.config import Config, Source

HEAD = """\
# Every key

Made by [`docs/keys.py`](keys.py) from [`config.py`](../src/lacuna/config.py): change that one. A key is written under \
its section in TOML, or as an option, which wins: `--train.seq_len 2048`. Lists and tables are JSON there. \
`uv run lacuna pt --help` prints the same. In brackets is what others call a key.

## What to set first

| key | why |
|---|---|
| `name` | a run's folder is `runs/` and this name. The same name again goes on with that run |
| `model.name` | what is trained |
| `data.sources` | on what: a `path` is enough |
| `train.steps` or `train.epochs` | how long: one of the two must be given |
| `train.seq_len` | as long as most of your documents; memory grows with it |
| `train.micro_batch_size` | as large as the GPU holds: memory and speed, not the result |
| `train.global_batch_size` | the batch of an optimizer step, over all GPUs: the result |
| `optim.lr`, `optim.warmup_steps` | the defaults are a beginning; a small model from scratch wants more than 3e-4 |
| `eval.fraction` | .01 to .05, to see whether it learns more than by heart |
| `lora.rank` | where the GPU is too small for all weights |

The rest can stay as it is. An empty default means that lacuna chooses, or that there is none.
"""
TYPES = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", dict: "table", Source: "tables"}
BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


def page() -> str:
    """The whole of keys.md."""
    parts = [HEAD]
    own = {}
    sections = {}
    for name, field in Config.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        (sections if is_section else own)[name] = field
    parts.append(f"## The run\n\n{table('', own)}")
    for name, field in sections.items():
        keys = table(f"{name}.", field.annotation.model_fields)
        parts.append(f"## `[{name}]`: {field.description}\n\n{keys}")
        if name == "data":
            text = "One table for each source; the same keys in `[[eval.sources]]`. [Data](data.md) has examples."
            parts.append(f"## `[[data.sources]]`\n\n{text}\n\n{table('', Source.model_fields)}")
    return "\n".join(parts)


def table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    lines = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        # what --help says of a list of sources goes on with the keys of one
        meaning = field.description.partition(", JSON here")[0]
        cells = [f"`{prefix}{name}`", default(field), allowed(field), meaning.replace("*", "\\*")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def default(field: FieldInfo) -> str:
    """As it is written in TOML, which for these is JSON."""
    if field.is_required():
        return "must be given"
    return "" if field.default is None else f"`{json.dumps(field.default)}`"


def allowed(field: FieldInfo) -> str:
    """The type and the limits of a key, in words."""
    limits = []
    for name, words in BOUNDS.items():
        for rule in field.metadata:
            limit = getattr(rule, name, None)
            if limit is not None:
                number = int(limit) if limit == int(limit) else limit
                limits.append(words.format(f"{number:,}"))
    return ", ".join([in_words(field.annotation), *limits])


def in_words(kind) -> str:
    """A type, without the None that means "choose for me"."""
    inner = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if get_origin(kind) in (Union, UnionType, Annotated):
        return in_words(inner[0])
    if get_origin(kind) is list:
        return f"list: {in_words(inner[0])}"
    return TYPES[get_origin(kind) or kind]


if __name__ == "__main__":
    print(page(), end="")
