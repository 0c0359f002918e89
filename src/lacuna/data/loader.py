"""Documents to rows, rows to `PackedBatch`: the one order of data, whatever the hardware.

A virtual stream draws a window of documents, packs it, shuffles the rows and emits them. Row p of the run is the next
row of stream p mod V. A rank (and each of its workers) takes every n-th row and reads only the streams that those rows
come from, so the order of rows depends on (seed, data, mixture) alone. Map-style data is one stream of indices that
everyone plans and nobody reads twice. The state of a stream is where its window began; it travels with every row, so
what is prefetched never counts as consumed, and how many of the window's rows are gone follows from the row's number.
"""

import copy
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lacuna.config import Config, ConfigError, Source, log, nearest_multiple
from lacuna.data.batch import PackedBatch, Row, assemble, collate
from lacuna.data.pack import best_fit, split_documents
from lacuna.data.sources import Cursor, MapSource, StreamSource
from lacuna.data.tokenize import Encoder
from lacuna.preemption import ignore_signals

MAP_WINDOW = 131_072  # documents packed together where they are indices only: fill .9999 in 0.1 to 0.3 s
STREAM_WINDOW = (8, 512)  # rows in a stream's first and largest windows: starts at once, then fill .998
PREFETCH = 3  # micro-batches made ahead


class StreamState(NamedTuple):
    """Where a window of a virtual stream begins: what it takes to draw it again, on any number of ranks."""

    cursors: list[Cursor]  # one a source
    drawn: list[int]  # tokens drawn from each source, which decides whose turn it is in a mixture
    window: int  # its number, which seeds its shuffle
    row: int  # rows of the stream before it


class Progress(NamedTuple):
    """What of a run is consumed."""

    rows: int  # of all ranks
    streams: dict[int, StreamState]  # of each stream the window that its last row came from

    def to_json(self) -> dict:
        """As it stands in a checkpoint."""
        streams = {}
        for number, state in self.streams.items():
            cursors = [cursor._asdict() for cursor in state.cursors]
            streams[str(number)] = state._asdict() | {"cursors": cursors}
        return {"rows": self.rows, "streams": streams}

    @classmethod
    def from_json(cls, saved: dict) -> "Progress":
        """What `to_json` made, also of several ranks (`merge_states`)."""
        streams = {}
        for number, state in saved["streams"].items():
            cursors = [Cursor(**cursor) for cursor in state["cursors"]]
            streams[int(number)] = StreamState(**state | {"cursors": cursors})
        return cls(saved["rows"], streams)


def merge_states(states: list[dict]) -> dict:
    """One `Loader.state` of those of all ranks: of each stream the latest window, since a reader skips ahead in it."""
    latest = {}
    for state in states:
        for number, stream in state["streams"].items():
            if number not in latest or stream["row"] > latest[number]["row"]:
                latest[number] = stream
    return {"rows": states[0]["rows"], "streams": latest}


class Piece(NamedTuple):
    """Tokens start to end of a document."""

    source: int
    key: int | np.ndarray  # of the document in its source
    start: int
    end: int


class RowPlan(NamedTuple):
    """What a row will be made of, before any token is loaded. The default is a row past the end of the data."""

    row: int = -1  # its number in the stream
    pieces: Sequence[Piece] = ()
    epoch: float = 0.0
    dropped: int = 0
    stream: int = 0
    state: StreamState | None = None


