"""Where documents come from: map-style and streaming datasets, read by virtual streams.

A source is read through cursors, one for each virtual stream: its documents, endless, epoch after epoch. A cursor has
`next() -> (length, document)`, `state()` (small and JSON-like, for a checkpoint), `epoch` (complete passes) and
`progress` (with the share of the pass under way). An epoch is a seeded permutation: of documents, or of whole shards.
"""

import hashlib
import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from lacuna.config import ConfigError, Source
from lacuna.data.tokenize import Encoder

log = logging.getLogger("lacuna")
READ_CHUNK = 128  # documents tokenised in one call: enough for the tokenizer to use every core
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}


def open_dataset(source: Source) -> datasets.Dataset | datasets.IterableDataset:
    """The Hugging Face dataset that a source names; ConfigError where it cannot be opened or lacks the column."""
    suffixes = [s for s in Path(source.path).suffixes if s not in (".gz", ".zst", ".bz2", ".xz")]
    builder = BUILDERS.get(suffixes[-1]) if suffixes and not Path(source.path).is_dir() else None
    options = {"split": source.split, "streaming": source.streaming}
    if builder and (source.name or source.data_files):
        raise ConfigError(f"data.sources: {source.path} is a file, so name and data_files have no meaning: remove them")
    if builder == "text" or {file.suffix for file in Path(source.path).glob("*")} & set(BUILDERS) == {".txt"}:
        options["sample_by"] = "document"
    if builder == "parquet":
        options["columns"] = [source.column]  # only this column is read from disk or network
    try:
        if builder is not None:
            dataset = datasets.load_dataset(builder, data_files=source.path, **options)
        else:
            dataset = datasets.load_dataset(source.path, source.name, data_files=source.data_files, **options)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:
        cause = str(error.__cause__ or error)
        if not cause.startswith("No match for FieldRef"):
            raise ConfigError(f"data.sources path {source.path}, split {source.split}: {cause}") from None
        columns = [cause.partition(" in ")[2].partition("\n")[0]]  # pyarrow's words where a column is not there
    if source.column not in columns:
        raise ConfigError(f"data.sources {source.path} has no column {source.column!r}; it has {', '.join(columns)}")
    return dataset.select_columns([source.column])


class MapCursor:
    dropped = 0  # documents without text never get here

    def __init__(self, source, stream: int, num_streams: int, epoch: int = 0, index: int = 0):
        if num_streams > len(source.lengths):
            raise ConfigError(f"data.num_streams {num_streams} exceeds the {len(source.lengths)} documents of a source")
        self.source, self.stream, self.num_streams = source, stream, num_streams
        self.start_epoch(epoch)
        self.index = index

    def start_epoch(self, epoch: int):
        order = np.random.default_rng([*self.source.seed, epoch]).permutation(len(self.source.lengths))
        self.order = order[self.stream :: self.num_streams]
        self.lengths = self.source.lengths[self.order]
        self.epoch, self.index = epoch, 0

    def next(self) -> tuple[int, int]:
        document, length = int(self.order[self.index]), int(self.lengths[self.index])
        self.index += 1
        if self.index == len(self.order):
            self.start_epoch(self.epoch + 1)
        return length, document

    @property
    def progress(self) -> float:
        return self.epoch + self.index / len(self.order)

    def state(self) -> dict:
        return {"epoch": self.epoch, "index": self.index}


class MapSource:
    """Tokenised documents that can be had by index. Several datasets make one source: all of each, once an epoch."""

    cursor = MapCursor

    def __init__(self, sources: list[Source], encoder: Encoder, seed: list[int], cache: str):
        tokenised = [tokenise(source, encoder, cache) for source in sources]
        self.tokens = datasets.concatenate_datasets(tokenised).with_format("numpy")
        self.lengths = np.concatenate([pc.list_value_length(t.data["input_ids"]).to_numpy() for t in tokenised])
        self.seed = seed
        if len(self.lengths) == 0:
            raise ConfigError(f"data.sources: no document with text in {', '.join(s.path for s in sources)}")

    def load(self, document: int) -> np.ndarray:
        return self.tokens[document]["input_ids"]


