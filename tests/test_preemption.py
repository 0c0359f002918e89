"""What a run does when it is told to go: real processes, real signals, exit status 75."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import VARIABLES, Run, checkpoints, finish, last_step, lines, train_lines
from test_resume import assert_same_run, place, straight, words  # noqa: F401  fixtures

from lacuna.preemption import REPEAT_SECONDS

pytestmark = pytest.mark.slow  # minutes: left out of the second set of versions in CI

STEPS = 20
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]


def state_of(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step_{step}" / "state.json").read_text())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_with_75_after_a_checkpoint_at_the_next_step_boundary(number, place):  # noqa: F811
    name = f"signal_{number}"
    run = place / "runs" / name
    done = finish(place, *words(place, "map", name, "--checkpoint.every", "500"), faults={"signal_at": (7, number)})
    assert done.status == 75, done.output
    # it came while step 7 was reported, so step 8 is the first whose end all ranks may agree on; a thread hears it
    [newest] = checkpoints(run)
    assert 8 <= newest <= 10 and [m["step"] for m in train_lines(run)] == list(range(1, newest + 1))
    assert state_of(run, newest)["step"] == newest
    assert f"stopped by a signal after step {newest} of 20; the same command goes on" in done.output
    assert "Traceback" not in done.output
    assert not (run / "hf").exists()


def test_a_signal_during_an_evaluation_is_kept_until_a_step_has_ended(place, straight):  # noqa: F811
    run, marker = place / "runs" / "evaluating", place / "evaluating"
    command = words(place, "map", "evaluating", "--checkpoint.every", "500")
    # 3 batches at step 0; then each one of step 5 takes half a second
    with Run(place, *command, faults={"slow_evaluation": (0.5, str(marker), 3)}) as process:
        process.until(marker.exists)
        process.send(signal.SIGTERM)
        assert process.wait() == 75, process.output
    [newest] = checkpoints(run)
    assert newest == 6
    assert [m["step"] for m in lines(run) if "eval_loss" in m] == [0, 5]
    assert finish(place, *command).status == 0
    assert_same_run(run, straight("map"))


def test_a_signal_before_the_first_step_has_ended_ends_the_run_at_once_and_spoils_nothing(place, straight):  # noqa: F811
    run, marker = place / "runs" / "compiling", place / "compiling"
    command = words(place, "map", "compiling")
    for before, resumed in ((None, []), (7, [6])):
        marker.unlink(missing_ok=True)
        if before:
            assert finish(place, *command, faults={"signal_at": (before, signal.SIGKILL)}).status == -signal.SIGKILL
            resumed = checkpoints(run)
            kept = {file: file.read_bytes() for file in (run / "checkpoints" / f"step_{resumed[-1]}").iterdir()}
        with Run(place, *command, faults={"slow_first_step": (60, str(marker))}) as process:
            process.until(marker.exists)
            process.send(signal.SIGTERM)
            begin = time.monotonic()
            assert process.wait() == 75, process.output
            assert time.monotonic() - begin < 15
        assert checkpoints(run) == resumed
    assert {file: file.read_bytes() for file in kept} == kept
    assert finish(place, *command).status == 0
    assert_same_run(run, straight("map"))


def test_a_signal_during_a_save_waits_for_it_and_a_second_one_ends_at_once_with_the_last_checkpoint_whole(
    place,  # noqa: F811
    straight,  # noqa: F811
):
    run, marker = place / "runs" / "saving", place / "saving"
    command = words(place, "map", "saving", "--checkpoint.every", "4")
    with Run(place, *command, faults={"slow_save": (1.5, str(marker))}) as process:
        process.until(marker.exists)  # of step 4, while later steps compute
        process.send(signal.SIGTERM)
        assert process.wait() == 75, process.output
    first, second = checkpoints(run)
    assert first == 4 and 4 < second <= 8, "both the save under way and one of the step that the signal ended"

    marker.unlink()
    with Run(place, *command, faults={"slow_save": (60, str(marker))}) as process:
        process.until(marker.exists)
        process.send(signal.SIGTERM)
        time.sleep(0.5)
        process.send(signal.SIGTERM)  # the same one once more, as torchrun passes it on
        time.sleep(REPEAT_SECONDS + 0.5)
        assert process.processes[0].exitcode is None, "it did not wait for the disk"
        process.send(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait() == 75, process.output
        assert time.monotonic() - begin < 15
    assert checkpoints(run) == [first, second]
    assert list((run / "checkpoints").glob(".step_*")), "the test did not hit the save"
    done = finish(place, *command)
    assert done.status == 0 and f"Going on after step {second}," in done.output
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_run(run, straight("map"))


def test_a_second_ctrl_c_ends_at_once_but_not_under_a_launcher_that_passes_it_on(place):  # noqa: F811
    for launched in (False, True):
        run, marker = place / "runs" / f"twice_{launched}", place / f"twice_{launched}"
        command = words(place, "map", run.name, "--checkpoint.every", "4")
        rank = {"variables": ({"RANK": "0", "WORLD_SIZE": "1"},)} if launched else {}
        with Run(place, *command, faults={"slow_save": (2, str(marker)), **rank}) as process:
            process.until(marker.exists)
            process.send(signal.SIGINT)
            time.sleep(0.3)
            process.send(signal.SIGINT)
            assert process.wait() == 75, process.output
        assert "Traceback" not in process.output
        assert "saving after this step; a second one ends it unsaved" in process.output
        assert ("ended at once by signal" in process.output) != launched
        assert checkpoints(run) == [] if not launched else len(checkpoints(run)) > 0


def test_what_nohup_ignores_stays_ignored(place):  # noqa: F811
    command = words(place, "map", "nohup")
    faults = {"ignored": (signal.SIGHUP,), "signal_at": (3, signal.SIGHUP)}
    assert finish(place, *command, faults=faults).status == 0
    assert last_step(place / "runs" / "nohup") == STEPS


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_ranks_ends_both_with_75_after_one_checkpoint(rank, place):  # noqa: F811
    name = f"one_of_two_{rank}"
    run = place / "runs" / name
    never = ("--checkpoint.every", "500", "--eval.every", "500")  # an evaluation tells the other rank too
    command = words(place, "map", name, *never, "--train.steps", "100000")
    with Run(place, *command, ranks=2) as process:
        process.until(lambda: last_step(run) >= 5)
        process.send(signal.SIGUSR1, rank)
        assert process.wait() == 75, process.output
    assert checkpoints(run) == [last_step(run)]
    assert len(list((run / "checkpoints").glob("step_*/*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("task", "number", "status", "sentence"),
    [
        ("pt", signal.SIGTERM, 75, "lacuna: ended at once by signal"),
        ("pt", signal.SIGINT, 75, "lacuna: ended at once by signal"),
        ("export", signal.SIGINT, 130, "lacuna: interrupted"),
    ],
)
def test_a_signal_while_torch_is_still_imported_is_answered(tmp_path, task, number, status, sentence):
    """The command itself, not forked: its first seconds go into imports, and a cluster may not wait for them."""
    (tmp_path / "empty.toml").write_text("")
    command = [sys.executable, "-X", "importtime", "-m", "lacuna", *["export", "nowhere", "out"]]
    if task == "pt":
        command[5:] = words(tmp_path, "map", "early", "--model.name", "nowhere")
    with open(tmp_path / "imports.txt", "w") as imports:
        process = subprocess.Popen(command, env=os.environ | VARIABLES, stderr=imports)
    try:
        end = time.monotonic() + 60
        while "torch._utils" not in (tmp_path / "imports.txt").read_text() and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == status
        said = (tmp_path / "imports.txt").read_text()
        assert sentence in said and "Traceback" not in said
    finally:
        process.kill()
