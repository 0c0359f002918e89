"""Datasets, map-style or streaming: `read` yields documents, `load` one's token ids."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from glob import escape, glob
from itertools import chain, count, filterfalse
from pathlib import Path
from typing import NamedTuple

import aiohttp
import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from lacuna.config import AGAIN, ConfigError, Source, blame, log
from lacuna.data.tokenize import digest

READ_CHUNK = 128  # documents tokenised in one call: enough for every core
# JSON is text, for Python to parse: Arrow would give all rows one type, make dates of texts, lose nulls.
ROW = "a row's JSON"
JSON = {"path": "text", "features": datasets.Features({ROW: datasets.Value("string")})}
READERS = {
    ".parquet": {"path": "parquet", "batch_size": 1000},  # else 0 of an empty file
    ".arrow": {"path": "arrow"},  # save_to_disk's
    ".csv": JSON | {"sample_by": "document"},  # pandas guesses types, and an index
    ".txt": {"path": "text", "sample_by": "document", "encoding": "utf-8-sig"},
    ".json": JSON | {"sample_by": "document"},
    ".jsonl": JSON,
    ".ndjson": JSON,
}
COPIES = re.compile(r"/cache-\w+\.arrow$")  # what datasets puts beside .arrow files
CACHED = datasets.Features({"ids": datasets.List(datasets.Value("int32")), "note": datasets.Value("string")})
# A broken connection is tried again 8 times, 5 s apart (datasets: 20), silence is at most 10 s (300).
datasets.config.STREAMING_READ_MAX_RETRIES = 8
datasets.config.STREAMING_OPEN_MAX_RETRIES = 8
SILENCE = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=10, sock_read=10)}}


class Cursor(NamedTuple):
    """A place in a source, before a document; `_asdict` makes JSON of it."""

    epoch: int = 0
    taken: int = 0  # documents before it in its epoch, or of a stream in its chunk
    shard: int = 0  # of a stream: shards of the epoch before its own
    row: int = 0  # rows of the shard before its chunk
    chunk: dict | None = None  # the dataset's state where it begins; None: the shard's


class Document(NamedTuple):
    key: int | np.ndarray  # what its source loads it by
    length: int  # tokens
    cursor: Cursor
    epoch: float  # epochs before it, as far as is known


class MapSource:
    """Tokenised documents by index, each once an epoch, in a seeded order: a share of all."""

    def __init__(self, sources: list[Source], encoder, seed: list[int], *, cache: str, share: tuple):
        whole = datasets.concatenate_datasets([tokenise(source, encoder, cache) for source in sources])
        self.tokens = whole.select_columns(["ids"]).with_format("numpy")
        self.lengths = pc.list_value_length(whole.data["ids"]).to_numpy()
        self.seed = seed
        documents = np.flatnonzero(self.lengths)
        begin, end = (round(len(documents) * edge) for edge in share)
        self.documents = np.random.default_rng(seed).permutation(documents)[begin:end]
        self.most_streams = len(self.documents)
        if not self.most_streams:
            raise ConfigError(f"data.sources, eval.sources: no document left of {', '.join(s.path for s in sources)}")
        self.inventory = f"{len(self.documents)} documents of {self.lengths[self.documents].sum()} tokens"

    def read(self, stream: int, num_streams: int, cursor: Cursor) -> Iterator[Document]:
        """The documents of a virtual stream from a cursor on, in each epoch's order; endless."""
        for epoch in count(cursor.epoch):
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.documents)[stream::num_streams]
            for i in range(cursor.taken, len(order)):
                key = order.item(i)
                yield Document(key, self.lengths.item(key), Cursor(epoch, i), epoch + i / len(order))
            cursor = Cursor(epoch + 1)

    def load(self, key: int) -> np.ndarray:
        return self.tokens[key]["ids"]


def tokenise(source: Source, encoder, cache: str) -> datasets.Dataset:
    """A map-style source as Tokens, made once: its key holds data, columns, tokenizer and code."""
    dataset = open_dataset(source, encoder)
    name = digest(dataset._fingerprint, source.column, source.fields, source.roles, encoder.fingerprint())
    file = Path(cache).expanduser() / f"{name}.arrow"

    def encode(batch, numbers):
        documents = encoder.documents(*as_rows(batch, source, numbers))
        return {"ids": [tokens.ids for tokens in documents], "note": [tokens.note for tokens in documents]}

    options = {"batched": True, "with_indices": True, "remove_columns": dataset.column_names, "features": CACHED}
    make = partial(dataset.map, encode, cache_file_name=str(file), new_fingerprint=name, **options)
    with FileLock(file.with_suffix(".lock")):  # one rank makes it, the others wait
        try:
            tokens = make()
        except (OSError, ValueError):  # it is damaged, or the disk full
            file.unlink(missing_ok=True)
            tokens = make()
    warn(source.path, tokens["note"][:])
    return tokens


