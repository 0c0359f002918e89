"""Documents to rows, rows to `PackedBatch`: the one order of data, whatever the hardware.

A virtual stream draws a window of documents, packs it, shuffles the rows and emits them. Row p of the run is the next
row of stream p mod V. A rank (and each of its workers) takes every n-th row and reads only the streams that those rows
come from, so the order of rows depends on (seed, data, mixture) alone. Map-style data is one stream of indices that
everyone plans and nobody reads twice. The state of a stream is where its window began; it travels with every row, so
what is prefetched never counts as consumed, and how many of the window's rows are gone follows from the row's number.
"""

import itertools
import math
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lacuna.config import Config, ConfigError, nearest_multiple
from lacuna.data.pack import best_fit, split_documents
from lacuna.data.sources import MapSource, StreamSource, log
from lacuna.preemption import ignore_signals

MAP_WINDOW = 131_072  # documents packed together where they are indices only: fill .9999 in 0.1 to 0.3 s
PREFETCH = 3  # micro-batches made ahead
NOTHING = ([], (0.0, 0, 0, None))  # what a row past the end of the data is made of: it trains nothing
STREAM_WINDOW = (8, 512)  # rows in a stream's first and largest windows: starts at once, then fill .998


class Row(NamedTuple):
    """One row of the run, S = seq_len slots, with the state of its stream."""

    ids: np.ndarray  # int32 [S]
    labels: np.ndarray  # int32 [S]
    starts: np.ndarray  # int64 [documents]: where each document (or what is left over) begins
    tokens: int  # slots that hold a document's token
    checksum: int
    epoch: float
    dropped: int  # documents without text met since the stream's last row
    stream: int
    state: dict | None  # None past the end of the data


