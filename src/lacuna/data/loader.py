"""The one order of data, whatever the hardware: row p is the next of virtual stream p mod V.

A stream draws a window of documents, shuffles, packs, and shuffles the rows. Its state, where the window began, goes
with every row: what is prefetched never counts as consumed. Map-style data is one stream.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from lacuna.config import Config
from lacuna.data.batch import PackedBatch, Row, assemble, collate
from lacuna.data.pack import best_fit, split_documents
from lacuna.data.sources import Cursor, Document, MapSource, StreamSource

MAP_WINDOW = 131_072  # documents packed together: fill .999 in 0.4 s
STREAM_WINDOW = (8, 512)  # rows of a stream's first and largest window: fill .997
MOST_STREAMS = 64  # of data that streams: one a shard, or fewer
PREFETCH = 3  # micro-batches made ahead


@dataclass
class StreamState:
    """Where a window of a stream begins: enough to draw it again. `asdict` makes JSON of it."""

    cursors: list[dict]  # the Cursor of each source, as JSON
    drawn: list[int]  # tokens drawn from each source: decides whose turn it is in a mixture
    window: int = 0  # its number, which seeds its shuffle
    row: int = 0  # rows of the stream before it


class RowPlan(NamedTuple):
    """What a row is made of; no token is loaded yet. By default, a row past the end of the data."""

    row: int = -1  # its number in the stream
    pieces: Sequence[tuple] = ()  # (source, document, start, end): tokens start to end of a document
    epoch: float = 0.0
    state: dict | None = None  # StreamState as JSON


class RowDataset:
    """Rows rank, rank + ranks, … of the run: `epochs`, at most `limit`; then rows that train nothing."""

    def __init__(
        self, config: Config, sources, encoder, *, rank, ranks, epochs=None, limit=math.inf, share=(0, 1), state=None
    ):
        self.seed = config.seed
        self.seq_len = config.train.seq_len
        self.batch_rows = config.train.global_batch_size
        self.packing = {"filler": encoder.eos, "mask_boundary": config.data.mask_boundary}
        self.rank, self.ranks = rank, ranks
        self.epochs, self.limit = epochs or math.inf, limit
        # Rows of the run that are consumed, and each stream's StreamState by its number, as text: JSON.
        self.state = state or {"rows": 0, "streams": {}}
        # Without weights all sources count as one, each document once an epoch.
        groups = [[source] for source in sources] if sources[0].weight else [sources]
        self.weights = [group[0].weight or 1.0 for group in groups]
        self.sources = []
        for i, group in enumerate(groups):
            if group[0].streaming:
                self.sources.append(StreamSource(group[0], encoder, [self.seed, i]))
            else:
                self.sources.append(MapSource(group, encoder, [self.seed, i], cache=config.data.cache, share=share))
        self.inventory = [source.inventory for source in self.sources]
        most = [source.most_streams for source in self.sources]
        self.map_style = not any(source.streaming for source in sources)
        # At most about an epoch: rows are shuffled inside a window, and documents must not wait long.
        self.window_documents = min(MAP_WINDOW, sum(most)) if self.map_style else math.inf
        self.num_streams = 1 if self.map_style else min(MOST_STREAMS, *most)

    def count_rows(self) -> int:
        """Rows that are left of map-style data's epochs, at most `limit`; no token is read."""
        return sum(plan.row < self.limit for plan in self.plan_stream(0)) - self.state["rows"]

    def __iter__(self) -> Iterator[Row]:
        state = self.state
        # A generator reads nothing before its first row is asked for, so a rank reads its own streams alone.
        streams = [self.plan_stream(i, state["streams"].get(str(i))) for i in range(self.num_streams)]
        for position in itertools.count(self.state["rows"] + self.rank, self.ranks):
            row, number = divmod(position, self.num_streams)
            plan = RowPlan()
            if position < self.limit:
                # rows before it are consumed, or other ranks'; in a stream their tokens are made all the same
                plan = next((plan for plan in streams[number] if plan.row == row), plan)
            if plan.state:
                places = state["streams"] | {str(number): plan.state}
                state = {"rows": position + 1, "streams": places}  # no empty ones
            pieces = [(self.sources[source].load(document.key), *span) for source, document, *span in plan.pieces]
            made = assemble(pieces, self.seq_len, place=position % self.batch_rows, **self.packing)
            yield made._replace(epoch=plan.epoch, state=state)

    def plan_stream(self, number: int, saved: dict | None = None) -> Iterator[RowPlan]:
        """The rows of a virtual stream, from a StreamState on (JSON), to the end of the last epoch."""
        count = len(self.sources)
        state = StreamState(**saved or {"cursors": [{}] * count, "drawn": [0] * count})
        pairs = zip(self.sources, state.cursors, strict=True)
        readers = [source.read(number, self.num_streams, Cursor(**cursor)) for source, cursor in pairs]
        lookahead = [next(reader) for reader in readers]  # the next document of each source
        while min(document.epoch for document in lookahead) < self.epochs:
            state.cursors = [document.cursor._asdict() for document in lookahead]
            saved = asdict(state)
            begin = max(document.epoch for document in lookahead)
            documents = self.draw_documents(state, readers, lookahead)
            end = max(document.epoch for document in lookahead)
            # Neighbours in a file are alike, and so are those in a row: both are shuffled.
            rng = np.random.default_rng([self.seed, number, state.window])
            documents = [documents[i] for i in rng.permutation(len(documents))]
            lengths = np.asarray([document.length for _, document in documents])
            which, starts, sizes = split_documents(lengths, self.seq_len)
            spans = zip(which.tolist(), starts.tolist(), (starts + sizes).tolist(), strict=True)
            pieces = [(*documents[i], start, end) for i, start, end in spans]
            rows = best_fit(sizes, self.seq_len)
            for i, row in enumerate(rng.permutation(len(rows)), 1):
                epoch = begin + (end - begin) * i / len(rows)
                yield RowPlan(state.row, [pieces[piece] for piece in rows[row]], epoch, saved)
                state.row += 1
            state.window += 1

    def draw_documents(self, state: StreamState, readers: list, lookahead: list) -> list[tuple[int, Document]]:
        """The next window's documents, each with its source: the one furthest behind its weight."""
        documents = []
        drawn = list(state.drawn)
        # A window of indices has so many documents, one of a stream so many rows' tokens.
        rows = min(STREAM_WINDOW[0] << state.window, STREAM_WINDOW[1])
        full = math.inf if self.map_style else sum(drawn) + rows * self.seq_len
        while len(documents) < self.window_documents and sum(drawn) < full:
            # No randomness: shares are exact at any time, and the state is a few numbers.
            source = min(range(len(drawn)), key=lambda i: drawn[i] / self.weights[i])
            document = lookahead[source]
            lookahead[source] = next(readers[source])
            documents.append((source, document))
            drawn[source] += document.length
            if len(drawn) == 1 and lookahead[0].cursor.epoch > document.cursor.epoch:
                break  # a window ends with the epoch: no row mixes two
        state.drawn = drawn
        return documents


