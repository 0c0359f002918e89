"""The contract between data and training: a document, a row, a micro-batch."""

import zlib
from typing import NamedTuple

import numpy as np
import torch

IGNORE = -100  # a label that trains nothing, as in torch
SECOND = 2**30  # added to the ids of the second of a pair of documents


class Tokens(NamedTuple):
    """A document as an encoder makes it."""

    ids: np.ndarray = np.zeros(0, np.int32)  # [n], ~id where a token is context only: see `hide`
    note: str = ""  # why it was cut, or dropped: then n is 0


def hide(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Ids [n] with their loss mask [n] in the sign, ~id: it cannot be lost on the way to a row."""
    return np.where(trained, ids, ~ids)


def reveal(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] as the tokenizer knows them, and which of them are trained, bool [n]."""
    return np.where(ids < 0, ~ids, ids) % SECOND, ids >= 0


class Row(NamedTuple):
    """One row of the run, S = seq_len slots."""

    ids: np.ndarray  # int32 [S]
    labels: np.ndarray  # int32 [S]
    starts: np.ndarray  # int64 [documents]: where each document (or what is left) begins
    tokens: int  # slots that hold a document's token
    pairs: int  # documents with a second one
    checksum: int  # crc32 of its place in the global batch, ids and labels
    epoch: float = 0.0
    state: dict | None = None  # the RowDataset's, after this row


def assemble(pieces: list[tuple], seq_len: int, *, filler: int, mask_boundary: bool, place: int) -> Row:
    """The row at a place of its global batch, of pieces (ids, start, end); `filler` trains nothing."""
    ids = np.full(seq_len, filler, dtype=np.int32)
    labels = np.full(seq_len, IGNORE, dtype=np.int32)
    starts = []
    at = 0  # the next free slot
    for document, start, end in pieces:
        # One token more than the piece: where a document is cut, the next piece's first is the last one's target.
        tokens, trained = reveal(document[start : end + 1])
        ids[at : at + end - start] = tokens[: end - start]
        labels[at : at + len(tokens) - 1] = np.where(trained, tokens, IGNORE)[1:]
        if at and not start and trained[0] and not mask_boundary:
            labels[at - 1] = tokens[0]
        second = at + np.flatnonzero(np.abs(document[start:end]) >= SECOND)[:1]
        starts += [at, *second]
        at += end - start
    pairs = len(starts) - len(pieces)
    if at < seq_len:
        starts.append(at)
    return Row(ids, labels, np.asarray(starts), at, pairs, zlib.crc32(labels, zlib.crc32(ids, place)))


class PackedBatch(NamedTuple):
    """One micro-batch: T = micro_batch_size * seq_len slots at every step."""

    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T], already shifted inside each document; IGNORE trains nothing
    position_ids: torch.Tensor  # int64 [T], from 0 in every document
    cu_seqlens: torch.Tensor  # int32 [N + 1], of N documents: the one shape that changes
    # No more tensors, least of all of floats: FSDP2 casts those among its inputs to bf16.
    max_seqlen: int  # seq_len, a constant
    epoch: float
    counts: dict[str, int]  # to be added over micro-batches and ranks

    def to(self, device: torch.device) -> "PackedBatch":
        """The same on a device, which nothing waits for."""
        if device.type != "cuda":
            return self
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in self[:4]]
        return PackedBatch(*tensors, *self[4:])


def collate(rows: list[Row]) -> PackedBatch:
    """Lay rows end to end as one long sample."""
    seq_len = len(rows[0].ids)
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    starts = np.concatenate([row.starts + i * seq_len for i, row in enumerate(rows)])
    lengths = np.diff(starts, append=len(ids))
    trained_tokens = int((labels != IGNORE).sum())
    counts = {
        "trained_tokens": trained_tokens,
        "units": sum(row.pairs for row in rows) or trained_tokens,  # what the loss is a mean over
        "tokens": sum(row.tokens for row in rows),
        "pairs": int((lengths**2).sum()),  # squared lengths: what attention computes
        "checksum": sum(row.checksum for row in rows),  # each below 2**32: exact in float64
    }
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    boundaries = np.append(starts, len(ids)).astype(np.int32)
    tensors = [torch.from_numpy(array) for array in (ids, labels, positions, boundaries)]
    return PackedBatch(*tensors, max_seqlen=seq_len, epoch=max(row.epoch for row in rows), counts=counts)
