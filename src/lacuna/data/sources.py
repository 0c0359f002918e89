"""Where documents come from: map-style and streaming datasets, read by virtual streams.

A source has `read(stream, num_streams, **place)`, which yields the documents of one virtual stream, endless, epoch
after epoch. Each says by which `place` (small, JSON-like, for a checkpoint) reading begins with it again. An epoch is a
seeded permutation: of documents, or of whole shards. `inventory` is what a run that goes on must find again.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from gzip import BadGzipFile
from pathlib import Path
from typing import NamedTuple

import aiohttp
import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from lacuna.config import ConfigError, Source
from lacuna.data.conversations import ChatEncoder
from lacuna.data.tokenize import Encoder, log

RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits for a source that drops the connection
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1  # and not 20
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 1
SILENCE = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=10, sock_read=10)}}  # and not 5 minutes
READ_CHUNK = 128  # documents tokenised in one call: enough for the tokenizer to use every core
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}


def open_dataset(source: Source, encoder: Encoder | ChatEncoder) -> datasets.Dataset | datasets.IterableDataset:
    """The dataset that a source names, with the columns that are read; ConfigError where it cannot be opened."""
    suffixes = [s for s in Path(source.path).suffixes if s not in (".gz", ".zst", ".bz2", ".xz")]
    builder = BUILDERS.get(suffixes[-1]) if suffixes and not Path(source.path).is_dir() else None
    options = {"split": source.split, "streaming": source.streaming}
    if source.streaming:
        options["storage_options"] = {"http": SILENCE, "https": SILENCE}
    if builder and (source.name or source.data_files):
        raise ConfigError(f"data.sources: {source.path} is a file, so name and data_files have no meaning: remove them")
    if builder == "text" or {file.suffix for file in Path(source.path).glob("*")} & set(BUILDERS) == {".txt"}:
        options["sample_by"] = "document"
    if builder == "parquet" and isinstance(encoder, Encoder):
        options["columns"] = [source.column]  # only this column is read from disk or network
    try:
        path, files = (builder, source.path) if builder else (source.path, source.data_files)
        dataset = datasets.load_dataset(path, source.name, data_files=files, **options)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:
        cause = str(error.__cause__ or error)
        if not cause.startswith("No match for FieldRef"):
            raise ConfigError(f"data.sources path {source.path}, split {source.split}: {cause}") from None
        columns = [cause.partition(" in ")[2].partition("\n")[0]]  # pyarrow's words where a column is not there
    columns = encoder.columns(columns, source)  # refused here where pyarrow refused: then there is no dataset
    return dataset.select_columns(columns)


class Document(NamedTuple):
    """A document of a virtual stream: `read` begins at it with its place and what is taken of that place."""

    key: int | np.ndarray  # what its source loads it by
    length: int  # tokens
    place: dict  # where its epoch, or its chunk of a shard, begins
    taken: int  # documents of it before this one
    epoch: float  # epochs before this document, as far as is known
    dropped: int  # documents without text that `read` has met


class MapSource:
    """Tokenised documents that can be had by index. Several datasets make one source: all of each, once an epoch.

    share: which part is taken of the documents in a seeded order of their own; what is held out is the rest.
    """

    def __init__(self, sources: list[Source], encoder, seed: list[int], cache: str, share: tuple[float, float]):
        tokenised = [tokenise(source, encoder, cache) for source in sources]
        self.tokens = datasets.concatenate_datasets(tokenised).select_columns(["input_ids"]).with_format("numpy")
        self.lengths = np.concatenate([pc.list_value_length(t.data["input_ids"]).to_numpy() for t in tokenised])
        self.notes = Counter(note or "whole" for t in tokenised for note in t.data["note"].to_pylist())
        self.seed = seed
        documents = np.flatnonzero(self.lengths)
        begin, end = (round(len(documents) * edge) for edge in share)
        self.documents = np.random.default_rng(seed).permutation(documents)[begin:end]
        if len(self.documents) == 0:
            raise ConfigError(f"data.sources: no document is left of {', '.join(s.path for s in sources)}")
        self.inventory = f"{len(self.documents)} documents of {self.lengths[self.documents].sum()} tokens"

    def read(self, stream: int, num_streams: int, epoch: int = 0, taken: int = 0) -> Iterator[Document]:
        """The documents of one virtual stream, in an order of each epoch's own; endless."""
        if num_streams > len(self.documents):
            raise ConfigError(f"data.num_streams {num_streams} exceeds the {len(self.documents)} documents of a source")
        while True:
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.documents)[stream::num_streams]
            place, lengths = {"epoch": epoch}, self.lengths[order]
            for i in range(taken, len(order)):
                yield Document(order.item(i), lengths.item(i), place, i, epoch + i / len(order), 0)
            epoch, taken = epoch + 1, 0

    def load(self, key: int) -> np.ndarray:
        return self.tokens[key]["input_ids"]


