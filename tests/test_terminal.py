"""What a run looks like: a live line between the others on a terminal, plain lines where it is piped."""

import json
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import EXAMPLES
from processes import VARIABLES

STEPS = 4
ESCAPE = "\x1b"


def on_terminal(command: list[str], environ: dict) -> tuple[int, str]:
    """The exit status of a command, and what it wrote to stderr: a terminal of 80 columns."""
    mine, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(command, stderr=terminal, env=environ)
    os.close(terminal)
    written = b""
    try:
        while part := os.read(mine, 4096):
            written += part
    except OSError:  # so a terminal ends, on Linux
        os.close(mine)
    return process.wait(60), written.decode()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on a terminal and one that is piped: what each wrote, and its log.txt."""
    place = tmp_path_factory.mktemp("terminal")
    (place / "empty.jsonl").write_text(json.dumps({"text": ""}) + "\n")  # one line of it is a warning
    source = json.dumps([{"path": str(EXAMPLES / "moby_dick" / "heldout.jsonl")}, {"path": str(place / "empty.jsonl")}])
    words = ["--model.name", EXAMPLES / "tiny", "--model.from_scratch", "true", "--data.sources", source]
    words += ["--data.cache", place / "cache", "--out", place / "runs", "--train.steps", STEPS, "--log.every", 1]
    words += ["--train.seq_len", 64, "--train.micro_batch_size", 1, "--train.global_batch_size", 1]
    words += ["--eval.sources", source, "--eval.rows", 3]
    (place / "empty.toml").touch()
    command = [sys.executable, "-m", "lacuna", "pt", place / "empty.toml", *words, "--optim.warmup_steps", 0]
    ours = ("TQDM_DISABLE", "NO_COLOR")
    environ = {key: value for key, value in os.environ.items() if key not in ours} | VARIABLES

    status, written = on_terminal([*map(str, command), "--name", "terminal"], environ)
    assert status == 0
    # after it, with a cache of its own: so it tokenizes too
    command[command.index(place / "cache")] = place / "another"
    piped = subprocess.run([*map(str, command), "--name", "piped"], stderr=subprocess.PIPE, env=environ, timeout=60)
    assert piped.returncode == 0
    return {
        "terminal": (written, (place / "runs" / "terminal" / "log.txt").read_text()),
        "piped": (piped.stderr.decode(), (place / "runs" / "piped" / "log.txt").read_text()),
    }


@pytest.mark.slow
def test_what_is_piped_is_the_log_and_nothing_that_moves(runs):
    written, log = runs["piped"]
    assert "\r" not in written and ESCAPE not in written
    assert written == "loading torch and transformers\n" + log


@pytest.mark.slow
def test_on_a_terminal_a_live_line_stands_below_lines_that_stay_whole(runs):
    written, log = runs["terminal"]
    assert "\r" not in log and ESCAPE not in log
    warning, *_ = [line for line in log.splitlines() if "1 of 1 documents dropped: no text" in line]
    assert f"{ESCAPE}[33m{warning}{ESCAPE}[m" in written, "in yellow"
    parts = re.split(r"[\r\n]+", re.sub(rf"{ESCAPE}\[\d*[mA]", "", written))
    assert [part for part in parts if part in log.splitlines()] == log.splitlines()
    live = [part for part in parts if re.search(rf"\d/{STEPS} \[\d\d:\d\d<", part)]
    assert f" {STEPS}/{STEPS} " in live[-1]
    assert max(map(len, live)) <= 72, "there is room for ^C"
    first = parts.index(next(line for line in log.splitlines() if f"step 1/{STEPS}" in line))
    last = parts.index(next(line for line in log.splitlines() if f"step {STEPS}/{STEPS}" in line))
    assert set(live) & set(parts[first:last]), "it is there between the lines"
    evaluating = [part for part in parts if part.startswith("evaluating: ")]
    assert any("/3 [" in part for part in evaluating) and max(map(len, evaluating)) <= 72


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_an_error_is_red_on_a_terminal_where_colours_are_wanted(variables, tmp_path):
    environ = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | VARIABLES | variables
    command = [sys.executable, "-m", "lacuna", "pt", "--learning_rate", "1"]
    status, written = on_terminal(command, environ)
    sentence = "lacuna: unknown key learning_rate: did you mean optim.lr?"
    assert status == 1
    assert written == (f"{sentence}\r\n" if variables else f"{ESCAPE}[31m{sentence}{ESCAPE}[m\r\n")
