"""What a run reports: on the terminal, in log.txt, and in metrics.jsonl."""

import json
import logging
import math
import os
import statistics
import sys
import time
from collections import Counter
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from textwrap import fill

import torch
from torch import Tensor, nn
from tqdm.contrib import DummyTqdmFile
from transformers import PreTrainedModel

from lacuna.config import COLOUR, Config, log
from lacuna.model import experts
from lacuna.parallel import Ranks

# Dense bf16 peaks, FLOP/s, from datasheets; the first name that is in the device's counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}


def flop(model: PreTrainedModel) -> tuple[float, int]:
    """FLOP to train on a token, and on a query and key: without what is recomputed or masked."""
    config = model.config
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // max(heads, 1)
    embeddings = model.get_input_embeddings().weight
    weights = set(model.state_dict(keep_vars=True).values())  # also those of a patch, in 4 bits
    if embeddings is not model.get_output_embeddings().weight:
        weights.discard(embeddings)  # they are looked up, not multiplied
    # 6 a weight, forward and backward, 4 a frozen one; of experts those that a token uses
    per_token = sum(p.numel() * (4 + 2 * p.requires_grad) for p in weights)
    routers = [module for module in model.modules() if hasattr(module, "top_k")]
    chosen = routers[0].top_k if routers else getattr(config, "top_k_experts", None)
    for p in nn.ModuleList(experts(model)).parameters():  # [experts, out, in]
        if chosen and p.ndim == 3:
            per_token -= p.numel() * (4 + 2 * p.requires_grad) * (1 - chosen / len(p))
    # a window counts as full attention
    return per_token, 6 * config.num_hidden_layers * heads * head_dim