def warn(where: str, notes: list[str]):
    for note, number in Counter(filter(None, notes)).items():
        log.warning("%s: %d of %d documents %s", where, number, len(notes), note)


class StreamSource:
    """Documents that are read and tokenised as the run goes. A virtual stream has whole shards."""

    def __init__(self, source: Source, encoder, seed: list[int]):
        self.source, self.encoder, self.seed = source, encoder, seed
        self.dataset = open_dataset(source, encoder)
        self.most_streams = self.num_shards = self.dataset.num_shards
        self.inventory = f"{self.num_shards} shards"

    def read(self, stream: int, num_streams: int, cursor: Cursor) -> Iterator[Document]:
        last_epoch = cursor.epoch  # that had a document; the first may begin behind its last
        # From coarse to fine: epochs, shards, chunks, documents; the cursor says where each of them begins.
        for epoch in count(cursor.epoch):
            if epoch > last_epoch + 1:
                raise ConfigError(f"data.sources {self.source.path}: stream {stream} finds no text")
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.num_shards)[stream::num_streams]
            for place, shard in enumerate(order[cursor.shard :].tolist(), cursor.shard):
                for begin, numbers, batch in self.read_shard(shard, cursor):
                    encoded = self.encoder.documents(*as_rows(batch, self.source, numbers))
                    documents = [tokens.ids for tokens in encoded if len(tokens.ids)]
                    warn(f"{self.source.path}, shard {shard}", [tokens.note for tokens in encoded])
                    for i, ids in enumerate(documents[begin.taken :], begin.taken):
                        yield Document(ids, len(ids), begin._replace(taken=i), epoch + place / len(order))
                        last_epoch = epoch
                cursor = Cursor(epoch, shard=place + 1)
            cursor = Cursor(epoch + 1)

    def read_shard(self, shard: int, cursor: Cursor) -> Iterator[tuple]:
        """The chunks of a shard from a cursor on: where each begins, its rows' numbers, and it."""
        dataset = self.dataset.shard(self.num_shards, shard)
        dataset.load_state_dict(cursor.chunk)  # None: from its beginning
        with blame(f"data.sources {self.source.path}: shard {shard}: see to file or server; {AGAIN}"):
            for batch in dataset.iter(READ_CHUNK):
                numbers = range(cursor.row, cursor.row + len(next(iter(batch.values()))))
                yield cursor, numbers, batch
                cursor = cursor._replace(taken=0, row=numbers.stop, chunk=dataset.state_dict())

    def load(self, key: np.ndarray) -> np.ndarray:
        return key


def split_file(file: dict[str, list]) -> dict[str, list]:
    """A file of JSON or CSV as its rows' JSON: of a list, of lines, or of cells, which are text."""
    text = file[ROW][0].removeprefix("\ufeff")
    first = text.lstrip()[:1]
    if first == "[":
        return {ROW: list(map(json.dumps, json.loads(text)))}
    if first == "{":
        return {ROW: list(filter(str.strip, text.split("\n")))}
    csv.field_size_limit(2**31)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    long = [number for number, row in enumerate(rows) if None in row]
    if long:
        raise ValueError(f"row {long[0]} has more cells than the header")
    return {ROW: list(map(json.dumps, rows))}


def as_rows(batch: dict[str, list], source: Source, numbers: Sequence[int]) -> tuple:
    """What an encoder takes: rows under lacuna's names, of columns or of JSON."""
    if ROW not in batch:
        values = zip(*without_nulls(list(batch.values())), strict=True)
        rows = [dict(zip(batch, row, strict=True)) for row in values]
        return [rename(row, source.fields) for row in rows], source, numbers
    rows = {}
    for number, text in zip(numbers, batch[ROW], strict=False):
        with blame(f"data.sources {source.path}, row {number}: no row of JSON, {{...}}"):
            if text.strip():  # NaN is pandas' null
                row = json.loads(text.removeprefix("\ufeff"), parse_constant=lambda constant: None)
                rows[number] = rename(row, source.fields)
    return list(rows.values()), source, list(rows)


