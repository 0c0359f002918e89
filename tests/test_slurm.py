"""`lacuna slurm` on a real Slurm: one controller and two nodes on this machine, of Debian's packages, as root."""

import json
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
from test_faults import (
    ROOT,
    can,
    environment,
    finished,
    metrics,
    only_sentence,
    same_run,
    two_ranks,
    wait_for_step,
    words,
)

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


STEPS = 150


def test_a_job_of_two_nodes_comes_back_after_time_limit_and_preemption_and_loses_nothing(words, tmp_path, slurm):
    folder = tmp_path / "runs of $(touch pwned)" / "job"  # neither a shell nor Slurm may split or run this
    words = [*words, "--train.steps", str(STEPS), "--checkpoint.every", "1_000"]
    options = {"comment": "it's $(touch pwned) `touch pwned`\ntouch pwned", "cpus-per-task": "2"}
    asked = ["--slurm.gpus", "0", "--slurm.nodes", "2", "--slurm.grace", "50", "--slurm.options", json.dumps(options)]
    asked += ["--name", "job", "--out", folder.parent.name]  # a relative folder
    submit = [*words[:3], "slurm", *words[3:], *asked, "--submit"]
    environ = environment(SLURM_CONF=slurm.conf)
    done = subprocess.run(submit, capture_output=True, text=True, timeout=60, env=environ, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]
    output = folder / f"slurm-{job}.txt"

    wait_for_step(folder, 20)
    assert state(slurm, job)["NumNodes"] == "2"
    assert "#SBATCH --signal=USR1@50\n" in (folder / "job.sh").read_text()
    slurm("scancel", "--signal=USR1", job)  # what Slurm does so many seconds before the time limit, by the half minute
    comes_back(slurm, job, 1)
    first = metrics(folder)[-1]["step"]
    assert (folder / "checkpoints" / f"step_{first}" / "state.json").exists(), output.read_text()

    wait_until(lambda: metrics(folder)[-1]["step"] >= first + 20, 90)
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

    with two_ranks([*words, "--name", "whole"], tmp_path) as ranks:
        assert [rank.wait(150) for rank in ranks] == [0, 0]
    same_run(folder, tmp_path / "runs" / "whole", STEPS)


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_threads_of_a_task_are_its_share_of_the_cores_of_its_node(slurm, tasks):
    code = "import os; from lacuna.cli import launch; from lacuna.config import Config, Source; "
    code += "launch(Config(data={'sources': [Source(path='x')]}, train={'steps': 1}), []); "
    code += "print(os.environ['OMP_NUM_THREADS'])"
    command = ["srun", "--nodes=2", f"--ntasks-per-node={tasks}", sys.executable, "-c", code]
    environ = environment(SLURM_CONF=slurm.conf)
    environ.pop("OMP_NUM_THREADS")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=True)
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    cores = len({file.read_text() for file in files if int(file.parts[-3][3:]) in os.sched_getaffinity(0)})
    assert done.stdout.split() == [str(max(1, cores // tasks))] * 2 * tasks


def test_what_sbatch_refuses_is_one_sentence(words, slurm):
    submit = [
        *words[:3],
        "slurm",
        *words[3:],
        "--submit",
        "--slurm.gpus",
        "0",
        "--slurm.options",
        '{"partition": "nowhere"}',
    ]
    done = finished(submit, SLURM_CONF=slurm.conf)
    assert done.returncode == 1
    assert "invalid partition" in done.stderr and "slurm.options" in only_sentence(done.stderr)


def test_without_slurm_the_script_is_written_and_submit_is_one_sentence(words, tmp_path):
    plain = [*words[:3], "slurm", *words[3:]]
    done = finished(plain, PATH="/nowhere")
    script = tmp_path / "runs" / "run" / "job.sh"
    assert done.returncode == 0 and done.stdout.strip() == f"sbatch {script}" and script.exists()
    done = finished([*plain, "--submit"], PATH="/nowhere")
    assert done.returncode == 1 and "no sbatch here" in only_sentence(done.stderr)