class Loader:
    """One rank's micro-batches, made ahead by a thread: a process was no faster (RESULTS.md)."""

    def __init__(self, config: Config, dataset: RowDataset, device, training: bool = True):
        self.device = device
        self.state = dataset.state  # after the last row handed out
        size = config.train.micro_batch_size
        self.accumulation = dataset.batch_rows // (size * dataset.ranks) if training else 1
        self.made = make_batches(dataset, size)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.ready = deque(self.thread.submit(next, self.made) for _ in range(PREFETCH))

    def step(self) -> list[PackedBatch]:
        """The next step's micro-batches, on the device. Raises what went wrong in the thread."""
        batches = []
        for _ in range(self.accumulation):
            batch, self.state = self.ready.popleft().result()
            self.ready.append(self.thread.submit(next, self.made))
            batches.append(batch.to(self.device))
        return batches

    def close(self):
        self.thread.shutdown(cancel_futures=True)


def make_batches(dataset: RowDataset, size: int) -> Iterator[tuple[PackedBatch, dict]]:
    """Micro-batches of so many rows, each with the dataset's state after it; endless."""
    rows = iter(dataset)
    while batch := list(itertools.islice(rows, size)):
        yield collate(batch), batch[-1].state


def merge_states(states: list[dict]) -> dict:
    """One state of all ranks': of each stream the latest window, in which a reader skips ahead."""
    streams = itertools.chain(*(state["streams"].items() for state in states))
    latest = dict(sorted(streams, key=lambda stream: stream[1]["row"]))
    return {"rows": max(state["rows"] for state in states), "streams": latest}
