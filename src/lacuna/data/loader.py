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
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lacuna.config import Config, ConfigError, nearest_multiple
from lacuna.data.pack import best_fit, split_documents
from lacuna.data.sources import MapSource, StreamSource, log

MAP_WINDOW = 131_072  # documents packed together where they are indices only: fill .9999 in 0.1 to 0.3 s
PREFETCH = 3  # micro-batches made ahead
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
    state: dict


class PackedBatch(NamedTuple):
    """One micro-batch: T = micro_batch_size * seq_len slots, the same shapes at every step."""

    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T], already shifted inside each document; -100 trains nothing
    position_ids: torch.Tensor  # int64 [T], from 0 in every document
    cu_seqlens: torch.Tensor  # int32 [N + 1], document boundaries, padded with T
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
    """One virtual stream: rows as lists of (document, start, end), and the state to begin again at any of them."""

    def __init__(self, data: "RowDataset", stream: int, state: dict | None):
        self.data, self.stream = data, stream
        sources = len(data.sources)
        state = state or {"cursors": [None] * sources, "drawn": [0] * sources, "window": 0, "row": 0, "dropped": 0}
        self.drawn, self.window, self.first_row = list(state["drawn"]), state["window"], state["row"]
        pairs = zip(data.sources, state["cursors"], strict=True)
        self.cursors = [source.cursor(source, stream, data.num_streams, **(cursor or {})) for source, cursor in pairs]
        self.rows, self.emitted, self.dropped = [], 0, state["dropped"]

    @property
    def ended(self) -> bool:
        last = self.data.epochs
        return self.emitted == len(self.rows) and last is not None and all(c.epoch >= last for c in self.cursors)

    def skip(self, rows: int):
        """Go on until `rows` rows of this stream are behind, planning windows but loading nothing."""
        while not self.ended and self.first_row + self.emitted < rows:
            if self.emitted == len(self.rows):
                self.draw_window()
            self.emitted = min(rows - self.first_row, len(self.rows))
            self.dropped = sum(c.dropped for c in self.cursors)

    def next(self) -> Row | None:
        if self.emitted == len(self.rows):
            if self.ended:
                return None
            self.draw_window()
        row = self.data.assemble(self.rows[self.emitted])
        self.emitted += 1
        epoch = self.begin + (self.end - self.begin) * self.emitted / len(self.rows)
        before, self.dropped = self.dropped, sum(c.dropped for c in self.cursors)
        return row._replace(epoch=epoch, dropped=self.dropped - before, stream=self.stream, state=self.start)

    def draw_window(self):
        """Draw documents until the window is full, always from the source that is furthest behind its weight."""
        data = self.data
        self.first_row += len(self.rows)
        cursors = [c.state() for c in self.cursors]
        self.start = {"cursors": cursors, "drawn": list(self.drawn), "window": self.window}
        self.start |= {"row": self.first_row, "dropped": self.dropped}
        budget = data.seq_len * min(STREAM_WINDOW[0] << self.window, STREAM_WINDOW[1])
        self.begin = max(c.progress for c in self.cursors)
        epoch, documents, lengths, total = self.cursors[0].epoch, [], [], 0
        while len(documents) < data.map_window if data.map_style else total < budget:
            behind = min(range(len(self.cursors)), key=lambda i: self.drawn[i] / data.weights[i])
            length, document = self.cursors[behind].next()
            self.drawn[behind] += length
            total += length
            documents.append((behind, document))
            lengths.append(length)
            if len(self.cursors) == 1 and self.cursors[0].epoch != epoch:
                break  # a window ends with the epoch: no row mixes two
        self.end = max(c.progress for c in self.cursors)
        which, start, length = split_documents(np.asarray(lengths), data.seq_len)
        rows = best_fit(length, data.seq_len, data.max_pieces)
        order = np.random.default_rng([data.seed, self.stream, self.window]).permutation(len(rows))
        self.rows = [[(documents[which[p]], start[p], start[p] + length[p]) for p in rows[r]] for r in order]
        self.window, self.emitted = self.window + 1, 0