class PackedBatch(NamedTuple):
    """One micro-batch: T = micro_batch_size * seq_len slots at every step."""

    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T], already shifted inside each document; -100 trains nothing
    position_ids: torch.Tensor  # int64 [T], from 0 in every document
    cu_seqlens: torch.Tensor  # int32 [N + 1], boundaries of the N documents: the one shape that changes
    max_seqlen: int  # a constant
    trained_tokens: int
    tokens: int
    pairs: int  # sum of squared document lengths: what attention computes
    checksum: int  # of ids and labels with their place in the global batch; summed over ranks it is layout-free
    dropped: int
    epoch: float

    def to(self, device: torch.device) -> "PackedBatch":
        tensors = {key: value for key, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        if device.type == "cuda":
            tensors = {key: value.pin_memory().to(device, non_blocking=True) for key, value in tensors.items()}
        return self._replace(**tensors)


class Stream:
    """One virtual stream: the plans of its rows, and the state to begin again at any of them."""

    def __init__(self, data: "RowDataset", stream: int, state: dict | None):
        self.data, self.stream, sources = data, stream, len(data.sources)
        state = state or {"sources": [{}] * sources, "drawn": [0] * sources, "window": 0, "row": 0}
        self.drawn, self.window, self.row = list(state["drawn"]), state["window"], state["row"]
        pairs = zip(data.sources, state["sources"], strict=True)
        self.readers = [source.read(stream, data.num_streams, **where) for source, where in pairs]
        self.ahead = [next(reader) for reader in self.readers]  # the next document of each source

    def __iter__(self) -> Iterator[tuple[int, list, tuple]]:
        """Number, document pieces and last fields of each `Row`, up to the last epoch's end; no token is loaded."""
        counted = 0  # also where a run goes on: the first row of a window, which has its `dropped`, is consumed by then
        while min(document.epoch for document in self.ahead) < self.data.epochs:
            sources = [document.place | {"taken": document.taken} for document in self.ahead]
            state = {"sources": sources, "drawn": list(self.drawn), "window": self.window, "row": self.row}
            begin = max(document.epoch for document in self.ahead)
            rows = self.draw_window()
            end = max(document.epoch for document in self.ahead)
            for i, pieces in enumerate(rows, 1):
                before, counted = counted, sum(document.dropped for document in self.ahead)
                epoch = begin + (end - begin) * i / len(rows)
                yield self.row, pieces, (epoch, counted - before, self.stream, state)
                self.row += 1

    def draw_window(self) -> list[list]:
        """The rows of the next window, as pieces ((source, key), start, end) of documents.

        A document is always drawn from the source that is furthest behind its weight.
        """
        data, documents, lengths = self.data, [], []
        full = sum(self.drawn) + data.seq_len * min(STREAM_WINDOW[0] << self.window, STREAM_WINDOW[1])
        next_epoch = int(self.ahead[0].epoch) + 1
        while len(documents) < data.map_window if data.map_style else sum(self.drawn) < full:
            behind = min(range(len(self.drawn)), key=lambda i: self.drawn[i] / data.weights[i])
            document = self.ahead[behind]
            self.ahead[behind] = next(self.readers[behind])
            self.drawn[behind] += document.length
            documents.append((behind, document.key))
            lengths.append(document.length)
            if len(self.ahead) == 1 and self.ahead[0].epoch >= next_epoch:
                break  # a window ends with the epoch: no row mixes two
        which, start, length = split_documents(np.asarray(lengths), data.seq_len)
        rows = best_fit(length, data.seq_len)
        order = np.random.default_rng([data.seed, self.stream, self.window]).permutation(len(rows))
        self.window += 1
        return [[(documents[which[p]], start[p], start[p] + length[p]) for p in rows[r]] for r in order]


class RowDataset(IterableDataset):
    """The rows of one rank, split over its loader workers: row p for p = first + rank, first + rank + ranks, …"""

    def __init__(self, config: Config, sources: list, encoder, rank, ranks, epochs=None, limit=math.inf, share=(0, 1)):
        self.seed, self.seq_len, self.batch_rows = config.seed, config.train.seq_len, config.train.global_batch_size
        self.mask_boundary, self.filler = config.data.mask_boundary, encoder.eos
        self.rank, self.ranks, self.epochs, self.limit = rank, ranks, epochs or math.inf, limit
        self.map_style = not any(source.streaming for source in sources)
        groups = [[source] for source in sources] if sources[0].weight else [sources]
        self.weights = [group[0].weight or 1.0 for group in groups]
        self.sources = [
            StreamSource(group[0], encoder, [self.seed, i])
            if group[0].streaming
            else MapSource(group, encoder, [self.seed, i], config.data.cache, share)
            for i, group in enumerate(groups)
        ]
        if self.map_style:  # at most about an epoch: rows are shuffled inside a window, documents must not wait long
            self.map_window = min(MAP_WINDOW, sum(len(source.documents) for source in self.sources))
        shards = [source.num_shards for source in self.sources if isinstance(source, StreamSource)]
        self.num_streams = 1 if self.map_style else config.data.num_streams or min(64, *shards)
        self.first, self.states = 0, {}  # set by Loader, to resume

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        streams = {}
        for position in itertools.count(self.first + self.rank + self.ranks * worker, self.ranks * workers):
            row, stream = divmod(position, self.num_streams)
            if stream not in streams:
                streams[stream] = iter(Stream(self, stream, self.states.get(stream)))
            mine = ((pieces, facts) for number, pieces, facts in streams[stream] if number == row)
            pieces, facts = next(mine, NOTHING) if position < self.limit else NOTHING
            yield self.assemble(pieces, position, facts)

    def count_rows(self) -> int:
        """Rows of all epochs of map-style data, from the lengths alone."""
        return sum(1 for _ in Stream(self, 0, None))

    def assemble(self, pieces: list, position: int, facts: tuple) -> Row:
        """Copy document pieces into one row. What is left over is a document of its own that trains nothing."""
        ids = np.full(self.seq_len, self.filler, dtype=np.int32)
        labels = np.full(self.seq_len, -100, dtype=np.int32)
        starts, at = [], 0
        for (source, key), start, end in pieces:
            tokens = self.sources[source].load(key)
            # a cut document goes on in its next piece: its first token there is still the target of the last one here
            piece, targets = tokens[start:end], tokens[start + 1 : end + 1]
            ids[at : at + end - start] = np.where(piece < 0, ~piece, piece)  # ~id is a token that is not trained
            labels[at : at + len(targets)] = np.where(targets < 0, -100, targets)
            starts.append(at)
            if at and not self.mask_boundary and piece[0] >= 0:
                labels[at - 1] = ids[at]
            at += end - start
        if at < self.seq_len:
            starts.append(at)
        checksum = zlib.crc32(labels.tobytes(), zlib.crc32(ids.tobytes())) * (position % self.batch_rows + 1)
        return Row(ids, labels, np.asarray(starts), at, checksum, *facts)


def collate(rows: list[Row], context_len: int) -> PackedBatch:
    """Lay rows end to end as one long sample, cutting documents to context_len."""
    seq_len = len(rows[0].ids)
    total = len(rows) * seq_len
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    begins = np.concatenate([row.starts + i * seq_len for i, row in enumerate(rows)])
    document, start, lengths = split_documents(np.diff(begins, append=total), context_len)
    starts = begins[document] + start
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64)),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(np.append(starts, total).astype(np.int32)),
        max_seqlen=seq_len,
        trained_tokens=int((labels != -100).sum()),
        tokens=sum(row.tokens for row in rows),
        pairs=int((lengths**2).sum()),
        checksum=sum(row.checksum for row in rows),
        dropped=sum(row.dropped for row in rows),
        epoch=max(row.epoch for row in rows),
    )


