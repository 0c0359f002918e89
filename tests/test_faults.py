"""A run is never lost: ranks that die or freeze, links that are cut, disks that are full, files that are cut off.

Every fault is real: processes that are killed, network namespaces, file systems of a few megabytes.
"""

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import processes
import pytest
from conftest import EXAMPLES, REPO
from processes import last_step

pytestmark = pytest.mark.slow  # minutes: left out of the second set of versions in CI

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
GONE = 60  # seconds until the other ranks of a dead one must have ended


def can(*command: str) -> bool:
    """Whether a command of the system works here, such as making a network namespace as root."""
    try:
        return ROOT and subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def words(tmp_path) -> list[str]:
    """The command line of a small run; further words override these."""
    data, config = tmp_path / "texts.jsonl", tmp_path / "run.toml"
    data.write_text("".join((EXAMPLES / "moby_dick" / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    config.write_text(f"""
        out = "{tmp_path / "runs"}"
        [model]
        name = "{EXAMPLES / "tiny"}"
        [data]
        sources = [{{ path = "{data}" }}]
        cache = "{tmp_path / "cache"}"
        [train]
        seq_len = 64
        micro_batch_size = 1
        global_batch_size = 2
        steps = 100_000
        [checkpoint]
        every = 10
        [log]
        every = 1
    """)
    return [sys.executable, "-m", "lacuna", "pt", str(config)]


def environment(**variables: str) -> dict:
    """Of a subprocess: no GPU, one thread, nothing of a launcher that may have started these tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC", "LACUNA"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    source = {"PYTHONPATH": str(REPO / "src"), "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_OFFLINE": "1"}
    return kept | source | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"} | variables


@contextmanager
def started(command: list[str], output: Path, **variables: str):
    """A process with its output in a file, and its whole process group gone afterwards, whatever happens."""
    with open(output, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(**variables), start_new_session=True
        )
    try:
        yield process
    finally:
        for sign in (signal.SIGKILL, signal.SIGCONT):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        process.wait(20)


def finished(command: list[str], faults: dict | None = None) -> subprocess.CompletedProcess:
    """The same command in a process that has imported torch already, to its end."""
    run = processes.finish(Path(command[4]).parent, *command[3:], faults=faults, timeout=150)
    return subprocess.CompletedProcess(command, run.status, "", run.output)


def metrics(folder: Path) -> list[dict]:
    """The whole lines of metrics.jsonl that hold a step's loss."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and '"loss"' in line]


def same_run(folder: Path, other: Path, steps: int):
    """Bit for bit: every step once, with the loss and the rows of an undisturbed run."""
    a, b = ([(m["step"], m["loss"], m["batch_checksum"], m["tokens"]) for m in metrics(f)] for f in (folder, other))
    assert [line[0] for line in a] == list(range(1, steps + 1))
    assert a == b


def only_sentence(output: str) -> str:
    """The one line by which a run says why it ends. Any traceback fails the test."""
    assert "Traceback" not in output, output
    found = [line for line in output.splitlines() if re.match(r"lacuna( \(rank \d+\))?: ", line)]
    assert len(found) == 1, output
    return found[0]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def is_gone(run: processes.Run, rank: int, since: float):
    """The rank has ended, within a minute, with status 1 and one sentence about the other rank."""
    process = run.processes[rank]
    process.join(GONE + 10)
    output = run.outputs[rank].read_text()
    assert process.exitcode == 1, output
    assert time.monotonic() - since < GONE
    sentence = only_sentence(output)
    assert "Another rank has ended" in sentence
    assert sentence.endswith("the same command goes on from the last checkpoint")


def whole_checkpoints(folder: Path, step: int):
    """Those that are named so have every file, and the newest is no older than `step`."""
    found = sorted((folder / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    assert int(found[-1].name[5:]) >= step
    for checkpoint in found:
        files = {file.name for file in checkpoint.iterdir()}
        assert {"state.json", "config.json", "tokenizer.json", "rank_00000.safetensors"} <= files
        assert json.loads((checkpoint / "state.json").read_text())["step"] == int(checkpoint.name[5:])


# ---- ranks that die, freeze, or cannot be reached


def test_a_rank_that_is_killed_ends_the_other_within_a_minute(words, tmp_path):
    folder = tmp_path / "runs" / "run"
    with processes.Run(tmp_path, *words[3:], ranks=2) as run:
        run.until(lambda: last_step(folder) >= 25)
        run.send(signal.SIGKILL, rank=1)
        is_gone(run, 0, time.monotonic())  # 0.4 s when it was written
    whole_checkpoints(folder, 10)


def test_a_rank_that_freezes_in_a_save_ends_the_other_after_dist_timeout(words, tmp_path):
    """No connection is closed then: only the timeout helps, which every process group must have."""
    folder = tmp_path / "runs" / "run"
    faults = {0: {}, 1: {"frozen_in_save": (2,)}}
    with processes.Run(tmp_path, *words[3:], "--dist.timeout", "10", ranks=2, faults=faults) as run:
        run.until(lambda: last_step(folder) >= 20)
        is_gone(run, 0, time.monotonic())
        assert "frozen" in run.outputs[1].read_text()
    whole_checkpoints(folder, 10)


def test_a_signal_ends_a_rank_that_waits_for_another_one_to_start(words, tmp_path):
    """It waits in C++, where Python's own signal handlers are not run."""
    port = free_port()
    meet = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with processes.Run(tmp_path, *words[3:], faults={"variables": (meet,)}) as alone:
        alone.until(lambda: listening(int(port)))
        time.sleep(1)
        alone.send(signal.SIGTERM)
        assert alone.wait(20) == 75


def test_a_signal_while_torch_is_imported_asks_to_be_started_again(words, tmp_path):
    """By its exit status: with any other one, a job of Slurm would end there."""
    with started(words, tmp_path / "output.txt") as process:
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        if not maps.exists():
            pytest.skip("needs Linux's /proc/PID/maps")
        while "libtorch_cpu" not in maps.read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 75
    assert not (tmp_path / "runs").exists()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def hosts():
    """Two network namespaces with one cable between them; yields their names and the command that cuts it."""
    names = [f"lacuna-{os.getpid()}-{i}" for i in range(2)]
    if not can("ip", "netns", "add", names[0]):
        pytest.skip("needs root, iproute2 and network namespaces")
    try:
        commands = [f"ip netns add {names[1]}", f"ip link add v0 netns {names[0]} type veth peer v1 netns {names[1]}"]
        for i, name in enumerate(names):
            commands += [f"ip -n {name} addr add 10.213.0.{i + 1}/24 dev v{i}", f"ip -n {name} link set v{i} up"]
            commands += [f"ip -n {name} link set lo up"]
        for command in commands:
            subprocess.run(command.split(), check=True, timeout=20)
        yield names, f"ip -n {names[0]} link set v0 down".split()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


def test_a_cut_link_ends_the_ranks_on_both_hosts_within_a_minute(words, tmp_path, hosts):
    names, cut = hosts
    folder = tmp_path / "runs" / "run"
    faults = {rank: {"on_host": (name, f"v{rank}", "10.213.0.1")} for rank, name in enumerate(names)}
    with processes.Run(tmp_path, *words[3:], "--dist.timeout", "10", ranks=2, faults=faults) as run:
        run.until(lambda: last_step(folder) >= 25)
        subprocess.run(cut, check=True, timeout=20)
        since = time.monotonic()
        is_gone(run, 0, since)  # 30.2 s both with dist.timeout 30, when it was written
        is_gone(run, 1, since)
    whole_checkpoints(folder, 10)


# ---- torchrun


def ranks_of(launcher: processes.Run) -> list[int]:
    """The processes that torchrun has started, in the order of their ranks."""
    pid = launcher.processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc/PID/task/PID/children")
    return sorted(int(pid) for pid in children.read_text().split())


def checkpoint_after_a_signal(folder: Path, launcher: processes.Run, status: int, steps: int) -> int:
    """Sends SIGTERM to the launcher and its ranks, as Slurm does: a rank hears it twice, from both."""
    reached = metrics(folder)[-1]["step"]
    for pid in [*ranks_of(launcher), launcher.processes[0].pid]:
        os.kill(pid, signal.SIGTERM)
    assert launcher.wait(40) == status, launcher.output
    assert launcher.output.count("stopped by a signal after step") == 2, "each rank says so"
    saved = sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))
    assert saved[-1] >= metrics(folder)[-1]["step"] >= reached
    assert saved[-1] < steps, "the run was too short for the signal"
    return saved[-1]


TWO_DEVICES = {"variables": ({"CUDA_VISIBLE_DEVICES": "-1,-2"},)}  # of which none is there
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SMALL = ("--model.from_scratch", "true", "--model.overrides", json.dumps(SHAPE))  # whose steps take no time


def test_restarts_of_torchrun_resume_by_themselves_and_a_signal_to_a_launcher_saves(words, tmp_path):
    """Two ranks: SIGTERM to lacuna's own launcher; then to torchrun, after one of its ranks was killed; then the end.

    The launchers are forked; the ranks that they start are the command itself, with Python's own start.
    """
    folder, steps = tmp_path / "runs" / "hit", 90
    words = [*words[3:], *SMALL, "--train.steps", str(steps), "--name", "hit"]
    with processes.Run(tmp_path, *words, faults=TWO_DEVICES) as launcher:
        launcher.until(lambda: last_step(folder) >= 5, timeout=120)
        saved = checkpoint_after_a_signal(folder, launcher, 75, steps)

    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "-m", "lacuna"]
    faults = {"variables": ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},)}
    with processes.Run(tmp_path, *options, *words, module="torch.distributed.run", faults=faults) as launcher:
        launcher.until(lambda: last_step(folder) >= saved + 15, timeout=120)
        os.kill(ranks_of(launcher)[1], signal.SIGKILL)
        launcher.until(lambda: launcher.output.count("Going on after step") == 2, timeout=120)
        launcher.until(lambda: last_step(folder) >= saved + 25, timeout=120)
        saved_again = checkpoint_after_a_signal(folder, launcher, 1, steps)  # torchrun's own status is 1
    first, second = map(int, re.findall(r"Going on after step (\d+)", launcher.output))
    assert first == saved
    assert second > saved, "it did not go on from its newest checkpoint"

    last = processes.finish(tmp_path, *words, ranks=2)
    assert last.status == 0 and f"Going on after step {saved_again}," in last.output, last.output
    whole = processes.finish(tmp_path, *words, "--name", "whole", ranks=2)
    assert whole.status == 0, whole.output
    same_run(folder, tmp_path / "runs" / "whole", steps)