class Stream:
    """One virtual stream: it draws documents, packs them, and says of what its rows will be made."""

    def __init__(self, data: "RowDataset", number: int, state: StreamState | None):
        if state is None:
            sources = len(data.sources)
            state = StreamState([Cursor()] * sources, [0] * sources, window=0, row=0)
        self.data = data
        self.number = number
        self.drawn = list(state.drawn)
        self.window = state.window
        self.row = state.row
        pairs = zip(data.sources, state.cursors, strict=True)
        self.readers = [source.read(number, data.num_streams, cursor) for source, cursor in pairs]
        self.lookahead = [next(reader) for reader in self.readers]  # the next document of each source

    def __iter__(self) -> Iterator[RowPlan]:
        """The rows in order, up to the last epoch's end. The first is that of `state.row`."""
        counted = 0  # documents without text
        while min(document.epoch for document in self.lookahead) < self.data.epochs:
            cursors = [document.cursor for document in self.lookahead]
            state = StreamState(cursors, list(self.drawn), self.window, self.row)
            begin = max(document.epoch for document in self.lookahead)
            rows = self.draw_window()
            end = max(document.epoch for document in self.lookahead)
            # The window's first row has the documents without text met since the last window. Nothing is counted twice
            # where a run goes on: then the first row is consumed already.
            dropped = sum(document.dropped for document in self.lookahead) - counted
            counted += dropped
            for i, pieces in enumerate(rows, 1):
                epoch = begin + (end - begin) * i / len(rows)
                yield RowPlan(self.row, pieces, epoch, dropped, self.number, state)
                self.row += 1
                dropped = 0

    def draw_window(self) -> list[list[Piece]]:
        """The rows of the next window."""
        sources, keys, lengths = self.draw_documents()
        document, start, length = split_documents(np.asarray(lengths), self.data.seq_len)
        pieces = []
        for d, begin, end in zip(document.tolist(), start.tolist(), (start + length).tolist(), strict=True):
            pieces.append(Piece(sources[d], keys[d], begin, end))
        rows = best_fit(length, self.data.seq_len)
        order = np.random.default_rng([self.data.seed, self.number, self.window]).permutation(len(rows))
        self.window += 1
        shuffled = []
        for row in order:
            shuffled.append([pieces[p] for p in rows[row]])
        return shuffled

    def draw_documents(self) -> tuple[list[int], list, list[int]]:
        """Source, key and length of the next window's documents: always from the source furthest behind its weight."""
        sources = []
        keys = []
        lengths = []
        tokens = math.inf
        if not self.data.map_style:
            rows = min(STREAM_WINDOW[0] << self.window, STREAM_WINDOW[1])
            tokens = sum(self.drawn) + rows * self.data.seq_len
        next_epoch = int(self.lookahead[0].epoch) + 1
        while len(keys) < self.data.window_documents and sum(self.drawn) < tokens:
            source = min(range(len(self.drawn)), key=lambda i: self.drawn[i] / self.data.weights[i])
            document = self.lookahead[source]
            self.lookahead[source] = next(self.readers[source])
            self.drawn[source] += document.length
            sources.append(source)
            keys.append(document.key)
            lengths.append(document.length)
            if len(self.lookahead) == 1 and self.lookahead[0].epoch >= next_epoch:
                break  # a window ends with the epoch: no row mixes two
        return sources, keys, lengths


class RowDataset(IterableDataset):
    """The rows of one rank, split over its loader workers: row p for p = rows + rank, rows + rank + ranks, …

    epochs, limit: after so many epochs or rows come rows that train nothing. share: see MapSource.
    """

    def __init__(
        self,
        config: Config,
        sources: list[Source],
        encoder: Encoder,
        *,
        rank: int,
        ranks: int,
        epochs: int | None = None,
        limit: float = math.inf,
        share: tuple[float, float] = (0.0, 1.0),
    ):
        self.seed = config.seed
        self.seq_len = config.train.seq_len
        self.batch_rows = config.train.global_batch_size
        self.mask_boundary = config.data.mask_boundary
        self.filler = encoder.eos
        self.rank = rank
        self.ranks = ranks
        self.epochs = epochs or math.inf
        self.limit = limit
        self.progress = Progress(0, {})
        self.map_style = not any(source.streaming for source in sources)
        groups = [[source] for source in sources] if sources[0].weight else [sources]
        self.weights = [group[0].weight or 1.0 for group in groups]
        self.sources = []
        for i, group in enumerate(groups):
            seed = [self.seed, i]
            if group[0].streaming:
                self.sources.append(StreamSource(group[0], encoder, seed=seed))
            else:
                self.sources.append(MapSource(group, encoder, seed=seed, cache=config.data.cache, share=share))
        self.window_documents = math.inf
        self.num_streams = 1
        if self.map_style:  # at most about an epoch: rows are shuffled in a window, and documents must not wait long
            self.window_documents = min(MAP_WINDOW, sum(len(source.documents) for source in self.sources))
        else:
            asked = config.data.num_streams
            most = min(source.most_streams for source in self.sources)
            if asked and asked > most and sources == config.data.sources:
                few = min(self.sources, key=lambda source: source.most_streams).inventory
                raise ConfigError(f"data.num_streams {asked} is too many for a source of {few}: use at most {most}")
            self.num_streams = min(asked or 64, most)

    @property
    def inventory(self) -> list[str]:
        """What a run that goes on must find again."""
        return [source.inventory for source in self.sources]

    @property
    def notes(self) -> Counter:
        """Documents by what became of them, as far as is known."""
        return sum((source.notes for source in self.sources), Counter())

    def count_rows(self) -> int:
        """Rows of all epochs of map-style data, from the lengths alone."""
        return sum(1 for _ in Stream(self, 0, None))

    def resumed(self, progress: Progress) -> "RowDataset":
        """The same rows, without those that are consumed."""
        dataset = copy.copy(self)
        dataset.progress = progress
        return dataset

    def __iter__(self) -> Iterator[Row]:
        worker = 0
        workers = 1
        info = get_worker_info()
        if info is not None:
            worker = info.id
            workers = info.num_workers
        streams = {}
        first = self.progress.rows + self.rank + self.ranks * worker
        for position in itertools.count(first, self.ranks * workers):
            row, number = divmod(position, self.num_streams)
            if number not in streams:
                streams[number] = iter(Stream(self, number, self.progress.streams.get(number)))
            plan = RowPlan()
            if position < self.limit:
                plan = skip_to(row, streams[number])
            yield self.load(plan, position)

    def load(self, plan: RowPlan, position: int) -> Row:
        """The row of a plan, at this position of the run."""
        pieces = []
        for piece in plan.pieces:
            pieces.append((self.sources[piece.source].load(piece.key), piece.start, piece.end))
        row = assemble(
            pieces,
            self.seq_len,
            filler=self.filler,
            mask_boundary=self.mask_boundary,
            place=position % self.batch_rows,
        )
        return row._replace(epoch=plan.epoch, dropped=plan.dropped, stream=plan.stream, state=plan.state)