class Loader:
    """The micro-batches of one rank, prepared ahead by a thread (and by worker processes, if data.workers says so)."""

    def __init__(self, config: Config, dataset: RowDataset, device: torch.device, state: dict | None = None):
        self.config, self.dataset, self.device = config, dataset, device
        self.micro_batch_size = config.train.micro_batch_size
        workers = config.data.workers if config.data.workers is not None else int(not dataset.map_style)
        readers, streams = dataset.ranks * max(1, workers), dataset.num_streams
        if not dataset.map_style and streams % readers and dataset.rank == 0:
            times, near = readers // math.gcd(streams, readers), nearest_multiple(streams, readers)
            fast = streams // readers * readers or math.lcm(streams, readers)
            what = f"{streams} virtual streams do not divide over {readers} readers (ranks x workers)"
            cure = f"num_shards of {near} would divide, data.num_streams = {fast} would be fast"
            log.warning("data: %s, so each is read %d times; %s", what, times, cure)
        # What this rank has consumed, and what the thread has made. `merge_states` of all ranks' is the run's state.
        self.state = self.prepared = state or {"rows": 0, "streams": {}}
        dataset.first, dataset.states = self.state["rows"], self.state["streams"]
        spawn = {"multiprocessing_context": "spawn", "prefetch_factor": 2 * self.micro_batch_size} if workers else {}
        spawn |= {"worker_init_fn": ignore_signals}
        self.rows = iter(DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=Row._make, **spawn))
        self.shortest = config.data.context_len or dataset.seq_len
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.ready = deque(self.thread.submit(self.prepare) for _ in range(PREFETCH))

    def context_len(self, rows: int) -> int:
        """Longest document piece at the step that begins after `rows` rows of the run (arXiv 2503.15450)."""
        step, warmup = rows // self.config.train.global_batch_size, self.config.data.context_warmup_steps
        grown = min(1, step / warmup) if warmup else 0
        return self.shortest + int((self.dataset.seq_len - self.shortest) * grown)

    def prepare(self) -> tuple[PackedBatch, dict]:
        try:
            rows = list(itertools.islice(self.rows, self.micro_batch_size))
        except ConfigError as error:  # a worker's comes with its traceback
            raise ConfigError(str(error).strip().rpartition("ConfigError: ")[2]) from None
        batch = collate(rows, self.context_len(self.prepared["rows"]))
        streams = self.prepared["streams"] | {row.stream: row.state for row in rows if row.state}
        self.prepared = {"rows": self.prepared["rows"] + len(rows) * self.dataset.ranks, "streams": streams}
        return batch, self.prepared

    def next(self) -> PackedBatch:
        """The next micro-batch on the device. Raises what went wrong in the thread or a worker."""
        batch, self.state = self.ready.popleft().result()
        self.ready.append(self.thread.submit(self.prepare))
        return batch.to(self.device)

    def close(self):
        self.thread.shutdown(cancel_futures=True)


def merge_states(states: list[dict]) -> dict:
    """One state from those of all ranks: of each stream the latest window, since a reader skips ahead inside it."""
    streams = [item for state in states for item in state["streams"].items()]
    return {"rows": states[0]["rows"], "streams": dict(sorted(streams, key=lambda item: item[1]["row"]))}
