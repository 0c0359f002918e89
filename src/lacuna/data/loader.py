"""Documents to rows, rows to `PackedBatch`: the one order of data, whatever the hardware.

A virtual stream draws a window of documents, packs it, shuffles the rows and emits them. Row p of the run is the next
row of stream p mod V. A rank, and each of its workers, takes every n-th row and reads the streams of those alone: so
the order depends on (seed, data, mixture). Map-style data is one stream of indices, which everyone plans. A stream's
state is where its window began. It travels with every row, so that what is prefetched never counts as consumed.
"""

import copy
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lacuna.config import Config, ConfigError, log
from lacuna.data.batch import PackedBatch, Row, assemble, collate
from lacuna.data.pack import best_fit, split_documents
from lacuna.data.sources import Cursor, MapSource, StreamSource
from lacuna.data.tokenize import Encoder
from lacuna.preemption import ignore_signals

MAP_WINDOW = 131_072  # documents packed together where they are indices only: fill .9999 in 0.1 to 0.3 s
STREAM_WINDOW = (8, 512)  # rows in a stream's first and largest windows: starts at once, then fill .998
PREFETCH = 3  # micro-batches made ahead


@dataclass
class StreamState:
    """Where a window of a stream began: enough to draw it again. `asdict` makes JSON of it, for a checkpoint."""

    cursors: list[Cursor]  # one a source
    drawn: list[int]  # tokens drawn from each source: decides whose turn it is in a mixture
    window: int = 0  # its number, which seeds its shuffle
    row: int = 0  # rows of the stream before it


class RowPlan(NamedTuple):
    """What a row is made of; no token is loaded yet. By default, a row past the end of the data."""

    row: int = -1  # its number in the stream
    pieces: Sequence[tuple] = ()  # (source, key, start, end): tokens start to end of a document
    epoch: float = 0.0
    dropped: int = 0
    state: dict | None = None  # StreamState as JSON


class Stream:
    """One virtual stream, from a StreamState on (JSON; None: from its beginning)."""

    def __init__(self, data: "RowDataset", number: int, saved: dict | None):
        state = StreamState([Cursor()] * len(data.sources), [0] * len(data.sources))
        if saved:
            state = StreamState(**saved)
            state.cursors = [Cursor(**cursor) for cursor in saved["cursors"]]
        self.data = data
        self.number = number
        self.drawn = list(state.drawn)
        self.window = state.window
        self.row = state.row
        pairs = zip(data.sources, state.cursors, strict=True)
        self.readers = [source.read(number, data.num_streams, cursor) for source, cursor in pairs]
        self.lookahead = [next(reader) for reader in self.readers]  # the next document of each source

    def __iter__(self) -> Iterator[RowPlan]:
        """Its rows, up to the end of the last epoch."""
        counted = 0
        while min(document.epoch for document in self.lookahead) < self.data.epochs:
            cursors = [document.cursor for document in self.lookahead]
            state = asdict(StreamState(cursors, self.drawn, self.window, self.row))
            begin = max(document.epoch for document in self.lookahead)
            rows = self.draw_window()
            end = max(document.epoch for document in self.lookahead)
            # reported by the window's first row, which is consumed where a run goes on: so none is counted twice
            dropped = sum(document.dropped for document in self.lookahead) - counted
            counted += dropped
            for i, pieces in enumerate(rows, 1):
                yield RowPlan(self.row, pieces, begin + (end - begin) * i / len(rows), dropped, state)
                self.row += 1
                dropped = 0

    def draw_window(self) -> list[list[tuple]]:
        """The pieces of each row of the next window."""
        documents = self.draw_documents()
        lengths = np.asarray([length for _, _, length in documents])
        which, starts, sizes = split_documents(lengths, self.data.seq_len)
        pieces = []
        for document, start, size in zip(which.tolist(), starts.tolist(), sizes.tolist(), strict=True):
            source, key, _ = documents[document]
            pieces.append((source, key, start, start + size))
        rows = best_fit(sizes, self.data.seq_len)
        generator = np.random.default_rng([self.data.seed, self.number, self.window])
        self.window += 1
        shuffled = []
        for row in generator.permutation(len(rows)):
            shuffled.append([pieces[piece] for piece in rows[row]])
        return shuffled

    def draw_documents(self) -> list[tuple]:
        """(source, key, length) of the next window's documents, each from the source furthest behind its weight."""
        documents = []
        # A stream's window has so many tokens, one of indices so many documents.
        full = math.inf
        if not self.data.map_style:
            rows = min(STREAM_WINDOW[0] << self.window, STREAM_WINDOW[1])
            full = sum(self.drawn) + rows * self.data.seq_len
        next_epoch = int(self.lookahead[0].epoch) + 1
        while len(documents) < self.data.window_documents and sum(self.drawn) < full:
            # No randomness: shares are exact at any time, and the state is a few numbers.
            source = min(range(len(self.drawn)), key=lambda i: self.drawn[i] / self.data.weights[i])
            document = self.lookahead[source]
            documents.append((source, document.key, document.length))
            self.drawn[source] += document.length
            self.lookahead[source] = next(self.readers[source])
            if len(self.lookahead) == 1 and self.lookahead[0].epoch >= next_epoch:
                break  # a window ends with the epoch: no row mixes two
        return documents


