"""examples/track.py: every line of a run goes to its tracker once, however often run and follower are stopped."""

import json
import runpy
import sys
import threading
import types

import pytest
from conftest import EXAMPLES
from filelock import FileLock

TRACK = runpy.run_path(str(EXAMPLES / "track.py"))


class Tracker(types.ModuleType):
    """Has the interface that wandb and trackio share; neither is a development dependency."""

    def __init__(self):
        super().__init__("wandb")
        self.begun = []
        self.logged = []
        self.finished = 0

    def init(self, **options):
        self.begun.append(options)

    def define_metric(self, names, step_metric):
        assert (names, step_metric) == ("*", "step")

    def log(self, figures):
        figures = dict(figures)
        self.logged.append((figures.pop("step"), figures))

    def finish(self):
        self.finished += 1


@pytest.fixture
def tracker(monkeypatch):
    module = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.toml").write_text('name = "x"\n[optim]\nlr = 1e-3\n')
    return tmp_path


def write(folder, lines: list[dict], rest: str = ""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)


def test_each_line_is_sent_once_though_run_and_follower_stop_and_go_on(folder, tracker):
    begin = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 8.0}]
    write(folder, [*begin, {"step": 2, "loss": 7.0}], rest='{"step": 3, "lo')
    TRACK["track"](folder, "wandb", 0.01)
    assert tracker.logged == [(0, {"eval_loss": 9.0}), (1, {"loss": 8.0}), (2, {"loss": 7.0})]
    # the run goes on from step 1: step 2 comes again, and then more
    write(
        folder, [*begin, {"step": 2, "loss": 7.0}, {"step": 3, "loss": 6.0, "mfu": None}, {"step": 3, "eval_loss": 6.5}]
    )
    TRACK["track"](folder, "wandb", 0.01)
    assert tracker.logged[3:] == [(3, {"loss": 6.0}), (3, {"eval_loss": 6.5})]
    first, second = tracker.begun
    assert first == second and first["config"] == {"name": "x", "optim": {"lr": 1e-3}}
    assert first["resume"] == "allow" and first["dir"] == folder and tracker.finished == 2


def test_a_tracker_that_is_not_installed_names_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SystemExit, match="trackio is not installed: uv sync --extra trackio"):
        TRACK["track"](folder, "trackio", 0.01)


def test_it_follows_as_long_as_a_run_has_the_folder(folder, tracker):
    write(folder, [{"step": 1, "loss": 8.0}])
    with FileLock(folder.with_name(f".{folder.name}.lock"), thread_local=False):
        thread = threading.Thread(target=TRACK["track"], args=[folder, "wandb", 0.2])
        thread.start()
        thread.join(1.0)
        assert thread.is_alive() and not tracker.finished
        write(folder, [{"step": 1, "loss": 8.0}, {"step": 2, "loss": 7.0}])
    thread.join(10)
    assert not thread.is_alive() and tracker.finished == 1
    assert tracker.logged == [(1, {"loss": 8.0}), (2, {"loss": 7.0})]
