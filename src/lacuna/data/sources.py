"""Where documents come from: map-style and streaming datasets, read by virtual streams.

A source has `read(stream, num_streams, cursor)`, which yields the documents of one virtual stream, endless, epoch after
epoch, and `load(key)`, which gives a document's token ids. An epoch is a seeded permutation: of documents, or of whole
shards. Every document says by which Cursor reading begins with it again.
"""

import hashlib
import itertools
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

from lacuna.config import ConfigError, Source, log
from lacuna.data.tokenize import Encoder

READ_CHUNK = 128  # documents tokenised in one call: enough for the tokenizer to use every core
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# A connection that breaks is tried again 8 times, 5 s apart (and not 20 times, each after up to 5 minutes of silence)
datasets.config.STREAMING_READ_MAX_RETRIES = 8
datasets.config.STREAMING_OPEN_MAX_RETRIES = 8
SILENCE = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=10, sock_read=10)}}
CACHED = datasets.Features({"ids": datasets.List(datasets.Value("int32")), "note": datasets.Value("string")})


class Cursor(NamedTuple):
    """Where reading stands in a source: before a document. Small, and plain enough for a checkpoint's JSON."""

    epoch: int = 0
    taken: int = 0  # documents before it: of its epoch where data is map-style, of its chunk where it streams
    shard: int = 0  # of a stream: shards of the epoch before its own
    row: int = 0  # rows of the shard before its chunk
    chunk: dict | None = None  # the dataset's own state where its chunk begins; None: at the shard's beginning


class Document(NamedTuple):
    """The next document of a virtual stream."""

    key: int | np.ndarray  # what its source loads it by
    length: int  # tokens
    start: Cursor  # where its epoch (map-style) or its chunk (streaming) begins
    taken: int  # documents of that before this one
    epoch: float  # epochs before it, as far as is known
    dropped: int  # documents without text that `read` has met

    @property
    def cursor(self) -> Cursor:
        """Where reading begins with this document again."""
        return self.start._replace(taken=self.taken)


class MapSource:
    """Tokenised documents that can be had by index. Several datasets make one source: all of each, once an epoch.

    share: which part is taken of the documents in a seeded order of their own; what is held out is the rest.
    """

    def __init__(self, sources: list[Source], encoder: Encoder, *, seed: list[int], cache: str, share):
        whole = datasets.concatenate_datasets([tokenise(source, encoder, cache) for source in sources])
        self.tokens = whole.select_columns(["ids"]).with_format("numpy")
        self.lengths = pc.list_value_length(whole.data["ids"]).to_numpy()
        self.notes = Counter(note or "whole" for note in whole.data["note"].to_pylist())
        self.seed = seed
        documents = np.flatnonzero(self.lengths)
        begin, end = (round(len(documents) * edge) for edge in share)
        self.documents = np.random.default_rng(seed).permutation(documents)[begin:end]
        if len(self.documents) == 0:
            raise ConfigError(f"data.sources: no document is left of {', '.join(s.path for s in sources)}")
        self.inventory = f"{len(self.documents)} documents of {self.lengths[self.documents].sum()} tokens"
        self.most_streams = len(self.documents)

    def read(self, stream: int, num_streams: int, cursor: Cursor) -> Iterator[Document]:
        """The documents of one virtual stream, in an order of each epoch's own; endless."""
        taken = cursor.taken
        for epoch in itertools.count(cursor.epoch):
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.documents)[stream::num_streams]
            lengths = self.lengths[order]
            start = Cursor(epoch)
            for i in range(taken, len(order)):
                yield Document(order.item(i), lengths.item(i), start, i, epoch + i / len(order), dropped=0)
            taken = 0

    def load(self, key: int) -> np.ndarray:
        return self.tokens[key]["ids"]


def tokenise(source: Source, encoder: Encoder, cache: str) -> datasets.Dataset:
    """A map-style source as Tokens, made once: the cache's key holds data, columns, tokenizer and code."""
    dataset = open_dataset(source, encoder)
    key = f"{dataset._fingerprint} {source.column} {encoder.fingerprint()}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch, numbers):
        documents = encoder.documents(batch, source, numbers)
        return {"ids": [document.ids for document in documents], "note": [document.note for document in documents]}

    with FileLock(folder / f"{name}.lock"):  # one rank makes it, the others wait here and read it
        tokens = dataset.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=CACHED,
            cache_file_name=str(folder / f"{name}.arrow"),
            new_fingerprint=name,
        )
    for note, count in Counter(tokens.data["note"].to_pylist()).items():
        if note:
            log.warning("%s: %d of %d documents %s", source.path, count, len(tokens), note)
    return tokens


