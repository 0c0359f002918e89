"""How full rows get, and how fast: lacuna's packing beside TRL's, in one run on the same documents.

    uv run --with trl==1.16.0 python benchmarks/packing.py [--documents 100000] [--repeats 3]

Documents have log-normal lengths (median 600 tokens, sigma 1, seed 0). fill = tokens in rows / slots of the rows;
kept = tokens in rows / tokens of the documents. The fastest of `--repeats` runs counts.

    lacuna plan   split_documents + best_fit over all lengths at once: which piece goes into which row
    lacuna rows   the same, and every token copied to its place in a row
    trl bfd       trl.data_utils.pack_dataset, best fit, in batches of 1,000 documents; cuts off what no row holds
    trl bfd_split the same, but splits long documents, as lacuna does

TRL packs a dataset in memory and returns one; its time is to be compared with `lacuna rows`. It is left out where it is
not installed.
"""

import argparse
import time

import datasets
import numpy as np
import pyarrow as pa

from lacuna.data.pack import best_fit, split_documents

SEQ_LENS = (2048, 8192, 32768)


def plan(lengths: np.ndarray, seq_len: int):
    """(start of each piece in the corpus, its length, the pieces of each row), as the loader packs."""
    document, start, length = split_documents(lengths, seq_len)
    rows = best_fit(length, seq_len)
    return (np.cumsum(lengths) - lengths)[document] + start, length, rows


def lacuna_plan(lengths: np.ndarray, tokens: np.ndarray, seq_len: int) -> tuple[int, int]:
    _, length, rows = plan(lengths, seq_len)
    return len(rows), int(length.sum())


def lacuna_rows(lengths: np.ndarray, tokens: np.ndarray, seq_len: int) -> tuple[int, int]:
    begin, length, rows = plan(lengths, seq_len)
    packed = np.zeros((len(rows), seq_len), dtype=np.int32)
    kept = 0
    for row, pieces in zip(packed, rows, strict=True):
        at = 0
        for first, n in zip(begin[pieces].tolist(), length[pieces].tolist(), strict=True):
            row[at : at + n] = tokens[first : first + n]
            at += n
        kept += at
    return len(rows), kept


def trl_packer(strategy: str):
    from trl.data_utils import pack_dataset

    def pack(lengths: np.ndarray, tokens: np.ndarray, seq_len: int) -> tuple[int, int]:
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens))})
        map_options = {"keep_in_memory": True, "load_from_cache_file": False}  # and its batch of 1,000
        packed = pack_dataset(datasets.Dataset(table), seq_len, strategy, map_options)
        kept = sum(pa.compute.sum(pa.compute.list_value_length(c)).as_py() for c in packed.data["input_ids"].chunks)
        return len(packed), kept

    return pack


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(600), 1, arguments.documents).astype(np.int64).clip(min=1)
    tokens = rng.integers(0, 50_000, lengths.sum(), dtype=np.int32)
    packers = {"lacuna plan": lacuna_plan, "lacuna rows": lacuna_rows}
    try:
        packers |= {f"trl {strategy}": trl_packer(strategy) for strategy in ("bfd", "bfd_split")}
    except ImportError as error:
        print(f"TRL is left out: {error}")
    print(f"{len(lengths):,} documents, {len(tokens):,} tokens, the longest {lengths.max():,}")
    print(f"{'packer':14}{'seq_len':>9}{'rows':>9}{'fill':>9}{'kept':>9}{'documents/s':>14}")
    for seq_len in SEQ_LENS:
        for name, pack in packers.items():
            seconds = []
            for _ in range(arguments.repeats):
                begin = time.perf_counter()
                rows, kept = pack(lengths, tokens, seq_len)
                seconds.append(time.perf_counter() - begin)
            fill, share = kept / (rows * seq_len), kept / len(tokens)
            print(f"{name:14}{seq_len:9,}{rows:9,}{fill:9.5f}{share:9.5f}{len(lengths) / min(seconds):14,.0f}")


if __name__ == "__main__":
    main()
