"""Real runs in real processes, to be killed for real.

`python -m lacuna` takes ten seconds to import torch and transformers on two cores. So a process here is forked from one
that has imported them (multiprocessing's forkserver) and then does what `python -m lacuna WORDS` does: the same
command, signals and exit status, a second after its start. Ranks get the variables that torchrun sets. Instead of
lacuna's, another module's main program may be run.
A fault is a function of this file that runs in the new process before the command does.
"""

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lacuna.train", "processes"])
VARIABLES = {
    "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO / 'tests'}",
    "OMP_NUM_THREADS": "1",  # read when torch is imported: the same in every process, so that sums are the same
    "CUDA_VISIBLE_DEVICES": "",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}
NUMBERS = itertools.count()


class Run:
    """One or several ranks of a `lacuna` command, each in a process and process group of its own."""

    def __init__(self, folder: Path, *words: str, ranks: int = 1, faults: dict | None = None, module: str = "lacuna"):
        """faults: {name: arguments}, or {rank: {name: arguments}}; folder: where their output goes."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC"))}
        environ |= VARIABLES
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            environ |= {"MASTER_PORT": str(port)}
        self.folder, number = folder, next(NUMBERS)
        self.outputs = [folder / f"output_{number}_{rank}.txt" for rank in range(ranks)]
        self.processes = []
        with environment(VARIABLES):  # of the server, which starts with the first process
            for rank in range(ranks):
                mine = environ | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
                own = (faults or {}).get(rank, {}) if set(faults or {}) <= set(range(ranks)) else faults
                arguments = (module, words, mine, self.outputs[rank], own)
                self.processes.append(CONTEXT.Process(target=child, args=arguments))
                self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join(10)

    @property
    def output(self) -> str:
        return "\n".join(file.read_text() for file in self.outputs if file.exists())

    def send(self, number: int, rank: int | None = None):
        """A signal to the whole process group of one rank or of each."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    try:
                        os.killpg(process.pid, number)
                    except ProcessLookupError:  # it has no group of its own yet
                        os.kill(process.pid, number)

    def wait(self, timeout: float = 60) -> int | list[int]:
        """The exit status, or those of all ranks where they differ; a process that takes too long is killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        if hung:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"ranks {hung} did not end in {timeout} s:\n{self.output[-5000:]}")
        codes = [process.exitcode for process in self.processes]
        return codes[0] if len(set(codes)) == 1 else codes

    def until(self, condition, timeout: float = 60):
        """Wait until condition() is true while the run goes on."""
        end = time.monotonic() + timeout
        while not (value := condition()):
            ended = all(process.exitcode is not None for process in self.processes)
            if ended or time.monotonic() > end:
                raise TimeoutError(f"{'ended' if ended else 'still running'} before that:\n{self.output[-5000:]}")
            time.sleep(0.005)
        return value


def finish(folder: Path, *words: str, timeout: float = 90, **options) -> Run:
    """A run to its end, whatever that is; options as Run has them."""
    with Run(folder, *words, **options) as run:
        run.status = run.wait(timeout)
    return run


@contextlib.contextmanager
def environment(variables: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def child(module: str, words: tuple, environ: dict, output: Path, faults: dict | None):
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environ)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name, arguments in (faults or {}).items():
        globals()[name](*arguments)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


# ---- faults


def signal_at(step: int, number: int):
    """This process signals itself as soon as a step stands in metrics.jsonl."""
    from lacuna.metrics import Report

    def write(self, metrics, real=Report.write):
        real(self, metrics)
        if metrics["step"] == step and "loss" in metrics:
            os.kill(os.getpid(), number)

    Report.write = write


def ignored(number: int):
    """As nohup leaves SIGHUP."""
    signal.signal(number, signal.SIG_IGN)


def variables(environ: dict):
    os.environ.update(environ)


def bug_at(step: int):
    """A bug of lacuna's in the step after this one."""
    from lacuna import train

    count = itertools.count(1)

    def accumulate(*arguments, real=train.accumulate_gradients):
        return real(*arguments) if next(count) <= step else 1 / 0

    train.accumulate_gradients = accumulate


def slow_save(seconds: float, marker: str):
    """A slow disk; the marker is there once a save has begun."""
    from lacuna.checkpoint import Checkpoints

    def write(*arguments, real=Checkpoints.write_safetensors):
        Path(marker).touch()
        time.sleep(seconds)
        real(*arguments)

    Checkpoints.write_safetensors = write


