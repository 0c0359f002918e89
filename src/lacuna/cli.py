"""The `lacuna` command and `count_lines`. Imports no torch before it is needed: `--help` answers in under a second."""

import errno
import gc
import os
import sys
import traceback
from glob import glob
from pathlib import Path

from lacuna.config import ConfigError, NonFinite, Preempted, load_config
from lacuna.preemption import REQUEUE, SIGNALS, Preemption

USAGE = """usage: lacuna pt [CONFIG.toml] [--section.key VALUE ...]             train on text: every token
       lacuna sft [CONFIG.toml] [--section.key VALUE ...]            train on conversations: what the assistant says
       lacuna explain pt|sft [CONFIG.toml] [--section.key VALUE ...] show the first rows that this would train on
       lacuna chat FOLDER                                            talk to the model of a run
       lacuna export CHECKPOINT FOLDER                               make a Hugging Face folder of a checkpoint

`lacuna pt --help` shows every key with its meaning, unit and default. Without a config, configs/pt.toml or
configs/sft.toml is used: a small model and data that ship with the repository."""


def main():
    """Entry point of `lacuna` and `python -m lacuna`."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return
    try:
        if command == "chat" and len(argv) == 1:
            from lacuna.chat import chat

            return chat(argv[0])
        if command == "export" and len(argv) == 2:
            from lacuna.checkpoint import export

            return export(Path(argv[0]), Path(argv[1]))
        task = argv.pop(0) if command == "explain" and argv else command
        if task not in ("pt", "sft"):
            raise ConfigError(f"unknown command {' '.join(sys.argv[1:])}\n{USAGE}")
        path = argv.pop(0) if argv and not argv[0].startswith("-") else None
        if path is None and not {"-h", "--help"} & set(argv):
            path = f"configs/{task}.toml"
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU is more than enough for this one
            if not Path(path).exists():
                raise ConfigError(f"no config given, and no {path} here: give one, or run in a clone of lacuna")
        config = load_config(path, argv, task)
        if command == "explain":
            from lacuna.explain import explain as run
        else:
            launch([task, path, *argv])
            Preemption()  # imports alone take seconds
            gc.disable()
            from lacuna.train import run

            gc.freeze()  # what imports make stays: looking through it would take half a second every few dozen steps
            gc.enable()
        run(config)
        leave(0)
    except (ConfigError, NonFinite, Preempted) as error:
        print(f"lacuna{name_rank()}: {error}", file=sys.stderr)
        leave(REQUEUE if isinstance(error, Preempted) else 1)
    except Exception as error:
        sentence = outside(error)
        if sentence:
            print(f"lacuna{name_rank()}: {sentence}", file=sys.stderr)
        else:
            traceback.print_exc()
        leave(1)


def name_rank() -> str:
    return f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""


def outside(error: Exception) -> str:
    """One sentence for a fault of disks or of other ranks, where a traceback would not help; otherwise none."""
    again = "the same command goes on from the last checkpoint"
    text = str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}): make room, and {again}"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"a folder cannot be written ({text}): change it or `out`, and {again}"
    if "gloo" in text or type(error).__name__ in ("DistStoreError", "DistNetworkError", "DistBackendError"):
        return f"another rank has ended, or cannot be reached ({text}): see what it says; {again}"
    return ""


def leave(status: int):
    """Exit. One of several ranks skips the interpreter's end: gloo's threads outlive it, and 1 run in 20 aborted.

    So does a run that stops early: the end would wait 10 s for loader workers, which ignore SIGTERM.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    (os._exit if status or "RANK" in os.environ else sys.exit)(status)


def launch(argv: list[str]):
    """Become torchrun over all local GPUs, unless there is one at most, or torchrun or Slurm started this process."""
    in_slurm = "SLURM_STEP_ID" in os.environ and os.environ["SLURM_NTASKS"] != "1"
    started = "RANK" in os.environ or in_slurm
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(glob("/dev/nvidia[0-9]*")) if visible is None else len([d for d in visible.split(",") if d])
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0]  # such as 4(x2)
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", tasks)) if started else max(1, gpus))
    if not started and gpus > 1:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main as torchrun

        options = ["--standalone", "--nproc-per-node", str(gpus)]
        options += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        try:
            torchrun([*options, "-m", "lacuna", *argv])
        except SignalException as error:
            print(f"lacuna: {error}", file=sys.stderr)
            sys.exit(REQUEUE if error.sigval in SIGNALS else 128 + error.sigval)
        except ChildFailedError as error:  # of a fault, torchrun ends the other ranks by a signal
            print("lacuna: a rank has ended before the run has, as it says above", file=sys.stderr)
            sys.exit(REQUEUE if all(rank.exitcode == REQUEUE for rank in error.failures.values()) else 1)
        sys.exit(0)


def set_threads(processes: int):
    """OMP_NUM_THREADS = physical cores this process may use / processes on the node; torchrun's own default is 1."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(file.read_text() if file.exists() else cpu)
    threads = str(max(1, len(siblings) // processes))
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["OMP_NUM_THREADS"] = threads
    os.environ.setdefault("RAYON_NUM_THREADS", threads)  # the tokenizers' threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # no request to the Hub for reading a local file


def count_lines():
    """Print the physical lines of every file of the package; exit 1 at 3,000 or more."""
    package = Path(__file__).parent
    counts = {file.relative_to(package): len(file.read_text().splitlines()) for file in sorted(package.rglob("*.py"))}
    for file, lines in counts.items():
        print(f"{lines:6,}  {file}")
    print(f"{sum(counts.values()):6,}  in all, of 3,000")
    sys.exit(sum(counts.values()) >= 3000)