class RowDataset(IterableDataset):
    """The rows of one rank, split over its workers: row p for p = rank, rank + ranks, …

    What comes after that many epochs, or after row `limit`, trains nothing. share: see MapSource.
    """

    def __init__(
        self, config: Config, sources, encoder: Encoder, *, rank, ranks, epochs=None, limit=math.inf, share=(0, 1)
    ):
        self.seed = config.seed
        self.seq_len = config.train.seq_len
        self.batch_rows = config.train.global_batch_size
        self.packing = {"filler": encoder.eos, "mask_boundary": config.data.mask_boundary}  # for `assemble`
        self.rank = rank
        self.ranks = ranks
        self.epochs = epochs or math.inf
        self.limit = limit
        self.state = {"rows": 0, "streams": {}}  # see Loader
        # Without weights all sources are one: each of their documents once an epoch.
        groups = [[source] for source in sources] if sources[0].weight else [sources]
        self.weights = [group[0].weight or 1.0 for group in groups]
        self.sources = []
        for i, group in enumerate(groups):
            if group[0].streaming:
                source = StreamSource(group[0], encoder, [self.seed, i])
            else:
                source = MapSource(group, encoder, [self.seed, i], cache=config.data.cache, share=share)
            self.sources.append(source)
        self.inventory = [source.inventory for source in self.sources]  # what a run that goes on must find again
        self.notes = sum((source.notes for source in self.sources), Counter())  # how many documents became what
        self.map_style = not any(source.streaming for source in sources)
        self.num_streams = 1
        self.window_documents = math.inf
        if self.map_style:
            # At most about an epoch: rows are shuffled inside a window, and documents must not wait long.
            self.window_documents = min(MAP_WINDOW, sum(source.most_streams for source in self.sources))
        else:
            asked = config.data.num_streams or 64
            self.num_streams = min(asked, *(source.most_streams for source in self.sources))
            # by default, and for held-out data, there may be fewer
            if config.data.num_streams and self.num_streams < asked and sources == config.data.sources:
                problem = f"data.num_streams {asked} exceeds the shards (or documents) of a source"
                raise ConfigError(f"{problem}: use at most {self.num_streams}")

    def count_rows(self) -> int:
        """Rows of all epochs of map-style data, from the lengths alone."""
        return sum(1 for _ in Stream(self, 0, None))

    def resumed(self, state: dict) -> "RowDataset":
        """The same rows from a Loader's state on."""
        dataset = copy.copy(self)
        dataset.state = state
        return dataset

    def __iter__(self) -> Iterator[Row]:
        readers = self.ranks
        first = self.state["rows"] + self.rank
        worker = get_worker_info()
        if worker:
            readers = self.ranks * worker.num_workers
            first += self.ranks * worker.id
        streams = {}
        for position in itertools.count(first, readers):
            row, number = divmod(position, self.num_streams)
            if number not in streams:
                streams[number] = iter(Stream(self, number, self.state["streams"].get(str(number))))
            # Skipping plans costs little where they are indices; where data streams, its tokens are made all the same.
            plan = RowPlan()
            if position < self.limit:
                plan = skip_to(row, streams[number])
            pieces = [(self.sources[source].load(key), start, end) for source, key, start, end in plan.pieces]
            packed = assemble(pieces, self.seq_len, place=position % self.batch_rows, **self.packing)
            yield packed._replace(epoch=plan.epoch, dropped=plan.dropped, stream=number, state=plan.state)


