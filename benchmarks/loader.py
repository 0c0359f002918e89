"""Text to `PackedBatch` through the real Loader, beside the tokenizer alone: same texts, same cores, same run.

    uv run python benchmarks/loader.py [CORPUS.jsonl] [--tokenizer FOLDER] [--seq-len 1024] [--windows 3] [--rounds 3]

For example `benchmarks/loader.py $LACUNA_ASSETS/corpus/tinystories.jsonl --tokenizer $LACUNA_ASSETS/tokenizer/qwen3`.

The corpus (column `text`) is repeated into parquet shards in a temporary folder, which are streamed: read, tokenised,
packed, laid out as tensors. A stream tokenises a whole window of rows at a time, so a fair time is that of whole
windows: the loader warms up until its windows have grown to their full size, and is timed over `--windows` of them in
every stream. The tokenizer alone does the same number of tokens, after a quarter of them as a warm-up. All ways take
turns, `--rounds` times; the fastest round of each counts. tokens = tokens of documents, EOS included.

    encode_batch_fast          the backend of the tokenizer, without offsets and masks: what lacuna calls
    tokenizer(texts)           the plain call
    loader                     Loader.step() in a loop, as a run does
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from lacuna.cli import set_threads

set_threads(1)  # before the tokenizer's threads start: as many as a run of one process has

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from lacuna.config import Config  # noqa: E402
from lacuna.data.loader import STREAM_WINDOW, Loader, RowDataset  # noqa: E402
from lacuna.data.tokenize import TextEncoder  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
BATCH = 1000  # texts in one call of the tokenizer alone


def time_tokens(step, warmup: int, tokens: int) -> float:
    """Tokens a second of step() -> tokens, over this many tokens, after a warm-up."""
    done = 0
    while done < warmup:
        done += step()
    begin, done = time.perf_counter(), 0
    while done < tokens:
        done += step()
    return done / (time.perf_counter() - begin)


def tokenizer_alone(encode, texts: list[str]):
    """A step over the next BATCH texts, round and round; encode(texts) -> lists of ids."""
    at = 0

    def step() -> int:
        nonlocal at
        batch = texts[at : at + BATCH]
        at = at + BATCH if at + BATCH < len(texts) else 0
        return sum(len(ids) + 1 for ids in encode(batch))

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", default=REPOSITORY / "examples/moby_dick/train.jsonl", type=Path)
    parser.add_argument("--tokenizer", default=str(REPOSITORY / "examples/tiny"))
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    backend = AutoTokenizer.from_pretrained(arguments.tokenizer).backend_tokenizer
    texts = [json.loads(line)["text"] for line in arguments.corpus.read_text().splitlines()]
    first, largest = STREAM_WINDOW  # rows; each window has twice those of the one before
    warmup = (largest - first) * arguments.shards * arguments.seq_len
    tokens = arguments.windows * largest * arguments.shards * arguments.seq_len
    once = sum(len(encoding.ids) + 1 for encoding in backend.encode_batch_fast(texts))
    texts *= 1 + int(1.2 * (warmup + tokens) / once)  # no epoch ends: a window would end with it

    temporary = tempfile.TemporaryDirectory(prefix="lacuna-loader-", ignore_cleanup_errors=True)
    folder = Path(temporary.name)
    for i in range(arguments.shards):
        pq.write_table(pa.table({"text": texts[i :: arguments.shards]}), folder / f"{i}.parquet", row_group_size=500)

    def fast() -> float:
        step = tokenizer_alone(lambda batch: [e.ids for e in backend.encode_batch_fast(batch)], texts)
        return time_tokens(step, tokens // 4, tokens)

    def plain() -> float:
        return time_tokens(tokenizer_alone(lambda batch: tokenizer(batch)["input_ids"], texts), tokens // 4, tokens)

    def load() -> float:
        size = arguments.micro_batch_size
        sizes = {"micro_batch_size": size, "global_batch_size": size}
        source = {"path": str(folder / "*.parquet"), "streaming": True}
        config = Config.model_validate(
            {
                "data": {"cache": str(folder / "cache"), "sources": [source]},
                "train": {"steps": 10**9, "seq_len": arguments.seq_len, **sizes},
            }
        )
        dataset = RowDataset(config, config.data.sources, TextEncoder(tokenizer), rank=0, ranks=1)
        loader = Loader(config, dataset, torch.device("cpu"))
        speed = time_tokens(lambda: loader.step()[0].counts["tokens"], warmup, tokens)
        loader.close()
        return speed

    ways = {"encode_batch_fast": fast, "tokenizer(texts)": plain, "loader": load}
    speeds = {name: 0.0 for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            speeds[name] = max(speeds[name], way())

    cores, threads = len(os.sched_getaffinity(0)), os.environ["RAYON_NUM_THREADS"]
    corpus, name = arguments.corpus.name, Path(arguments.tokenizer).name
    print(f"{corpus}, {name}, seq_len {arguments.seq_len}, {cores} CPUs, {threads} tokenizer threads")
    print(f"{'':22}{'tokens/s':>12}{'/ fast':>9}{'/ plain':>9}")
    for name, speed in speeds.items():
        of_fast, of_plain = speed / speeds["encode_batch_fast"], speed / speeds["tokenizer(texts)"]
        print(f"{name:22}{speed:12,.0f}{of_fast:9.2f}{of_plain:9.2f}")


if __name__ == "__main__":
    main()
