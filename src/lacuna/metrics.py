"""What a run reports, and to whom: the terminal, log.txt, metrics.jsonl, and trackers if asked."""

import json
import logging
import math
import resource
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedModel

from lacuna.config import Config, NonFinite
from lacuna.model import Trainee
from lacuna.parallel import Ranks

log = logging.getLogger("lacuna")
# Dense bf16 peaks, FLOP/s, from the vendors' datasheets; the first name that the device's name contains counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}
MFU_CONVENTION = (
    "mfu: 6 FLOP a weight (without input embeddings) and token + 6 x heads x head_dim a layer x the sum of squared "
    "document lengths, over the dense bf16 peak; what is recomputed, or masked as not causal, does not count"
)


class Work:
    """FLOP of a training step, counted as MFU_CONVENTION says."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.a_pair = 6 * config.num_attention_heads * head_dim
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]
        embeddings = model.get_input_embeddings().weight
        tied = embeddings is model.get_output_embeddings().weight
        self.a_token = 6 * (sum(p.numel() for p in model.parameters()) - (0 if tied else embeddings.numel()))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for key, peak in PEAKS.items() if key in name), None)

    def mfu(self, slots: int, pairs: int, seconds: float, devices: int) -> float | None:
        """Share of the devices' peak, None where the peak is not known (on a CPU)."""
        attention = sum(min(pairs, 2 * window * slots) if window else pairs for window in self.windows)
        flop = self.a_token * slots + self.a_pair * attention
        return flop / seconds / devices / self.peak if self.peak else None