def skip_to(row: int, plans: Iterator[RowPlan]) -> RowPlan:
    """The plan of a stream's row; those before it are other readers', or consumed."""
    for plan in plans:
        if plan.row == row:
            return plan
    return RowPlan()


class Loader:
    """The micro-batches of one rank, made ahead by a thread (and worker processes, if there are any).

    context_len: longest piece that attention sees; it grows to seq_len in context_warmup_steps.
    state: go on after what was handed out then, by one rank or by all (`merge_states`).
    """

    def __init__(
        self,
        dataset: RowDataset,
        device,
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
            workers = int(not dataset.map_style)
        readers = dataset.ranks * max(1, workers)
        if dataset.rank == 0 and dataset.num_streams % readers and not dataset.map_style:
            problem = f"{dataset.num_streams} virtual streams do not divide over {readers} readers (ranks x workers)"
            times = readers // math.gcd(dataset.num_streams, readers)
            cure = f"a multiple of {readers} would be fast (data.num_streams, at most the number of shards)"
            log.warning("data: %s, so each is read %d times; %s", problem, times, cure)
        # JSON: the rows of the run that are consumed, and each stream's state (by its number, as text).
        self.state = state or {"rows": 0, "streams": {}}
        if any("cursors" not in stream for stream in self.state["streams"].values()):
            raise ConfigError("this checkpoint's place in the data was written by an older lacuna: begin a new run")
        self.prepared = self.state  # by the thread, so ahead of it
        options = {"batch_size": None, "num_workers": workers, "worker_init_fn": ignore_signals}
        if workers:
            options |= {"multiprocessing_context": "spawn", "prefetch_factor": 2 * micro_batch_size}
        # Row._make leaves a row as it is: torch's own function would make tensors of its arrays.
        self.rows = iter(DataLoader(dataset.resumed(self.state), collate_fn=Row._make, **options))
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.ready = deque(self.thread.submit(self.prepare) for _ in range(PREFETCH))

    def step(self) -> list[PackedBatch]:
        """The micro-batches of the next optimizer step."""
        return [self.next() for _ in range(self.accumulation)]

    def next(self) -> PackedBatch:
        """The next micro-batch, on the device. Raises what went wrong in the thread or a worker."""
        batch, self.state = self.ready.popleft().result()
        self.ready.append(self.thread.submit(self.prepare))
        return batch.to(self.device)

    def prepare(self) -> tuple[PackedBatch, dict]:
        """In the thread: a micro-batch, and the state after it."""
        try:
            rows = list(itertools.islice(self.rows, self.micro_batch_size))
        except ConfigError as error:  # a worker's comes with its traceback
            raise ConfigError(str(error).strip().rpartition("ConfigError: ")[2]) from None
        done = self.prepared["rows"]
        batch = collate(rows, self.context_len(done // self.dataset.batch_rows))
        streams = self.prepared["streams"] | {str(row.stream): row.state for row in rows if row.state}
        self.prepared = {"rows": done + len(rows) * self.dataset.ranks, "streams": streams}
        return batch, self.prepared

    def context_len(self, step: int) -> int:
        """Longest piece of a document at a step (arXiv 2503.15450)."""
        grown = min(1, step / self.warmup) if self.warmup else 0
        return self.shortest + int((self.dataset.seq_len - self.shortest) * grown)

    def close(self):
        self.thread.shutdown(cancel_futures=True)


def merge_states(states: list[dict]) -> dict:
    """One state of those of all ranks: of each stream the latest window, since a reader skips ahead inside it."""
    latest = {}
    for state in states:
        for number, stream in state["streams"].items():
            latest[number] = max(latest.get(number, stream), stream, key=lambda stream: stream["row"])
    return {"rows": states[0]["rows"], "streams": latest}