def tokenise(source: Source, encoder: Encoder, cache: str) -> datasets.Dataset:
    """A map-style source as token ids, made once: the cache's key holds data, column, tokenizer and code."""
    dataset = open_dataset(source)
    key = hashlib.sha256(f"{dataset._fingerprint} {source.column} {encoder.fingerprint()}".encode()).hexdigest()[:32]
    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch):
        return {"input_ids": [ids for ids in encoder(texts(batch[source.column], source)) if len(ids)]}

    with FileLock(folder / f"{key}.lock"):  # one rank makes it, the others wait here and read it
        features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
        file = {"cache_file_name": str(folder / f"{key}.arrow"), "new_fingerprint": key}
        tokens = dataset.map(encode, batched=True, remove_columns=dataset.column_names, features=features, **file)
    if dropped := len(dataset) - len(tokens):
        log.warning("%s: %d of %d documents have no text and are dropped", source.path, dropped, len(dataset))
    return tokens


def texts(values: list, source: Source) -> list[str]:
    """The values of a text column, null as empty; ConfigError where they are not text."""
    for value in values:
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"data.sources {source.path}: {source.column!r} holds {type(value).__name__}, not text")
    return [value or "" for value in values]


class StreamCursor:
    """The shards of one virtual stream, in chunks of READ_CHUNK documents.

    There is always a next document at hand, so that `epoch` has changed once the last one of an epoch is taken. The
    state is where the chunk at hand began, and how many of its documents are taken: resuming reads one chunk again.
    """

    def __init__(self, source, stream, num_streams, epoch=0, shard=0, inside=None, taken=0, dropped=0):
        shards = source.num_shards
        if num_streams > shards and num_streams % shards:
            fit = f"use at most {shards}, or a multiple of {shards}"
            raise ConfigError(
                f"data.num_streams {num_streams} does not fit {shards} shards of {source.source.path}: {fit}"
            )
        self.source, self.stream, self.num_streams = source, stream, num_streams
        # more streams than shards: a shard is read by several streams, and each keeps every n-th document of it
        self.share, self.shares = stream // shards, max(1, num_streams // shards)
        self.epoch, self.shard, self.place, self.dropped = epoch, shard, inside, dropped
        self.open_shard()
        self.read_chunk()
        self.taken = taken

    def open_shard(self):
        shards = self.source.num_shards
        order = np.random.default_rng([*self.source.seed, self.epoch]).permutation(shards)
        self.mine = order[self.stream % shards :: self.num_streams].tolist()
        self.dataset = self.source.dataset.shard(shards, self.mine[self.shard])
        if self.place is not None:
            self.dataset.load_state_dict(self.place["state"])
        else:
            self.place = {"state": self.dataset.state_dict(), "row": 0}
        # by batches: an IterableDataset's plain iterator deals shards to loader workers once more, behind our back
        self.batches = self.dataset.iter(READ_CHUNK)

    def read_chunk(self):
        """Read and tokenise the next documents, going on to the next shard and epoch until there is at least one."""
        first_epoch, source, self.chunk = self.epoch, self.source.source, []
        while not self.chunk:
            self.inside, self.dropped_before, self.taken = self.place, self.dropped, 0
            batch = next(self.batches, None)
            if batch is None:
                self.next_shard()
                if self.epoch > first_epoch + 1:
                    raise ConfigError(f"data.sources {source.path}: stream {self.stream} finds no text")
                continue
            values = texts(batch[source.column], source)
            encoded = self.source.encoder(values[(self.share - self.place["row"]) % self.shares :: self.shares])
            self.place = {"state": self.dataset.state_dict(), "row": self.place["row"] + len(values)}
            self.chunk = [ids for ids in encoded if len(ids)]
            self.dropped += len(encoded) - len(self.chunk)

    def next_shard(self):
        self.shard, self.place = self.shard + 1, None
        if self.shard == len(self.mine):
            self.epoch, self.shard = self.epoch + 1, 0
        self.open_shard()

    def next(self) -> tuple[int, np.ndarray]:
        document = self.chunk[self.taken]
        self.taken += 1
        if self.taken == len(self.chunk):
            self.read_chunk()
        return len(document), document

    @property
    def progress(self) -> float:
        return self.epoch + self.shard / len(self.mine)

    def state(self) -> dict:
        place = {"epoch": self.epoch, "shard": self.shard, "inside": self.inside, "taken": self.taken}
        return {**place, "dropped": self.dropped_before}


class StreamSource:
    """Documents that are read and tokenised as the run goes, shard by shard."""

    cursor = StreamCursor

    def __init__(self, source: Source, encoder: Encoder, seed: list[int]):
        self.source, self.encoder, self.seed = source, encoder, seed
        self.dataset = open_dataset(source)
        self.num_shards = self.dataset.num_shards
