"""Tables and pictures of what benchmarks/choices.py has measured: differences between runs of the same seed."""

from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from choices_arms import ARMS, EXPERIMENTS

# What is shown, each the tokens of these groups together.
ALONE = {
    "all tokens, alone": ["first, alone", "others, alone"],
    "first tokens, alone": ["first, alone"],
    "other tokens, alone": ["others, alone"],
}
BEHIND = {
    "all tokens, behind another": ["first, behind another", "others, behind another"],
    "first tokens, behind another": ["first, behind another"],
    "other tokens, behind another": ["others, behind another"],
}
CHAT = {
    "all answers": ["short answers", "long answers"],
    "short answers": ["short answers"],
    "long answers": ["long answers"],
}
MEASURES = {"long": ALONE, "short": ALONE, "chat": CHAT}

# Student's t for 95% on both sides, by the number of differences: beyond ten the last one is near enough.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


class Difference(NamedTuple):
    """One measure of two arms, by seed: nats a token, of the other arm minus those of lacuna."""

    arms: tuple[str, str]
    measure: str
    tokens: int
    ours: list[float]
    theirs: list[float]

    @property
    def values(self) -> list[float]:
        return [theirs - ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def spread(self) -> float:
        return stdev(self.values) if len(self.values) > 1 else float("nan")

    @property
    def verdict(self) -> str:
        """Whether zero is outside of the mean's 95% interval, and on which side."""
        count = len(self.values)
        if count < 2:
            return "one seed only"
        half = STUDENT[min(count, 10)] * self.spread / count**0.5
        if abs(mean(self.values)) <= half:
            return "no difference seen"
        return "supported" if mean(self.values) > 0 else "against"


def differences(results: list[dict], experiment: str) -> list[Difference]:
    """All measures of an experiment, over the seeds that both arms have."""
    runs = {(result["arm"], result["seed"]): result["losses"] for result in results}
    found = []
    for ours, theirs in EXPERIMENTS[experiment].pairs:
        seeds = sorted(seed for name, seed in runs if name == ours and (theirs, seed) in runs)
        if not seeds:
            continue
        measures = MEASURES[ARMS[ours].data] | (BEHIND if EXPERIMENTS[experiment].behind else {})
        for measure, groups in measures.items():
            tokens = sum(runs[ours, seeds[0]][group][1] for group in groups)
            ours_by_seed = [per_token(runs[ours, seed], groups) for seed in seeds]
            theirs_by_seed = [per_token(runs[theirs, seed], groups) for seed in seeds]
            found.append(Difference((ours, theirs), measure, tokens, ours_by_seed, theirs_by_seed))
    return found


def per_token(losses: dict, groups: list[str]) -> float:
    nats = sum(losses[group][0] for group in groups)
    return nats / sum(losses[group][1] for group in groups)


def print_tables(results: list[dict]):
    """A Markdown table for each experiment of which there are results."""
    for name, experiment in EXPERIMENTS.items():
        rows = differences(results, name)
        if not rows:
            continue
        print(f"## {name}: {experiment.title}\n")
        print("| runs | held-out loss, nats | tokens | lacuna | other | other - lacuna, by seed | seeds | |")
        print("|---|---|---|---|---|---|---|---|")
        for row in rows:
            arms = " / ".join(row.arms)
            losses = f"{mean(row.ours):.4f} | {mean(row.theirs):.4f}"
            difference = f"{mean(row.values):+.4f} ± {row.spread:.4f}"
            counts = f"{len(row.values)} | {row.verdict}"
            print(f"| {arms} | {row.measure} | {row.tokens:,} | {losses} | {difference} | {counts} |")
        print()
    print("## what ran\n")
    print("| arm | runs | steps | last train loss | mean gradient norm | seconds to train, to measure |")
    print("|---|---|---|---|---|---|")
    for name in ARMS:
        runs = [result for result in results if result["arm"] == name]
        if not runs:
            continue
        loss = mean(run["train_loss"] for run in runs)
        norm = mean(run["grad_norm"] for run in runs)
        seconds = (
            f"{mean(run['train_seconds'] for run in runs):.0f}, {mean(run['measure_seconds'] for run in runs):.0f}"
        )
        print(f"| {name} | {len(runs)} | {runs[0]['steps']} | {loss:.4f} | {norm:.3f} | {seconds} |")


def draw(results: list[dict], folder: Path):
    """A picture for each experiment: a point for each seed, a bar at their mean."""
    import matplotlib  # not among lacuna's dependencies

    matplotlib.use("svg")
    # text stays text; the grey can be read on white and on black; no date and no random names, so files repeat
    style = {"svg.fonttype": "none", "svg.hashsalt": "lacuna", "font.size": 9}
    style |= dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], "#808080")
    matplotlib.rcParams.update(style)
    folder.mkdir(parents=True, exist_ok=True)
    for name in EXPERIMENTS:
        rows = differences(results, name)
        if rows:
            figure = draw_rows(rows)
            figure.savefig(folder / f"{name}.svg", transparent=True, bbox_inches="tight", metadata={"Date": None})


def draw_rows(rows: list[Difference]):
    from matplotlib.figure import Figure

    # first tokens are few, and may differ by nats where all others differ by hundredths: they have an axis of their own
    panels = [[row for row in rows if row.measure.startswith("first") == first] for first in (False, True)]
    panels = [panel for panel in panels if panel]
    heights = [len(panel) + 1 for panel in panels]
    figure = Figure(figsize=(6.5, 0.3 * sum(heights) + 0.5), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.axvline(0, color="#808080", linewidth=1)
        for place, row in enumerate(panel):
            axes.plot(row.values, [place] * len(row.values), "o", color="#3b82f6", markersize=4, alpha=0.7)
            axes.plot([mean(row.values)], [place], "|", color="#ef4444", markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(panel)), [f"{row.arms[1]}: {row.measure}" for row in panel])
        axes.set_ylim(len(panel) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", color="#808080", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
    label = "nats a token, without lacuna's choice minus with it: right of 0 the choice helps"
    figure.supxlabel(label, fontsize=9, color="#808080")
    return figure