def frozen_in_save(count: int):
    """The process stands still as its count-th save begins."""
    from lacuna.checkpoint import Checkpoints

    counter = itertools.count(1)

    def save(*arguments, real=Checkpoints.save):
        if next(counter) == count:
            print("frozen", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        real(*arguments)

    Checkpoints.save = save


def on_host(name: str, interface: str, first: str):
    """On a host of its own: a network namespace. `first` is the address of rank 0's."""
    variables({"GLOO_SOCKET_IFNAME": interface, "MASTER_ADDR": first})
    with open(f"/run/netns/{name}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), 0):  # Python has it from 3.12 on
            raise OSError(ctypes.get_errno(), "setns")


def late_write(seconds: float):
    """A thread that gets no turn: training is far into the next step before anything is written."""
    from lacuna.checkpoint import Checkpoints

    def write(*arguments, real=Checkpoints.write_safetensors):
        time.sleep(seconds)
        return real(*arguments)

    Checkpoints.write_safetensors = write


def slow_evaluation(seconds: float, marker: str, after: int):
    """Every batch of an evaluation takes so long; the marker is there from the first batch after `after` ones."""
    from lacuna.model import Trainee

    seen = itertools.count()

    def forward(self, batch, real=Trainee.forward):
        if not self.training and next(seen) >= after:
            Path(marker).touch()
            time.sleep(seconds)
        return real(self, batch)

    Trainee.forward = forward


def slow_first_step(seconds: float, marker: str):
    """As a compilation would: the first forward takes long, in Python."""
    from lacuna.model import Trainee

    first = iter([True])

    def forward(self, batch, real=Trainee.forward):
        if self.training and next(first, False):
            Path(marker).touch()
            for _ in range(int(seconds * 100)):
                time.sleep(0.01)
        return real(self, batch)

    Trainee.forward = forward


def not_finite_at(*steps: int):
    """The loss of these steps is NaN."""
    from lacuna import train

    count = itertools.count(1)

    def accumulate(*arguments, real=train.accumulate_gradients):
        parts = real(*arguments)
        return [{"loss": float("nan")} for _ in parts] if next(count) in steps else parts

    train.accumulate_gradients = accumulate


def killed_in_writelines():
    """Killed at the first writelines: where a resumed run writes its metrics again."""
    import builtins

    real = builtins.open

    def opened(name, mode="r", *more, **options):
        file = real(name, mode, *more, **options)
        if "metrics.jsonl" in str(name) and mode[0] in "wa":
            os.kill(os.getpid(), signal.SIGKILL)
        return file

    builtins.open = opened


def killed_at(name: str, count: int, after: bool):
    """Killed just before or after the count-th rename of a checkpoint, or in the middle of its removal."""
    import shutil

    counter = itertools.count(1)
    real = {"rename": os.rename, "rmtree": shutil.rmtree}[name]

    def fault(path, *more, **options):
        now = "step_" in Path(path).name and next(counter) == count  # and not of a file inside
        if now and name == "rmtree":
            next(Path(path).iterdir()).unlink()
        if after or not now:
            real(path, *more, **options)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr({"rename": os, "rmtree": shutil}[name], name, fault)


# ---- what a run leaves


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_lines(run: Path) -> list[dict]:
    return [line for line in lines(run) if "loss" in line]


def last_step(run: Path) -> int:
    """The last whole line of metrics.jsonl, while it is being written."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(whole[-1])["step"] if whole else -1


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    steps = [folder.name.removeprefix("step_") for folder in (run / "checkpoints").glob("step_*")]
    return sorted(int(step) for step in steps if step.isdecimal())


def tensors(checkpoint: Path) -> dict:
    """All tensors of a checkpoint or model folder by name, put together by hand, without torch's reader or lacuna's.

    No part may be missing, or stored twice.
    """
    import torch
    from safetensors import safe_open

    parts = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            places = json.loads(content.metadata().get("DCP_SHARDING_INFO", "{}"))
            for name in content.keys():  # noqa: SIM118
                tensor = content.get_tensor(name)
                offsets = places.get(name, {}).get("saved_offsets", [0] * tensor.ndim)
                parts.setdefault(name, []).append((offsets, tensor))
    whole = {}
    for name, pieces in parts.items():
        shape = [max(o[d] + t.shape[d] for o, t in pieces) for d in range(pieces[0][1].ndim)]
        whole[name] = torch.full(shape, float("nan"))
        assert sum(tensor.numel() for _, tensor in pieces) == whole[name].numel(), name
        for offsets, tensor in pieces:
            whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))] = tensor
    return whole