class StreamSource:
    """Documents that are read and tokenised as the run goes. A virtual stream has whole shards to itself."""

    def __init__(self, source: Source, encoder: Encoder, *, seed: list[int]):
        self.source = source
        self.encoder = encoder
        self.seed = seed
        self.dataset = open_dataset(source, encoder)
        self.num_shards = self.dataset.num_shards
        self.most_streams = self.num_shards
        self.inventory = f"{self.num_shards} shards"
        self.notes = Counter()  # nothing is known before it is read

    def read(self, stream: int, num_streams: int, cursor: Cursor) -> Iterator[Document]:
        """The documents of one virtual stream, chunk by chunk; endless."""
        shards = len(range(stream, self.num_shards, num_streams))  # of this stream
        dropped = 0
        last_epoch = cursor.epoch  # that had text; the first may have begun behind its last document
        for epoch in itertools.count(cursor.epoch):
            if epoch > last_epoch + 1:
                raise ConfigError(f"data.sources {self.source.path}: stream {stream} finds no text")
            for start, batch in self.read_epoch(stream, num_streams, cursor):
                size = len(next(iter(batch.values())))
                encoded = self.encoder.documents(batch, self.source, range(start.row, start.row + size))
                documents = [tokens.ids for tokens in encoded if len(tokens.ids)]
                dropped += size - len(documents)
                for taken in range(start.taken, len(documents)):
                    ids = documents[taken]
                    yield Document(ids, len(ids), start, taken, epoch + start.shard / shards, dropped)
                    last_epoch = epoch
            cursor = Cursor(epoch + 1)

    def read_epoch(self, stream: int, num_streams: int, cursor: Cursor) -> Iterator[tuple[Cursor, dict]]:
        """What is left of a stream's epoch: the chunks of its shards, in the epoch's order."""
        order = np.random.default_rng([*self.seed, cursor.epoch]).permutation(self.num_shards)[stream::num_streams]
        for shard in order[cursor.shard :].tolist():
            yield from self.read_shard(shard, cursor)
            cursor = Cursor(cursor.epoch, shard=cursor.shard + 1)

    def read_shard(self, shard: int, cursor: Cursor) -> Iterator[tuple[Cursor, dict]]:
        """What is left of a shard: READ_CHUNK rows at a time, with the cursor by which they are read again."""
        dataset = self.dataset.shard(self.num_shards, shard)
        if cursor.chunk is not None:
            dataset.load_state_dict(cursor.chunk)
        try:
            # by batches: a plain iterator deals shards to loader workers once more, behind our back
            for batch in dataset.iter(READ_CHUNK):
                yield cursor, batch
                row = cursor.row + len(next(iter(batch.values())))
                cursor = cursor._replace(taken=0, row=row, chunk=dataset.state_dict())
        except Exception as error:
            cure = "see to the connection or the server"
            if isinstance(error, ValueError | EOFError | BadGzipFile):  # what a second look would not cure
                cure = "replace the file"
            problem = f"data.sources {self.source.path}: shard {shard} cannot be read: {error!r}"
            raise ConfigError(f"{problem}: {cure}, and the same command goes on from the last checkpoint") from None

    def load(self, key: np.ndarray) -> np.ndarray:
        return key


def open_dataset(source: Source, encoder: Encoder) -> datasets.Dataset | datasets.IterableDataset:
    """The dataset that a source names, with the columns that are read; ConfigError where it cannot be opened."""
    file_format = format_of(source.path)
    files = {"path": source.path, "name": source.name, "data_files": source.data_files}
    if file_format:
        if source.name or source.data_files:
            problem = f"{source.path} is a file, so name and data_files have no meaning"
            raise ConfigError(f"data.sources: {problem}: remove them")
        files = {"path": file_format, "data_files": source.path}
    remote = {"storage_options": {"http": SILENCE, "https": SILENCE}}
    options = {"split": source.split, "streaming": source.streaming}
    if source.streaming:
        options |= remote
    if file_format == "text" or holds_texts_alone(source.path):
        options["sample_by"] = "document"
    try:
        if file_format == "parquet":
            # its schema comes first: then only the columns that are needed are read from disk or network
            schema = datasets.load_dataset(**files, split="train", streaming=True, **remote)
            columns = encoder.columns(schema.column_names, source)
            dataset = datasets.load_dataset(**files, columns=columns, **options)
        else:
            dataset = datasets.load_dataset(**files, **options)
            columns = encoder.columns(dataset.column_names or list(next(iter(dataset), {})), source)
    except ConfigError:
        raise
    except Exception as error:
        cause = str(error.__cause__ or error)
        raise ConfigError(f"data.sources path {source.path}, split {source.split}: {cause}") from None
    return dataset.select_columns(columns)


def format_of(path: str) -> str | None:
    """What datasets calls the format of a file or glob, as its ending says; None for a folder or a name of the Hub."""
    endings = [ending for ending in Path(path).suffixes if ending not in COMPRESSIONS]
    if not endings or Path(path).is_dir():
        return None
    return FORMATS.get(endings[-1])


def holds_texts_alone(path: str) -> bool:
    """Whether of all data files that lie in a folder itself every one is a text."""
    return {file.suffix for file in Path(path).glob("*")} & set(FORMATS) == {".txt"}
