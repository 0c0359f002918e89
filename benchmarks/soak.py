"""A run that is killed (kill -9) again and again at random moments, against one that nobody disturbs.

    uv run python benchmarks/soak.py [--kills 50] [--seed 0] [--steps 300]

The run saves at every step, so many kills come inside a save; one in five comes while the run starts or resumes, the
others a random number of steps later, at a random moment of a step. After each kill every checkpoint that is there is
compared, bit for bit, with the one of the same step of the undisturbed run; at the end all losses, checksums of
batches, evaluations and the exported model. Prints a summary; exits 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from processes import Run, checkpoints, finish, last_step, lines  # noqa: E402

from lacuna.weights import refuse_damaged  # noqa: E402

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SPARE = 25  # steps that are left for the last run
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "epoch", "batch_checksum", "eval_loss", "eval_tokens")


def options(folder: Path, name: str, steps: int, keep: int) -> list[str]:
    (folder / "empty.toml").touch()
    text = REPOSITORY / "examples" / "moby_dick"
    fixed = {
        "--name": name,
        "--out": str(folder),
        "--model.name": str(REPOSITORY / "examples" / "tiny"),
        "--model.from_scratch": "true",
        "--model.overrides": json.dumps(SHAPE),
        "--data.sources": json.dumps([{"path": str(text / "heldout.jsonl")}]),
        "--data.cache": str(folder / "cache"),
        "--eval.sources": json.dumps([{"path": str(text / "heldout.jsonl")}]),
        "--eval.rows": "4",
        "--eval.every": "10",
        "--train.seq_len": "64",
        "--train.micro_batch_size": "4",
        "--train.global_batch_size": "4",
        "--train.steps": str(steps),
        "--checkpoint.every": "1",
        "--checkpoint.keep": str(keep),
        "--log.every": "1",
    }
    return ["pt", str(folder / "empty.toml"), *(word for pair in fixed.items() for word in pair)]


def soak(folder: Path, kills: int, seed: int, steps: int) -> dict:
    """Kill a run of so many steps so many times; the summary's `problems` says what was lost or differs."""
    chance, problems, startup = random.Random(seed), [], None
    undisturbed = finish(folder, *options(folder, "undisturbed", steps, keep=steps), timeout=600)
    if undisturbed.status:
        raise RuntimeError(undisturbed.output)
    wanted, run, command = folder / "undisturbed", folder / "soaked", options(folder, "soaked", steps, keep=2)
    done = {"kills": 0, "inside a save": 0, "inside a removal": 0, "while it starts": 0, "checkpoints compared": 0}
    begin, at = time.monotonic(), []
    while done["kills"] < kills:
        newest = max(checkpoints(run), default=0)
        share = 2 * max(0, steps - SPARE - newest) // (kills - done["kills"])
        goal = min(newest + chance.randint(0, share), steps - SPARE)
        with Run(folder, *command) as process:
            started = time.monotonic()
            if chance.random() < 0.2 and startup:
                end = started + chance.uniform(0, startup)  # but not long after: on a busy machine it might finish
                while time.monotonic() < end and "  loss " not in process.output:
                    time.sleep(0.002)
            else:
                process.until(lambda process=process: "  loss " in process.output, timeout=300)
                startup = time.monotonic() - started if done["kills"] else None  # the first one starts a server too
                process.until(lambda goal=goal: last_step(run) >= goal, timeout=300)
                time.sleep(chance.uniform(0, 0.05))
            first = process.processes[0].exitcode is None
            process.send(signal.SIGKILL)
            status = process.wait(30)
            text = process.output
        if not first or status != -signal.SIGKILL:
            problems.append(f"kill {done['kills']}: the run had ended with {status} before: {text[-2000:]}")
            break
        done["kills"] += 1
        left = [file.name for file in (run / "checkpoints").glob(".*")]
        done["inside a save"] += any(name.startswith(".step_") for name in left)
        done["inside a removal"] += any(name.startswith(".old_") for name in left)
        done["while it starts"] += "  loss " not in text
        now = checkpoints(run)
        at.append(max(now, default=0))
        if at[-1] < newest or (newest and not now):
            problems.append(f"kill {done['kills']}: the newest checkpoint was {newest}, now there are {now}")
        for step in now:
            done["checkpoints compared"] += 1
            problems += differences(run / "checkpoints" / f"step_{step}", wanted / "checkpoints" / f"step_{step}")
    last = finish(folder, *command, timeout=600)
    if last.status:
        problems.append(f"the last run ended with {last.status}: {last.output[-2000:]}")
    else:
        problems += differences(run / "hf", wanted / "hf")
        exact = [[{key: line.get(key) for key in EXACT} for line in lines(folder)] for folder in (run, wanted)]
        if exact[0] != exact[1]:
            both = zip(*exact, strict=False)
            problems.append(f"metrics differ first at {next((pair for pair in both if pair[0] != pair[1]), 'the end')}")
    done |= {"steps": steps, "newest checkpoints after kills": at, "seconds": round(time.monotonic() - begin, 1)}
    loss = [line["loss"] for line in lines(run) if "loss" in line][-1]
    return done | {"seed": seed, "final loss": loss, "problems": problems}


def differences(folder: Path, wanted: Path) -> list[str]:
    """Files that do not hold what those of the other folder hold."""
    names = {file.name for file in folder.iterdir()}
    wanted_names = {file.name for file in wanted.iterdir()}
    if names != wanted_names:
        return [f"{folder} has {sorted(names)}, not {sorted(wanted_names)}"]
    return [f"{folder / name} differs" for name in sorted(names) if content(folder / name) != content(wanted / name)]


def content(file: Path):
    """The bytes of a file; but the config in state.json may differ, and a safetensors header has no fixed order."""
    data = file.read_bytes()
    if file.name == "state.json":
        return {**json.loads(data), "config": None}
    if file.name == "seals.json":  # of what may differ so, too; all must be what was written
        refuse_damaged(file.parent)
        return set(json.loads(data))
    if file.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]
    return data


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = soak(Path(folder), arguments.kills, arguments.seed, arguments.steps)
    for key, value in summary.items():
        print(f"{key:32} {value}")
    sys.stdout.flush()
    os._exit(bool(summary["problems"]))


if __name__ == "__main__":
    main()
