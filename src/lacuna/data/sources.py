"""Where documents come from: map-style and streaming datasets, read by virtual streams.

A source is read through cursors, one for each virtual stream: its documents, endless, epoch after epoch. A cursor has
`next() -> (length, document)`, `state()` (small and JSON-like, for a checkpoint), `epoch` (complete passes) and
`progress` (with the share of the pass under way). An epoch is a seeded permutation: of documents, or of whole shards.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from lacuna.config import ConfigError, Source
from lacuna.data.conversations import ChatEncoder
from lacuna.data.tokenize import Encoder, log

READ_CHUNK = 128  # documents tokenised in one call: enough for the tokenizer to use every core
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}


def open_dataset(source: Source, encoder: Encoder | ChatEncoder) -> datasets.Dataset | datasets.IterableDataset:
    """The dataset that a source names, with the columns that are read; ConfigError where it cannot be opened."""
    suffixes = [s for s in Path(source.path).suffixes if s not in (".gz", ".zst", ".bz2", ".xz")]
    builder = BUILDERS.get(suffixes[-1]) if suffixes and not Path(source.path).is_dir() else None
    options = {"split": source.split, "streaming": source.streaming}
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
    columns = encoder.columns(columns, source)
    return dataset.select_columns(columns)


class MapCursor:
    dropped = 0  # documents without text never get here

    def __init__(self, source, stream: int, num_streams: int, epoch: int = 0, index: int = 0):
        if num_streams > len(source.documents):
            limit = f"the {len(source.documents)} documents of a source"
            raise ConfigError(f"data.num_streams {num_streams} exceeds {limit}")
        self.source, self.stream, self.num_streams = source, stream, num_streams
        self.epoch, self.index = epoch, index
        self.shuffle()

    def shuffle(self):
        order = np.random.default_rng([*self.source.seed, self.epoch]).permutation(self.source.documents)
        self.order = order[self.stream :: self.num_streams]

    def next(self) -> tuple[int, int]:
        document = int(self.order[self.index])
        self.index += 1
        if self.index == len(self.order):
            self.epoch, self.index = self.epoch + 1, 0
            self.shuffle()
        return int(self.source.lengths[document]), document

    @property
    def progress(self) -> float:
        return self.epoch + self.index / len(self.order)

    def state(self) -> dict:
        return {"epoch": self.epoch, "index": self.index}


class MapSource:
    """Tokenised documents that can be had by index. Several datasets make one source: all of each, once an epoch.

    share: which part is taken of the documents in a seeded order of their own; what is held out is the rest.
    """

    cursor = MapCursor

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

    def load(self, document: int) -> np.ndarray:
        return self.tokens[document]["input_ids"]


def tokenise(source: Source, encoder: Encoder | ChatEncoder, cache: str) -> datasets.Dataset:
    """A map-style source as token ids, made once: the cache's key holds data, columns, tokenizer and code."""
    dataset = open_dataset(source, encoder)
    key = hashlib.sha256(f"{dataset._fingerprint} {source.column} {encoder.fingerprint()}".encode()).hexdigest()[:32]
    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch, numbers):
        documents = encoder.documents(batch, source, numbers)
        return {"input_ids": [ids for ids, _ in documents], "note": [note for _, note in documents]}

    with FileLock(folder / f"{key}.lock"):  # one rank makes it, the others wait here and read it
        kinds = {"input_ids": datasets.List(datasets.Value("int32")), "note": datasets.Value("string")}
        file = {"cache_file_name": str(folder / f"{key}.arrow"), "new_fingerprint": key}
        options = {"batched": True, "with_indices": True, "remove_columns": dataset.column_names}
        tokens = dataset.map(encode, features=datasets.Features(kinds), **options, **file)
    for note, count in Counter(tokens.data["note"].to_pylist()).items():
        if note:
            log.warning("%s: %d of %d documents %s", source.path, count, len(tokens), note)
    return tokens


class StreamCursor:
    """The shards of one virtual stream, in chunks of READ_CHUNK documents.

    There is always a next document at hand, so that `epoch` has changed once the last one of an epoch is taken. The
    state is where the chunk at hand began, and how many of its documents are taken: resuming reads one chunk again.
    """

    def __init__(self, source, stream, num_streams, epoch=0, shard=0, inside=None, taken=0, dropped=0):
        shards = source.num_shards
        if num_streams > shards and num_streams % shards:
            what = f"data.num_streams {num_streams} does not fit {shards} shards of {source.source.path}"
            raise ConfigError(f"{what}: use at most {shards}, or a multiple of {shards}")
        self.source, self.stream, self.num_streams, self.dropped = source, stream, num_streams, dropped
        self.chunks = self.read(epoch, shard, inside)
        self.chunk, self.place = next(self.chunks)
        self.taken = taken

    def read(self, epoch: int, first: int, inside: dict | None) -> Iterator[tuple[list[np.ndarray], dict]]:
        """Chunks of at least one document, tokenised, and the place where each began; endless."""
        source, shards, last_epoch = self.source.source, self.source.num_shards, epoch
        # more streams than shards: a shard is read by several streams, and each keeps every n-th document of it
        share, shares = self.stream // shards, max(1, self.num_streams // shards)
        while epoch <= last_epoch + 1:
            order = np.random.default_rng([*self.source.seed, epoch]).permutation(shards)
            order = order[self.stream % shards :: self.num_streams].tolist()
            for shard in range(first, len(order)):
                dataset = self.source.dataset.shard(shards, order[shard])
                inside = inside or {"state": dataset.state_dict(), "row": 0}
                dataset.load_state_dict(inside["state"])
                # by batches: a plain iterator deals shards to loader workers once more, behind our back
                for batch in dataset.iter(READ_CHUNK):
                    numbers = range(inside["row"], inside["row"] + len(next(iter(batch.values()))))
                    begin = (share - inside["row"]) % shares
                    mine = {name: values[begin::shares] for name, values in batch.items()}
                    encoded = self.source.encoder.documents(mine, source, numbers[begin::shares])
                    chunk = [ids for ids, _ in encoded if len(ids)]
                    place = {"epoch": epoch, "shard": shard, "inside": inside, "dropped": self.dropped}
                    inside = {"state": dataset.state_dict(), "row": numbers.stop}
                    self.dropped += len(encoded) - len(chunk)
                    if chunk:
                        self.epoch, self.progress, last_epoch = epoch, epoch + shard / len(order), epoch
                        yield chunk, place
                inside = None
            epoch, first = epoch + 1, 0
        raise ConfigError(f"data.sources {source.path}: stream {self.stream} finds no text")

    def next(self) -> tuple[int, np.ndarray]:
        document = self.chunk[self.taken]
        self.taken += 1
        if self.taken == len(self.chunk):
            (self.chunk, self.place), self.taken = next(self.chunks), 0
        return len(document), document

    def state(self) -> dict:
        return self.place | {"taken": self.taken}


class StreamSource:
    """Documents that are read and tokenised as the run goes, shard by shard."""

    cursor = StreamCursor

    def __init__(self, source: Source, encoder: Encoder, seed: list[int]):
        self.source, self.encoder, self.seed = source, encoder, seed
        self.notes = Counter()  # nothing is known before it is read
        self.dataset = open_dataset(source, encoder)
        self.num_shards = self.dataset.num_shards
