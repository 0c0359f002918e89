"""Map-style and streaming datasets: `read` yields the documents of a virtual stream, `load` one's token ids."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import escape
from gzip import BadGzipFile
from pathlib import Path
from typing import NamedTuple

import aiohttp
import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from lacuna.config import ConfigError, Source, log
from lacuna.data.tokenize import digest

READ_CHUNK = 128  # documents tokenised in one call: enough for the tokenizer to use every core
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".txt": "text", ".csv": "csv"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CACHED = datasets.Features({"ids": datasets.List(datasets.Value("int32")), "note": datasets.Value("string")})
# Where a connection breaks, datasets tries again 8 times, 5 s apart (its own: 20), and silence is at most 10 s (300).
datasets.config.STREAMING_READ_MAX_RETRIES = 8
datasets.config.STREAMING_OPEN_MAX_RETRIES = 8
SILENCE = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=10, sock_read=10)}}


@dataclass(frozen=True)
class Cursor:
    """A place in a source, before a document; `asdict` makes a checkpoint's JSON of it."""

    epoch: int = 0
    taken: int = 0  # documents before it: of its epoch if data is map-style, of its chunk if it streams
    shard: int = 0  # of a stream: shards of the epoch before its own
    row: int = 0  # rows of the shard before its chunk
    chunk: dict | None = None  # the dataset's own state where its chunk begins; None: where the shard begins


class Document(NamedTuple):
    """The next document of a virtual stream."""

    key: int | np.ndarray  # what its source loads it by
    length: int  # tokens
    begin: Cursor  # of its epoch (map-style) or its chunk (streaming)
    taken: int  # documents between `begin` and this one
    epoch: float  # epochs before it, as far as is known

    @property
    def cursor(self) -> Cursor:
        return replace(self.begin, taken=self.taken)


class MapSource:
    """Tokenised documents by index, each once an epoch, in a seeded order: a share of all."""

    def __init__(self, sources: list[Source], encoder, seed: list[int], *, cache: str, share: tuple):
        whole = datasets.concatenate_datasets([tokenise(source, encoder, cache) for source in sources])
        self.tokens = whole.select_columns(["ids"]).with_format("numpy")
        self.lengths = pc.list_value_length(whole.data["ids"]).to_numpy()
        self.notes = Counter(note or "whole" for note in whole.data["note"].to_pylist())
        self.seed = seed
        documents = np.flatnonzero(self.lengths)
        begin, end = (round(len(documents) * edge) for edge in share)
        self.documents = np.random.default_rng(seed).permutation(documents)[begin:end]
        self.most_streams = len(self.documents)
        if not self.most_streams:
            raise ConfigError(f"data.sources: no document is left of {', '.join(s.path for s in sources)}")
        self.inventory = f"{len(self.documents)} documents of {self.lengths[self.documents].sum()} tokens"

    def read(self, stream: int, num_streams: int, cursor: Cursor) -> Iterator[Document]:
        """The documents of one virtual stream from a cursor on, in an order of each epoch's own; endless."""
        for epoch in itertools.count(cursor.epoch):
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.documents)[stream::num_streams]
            lengths = self.lengths[order]
            begin = Cursor(epoch)
            for i in range(cursor.taken, len(order)):
                yield Document(order.item(i), lengths.item(i), begin, i, epoch + i / len(order))
            cursor = begin

    def load(self, key: int) -> np.ndarray:
        return self.tokens[key]["ids"]


def tokenise(source: Source, encoder, cache: str) -> datasets.Dataset:
    """A map-style source as Tokens, made once: the cache's key holds data, columns, tokenizer and code."""
    dataset = open_dataset(source, encoder)
    name = digest(dataset._fingerprint, source.column, encoder.fingerprint())
    file = Path(cache).expanduser() / f"{name}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)

    def encode(batch, numbers):
        documents = encoder.documents(as_rows(batch), source, numbers)
        return {"ids": [tokens.ids for tokens in documents], "note": [tokens.note for tokens in documents]}

    options = {"batched": True, "with_indices": True, "remove_columns": dataset.column_names, "features": CACHED}
    with FileLock(file.with_suffix(".lock")):  # one rank makes it, the others wait here and read it
        tokens = dataset.map(encode, cache_file_name=str(file), new_fingerprint=name, **options)
    warn(source.path, Counter(tokens.data["note"].to_pylist()))
    return tokens


def warn(where: str, notes: Counter):
    """Say how many documents were cut or dropped, and why."""
    for note, count in notes.items():
        if note:
            log.warning("%s: %d of %d documents %s", where, count, notes.total(), note)


