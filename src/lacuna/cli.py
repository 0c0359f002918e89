"""The `lacuna` command. No torch before it is needed: `--help` answers in under a second."""

import logging
import os
import sys
from argparse import ArgumentParser
from contextlib import suppress
from glob import glob
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from lacuna.config import COLOUR, Config, ConfigError, Preempted, blame, load_config, log
from lacuna.preemption import REQUEUE, SIGNALS, Preemption

USAGE = """usage: lacuna pt [CONFIG.toml]          train on text: every token
       lacuna sft [CONFIG.toml]         train on what an assistant says
       lacuna RECIPE.py CONFIG.toml     train by a recipe, such as examples/dpo.py
       lacuna export CHECKPOINT FOLDER  make a Hugging Face folder of it [--dtype bfloat16]

`lacuna pt --help` shows every --section.key VALUE. Without a config: configs/pt.toml (sft.toml, dpo.toml)."""


def main():
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ["TQDM_DISABLE"] = "1"  # the bars of all libraries
    try:
        command, *words = sys.argv[1:] or ["--help"]
        if command in ("-h", "--help"):
            print(USAGE)
        elif command == "--version":
            print(", ".join(f"{name} {version(name)}" for name in ("lacuna", "torch", "transformers")))
        elif command == "export":
            export(words)
        else:
            with blame("see log.txt (or model.overrides, RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_PORT)"):
                config = parse(command, words)
                launch()
                preemption = Preemption()  # imports take seconds
                import_module("lacuna.train").run(config, preemption)
        leave(0)
    except Preempted as error:
        leave(REQUEUE, str(error))
    except KeyboardInterrupt:  # Ctrl-C during an export: a run has its own handler
        leave(130, "interrupted")
    except Exception as error:
        leave(1, str(error) or repr(error))


def parse(task: str, words: list[str]) -> Config:
    """A run's config; exits if the words ask for help."""
    if task not in ("pt", "sft") and not task.endswith(".py"):
        raise ConfigError(f"unknown command {' '.join([task, *words])}\n{USAGE}")
    path = f"configs/{Path(task).stem}.toml"
    if words and not words[0].startswith("-"):
        path, *words = words
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU is enough for the examples
    if not (Path(path).is_file() or {"-h", "--help"} & set(words)):  # a pipe may never end
        raise ConfigError(f"no config {path} here: name one, or run in a clone of lacuna")
    return load_config(path, words, task)


@blame("lacuna export")
def export(words: list[str]):
    parser = ArgumentParser(prog="lacuna export", description="A checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the run's own")
    given = parser.parse_args(words)
    import_module("lacuna.checkpoint").export(given.checkpoint, given.folder, given.dtype)
    print(f"The model is in {given.folder}")


def leave(status: int, sentence: str = ""):
    """Exit, saying why."""
    rank = os.environ.get("RANK")
    name = f"lacuna (rank {rank})" if rank else "lacuna"
    with suppress(OSError, AttributeError):  # the terminal may be gone
        if sentence:
            log.debug(sentence)
            logging.shutdown()
            sys.stderr.write(COLOUR.format(31, f"{name}: {sentence}") + "\n")
        sys.stdout.flush()
    # threads of gloo, or a loader's, may outlive the interpreter: 1 run in 20 aborted at exit
    if status or rank:
        os._exit(status)
    sys.exit(0)


def launch():
    """Take this process's share of the cores; alone with several GPUs, become torchrun."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(glob("/dev/nvidia[0-9]*")))
    gpus = len(visible.replace(",", " ").split())
    # cores that this process may use over processes; torchrun's own default is 1
    threads = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", max(1, gpus)))
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, threads)))
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # no requests for local files
    if "RANK" in os.environ:
        return
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        raise ConfigError("SLURM_NTASKS tasks without RANK are as many runs: see configs/slurm.sh")
    log.warning("loading torch and transformers")
    if gpus > 1:
        become_torchrun(gpus)


def become_torchrun(gpus: int):
    """One rank a GPU, each this command. Their 75 is passed on: torchrun alone would end with 1."""
    from torch.distributed.elastic.multiprocessing import SignalException, errors
    from torch.distributed.run import main as torchrun

    options = f"--standalone --nproc-per-node {gpus} --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    os.environ["PYTHONSAFEPATH"] = "1"  # import nothing from here
    try:
        torchrun([*options.split(), "-m", "lacuna", *sys.argv[1:]])
    except SignalException as error:
        leave(REQUEUE if error.sigval in SIGNALS else 128 + error.sigval, str(error))
    except errors.ChildFailedError as error:  # torchrun ends the others by a signal
        saved = all(rank.exitcode == REQUEUE for rank in error.failures.values())
        leave(REQUEUE if saved else 1, "a rank has ended before the run has, as it says above")
    leave(0)
