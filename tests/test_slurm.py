"""configs/slurm.sh on a real Slurm: one controller and two nodes on this machine, of Debian's packages, as root."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPO
from processes import finish, last_step
from test_faults import (
    ROOT,
    SMALL,
    can,
    environment,
    metrics,
    same_run,
    words,
)

from lacuna.preemption import REQUEUE

pytestmark = pytest.mark.slow  # minutes: left out of the second set of versions in CI

assert words  # a fixture
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "munged", "unshare"]
CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=local Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Starts the daemons with an /etc/hosts of their own that knows the nodes; gives a function that asks Slurm."""
    if not ROOT:
        pytest.skip("needs root, to start Slurm's daemons")
    if not all(map(shutil.which, PROGRAMS)) and shutil.which("apt-get"):
        environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        packages = ["slurmctld", "slurmd", "slurm-client", "munge", "util-linux"]
        apt = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10"]
        with suppress(subprocess.TimeoutExpired):  # where no mirror can be reached
            for command in ([*apt, "update"], [*apt, "install", "-y", *packages]):
                subprocess.run(command, env=environ, timeout=90, check=False, capture_output=True)
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, and apt-get cannot bring them")
    if not can("unshare", "--mount", "true"):
        pytest.skip("needs mount namespaces, for the names of its nodes")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} n0 n1\n")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=free_ports(3)))
    (folder / "state").mkdir()
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    environ = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    commands = [["munged", "--force", f"--socket={folder}/munge.socket", *files], ["slurmctld"]]
    for node in ("n0", "n1"):
        inside = f"mount --bind {folder}/hosts /etc/hosts && exec slurmd -N {node}"
        commands.append(["unshare", "--mount", "sh", "-c", inside])

    def ask(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environ, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    try:
        for command in commands:  # with no output of ours: daemons would hold it open
            subprocess.run(
                command, env=environ, timeout=30, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        wait_until(lambda: ask("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"], 30)
        ask.conf = environ["SLURM_CONF"]
        yield ask
        ask("scancel", "--user=root", "--full", "--signal=KILL")
    finally:
        for file in [*folder.glob("slurm*.pid"), folder / "munge.pid"]:
            if file.exists():
                os.kill(int(file.read_text()), 15)


def wait_until(happens, timeout: float):
    deadline = time.monotonic() + timeout
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.2)


def state(slurm, job: str) -> dict:
    return dict(word.split("=", 1) for word in slurm("scontrol", "show", "job", job).split() if "=" in word)


def comes_back(slurm, job: str, times: int):
    """The job is in the queue again; Slurm would let it wait there for two minutes."""
    wait_until(lambda: state(slurm, job)["JobState"] == "PENDING", 60)
    assert state(slurm, job)["Restarts"] == str(times)
    time.sleep(3)  # within a second of the requeue, slurmd takes the job for the one that it has just ended
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


STEPS = 100
SCRIPT = REPO / "configs" / "slurm.sh"


def submit(slurm, folder: Path, options: list[str], words: list[str], python: Path = sys.executable):
    """Hand the script to sbatch in a folder, for a cluster without GPUs."""
    command = ["sbatch", "--gpus-per-node", "0", "--ntasks-per-node", "1", *options, str(SCRIPT), *words]
    environ = environment(SLURM_CONF=slurm.conf, PYTHON=str(python))
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=folder, check=False)