class RowDataset(IterableDataset):
    """The rows of one rank, split over its loader workers: row p for p = first + rank, first + rank + ranks, …"""

    def __init__(self, config: Config, sources: list, encoder, rank: int, ranks: int, epochs=None, limit=math.inf):
        self.seq_len, self.seed = config.train.seq_len, config.seed
        self.mask_boundary, self.filler = config.data.mask_boundary, encoder.eos
        # A fixed bound, so that cu_seqlens never changes its shape; rows of tinier documents are filled up instead.
        self.max_pieces = max(16, self.seq_len // 32)
        self.batch_rows = config.train.global_batch_size
        self.rank, self.ranks, self.epochs, self.limit = rank, ranks, epochs, limit
        self.map_style = not any(source.streaming for source in sources)
        weights = [source.weight for source in sources]
        if len(sources) > 1 and not self.map_style and not all(weights):
            raise ConfigError("data.sources: a mixture with a streaming source needs a weight for every source")
        whole = self.map_style and not any(weights)
        groups = [sources] if whole else [[source] for source in sources]
        self.weights = [1.0] if whole else [weight or 1.0 for weight in weights]
        self.sources = [
            StreamSource(group[0], encoder, [self.seed, i])
            if group[0].streaming
            else MapSource(group, encoder, [self.seed, i], config.data.cache)
            for i, group in enumerate(groups)
        ]
        if self.map_style:  # at most about an epoch: rows are shuffled inside a window, documents must not wait long
            self.map_window = min(MAP_WINDOW, sum(len(source.lengths) for source in self.sources))
        shards = [source.num_shards for source in self.sources if isinstance(source, StreamSource)]
        self.num_streams = 1 if self.map_style else config.data.num_streams or min(64, *shards)
        self.first, self.states = 0, {}

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        streams = {}
        position = self.first + self.rank + self.ranks * worker
        while True:
            number = position % self.num_streams
            if number not in streams:
                streams[number] = Stream(self, number, self.states.get(number))
            streams[number].skip(position // self.num_streams)
            row = streams[number].next() if position < self.limit else None
            row = row or self.assemble([])  # past the end of the data: a row that trains nothing
            crc = zlib.crc32(row.labels.tobytes(), zlib.crc32(row.ids.tobytes()))
            yield row._replace(checksum=crc * (position % self.batch_rows + 1))
            position += self.ranks * workers

    def count_rows(self) -> int:
        """Rows of all epochs of map-style data, from the lengths alone."""
        stream = Stream(self, 0, None)
        while not stream.ended:
            stream.draw_window()
            stream.emitted = len(stream.rows)
        return stream.first_row + stream.emitted

    def assemble(self, pieces: list) -> Row:
        """Copy document pieces into one row. What is left over is a document of its own that trains nothing."""
        ids = np.full(self.seq_len, self.filler, dtype=np.int32)
        labels = np.full(self.seq_len, -100, dtype=np.int32)
        starts, at = [], 0
        for (which, document), start, end in pieces:
            tokens = self.sources[which].load(document) if isinstance(document, int) else document
            # a cut document goes on in its next piece: its first token there is still the target of the last one here
            targets = tokens[start + 1 : end + 1]
            ids[at : at + end - start] = tokens[start:end]
            labels[at : at + len(targets)] = targets
            starts.append(at)
            if at and not self.mask_boundary:
                labels[at - 1] = ids[at]
            at += end - start
        if at < self.seq_len:
            starts.append(at)
        return Row(ids, labels, np.asarray(starts), at, 0, 0.0, 0, -1, {})


def collate(rows: list[Row], context_len: int, num_documents: int) -> PackedBatch:
    """Lay rows end to end as one long sample, cutting documents to context_len; N = num_documents at most."""
    seq_len = len(rows[0].ids)
    total = len(rows) * seq_len
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    starts = np.concatenate([row.starts + i * seq_len for i, row in enumerate(rows)])
    if context_len < seq_len:
        document, start, _ = split_documents(np.diff(np.append(starts, total)), context_len)
        starts = starts[document] + start
    lengths = np.diff(np.append(starts, total))
    assert len(starts) <= num_documents, "cu_seqlens is too short for these documents"
    boundaries = np.full(num_documents + 1, total, dtype=np.int32)
    boundaries[: len(starts)] = starts
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(boundaries),
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
        if state is not None:
            dataset.first, dataset.states = state["rows"], state["streams"]
        self.prepared = self.consumed = dataset.first  # rows, over all ranks
        self.streams = dict(dataset.states)
        spawn = {"multiprocessing_context": "spawn", "prefetch_factor": 2 * self.micro_batch_size} if workers else {}
        self.rows = iter(DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=keep, **spawn))
        shortest = config.data.context_len or config.train.seq_len
        self.num_documents = self.micro_batch_size * (dataset.max_pieces + 1 + config.train.seq_len // shortest)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.ready = deque(self.thread.submit(self.prepare) for _ in range(PREFETCH))

    def context_len(self, rows: int) -> int:
        """Longest document piece at the step that begins after `rows` rows of the run (arXiv 2503.15450)."""
        data, seq_len = self.config.data, self.config.train.seq_len
        start = data.context_len or seq_len
        step = rows // self.config.train.global_batch_size
        grown = min(1, step / data.context_warmup_steps) if data.context_warmup_steps else 0
        return start + int((seq_len - start) * grown)

    def prepare(self) -> tuple[PackedBatch, list]:
        try:
            rows = list(itertools.islice(self.rows, self.micro_batch_size))
        except ConfigError as error:  # a worker's comes with its traceback
            raise ConfigError(str(error).strip().rpartition("ConfigError: ")[2]) from None
        batch = collate(rows, self.context_len(self.prepared), self.num_documents)
        self.prepared += len(rows) * self.dataset.ranks
        return batch, [(row.stream, row.state) for row in rows if row.stream >= 0]

    def next(self) -> PackedBatch:
        """The next micro-batch on the device. Raises what went wrong in the thread or a worker."""
        batch, states = self.ready.popleft().result()
        self.ready.append(self.thread.submit(self.prepare))
        self.consumed += self.micro_batch_size * self.dataset.ranks
        self.streams.update(states)
        return batch.to(self.device)

    def state_dict(self) -> dict:
        """What this rank has consumed. Merged over ranks (`merge_states`), it resumes on any number of them."""
        return {"rows": self.consumed, "streams": dict(self.streams)}

    def close(self):
        self.thread.shutdown(cancel_futures=True)


def keep(row: Row) -> Row:
    """Instead of DataLoader's conversion to tensors: NumPy travels between processes at less cost."""
    return row


def merge_states(states: list[dict]) -> dict:
    """One state from those of all ranks: of each stream the latest window, since a reader skips ahead inside it."""
    streams = [item for state in states for item in state["streams"].items()]
    return {"rows": states[0]["rows"], "streams": dict(sorted(streams, key=lambda item: item[1]["row"]))}