# ---- disks


@pytest.fixture
def disk(tmp_path):
    """A function that makes, or changes, a file system of a given size, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not can("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)):
        pytest.skip("needs root and tmpfs")

    def remount(options: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, timeout=20)
        return folder

    yield remount
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def test_a_full_disk_ends_the_run_in_a_sentence_and_room_lets_it_go_on(words, tmp_path, disk):
    undisturbed = finished([*words, "--train.steps", "40", "--name", "undisturbed"])
    assert undisturbed.returncode == 0, undisturbed.stderr
    words = [*words, "--train.steps", "40", "--out", str(disk("size=24m"))]  # one checkpoint has 16 MB
    done = finished(words)
    folder = tmp_path / "disk" / "run"
    sentence = only_sentence(done.stderr)
    assert done.returncode == 1
    assert "no checkpoint of step 20" in sentence and "No space left on device" in sentence
    assert "The disk is full: make room, and the same command goes on from the last checkpoint" in sentence
    whole_checkpoints(folder, 10)
    disk("size=99m")
    done = finished(words)
    assert done.returncode == 0, done.stderr
    assert "Going on after step 10" in done.stderr
    same_run(folder, tmp_path / "runs" / "undisturbed", 40)


def test_a_disk_too_full_for_a_line_of_metrics_or_a_log_is_one_sentence(words, tmp_path, disk):
    """One that has room when the run begins, and none a few steps later."""
    folder = disk("size=24m")
    more = ["--out", str(folder), "--checkpoint.every", "100_000", "--log.every", "1"]
    with processes.Run(tmp_path, *words[3:], *more) as run:
        run.until(lambda: last_step(folder / "run") >= 2)
        with suppress(OSError), open(folder / "others", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert run.wait() == 1
    sentence = only_sentence(run.output)
    assert "The disk is full" in sentence and "No space left on device" in sentence and "make room" in sentence


def test_a_disk_too_full_for_the_token_cache_is_one_sentence(words, disk):
    done = finished([*words, "--data.cache", str(disk("size=64k"))])
    assert done.returncode == 1
    sentence = only_sentence(done.stderr)
    assert "The disk is full" in sentence and "make room" in sentence


@pytest.mark.parametrize("key", ["--out", "--data.cache"])
def test_a_read_only_folder_is_one_sentence(words, disk, key):
    done = finished([*words, key, str(disk("ro") / "folder")])
    assert done.returncode == 1
    sentence = only_sentence(done.stderr)
    assert "Read-only file system" in sentence and str(disk("ro") / "folder") in sentence
    assert "Change who may, or name another place" in sentence


def test_torchrun_adds_no_traceback_to_what_a_rank_has_said(words, disk):
    done = finished([*words, "--out", str(disk("ro") / "folder")], TWO_DEVICES)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "lacuna (rank 0): out: " in done.stderr
    assert done.stderr.splitlines()[-1] == "lacuna: a rank has ended before the run has, as it says above"


# ---- files that are cut off


@pytest.mark.parametrize(("suffix", "streaming"), [(".jsonl", False), (".jsonl.gz", True)])
def test_a_data_file_that_is_cut_off_is_named_in_one_sentence(words, tmp_path, suffix, streaming):
    """Never a hang, never an early end that nobody notices; tests/data/test_remote.py has the other kinds of files."""
    data = (EXAMPLES / "moby_dick" / "train.jsonl").read_bytes()
    data = gzip.compress(data) if suffix == ".jsonl.gz" else data
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: len(data) * 9 // 10])
    sources = json.dumps([{"path": str(cut), "streaming": streaming}])
    done = finished([*words, "--data.sources", sources])
    assert done.returncode == 1, done.stderr[-3000:]
    assert str(cut) in only_sentence(done.stderr)


# ---- anything wrong before the first step


def replaced(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def spoil_config(folder: Path):
    replaced(folder / "model" / "config.json", hidden_size="large")


def spoil_tokenizer(folder: Path):
    (folder / "model" / "tokenizer.json").write_text('{"model": 3}')


def spoil_weights(folder: Path):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


BROKEN = {  # what breaks, with what words: what the sentence must hold
    "the config file": (lambda f: (f / "run.toml").write_bytes(b"\xff"), [], ["run.toml", "UnicodeDecodeError"]),
    "a value": (None, ["--data.sources", "[{"], ["the command line", "data.sources"]),
    "the folder": (lambda f: (f / "runs").write_text(""), [], ["Wait, or set another name", "File exists"]),
    "the model's config": (spoil_config, [], ["model", "hidden_size", "expected int"]),
    "the model": (None, ["--model.overrides", '{"num_key_value_heads": 0}'], ["model.overrides", "division"]),
    "the weights": (spoil_weights, [], ["model"]),
    "the tokenizer": (spoil_tokenizer, [], ["model.tokenizer"]),
    "no model": (None, ["--model.name", "."], ["model.name", "config.json or tokenizer"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_is_broken_before_the_first_step_is_one_sentence(words, tmp_path, what):
    shutil.copytree(EXAMPLES / "tiny", tmp_path / "model")
    spoil, more, parts = BROKEN[what]
    if spoil:
        spoil(tmp_path)
    done = finished([*words, "--model.name", str(tmp_path / "model"), *more])
    sentence = only_sentence(done.stderr)
    assert done.returncode == 1 and len(sentence) < 700
    for part in parts:
        assert part in sentence
    assert not (tmp_path / "runs" / "run").exists(), "a start that fails leaves no folder"
    log = tmp_path / "runs" / "log.txt"
    if log.exists():
        assert sentence.partition(": ")[2][:60] in log.read_text(), "what libraries say in full is kept"


def test_a_log_that_cannot_be_opened_is_a_sentence(words, tmp_path):
    (tmp_path / "runs" / "run" / "log.txt").mkdir(parents=True)
    assert "log.txt" in only_sentence(finished([*words, "--train.steps", "2"]).stderr)


def test_a_start_that_fails_changes_nothing_of_a_finished_run_and_is_told_beside_it(words, tmp_path):
    shutil.copytree(EXAMPLES / "tiny", tmp_path / "model")
    words = [*words, "--model.name", str(tmp_path / "model"), "--train.steps", "2"]
    assert finished(words).returncode == 0
    folder = tmp_path / "runs" / "run"
    assert "step 2/2" in (folder / "log.txt").read_text()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    done = finished(words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert "Traceback" in (tmp_path / "runs" / "log.txt").read_text()


def test_a_bug_is_a_sentence_and_its_traceback_is_in_the_log(words, tmp_path):
    for step in (0, 2):
        run = processes.finish(tmp_path, *words[3:], "--name", f"bug{step}", faults={"bug_at": (step,)})
        assert run.status == 1 and "Traceback" not in run.output
        assert "MASTER_PORT): ZeroDivisionError: division by zero" in run.output
        [log] = tmp_path.glob(f"**/bug{step}/log.txt")
        assert "Traceback" in log.read_text()