class StreamSource:
    """Documents that are read and tokenised as the run goes. A virtual stream has whole shards to itself."""

    def __init__(self, source: Source, encoder, seed: list[int]):
        self.source, self.encoder, self.seed = source, encoder, seed
        self.dataset = open_dataset(source, encoder)
        self.most_streams = self.num_shards = self.dataset.num_shards
        self.inventory = f"{self.num_shards} shards"
        self.notes = Counter()  # nothing is known before it is read

    def read(self, stream: int, num_streams: int, cursor: Cursor) -> Iterator[Document]:
        """The documents of one virtual stream from a cursor on, in each epoch's own order of shards; endless."""
        last_epoch = cursor.epoch  # with text; the first may have begun behind its last document
        # From coarse to fine: epochs, shards, chunks, documents; the cursor says where each of them begins.
        for epoch in itertools.count(cursor.epoch):
            if epoch > last_epoch + 1:
                raise ConfigError(f"data.sources {self.source.path}: stream {stream} finds no text")
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.num_shards)[stream::num_streams]
            for place, shard in enumerate(order[cursor.shard :].tolist(), cursor.shard):
                for begin, numbers, rows in self.read_shard(shard, cursor):
                    encoded = self.encoder.documents(as_rows(rows), self.source, numbers)
                    documents = [tokens.ids for tokens in encoded if len(tokens.ids)]
                    warn(f"{self.source.path}, shard {shard}", Counter(tokens.note for tokens in encoded))
                    for i, ids in enumerate(documents[begin.taken :], begin.taken):
                        yield Document(ids, len(ids), begin, i, epoch + place / len(order))
                        last_epoch = epoch
                cursor = Cursor(epoch, shard=place + 1)
            cursor = Cursor(epoch + 1)

    def read_shard(self, shard: int, cursor: Cursor) -> Iterator[tuple[Cursor, range, dict]]:
        """The chunks of a shard from a cursor on: where each begins, its rows' numbers, and its rows."""
        dataset = self.dataset.shard(self.num_shards, shard)
        if cursor.chunk is not None:
            dataset.load_state_dict(cursor.chunk)
        try:
            for rows in dataset.iter(READ_CHUNK):
                numbers = range(cursor.row, cursor.row + len(next(iter(rows.values()))))
                yield cursor, numbers, rows
                cursor = replace(cursor, taken=0, row=numbers.stop, chunk=dataset.state_dict())
        except Exception as error:
            damaged = isinstance(error, ValueError | EOFError | BadGzipFile)
            cure = "replace the file" if damaged else "see to the connection or the server"
            problem = f"data.sources {self.source.path}: shard {shard} cannot be read: {error!r}"
            raise ConfigError(f"{problem}: {cure}, and the same command goes on from the last checkpoint") from None

    def load(self, key: np.ndarray) -> np.ndarray:
        return key


def as_rows(batch: dict[str, list]) -> list[dict]:
    return [dict(zip(batch, map(without_nulls, values), strict=True)) for values in zip(*batch.values(), strict=True)]


def without_nulls(value):
    """A copy without the nulls that Arrow puts into structs whose keys differ from row to row."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def open_dataset(source: Source, encoder) -> datasets.Dataset | datasets.IterableDataset:
    """A source's dataset, with the columns that are read; ConfigError where it cannot be opened."""
    path = Path(source.path)
    endings = [ending.lower() for ending in path.suffixes if ending.lower() not in COMPRESSED]
    builder = BUILDERS.get(endings[-1]) if endings and not path.is_dir() else None
    files = {"path": source.path, "name": source.name, "data_files": source.data_files}
    if builder:
        if source.name or source.data_files:
            raise ConfigError(f"data.sources: {source.path} is a file: remove name and data_files")
        files = {"path": builder, "data_files": escape(source.path) if path.is_file() else source.path}
    remote = {"storage_options": {"http": SILENCE, "https": SILENCE}}
    options = {"split": source.split, "streaming": source.streaming} | (remote if source.streaming else {})
    if builder == "text" or {file.suffix for file in path.glob("*")} & set(BUILDERS) == {".txt"}:
        options["sample_by"] = "document"
    try:
        if builder == "parquet" and not source.fields:
            # the schema first: then only columns that are needed are read from disk or network
            schema = datasets.load_dataset(**files, split="train", streaming=True, **remote)
            options["columns"] = encoder.columns(schema.column_names, source)
        dataset = datasets.load_dataset(**files, **options)
        if source.fields:
            dataset = dataset.rename_columns({column: name for name, column in source.fields.items()})
        names = dataset.column_names or list(next(iter(dataset), {}))
    except ConfigError:
        raise
    except Exception as error:
        cause = str(error.__cause__ or error) or "there is no data in it"
        raise ConfigError(f"data.sources path {source.path}, split {source.split}: {cause}") from None
    return dataset.select_columns(options.get("columns") or encoder.columns(names, source))
