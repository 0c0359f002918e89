"""Packing: nothing lost, nothing twice, nothing overfilled, nearly full, and short documents as they come."""

from collections import Counter

import numpy as np
import pytest

from lacuna.data.pack import best_fit, split_documents


def log_normal(n: int, seed: int = 0, median: float = 600) -> np.ndarray:
    return np.maximum(1, np.random.default_rng(seed).lognormal(np.log(median), 1, n)).astype(np.int64)


def reference_split(lengths, seq_len) -> list[tuple[int, int, int]]:
    pieces = []
    for document, length in enumerate(lengths):
        at = 0
        while at < length:
            pieces.append((document, at, min(seq_len, length - at)))
            at += seq_len
    return pieces


def reference_best_fit(lengths, seq_len) -> list[list[int]]:
    """Best fit, slowly: each piece into the fullest row that has room (of equals: the one begun first), those over a
    quarter of a row first, the longest before the others; then the rest as they come."""
    long = sorted((i for i, length in enumerate(lengths) if length > seq_len // 4), key=lambda i: -lengths[i])
    short = [i for i, length in enumerate(lengths) if length <= seq_len // 4]
    rows = []  # [free, pieces]
    for piece in [*long, *short]:
        fitting = [row for row in rows if row[0] >= lengths[piece]]
        if fitting:
            row = min(fitting, key=lambda row: row[0])
        else:
            row = [seq_len, []]
            rows.append(row)
        row[0] -= lengths[piece]
        row[1].append(piece)
    return [row[1] for row in rows]


CASES = {
    "one": ([5], 8),
    "exact": ([8, 16, 24], 8),
    "one over": ([9, 17, 1], 8),
    "tiny": ([1] * 40, 8),
    "mixed": ([3, 100, 8, 7, 64, 1, 2, 65], 8),
    "log-normal": (log_normal(300, 1, 40).tolist(), 64),
}


@pytest.mark.parametrize("case", CASES)
def test_split_loses_and_repeats_no_token(case):
    lengths, seq_len = CASES[case]
    pieces = list(zip(*(a.tolist() for a in split_documents(np.asarray(lengths), seq_len)), strict=True))
    assert pieces == reference_split(lengths, seq_len)
    tokens = [(document, token) for document, start, length in pieces for token in range(start, start + length)]
    assert tokens == [(document, token) for document, length in enumerate(lengths) for token in range(length)]


def test_split_of_nothing_is_nothing():
    assert [len(part) for part in split_documents(np.asarray([], dtype=np.int64), 8)] == [0, 0, 0]
    assert best_fit(np.asarray([], dtype=np.int64), 8) == []


@pytest.mark.parametrize("seq_len", [8, 64, 333])
def test_every_piece_is_in_exactly_one_row_and_no_row_is_overfilled(seq_len):
    lengths = split_documents(log_normal(400, seq_len, seq_len / 4), seq_len)[2]
    rows = best_fit(lengths, seq_len)
    assert Counter(piece for row in rows for piece in row) == Counter(range(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= seq_len
    assert min(len(row) for row in rows) >= 1


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_those_of_slow_best_fit(seed):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(8, 200))
    lengths = rng.integers(1, seq_len + 1, 250) if seed % 2 else rng.integers(1, seq_len // 2 + 1, 250)
    fast, slow = best_fit(lengths, seq_len), reference_best_fit(lengths.tolist(), seq_len)
    assert fast == slow


def test_short_documents_of_two_kinds_share_rows():
    """The longest first would give every row documents of one length, and so of one kind."""
    lengths = np.random.default_rng(0).permutation(np.repeat([20, 50], 500))
    kinds = [len(set(lengths[row].tolist())) for row in best_fit(lengths, 1024)]
    assert np.mean(np.asarray(kinds) == 2) > 0.95


def test_packing_is_deterministic_and_leaves_its_input_alone():
    lengths = log_normal(5000, 3).clip(max=2048)
    before = lengths.copy()
    first, second = best_fit(lengths, 2048), best_fit(lengths.copy(), 2048)
    assert (lengths == before).all()
    assert first == second


@pytest.mark.parametrize(("seq_len", "fill"), [(2048, 0.998), (8192, 0.998), (32768, 0.999)])
def test_20_000_log_normal_documents_fill_998_of_1000_slots(seq_len, fill):
    documents = log_normal(20_000)
    lengths = split_documents(documents, seq_len)[2]
    rows = best_fit(lengths, seq_len)
    assert sum(lengths[row].sum() for row in rows) == documents.sum()
    assert documents.sum() / (len(rows) * seq_len) >= fill
