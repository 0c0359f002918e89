"""Corpora whose tokens are known beforehand: word "17" is token 17, and no token is in two places."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lacuna.config import Config, Source

EOS, BOS, UNKNOWN = 0, 1, 2
FIRST = 3  # the smallest id of a word


def number_tokenizer(size: int = 20_000, bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN} | {str(i): i for i in range(FIRST, size)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def log_normal_documents(count: int, median: float = 40, seed: int = 0, first: int = FIRST) -> list[list[int]]:
    """Documents of log-normal lengths; together their tokens are first, first + 1, … in order, each once."""
    lengths = np.maximum(1, np.random.default_rng(seed).lognormal(np.log(median), 1, count)).astype(int)
    ends = first + np.cumsum(lengths)
    return [list(range(end - length, end)) for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)]


def text(document: list[int]) -> str:
    return " ".join(map(str, document))


def write(path: Path, texts: list, column: str = "text") -> Path:
    """One file of texts, as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path)
    elif path.suffix == ".txt":
        path.write_text("".join(texts), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({column: value}) + "\n" for value in texts))
    return path


def write_shards(folder: Path, documents: list[list[int]], shards: int, suffix: str = ".jsonl") -> str:
    """Documents dealt to this many files, the first ones larger; returns a glob."""
    sizes = np.linspace(1.5, 0.5, shards)
    ends = np.round(np.cumsum(sizes) / sizes.sum() * len(documents)).astype(int)
    for i, part in enumerate(np.split(np.arange(len(documents)), ends[:-1])):
        write(folder / f"shard-{i:02}{suffix}", [text(documents[d]) for d in part])
    return str(folder / f"*{suffix}")


def make_config(folder: Path, *sources: dict, steps: int | None = 10, epochs: int | None = None, **keys) -> Config:
    """A config of these sources with its cache in `folder`; further keys are those of data and train."""
    data = {"cache": str(folder / "cache"), "sources": [{"path": "x"} | source for source in sources]}
    train = {"seq_len": 64, "micro_batch_size": 2, "global_batch_size": 8, "epochs": epochs}
    train |= {} if epochs else {"steps": steps}
    for key, value in keys.items():
        (train if key in ("seq_len", "micro_batch_size", "global_batch_size") else data)[key] = value
    return Config.model_validate({"data": data, "train": train})


def make_source(path, **keys) -> dict:
    return Source(path=str(path), **keys).model_dump(exclude_none=True)


@contextmanager
def lacuna_log():
    """The messages that lacuna logs, whatever has been done to its logger."""
    records = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("lacuna")
    level, disabled = logger.level, logger.disabled
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.disabled = False
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.disabled = disabled