def skip_to(row: int, plans: Iterator[RowPlan]) -> RowPlan:
    """The plan of a stream's row. Those before it are other readers', or consumed."""
    for plan in plans:
        if plan.row == row:
            return plan
    return RowPlan()  # past the end of the data


class Loader:
    """The micro-batches of one rank, prepared ahead by a thread (and by worker processes, if there are to be any).

    state: begin after what that of `merge_states` says. context_len: longest piece that attention sees; it grows to
    seq_len over context_warmup_steps.
    """

    def __init__(
        self,
        dataset: RowDataset,
        device: torch.device,
        *,
        micro_batch_size: int,
        accumulation: int = 1,
        workers: int | None = None,
        context_len: int | None = None,
        context_warmup_steps: int = 0,
        state: dict | None = None,
    ):
        self.dataset = dataset
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.shortest = context_len or dataset.seq_len
        self.warmup = context_warmup_steps
        if workers is None:
            workers = 0 if dataset.map_style else 1
        warn_of_double_work(dataset, workers)
        self.consumed = Progress.from_json(state) if state else Progress(0, {})
        self.prepared = self.consumed  # by the thread, so ahead of what is consumed
        options = {}
        if workers:
            options = {"multiprocessing_context": "spawn", "prefetch_factor": 2 * micro_batch_size}
        rows = DataLoader(
            dataset.resumed(self.consumed),
            batch_size=None,
            num_workers=workers,
            collate_fn=Row._make,  # a row as it is: torch's own would make tensors of its arrays
            worker_init_fn=ignore_signals,
            **options,
        )
        self.rows = iter(rows)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.ready = deque(self.thread.submit(self.prepare) for _ in range(PREFETCH))

    @property
    def state(self) -> dict:
        """Where this rank stands after what was handed out, as JSON. `merge_states` makes the run's of all ranks'."""
        return self.consumed.to_json()

    def step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next optimizer step, on the device."""
        return [self.next() for _ in range(self.accumulation)]

    def next(self) -> PackedBatch:
        """The next micro-batch on the device. Raises what went wrong in the thread or a worker."""
        batch, self.consumed = self.ready.popleft().result()
        self.ready.append(self.thread.submit(self.prepare))
        return batch.to(self.device)

    def prepare(self) -> tuple[PackedBatch, Progress]:
        """In the thread: the next micro-batch, and what is consumed with it."""
        try:
            rows = list(itertools.islice(self.rows, self.micro_batch_size))
        except ConfigError as error:  # a worker's comes with its traceback
            raise ConfigError(str(error).strip().rpartition("ConfigError: ")[2]) from None
        batch = collate(rows, self.context_len(self.prepared.rows))
        streams = dict(self.prepared.streams)
        for row in rows:
            if row.state is not None:
                streams[row.stream] = row.state
        self.prepared = Progress(self.prepared.rows + len(rows) * self.dataset.ranks, streams)
        return batch, self.prepared

    def context_len(self, rows: int) -> int:
        """Longest document piece at the step that begins after `rows` rows of the run (arXiv 2503.15450)."""
        grown = 0.0
        if self.warmup:
            grown = min(1, rows // self.dataset.batch_rows / self.warmup)
        return self.shortest + int((self.dataset.seq_len - self.shortest) * grown)

    def close(self):
        self.thread.shutdown(cancel_futures=True)


def warn_of_double_work(dataset: RowDataset, workers: int):
    """Say once where streams do not divide over the readers: then some are read several times."""
    readers = dataset.ranks * max(1, workers)
    streams = dataset.num_streams
    if dataset.map_style or dataset.rank > 0 or streams % readers == 0:
        return
    times = readers // math.gcd(streams, readers)
    cure = f"num_shards of {nearest_multiple(streams, readers)} would divide"
    if streams > readers:
        cure += f", data.num_streams = {streams // readers * readers} would be fast"
    problem = f"{streams} virtual streams do not divide over {readers} readers (ranks x workers)"
    log.warning("data: %s, so each is read %d times; %s", problem, times, cure)
