"""Best-fit-decreasing packing of document pieces into rows of fixed length (arXiv 2404.10830).

Long pieces go first, each into the fullest row with room. Pieces of one length go together, and the rows with room are
found through the bits of one integer, so the cost is a few integer operations for each piece.
"""

import numpy as np


def split_documents(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents of lengths [n] into pieces of at most seq_len: the document [m], start [m], length [m] of each."""
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    first_piece = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first_piece[document]) * seq_len
    return document, start, np.minimum(lengths[document] - start, seq_len)


def best_fit(lengths: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Assign pieces of lengths [m], each in 1..seq_len, to rows of seq_len slots: the indices of each row's pieces."""
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(-lengths, return_counts=True)
    free_rows = [[] for _ in range(seq_len + 1)]  # rows by free slots; only rows that may take one more piece
    free_bits = 0  # bit f is set where free_rows[f] is not empty
    used = []  # pieces in each row
    row_of = []  # row of each piece, in `order`
    for length, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        while count:
            fits = free_bits >> length
            if fits:
                free = length + (fits & -fits).bit_length() - 1
                row = free_rows[free].pop()
                if not free_rows[free]:
                    free_bits ^= 1 << free
            else:
                free, row = seq_len, len(used)
                used.append(0)
            # what is left of the fullest fitting row is the fullest again: it takes all it can of this length
            taken = min(count, free // length)
            row_of += [row] * taken
            count -= taken
            used[row] += taken
            free -= taken * length
            if free:
                free_rows[free].append(row)
                free_bits |= 1 << free
    row_of = np.asarray(row_of, dtype=np.int64)
    by_row = order[np.argsort(row_of, kind="stable")]
    return np.split(by_row, np.cumsum(used)[:-1]) if used else []