class Report:
    """Every rank takes in the outcome of every step; rank 0 reports it."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path, steps: int, trainee: Trainee, state: dict):
        self.config, self.ranks, self.steps = config, ranks, steps
        self.names = [name.removeprefix("model.") for name, _ in trainee.named_parameters()]
        self.work = Work(trainee.model, ranks.device)
        self.totals = {key: state[key] for key in ("tokens", "trained_tokens")}  # since the run began
        self.trackers, self.file, self.waiting, self.stop_asked = [], None, [], False
        if ranks.rank != 0:
            return
        model, batch = trainee.model, f"{config.train.global_batch_size} rows x {config.train.seq_len} tokens"
        what = f"{model.num_parameters():,} parameters, {trainee.backend} attention, {model.config.dtype}"
        log.info("%s: %s, %d rank(s), %d steps of %s", config.model.name, what, ranks.world, steps, batch)
        if self.work.peak:
            log.info(MFU_CONVENTION)
        file, kept = folder / "metrics.jsonl", folder / ".metrics.jsonl"
        kept.write_text("".join(lines_until(file, state["step"]) if state["step"] and file.exists() else []))
        kept.replace(file)  # at once: a run killed just now loses no line
        self.file = open(file, "a", buffering=1)  # noqa: SIM115  a killed run keeps its lines
        self.trackers = [open_tracker(name, config, folder) for name in config.log.trackers]

    def start_clock(self):
        """Begin a new interval between two lines: what follows is measured, what was before (an evaluation) is not."""
        self.since, self.interval = self.now(), Counter()

    def now(self):
        """The time: on a GPU that of its queue, since the host is ahead of it by most of a step."""
        if self.ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, facts: dict, values: torch.Tensor, counts: torch.Tensor):
        """Take in a step's figures, on their way to the host, and report it. Raises NonFinite.

        On a GPU report the step before the last one: it is done by now, so that neither waits for the other.
        """
        figures = (values.to("cpu", non_blocking=True), counts.to("cpu", non_blocking=True))
        self.waiting.append((facts, *figures, self.now()))
        self.flush(2 * values.is_cuda)

    def flush(self, but: int = 0):
        """Report all steps taken in, but so many."""
        while len(self.waiting) > but:
            self.report(*self.waiting.pop(0))

    def report(self, facts: dict, values: torch.Tensor, counts: torch.Tensor, done):
        if not isinstance(done, float) and not done.query():
            done.synchronize()
        train, world = self.config.train, self.ranks.world
        loss, stop, *bad_ranks = values[: 2 + world].tolist()
        self.stop_asked |= stop > 0
        norm, *squares = values[2 + world :].tolist()
        trained, tokens, pairs, checksum, dropped = counts.tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            ranks = ", ".join(str(rank) for rank, bad in enumerate(bad_ranks) if bad)
            where = f"the loss on rank {ranks}" if ranks else "a gradient"
            bad = [name for name, square in zip(self.names, squares, strict=True) if not math.isfinite(square)]
            what = f"step {facts['step']}: {where} is not finite (loss {loss}, grad norm {norm}, first bad gradient: "
            what += f"{(bad or ['none'])[0]})"
            raise NonFinite(f"{what}; it updated nothing. Lower optim.lr, or look at the data")
        if dropped:
            log.warning("step %d: %d documents dropped: no text, too long, or nothing to train", facts["step"], dropped)
        self.totals["tokens"] += tokens
        self.totals["trained_tokens"] += trained
        slots = train.global_batch_size * train.seq_len
        self.interval.update(steps=1, tokens=tokens, slots=slots, pairs=pairs, data_seconds=facts["data_seconds"])
        if facts["step"] % self.config.log.every and facts["step"] not in (1, self.steps):
            return
        total, seconds = self.interval, seconds_between(self.since, done)
        speed = total["tokens"] / seconds
        metrics = {"step": facts["step"], "loss": loss, "grad_norm": norm, "lr": facts["lr"], **self.totals}
        metrics |= {"epoch": round(facts["epoch"], 4)}
        metrics |= {"packing_efficiency": total["tokens"] / total["slots"], "tokens_per_second": speed}
        mfu = self.work.mfu(total["slots"], total["pairs"], seconds, world)
        metrics |= {"tokens_per_second_per_device": speed / world, "mfu": mfu}
        metrics |= {"step_seconds": seconds / total["steps"], "data_seconds": total["data_seconds"] / total["steps"]}
        metrics |= {"peak_memory_gib": peak_memory(self.ranks.device), "batch_checksum": f"{checksum % 2**64:016x}"}
        self.since, self.interval = done, Counter()
        self.write(metrics)
        share = "" if mfu is None else f" | mfu {mfu:.1%}"
        rates = f"{speed:,.0f} tokens/s{share} | {metrics['peak_memory_gib']:.1f} GiB"
        text = f"loss {loss:.4f} | grad norm {norm:.2f} | {rates}"
        left = timedelta(seconds=round((self.steps - facts["step"]) * metrics["step_seconds"]))
        log.info("step %d/%d | %s | %s left", facts["step"], self.steps, text, left)

    def evaluation(self, step: int, result: dict | None):
        if result is None:
            self.stop_asked = True
            return
        self.write({"step": step, **result})
        log.info("step %d: eval loss %.4f, %.4f bits a byte", step, result["eval_loss"], result["eval_bits_per_byte"])
        self.start_clock()

    def write(self, metrics: dict):
        """One line of metrics.jsonl, and the same to the trackers."""
        if self.file:
            self.file.write(json.dumps(metrics) + "\n")
        for track, _ in self.trackers:
            track({k: v for k, v in metrics.items() if isinstance(v, int | float)})

    def close(self):
        for _, finish in self.trackers:
            finish()


def lines_until(file: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to a step that a run goes on from; it evaluates again there if it is due."""
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        metrics = json.loads(line) if line.endswith("\n") else {"step": math.inf}  # the last one may be cut off
        if metrics["step"] < step or (metrics["step"] == step and "eval_loss" not in metrics):
            kept.append(line)
    return kept


def seconds_between(begin, end) -> float:
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000


def start_logging(folder: Path, rank: int):
    """Rank 0 logs to stderr and log.txt, other ranks only warnings to stderr."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.raiseExceptions = False  # on a full disk it would print a traceback a line; metrics.jsonl ends the run
    log.propagate = False  # other libraries print their own: on the root logger their lines would stand twice
    log.handlers = [logging.StreamHandler()]
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        log.addHandler(logging.FileHandler(folder / "log.txt", mode="a"))
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


def peak_memory(device: torch.device) -> float:
    """GiB: of the device since the last call, or of this process on a CPU."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30


def open_tracker(name: str, config: Config, folder: Path):
    """What takes a step's metrics, and what ends it. The packages are extras: wandb, tensorboard, trackio."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        return lambda metrics: [writer.add_scalar(k, v, metrics["step"]) for k, v in metrics.items()], writer.close
    module = __import__(name)  # wandb and trackio share one interface
    module.init(project="lacuna", name=config.name, config=config.model_dump())
    return module.log, module.finish
