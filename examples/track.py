"""A run's curves on Weights & Biases or trackio: `uv run --extra wandb python examples/track.py runs/NAME [trackio]`.

It follows runs/NAME/metrics.jsonl, of a run that goes on or is over, in a process of its own: so no server and no
network can stop a run. It ends when nobody has trained there for a minute. Started again, or beside a run that was
stopped and goes on, it adds to the same curves, and sends every step once: where a run goes on with another config
(checkpoint.resume_changed), the steps that it does again stay as they were. Project, entity and offline mode are the
tracker's own: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE.
"""

import json
import os
import secrets
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 60  # seconds without a run


def track(folder: Path, name: str, patience: float = PATIENCE):
    """Send what is in the folder's metrics.jsonl, and what comes, to the module of this name."""
    file = folder / f"{name}.json"  # which run it is there, and the last steps that were sent
    sent = {"id": secrets.token_hex(4), "metrics": -1, "evaluation": -1}
    if file.exists():
        sent = json.loads(file.read_text())
    try:
        tracker = import_module(name)
    except ModuleNotFoundError:
        sys.exit(f"{name} is not installed: uv sync --extra {name}")
    keys = tomllib.loads((folder / "config.toml").read_text())
    project = os.environ.get("WANDB_PROJECT", "lacuna")
    options = {"id": sent["id"], "dir": folder} if name == "wandb" else {}
    tracker.init(project=project, name=folder.name, config=keys, resume="allow", **options)
    if name == "wandb":
        # its own steps only grow, and an evaluation may come after a restart
        tracker.define_metric("*", step_metric="step")
    seen = time.monotonic()  # when somebody trained
    while time.monotonic() - seen < patience:
        if is_running(folder):
            seen = time.monotonic()
        send_new(folder / "metrics.jsonl", tracker, sent)
        file.write_text(json.dumps(sent))
        time.sleep(min(5, patience / 4))
    tracker.finish()


def send_new(metrics: Path, tracker, sent: dict):
    """Of a run that goes on some lines come again: the same ones. The last one may not be written to its end."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    for line in lines:
        if not line.endswith("\n"):
            break
        figures = json.loads(line)
        step = figures.pop("step")
        kind = "evaluation" if "eval_loss" in figures else "metrics"
        if step > sent[kind]:
            numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
            if tracker.__name__ == "wandb":
                tracker.log(numbers | {"step": step})
            else:
                tracker.log(numbers, step=step)
            sent[kind] = step


def is_running(folder: Path) -> bool:
    """Whether a run has the folder: it holds a lock beside it."""
    try:
        FileLock(folder.parent / f".{folder.name}.lock").acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False


if __name__ == "__main__":
    if not sys.argv[1:] or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: track.py runs/NAME [wandb|trackio], with a folder that a run has begun in")
    followed = Path(sys.argv[1]).resolve()
    while not (followed / "config.toml").exists():  # a run writes it once it can begin
        time.sleep(1)
    track(followed, *sys.argv[2:3] or ["wandb"])