def rename(row: dict, fields: dict[str, str]) -> dict:
    """A row by lacuna's names, in place of what has such names."""
    others = {column: value for column, value in row.items() if column not in fields.values()}
    return others | {name: row.get(column) for name, column in fields.items()}


def without_nulls(value):
    """A copy without the nulls that Arrow puts into structs whose keys differ from row to row."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def open_dataset(source: Source, encoder) -> datasets.Dataset | datasets.IterableDataset:
    """A source's dataset, with the columns that are read."""
    remote = {"storage_options": {"http": SILENCE, "https": SILENCE}}
    options = source.model_dump(include={"split", "streaming"}) | (remote if source.streaming else {})
    with blame(f"data.sources or eval.sources {source.path}, split {source.split}"):
        files = find_files(source)
        if "[" in source.split and {"features", "sample_by"} <= files.keys():
            raise ConfigError(f"data.sources: {source.path}: slices need .jsonl, or see eval.fraction")
        if files["path"] == "parquet" and not source.fields:
            # the schema first, so that only the columns that are needed are read from disk or network
            [schema, *_] = datasets.load_dataset(**files, streaming=True, **remote).values()
            columns = encoder.columns(schema.column_names, source)
            return datasets.load_dataset(**files, **options, columns=columns)
        dataset = datasets.load_dataset(**files, **options)
        if "features" in files and "sample_by" in files:
            dataset = dataset.map(split_file, batched=True, batch_size=1)
        names = dataset.column_names
        if names in (None, [ROW]):
            rows, *_ = as_rows(next(dataset.iter(100)), Source(path=source.path), range(100))
            names = sorted(set().union(*rows))
        if not set(source.fields.values()) <= set(names):
            raise ConfigError(f"data.sources {source.path}: fields {source.fields} are not all among {names}")
        read = encoder.columns(list(rename(dict.fromkeys(names), source.fields)), source)
        columns = [source.fields.get(name, name) for name in read]
        return dataset if "features" in files else dataset.select_columns(columns)


def find_files(source: Source) -> dict:
    """What datasets is to read, and how."""
    path = Path(source.path)
    files = source.model_dump(include={"path", "name", "data_files"})
    splits = {"train": [escape(source.path) if path.is_file() else source.path]}
    if path.is_dir():
        splits = find_splits(path, source, files)
    kind = min(map(ending, chain(*splits.values())))  # .json before .jsonl: it reads lines, too
    reader = READERS.get(kind)
    remote = source.streaming and "://" in source.path
    if (reader is None and glob(source.path) and not path.is_dir()) or (remote and kind == ".csv"):
        raise ConfigError(f"data.sources: {source.path} is none of {', '.join(READERS)}; CSV needs streaming = false")
    if reader is None:  # of a kind that datasets alone knows
        return files
    if not path.is_dir() and (source.name or source.data_files):
        raise ConfigError(f"data.sources: {source.path} is a file: remove name and data_files")
    if "features" in reader and remote:
        reader = {"path": "json"}  # of a text, datasets may lose some
    return reader | {"data_files": splits}


def find_splits(folder: Path, source: Source, files: dict) -> dict[str, list[str]]:
    """A folder's files by split: without a README.md, what no name says is `train`."""
    found = datasets.load_dataset_builder(**files).config.data_files
    splits = {str(split): [*dict.fromkeys(filterfalse(COPIES.search, paths))] for split, paths in found.items()}
    saved = [info.parent for info in folder.resolve().glob("*/dataset_info.json")]  # save_to_disk
    splits = {part.name: sorted(map(str, part.glob("data*.arrow"))) for part in saved} or splits
    kinds = set(map(ending, chain(*splits.values())))
    here = filterfalse(COPIES.search, glob(f"{escape(str(folder.resolve()))}/**", recursive=True))
    there = {path for path in here if ending(path) in READERS}
    left = sorted(path for path in there.difference(*splits.values()) if ending(path) in kinds)
    if left and not (source.name or source.data_files or (folder / "README.md").exists()):
        splits["train"] = splits.get("train", []) + left
    read = [paths for split, paths in splits.items() if split in re.findall(r"\w+", source.split)]
    unread = ", ".join(sorted(there.difference(*read)))
    if unread:
        log.warning("%s: not read for split %s: %s", folder, source.split, unread)
    return {split: list(map(escape, paths)) for split, paths in splits.items()}


def ending(path: str | Path) -> str:
    """A file's ending, but for one of compression."""
    return Path(re.sub(r"\.(gz|zst|bz2|xz)$", "", str(path).lower())).suffix
