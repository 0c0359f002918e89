"""One page with the curves of one or several runs: a single file, which a browser shows without a network.

usage: uv run --with plotly==7.1.0 benchmarks/report.py RUN... [-o report.html]

For example `benchmarks/report.py runs/a runs/b`. RUN is the folder of a run, finished or still going on: figures are
from its metrics.jsonl, and the keys in which runs differ from config.toml. 5 MB of the page are Plotly's own script.
"""

import argparse
import html
import json
import math
import re
import sys
import tomllib
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

PAGE = Template(Path(__file__).with_name("report_page.html").read_text(encoding="utf-8"))
TITLES = {
    "loss": "loss of training",
    "eval_loss": "loss, held out",
    "eval_bits_per_byte": "bits per byte, held out",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "peak_memory_gib": "peak memory, GiB",
}  # further figures, a recipe's, come after these
NOISY = {"loss", "grad_norm", "tokens_per_second"}
NOT_DRAWN = {"step", "tokens", "trained_tokens", "epoch", "packing_efficiency", "tokens_per_second_per_device", "mfu"}
NOT_DRAWN |= {"step_seconds", "data_seconds", "eval_tokens"}
SECRET = re.compile(r"secret|passw|credential|api_?key|(^|[._])(key|token)$", re.IGNORECASE)  # keys
SECRET_IN_URL = re.compile(r"(?<=//)[^/\s]*@|\?\S*")  # what is before the host, and the query


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="default: report.html")
    args = parser.parse_args()
    names = [folder.resolve().name for folder in args.runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in args.runs]
    try:
        metrics = [read_metrics(folder / "metrics.jsonl") for folder in args.runs]
        configs = [flatten(tomllib.loads((folder / "config.toml").read_text())) for folder in args.runs]
    except (FileNotFoundError, NotADirectoryError) as error:
        sys.exit(f"There is no {error.filename}: name the folder of a run, such as runs/moby-dick")
    panels = make_panels(metrics)
    if not panels:
        sys.exit(f"No step is reported yet in {' or '.join(str(folder / 'metrics.jsonl') for folder in args.runs)}")
    shown = {"names": names, "rows": make_rows(metrics, configs), "panels": panels}
    data = json.dumps(shown).replace("<", "\\u003c")  # which could end the script that holds the data
    title = html.escape(", ".join(names))
    page = PAGE.substitute(title=title, data=data, plotly=get_plotlyjs())
    args.out.write_text(page, encoding="utf-8")
    print(f"{args.out}: {', '.join(names)}")


def read_metrics(file: Path) -> list[dict]:
    """Its whole lines: the last one may be cut off, or not be written to its end yet."""
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def flatten(value, key: str = "") -> dict[str, str]:
    """A config's values as text, by keys such as data.sources.0.path; none that may be a secret."""
    if SECRET.search(key):
        return {}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, dict):
        inner = [flatten(item, f"{key}.{name}" if key else name) for name, item in value.items()]
        return {name: text for part in inner for name, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return {key: SECRET_IN_URL.sub("", text) if "://" in text else text}


def make_panels(metrics: list[list[dict]]) -> list[dict]:
    """One for every figure: its title, and a curve for every run that has it."""
    panels = {key: [] for key in TITLES}
    for run, lines in enumerate(metrics):
        for key, points in read_points(lines).items():
            # what is held out of a recipe's figure is drawn beside that of training
            panel = key if key in TITLES else key.removeprefix("eval_")
            curve = {"run": run, "held_out": key.startswith("eval_"), **points}
            if key in NOISY or (key not in TITLES and not curve["held_out"]):
                curve["mean"] = local_means(points["value"])
            panels.setdefault(panel, []).append(curve)
    titles = {key: key.replace("_", " ") for key in panels} | TITLES
    return [{"key": key, "title": titles[key], "curves": curves} for key, curves in panels.items() if curves]


def read_points(lines: list[dict]) -> dict[str, dict[str, list]]:
    """The points of every figure: steps, tokens, values; none where it is not finite."""
    points = defaultdict(lambda: {"step": [], "tokens": [], "value": []})
    last = {"step": 1, "tokens": 0}
    for line in lines:
        last = line if "tokens" in line else last
        # an evaluation does not say how many tokens there were: about as many a step as before
        tokens = line.get("tokens", round(line["step"] * last["tokens"] / last["step"]))
        for key in line.keys() - NOT_DRAWN:
            if isinstance(line[key], int | float) and math.isfinite(line[key]):
                points[key]["step"].append(line["step"])
                points[key]["tokens"].append(tokens)
                points[key]["value"].append(line[key])
    return dict(sorted(points.items()))


def local_means(values: list[float]) -> list[float]:
    """The mean around every point, over a tenth of all points."""
    reach = len(values) // 20
    sums = [0, *accumulate(values)]
    spans = [(max(index - reach, 0), min(index + reach + 1, len(values))) for index in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def make_rows(metrics: list[list[dict]], configs: list[dict[str, str]]) -> list[dict]:
    """The table, with a cell for every run: where it is, then the keys in which the configs differ."""
    rows = defaultdict(list)
    for lines in metrics:
        last = {"step": 0, "tokens": 0}
        before = 0
        seconds = 0
        for line in lines:
            last |= line
            if "loss" in line:
                seconds += line["step_seconds"] * (line["step"] - before)
                before = line["step"]
        rows["last step"].append(f"{last['step']:,}")
        rows["tokens"].append(f"{last['tokens']:,}")
        rows["last loss"].append(f"{last['loss']:.4f}" if "loss" in last else None)
        rows["last loss, held out"].append(f"{last['eval_loss']:.4f}" if "eval_loss" in last else None)
        rows["hours of steps"].append(f"{seconds / 3600:.3g}")
    for key in sorted(set().union(*configs) - {"name", "out"}):
        values = [config.get(key) for config in configs]
        if len(set(values)) > 1:
            rows[key] = values
    return [{"title": title, "cells": cells} for title, cells in rows.items()]


if __name__ == "__main__":
    main()