def tokenise(source: Source, encoder: Encoder | ChatEncoder, cache: str) -> datasets.Dataset:
    """A map-style source as token ids, made once: the cache's key holds data, columns, tokenizer and code."""
    dataset = open_dataset(source, encoder)
    key = hashlib.sha256(f"{dataset._fingerprint} {source.column} {encoder.fingerprint()}".encode()).hexdigest()[:32]
    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch, numbers):
        documents = encoder.documents(batch, source, numbers)
        return {"input_ids": [ids for ids, _ in documents], "note": [note for _, note in documents]}

    kinds = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "note": datasets.Value("string")})
    options = {"batched": True, "with_indices": True, "remove_columns": dataset.column_names, "features": kinds}
    with FileLock(folder / f"{key}.lock"):  # one rank makes it, the others wait here and read it
        tokens = dataset.map(encode, cache_file_name=str(folder / f"{key}.arrow"), new_fingerprint=key, **options)
    for note, count in Counter(tokens.data["note"].to_pylist()).items():
        if note:
            log.warning("%s: %d of %d documents %s", source.path, count, len(tokens), note)
    return tokens


class StreamSource:
    """Documents that are read and tokenised as the run goes, shard by shard."""

    def __init__(self, source: Source, encoder: Encoder | ChatEncoder, seed: list[int]):
        self.source, self.encoder, self.seed = source, encoder, seed
        self.notes = Counter()  # nothing is known before it is read
        self.dataset = open_dataset(source, encoder)
        self.num_shards = self.dataset.num_shards
        self.inventory = f"{self.num_shards} shards"

    def read(self, stream, num_streams, epoch=0, shard=0, inside=None, taken=0) -> Iterator[Document]:
        """The documents of one virtual stream, in chunks of READ_CHUNK: to resume reads one again; endless."""
        shards, last_epoch, dropped = self.num_shards, epoch, 0
        if num_streams > shards and num_streams % shards:
            what = f"data.num_streams {num_streams} does not fit {shards} shards of {self.source.path}"
            raise ConfigError(f"{what}: use at most {shards}, or a multiple of {shards}")
        # more streams than shards: a shard is read by several streams, and each keeps every n-th document of it
        share, shares = stream // shards, max(1, num_streams // shards)
        while epoch <= last_epoch + 1:
            order = np.random.default_rng([*self.seed, epoch]).permutation(shards)[stream % shards :: num_streams]
            for at in range(shard, len(order)):
                dataset = self.dataset.shard(shards, int(order[at]))
                inside = inside or {"state": dataset.state_dict(), "row": 0}
                dataset.load_state_dict(inside["state"])
                for batch, after in self.batches(dataset, order[at]):
                    numbers = range(inside["row"], inside["row"] + len(next(iter(batch.values()))))
                    first = (share - numbers.start) % shares
                    mine = {name: values[first::shares] for name, values in batch.items()}
                    encoded = self.encoder.documents(mine, self.source, numbers[first::shares])
                    chunk = [ids for ids, _ in encoded if len(ids)]
                    dropped += len(encoded) - len(chunk)
                    place = {"epoch": epoch, "shard": at, "inside": inside}
                    for i in range(taken, len(chunk)):
                        yield Document(chunk[i], len(chunk[i]), place, i, epoch + at / len(order), dropped)
                        last_epoch = epoch
                    inside, taken = {"state": after, "row": numbers.stop}, 0
                inside = None
            epoch, shard = epoch + 1, 0
        raise ConfigError(f"data.sources {self.source.path}: stream {stream} finds no text")

    def batches(self, dataset: datasets.IterableDataset, shard: int) -> Iterator[tuple[dict, dict]]:
        """READ_CHUNK rows of a shard, and the state after them. Where the connection breaks, the same again, later."""
        state, failures = dataset.state_dict(), 0
        while True:
            try:
                # by batches: a plain iterator deals shards to loader workers once more, behind our back
                for batch in dataset.iter(READ_CHUNK):
                    state, failures = dataset.state_dict(), 0
                    yield batch, state
                return
            except Exception as error:
                what = f"data.sources {self.source.path}: shard {shard} cannot be read: {error!r}"
                damaged = isinstance(error, ValueError | EOFError | BadGzipFile)  # what a second look would not cure
                if damaged or failures == len(RETRY_SECONDS):
                    cure = "replace the file" if damaged else "see to the connection or the server"
                    again = "and the same command goes on from the last checkpoint"
                    raise ConfigError(f"{what}: {cure}, {again}") from None
                log.warning("%s: again in %g s", what, RETRY_SECONDS[failures])
                time.sleep(RETRY_SECONDS[failures])
                dataset.load_state_dict(state)
                failures += 1

    def load(self, key: np.ndarray) -> np.ndarray:
        return key