class Report:
    """Every rank takes in every step's outcome; rank 0 reports it."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path, steps, model, state, again):
        self.config = config
        self.ranks = ranks
        self.steps = steps
        self.flop_per_token, self.flop_per_pair = flop(model)
        self.on_gpu = ranks.device.type == "cuda"
        self.device = torch.cuda.get_device_name(ranks.device) if self.on_gpu else "CPU"
        self.peak = next((peak for key, peak in PEAKS.items() if key in self.device), None)
        self.totals = {key: state[key] for key in ("tokens", "trained_tokens")}
        self.stop_asked = False  # by a signal on any rank
        self.pending = []  # steps whose figures are on their way to the host
        self.file = open_metrics(folder, state["step"], again) if ranks.rank == 0 else None
        self.paces = []  # seconds a step, of each line
        self.made = time.monotonic()
        self.in_steps = 0.0  # seconds
        self.interval = Counter()  # sums since the last line
        self.since = self.now()

    def now(self):
        """This moment: a time, or on a GPU an event that comes when its work so far is done."""
        if self.on_gpu:
            return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()

    def step(self, facts: dict, sums: dict[str, Tensor]):
        """Take in a step, whose figures are on their way. Raises FloatingPointError."""
        # facts are known at once: step, lr, epoch, data_seconds, ends_interval, names of a recipe's figures
        values = torch.stack(list(sums.values())).to("cpu", non_blocking=True)  # float64 [names]
        self.pending.append((facts, list(sums), values, self.now()))
        # on a GPU the step before the last one is done by now: neither host nor device waits
        self.flush(in_flight=2 if self.on_gpu else 0)

    def flush(self, in_flight: int = 0):
        """Report all steps taken in, but the last so many."""
        while len(self.pending) > in_flight:
            facts, names, values, done = self.pending.pop(0)
            if self.on_gpu and not done.query():
                done.synchronize()
            sums = dict(zip(names, values.tolist(), strict=True))
            number = facts["step"]
            self.stop_asked |= sums["stop_asked"] > 0
            if not math.isfinite(sums["loss"] + sums["grad_norm"]):
                what = f"loss {sums['loss']:g}, gradient norm {sums['grad_norm']:g}: not finite; it updated nothing"
                raise FloatingPointError(f"step {number}: {what}. Lower optim.lr; see data, weights, model.overrides")
            for key in self.totals:
                self.totals[key] += int(sums[key])
            self.interval.update(sums | {"steps": 1, "data_seconds": facts["data_seconds"]})
            due = number == 1 or number % self.config.log.every == 0
            if due or facts["ends_interval"] or self.stop_asked:
                self.report_interval(facts, sums, done)
                self.since = done  # `write` has set a later moment

    def report_interval(self, facts: dict, sums: dict, done):
        """One line: means since the last one, speed and fill, and this step's norm."""
        interval = self.interval
        seconds = self.since.elapsed_time(done) / 1000 if self.on_gpu else done - self.since
        self.in_steps += seconds
        count = interval["steps"]
        slots = count * self.config.train.global_batch_size * self.config.train.seq_len
        speed = interval["tokens"] / seconds
        loss = interval["loss"] / count
        metrics = {"step": facts["step"], "loss": loss, "grad_norm": sums["grad_norm"], "lr": facts["lr"]}
        metrics |= self.totals | {"epoch": round(facts["epoch"], 4), "packing_efficiency": interval["tokens"] / slots}
        work = slots * self.flop_per_token + interval["pairs"] * self.flop_per_pair
        mfu = work / seconds / self.ranks.world / self.peak if self.peak else None
        metrics |= {"tokens_per_second": speed, "tokens_per_second_per_device": speed / self.ranks.world, "mfu": mfu}
        metrics |= {"step_seconds": seconds / count, "data_seconds": interval["data_seconds"] / count}
        peak = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30 if self.on_gpu else None
        metrics |= {"peak_memory_gib": peak, "batch_checksum": f"{int(sums['checksum']):016x}"}
        own = {name: interval[name] / max(interval["units"], 1) for name in facts["figures"]}
        self.paces.append(seconds / count)
        left = timedelta(seconds=round((self.steps - facts["step"]) * statistics.median_low(self.paces)))
        words = [f"loss {loss:.4f}", f"norm {sums['grad_norm']:.2f}", f"{speed:,.0f} tok/s"]
        if mfu:
            words.append(f"mfu {mfu:.0%}")
        words += [str(left), *(f"{key}={own[key]:.5g}" for key in own)]
        log.info(fill("  ".join([f"step {facts['step']}/{self.steps}", *words]), 71))
        self.write(metrics | own)

    def close(self, folder: Path, began: float):
        """How it went since `began`, and what to do now."""
        took = timedelta(seconds=round(time.monotonic() - began))
        log.info("time: %s, %.0f s to start, %.0f in steps", took, self.made - began, self.in_steps)
        log.info("tokens: {tokens:,} in all, {trained_tokens:,} of them trained".format(**self.totals))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        for name in ("loss", "eval_loss", "peak_memory_gib"):
            seen = [line[name] for line in lines if line.get(name) is not None]
            if seen:
                log.info("%s: first %.4f, last %.4f, highest %.4f", name, seen[0], seen[-1], max(seen))
        log.info("Its curves:\nuv run --with plotly==7.1.0 benchmarks/report.py %s", folder)
        log.info("The model is in %s/hf. To talk to it:\nuv run python examples/chat.py %s", folder, folder)

    def write(self, metrics: dict):
        """Add a line, and tell of it in words; a new interval begins."""
        if self.file:
            self.file.write(json.dumps(metrics) + "\n")
        words = [f"{key[5:].replace('_', ' ')} {metrics[key]:.5g}" for key in metrics if key.startswith("eval_")]
        if words:
            log.info(fill(f"step {metrics['step']}: eval {', '.join(words)}", 71))
        self.interval = Counter()
        self.since = self.now()


def open_metrics(folder: Path, step: int, again: bool):
    """metrics.jsonl up to a step that a run goes on from, to be added to."""
    file = folder / "metrics.jsonl"
    file.touch()
    lines = file.read_bytes().splitlines(keepends=True) if step else []
    whole = [json.loads(line) for line in lines if line is not lines[-1] or line.endswith(b"}\n")]  # cut off
    # a step's last line is its evaluation: dropped where it is done again
    kept = sum(m["step"] < step or (m["step"] == step and not (again and "eval_loss" in m)) for m in whole)
    os.truncate(file, sum(map(len, lines[:kept])))
    return open(file, "a", buffering=1)  # a killed run keeps its lines


def start_logging(out: Path, rank: int):
    """Rank 0 logs to stderr and log.txt; others warnings to stderr, tracebacks to log.txt."""
    log.setLevel(logging.DEBUG)
    logging.raiseExceptions = False  # a full disk ends the run at metrics.jsonl
    log.propagate = False  # lines would stand twice
    layout = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    terminal = logging.StreamHandler(DummyTqdmFile(sys.stderr))  # above a live line
    terminal.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    colours = {logging.WARNING: COLOUR}
    terminal.format = lambda record: colours.get(record.levelno, "{1}").format(33, layout.format(record))
    out.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(out / "log.txt", delay=True)
    file.setFormatter(layout)
    kept = MemoryHandler(10**6, target=file)
    kept.addFilter(lambda record: rank == 0 or record.exc_info)
    log.handlers = [terminal, kept]