def test_a_job_of_two_nodes_comes_back_after_time_limit_and_preemption_and_loses_nothing(words, tmp_path, slurm):
    folder = tmp_path / "runs of $(touch pwned)" / "job"  # neither a shell nor Slurm may split or run this
    words = [*words, *SMALL, "--train.steps", str(STEPS), "--checkpoint.every", "1_000"]
    options = ["--nodes", "2", "--cpus-per-task", "2", "--comment", "it's $(touch pwned) `touch pwned`\ntouch pwned"]
    asked = ["--name", "job", "--out", folder.parent.name]  # a relative folder
    done = submit(slurm, tmp_path, options, [*words[3:], *asked])
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]
    output = tmp_path / f"slurm-{job}.txt"

    wait_until(lambda: last_step(folder) >= 20, 120)
    assert state(slurm, job)["NumNodes"] == "2"
    slurm("scancel", "--signal=USR1", job)  # what Slurm does so many seconds before the time limit, by the half minute
    comes_back(slurm, job, 1)
    first = metrics(folder)[-1]["step"]
    assert (folder / "checkpoints" / f"step_{first}" / "state.json").exists(), output.read_text()

    wait_until(lambda: metrics(folder)[-1]["step"] >= first + 10, 90)
    slurm("scontrol", "requeue", job)
    comes_back(slurm, job, 2)
    second = metrics(folder)[-1]["step"]
    assert first < second < STEPS and (folder / "checkpoints" / f"step_{second}").exists()

    wait_until(lambda: state(slurm, job)["JobState"] in ("COMPLETED", "FAILED"), 90)
    text = output.read_text()
    assert state(slurm, job)["ExitCode"] == "0:0", text
    assert re.findall(r"Going on after step (\d+)", text) == [str(first), str(second)]
    assert "Traceback" not in text
    assert text.count("stopped by a signal") == 4, "each of two ranks saved, twice"
    assert not list(tmp_path.rglob("pwned")), "an option was run by a shell"

    whole = finish(tmp_path, *words[3:], "--name", "whole", ranks=2)
    assert whole.status == 0, whole.output
    same_run(folder, tmp_path / "runs" / "whole", STEPS)


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_script_tells_each_task_its_rank_and_its_share_of_the_cores_of_its_node(slurm, tmp_path, tasks):
    """A stand-in for python says what `lacuna` would see, even of a job that is given few variables."""
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    code = f"import os; from lacuna.cli import launch; launch(); print(*map(os.environ.get, {names}))"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nunset OMP_NUM_THREADS\nexec {sys.executable} -c "{code}"\n')
    python.chmod(0o700)
    options = ["--nodes", "2", "--ntasks-per-node", str(tasks), "--export=PYTHON,PYTHONPATH,PATH,SLURM_CONF"]
    job = submit(slurm, tmp_path, options, ["pt"], python).stdout.split()[-1]
    wait_until(lambda: state(slurm, job)["JobState"] in ("COMPLETED", "FAILED"), 60)

    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    cores = len({file.read_text() for file in files if int(file.parts[-3][3:]) in os.sched_getaffinity(0)})
    threads = max(1, cores // tasks)
    meeting = f"n0 {20000 + int(job) % 20000}"
    expected = [f"{rank} {rank % tasks} {2 * tasks} {meeting} {threads}" for rank in range(2 * tasks)]
    assert sorted((tmp_path / f"slurm-{job}.txt").read_text().splitlines()) == expected


def test_tasks_of_srun_alone_are_refused_before_they_write(words, tmp_path, slurm):
    command = ["srun", "--nodes=2", *words, "--name", "alone"]
    environ = environment(SLURM_CONF=slurm.conf)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.count("without RANK are as many runs: see configs/slurm.sh") == 2
    assert not (tmp_path / "runs").exists()


def test_the_script_asks_for_what_a_run_that_comes_back_needs():
    """Of Slurm: the signal early enough, the requeue, and one file for all starts."""
    options = re.findall(r"^#SBATCH (.+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(options)
    assert f"$status = {REQUEUE} " in SCRIPT.read_text()


def test_a_run_that_fails_does_not_come_back(words, tmp_path, slurm):
    done = submit(slurm, tmp_path, [], [*words[3:], "--train.stepz", "3"])
    job = done.stdout.split()[-1]
    wait_until(lambda: state(slurm, job)["JobState"] in ("COMPLETED", "FAILED"), 60)
    assert state(slurm, job)["ExitCode"] == "1:0"
    assert state(slurm, job)["Restarts"] == "0"
    assert "unknown key train.stepz" in (tmp_path / f"slurm-{job}.txt").read_text()
