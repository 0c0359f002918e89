"""What lacuna says of a folder of odd data files, one row a file, as a table in Markdown.

uv run python benchmarks/cases.py FOLDER TOKENIZER > table.md      e.g. $LACUNA_CASES $LACUNA_ASSETS/tokenizer/qwen3

Text is read as `pt`, everything else as `sft`. ⟦what is trained⟧ stands in brackets, of the first row of 256 slots.
"""

import json
import logging
import sys
import tempfile
from itertools import groupby, pairwise
from pathlib import Path

from lacuna.config import ConfigError, blame, load_config, log
from lacuna.data.conversations import make_encoder
from lacuna.data.loader import RowDataset
from lacuna.data.tokenize import load_tokenizer


def say(file: Path, task: str, tokenizer: str, cache: str) -> str:
    """The log's lines but for the columns, and the first row; or the sentence that refuses the file."""
    words = ["--data.sources", json.dumps([{"path": str(file)}]), "--train.seq_len", "256", "--train.steps", "1"]
    config = load_config(None, [*words, "--model.tokenizer", tokenizer, "--data.cache", cache], task)
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage().replace(f"{file.parent}/", ""))
    log.handlers = [listener]
    try:
        read = load_tokenizer(config.model)
        with blame("data.sources"):
            row = next(iter(RowDataset(config, config.data.sources, make_encoder(config, read), rank=0, ranks=1)))
    except ConfigError as error:
        return "refused: " + str(error).replace(f"{file.parent}/", "")
    documents = []
    for start, end in pairwise([*row.starts, len(row.ids)]):
        if start == row.tokens:
            continue
        trained = [False, *(row.labels[start : end - 1] >= 0)]
        parts = []
        for is_trained, slots in groupby(range(start, end), key=lambda slot: trained[slot - start]):
            text = read.decode(row.ids[list(slots)].tolist())
            parts.append(f"\u27e6{text}\u27e7" if is_trained else text)
        documents.append("".join(parts))
    notes = [line for line in heard if not line.endswith("not read: nothing")]
    return " \u2502 ".join([*notes, *documents])


def is_text(file: Path) -> bool:
    return b"text" in file.read_bytes()[:16] or (file.suffix in (".parquet", ".csv") and b"text" in file.read_bytes())


def main(folder: Path, tokenizer: str):
    logging.raiseExceptions = False
    log.setLevel(logging.INFO)
    log.propagate = False
    print("| file | what lacuna says |\n|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".py", ".toml"):
                continue
            said = say(file, "pt" if is_text(file) else "sft", tokenizer, cache)
            escaped = said.replace("\n", "\\n").replace("\0", "\\0").replace("|", "\\|")
            print(f"| {file.name} | {escaped[:600]} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
