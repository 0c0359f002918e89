"""What a run would train on, as rows of coloured text made from the labels; trains nothing.

uv run python examples/explain.py [--rows N] [--ids] pt|sft|RECIPE.py [CONFIG.toml] [--section.key VALUE ...]
"""

import logging
import runpy
import sys
from argparse import ArgumentParser
from itertools import groupby, islice, pairwise

import datasets
from rich.console import Console
from rich.text import Text

from lacuna.cli import parse
from lacuna.config import Config, ConfigError, log
from lacuna.data.conversations import make_encoder
from lacuna.data.loader import RowDataset
from lacuna.data.tokenize import load_tokenizer


def explain(config: Config, show: int = 2, show_ids: bool = False):
    """Print the first rows of a run: green is trained, or in \u27e6brackets\u27e7 where there is no colour.

    Of a pair the rejected answer is red, or in \u27eaother ones\u27eb.
    """
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    console = Console(highlight=False)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    tokenizer = load_tokenizer(config.model)
    recipe = runpy.run_path(config.task) if config.task.endswith(".py") else {}
    encoder = recipe.get("make_encoder", make_encoder)(config, tokenizer)
    rows = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, share=(config.eval.fraction or 0, 1))
    for number, row in enumerate(islice(rows, show)):
        text = Text()
        answers = 0  # in documents of pairs: every second one was rejected
        for start, end in pairwise([*row.starts, len(row.ids)]):
            if start:
                text.append(" \u2502 ", "magenta")  # a boundary that attention does not cross
            if start == row.tokens:
                text.append(f"{end - start} slot(s) left over", "magenta")
                continue
            # a token is trained where the position before it, in the same document, has a label
            trained = [False, *(row.labels[start : end - 1] >= 0)]
            answers += any(trained)
            rejected = row.pairs > 0 and answers % 2 == 0
            colour, begin, close = ("red", "\u27ea", "\u27eb") if rejected else ("green", "\u27e6", "\u27e7")
            for is_trained, run in groupby(range(start, end), key=lambda at: trained[at - start]):
                ids = row.ids[list(run)].tolist()
                words = tokenizer.decode(ids)
                if show_ids:
                    words = " ".join(f"{i}:{tokenizer.decode([i])!r}" for i in ids)
                if is_trained and (console.color_system is None or console.no_color):
                    words = f"{begin}{words}{close}"
                text.append(words, colour if is_trained else "dim")
        documents = sum(start < row.tokens for start in row.starts)
        slots = f"{row.tokens} of {len(row.ids)} slots, {(row.labels >= 0).sum()} trained"
        console.rule(f"row {number}: {documents} document(s), {slots}")
        console.print(text, soft_wrap=True)


if __name__ == "__main__":
    parser = ArgumentParser(description="The first rows of a run, and which of their tokens are trained.")
    parser.add_argument("task", help="pt or sft; then its config and keys, as for lacuna")
    parser.add_argument("--rows", type=int, default=2, help="how many")
    parser.add_argument("--ids", action="store_true", help="token ids too")
    options, words = parser.parse_known_args()
    try:
        config = parse(options.task, words)
        explain(config, options.rows, options.ids)
    except ConfigError as error:
        sys.exit(f"explain: {error}")
