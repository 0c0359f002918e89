"""What a run reports, and to whom: the terminal, log.txt, metrics.jsonl, and trackers if asked."""

import json
import logging
import math
import resource
import time
from collections import Counter
from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from lacuna.config import Config, NonFinite
from lacuna.model import Trainee
from lacuna.parallel import Ranks

log = logging.getLogger("lacuna")
console = Console(stderr=True)
# Dense bf16 peaks, FLOP/s, from the vendors' datasheets; the first name that the device's name contains counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}
MFU_CONVENTION = (
    "mfu: 6 FLOP a weight (without input embeddings) and token + 6 x heads x head_dim a layer x the sum of squared "
    "document lengths, over the dense bf16 peak; what is recomputed, or masked as not causal, does not count"
)


class Outcome:
    """A step's figures on their way to the host, which does not wait for them until it reads."""

    def __init__(self, facts: dict, values: torch.Tensor, counts: torch.Tensor):
        self.facts = facts
        self.values, self.counts = values.to("cpu", non_blocking=True), counts.to("cpu", non_blocking=True)
        self.moment = Moment(values.device)


class Moment:
    """A point in the device's time: of everything queued so far."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.time = time.perf_counter()
        if self.event:
            self.event.record()

    def seconds_since(self, earlier: "Moment") -> float:
        """Waits until both have come."""
        if not self.event:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


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

    def __init__(self, config: Config, ranks: Ranks, folder: Path, steps: int, trainee: Trainee):
        self.config, self.ranks, self.steps = config, ranks, steps
        self.names = [name.removeprefix("model.") for name, _ in trainee.named_parameters()]
        self.work = Work(trainee.model, ranks.device)
        self.tokens = self.trained_tokens = 0  # since the run began
        self.progress, self.trackers, self.file = None, [], None
        if ranks.rank != 0:
            return
        log.info(
            "%s: %s parameters, %s attention, %s, %d rank(s), %d steps of %d rows x %d tokens",
            *(config.model.name, f"{trainee.model.num_parameters():,}", trainee.backend, trainee.model.config.dtype),
            *(ranks.world, steps, config.train.global_batch_size, config.train.seq_len),
        )
        if self.work.peak:
            log.info(MFU_CONVENTION)
        self.file = open(folder / "metrics.jsonl", "w", buffering=1)  # noqa: SIM115  a killed run keeps its lines
        self.trackers = [open_tracker(name, config, folder) for name in config.log.trackers]
        if console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("", total=steps)
            self.progress.start()

    def start_clock(self):
        """Begin a new interval between two lines: what follows is measured, what was before (an evaluation) is not."""
        self.since = Moment(self.ranks.device)
        self.interval = Counter()

    def step(self, outcome: Outcome):
        """Take in a step, in order; raises NonFinite."""
        seconds = outcome.moment.seconds_since(self.since)
        facts, train, world = outcome.facts, self.config.train, self.ranks.world
        loss, *bad_ranks = outcome.values[: 1 + world].tolist()
        norm, *squares = outcome.values[1 + world :].tolist()
        trained, tokens, pairs, checksum, dropped = outcome.counts.tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            ranks = ", ".join(str(rank) for rank, bad in enumerate(bad_ranks) if bad)
            where = f"the loss on rank {ranks}" if ranks else "a gradient"
            bad = [name for name, square in zip(self.names, squares, strict=True) if not math.isfinite(square)]
            raise NonFinite(
                f"step {facts['step']}: {where} is not finite (loss {loss}, grad norm {norm}, first bad gradient: "
                f"{(bad or ['none'])[0]}); nothing was updated from here on. Lower optim.lr, or look at the data"
            )
        if dropped:
            log.warning("step %d: %d documents without text were dropped", facts["step"], dropped)
        self.tokens += tokens
        self.trained_tokens += trained
        slots = train.global_batch_size * train.seq_len
        self.interval.update(steps=1, tokens=tokens, slots=slots, pairs=pairs, data_seconds=facts["data_seconds"])
        if facts["step"] % self.config.log.every and facts["step"] not in (1, self.steps):
            return
        total = self.interval
        speed = total["tokens"] / seconds
        metrics = {"step": facts["step"], "loss": loss, "grad_norm": norm, "lr": facts["lr"], "tokens": self.tokens}
        metrics |= {"trained_tokens": self.trained_tokens, "epoch": round(facts["epoch"], 4)}
        metrics |= {"packing_efficiency": total["tokens"] / total["slots"], "tokens_per_second": speed}
        mfu = self.work.mfu(total["slots"], total["pairs"], seconds, world)
        metrics |= {"tokens_per_second_per_device": speed / world, "mfu": mfu}
        metrics |= {"step_seconds": seconds / total["steps"], "data_seconds": total["data_seconds"] / total["steps"]}
        metrics |= {"peak_memory_gib": peak_memory(self.ranks.device), "batch_checksum": f"{checksum % 2**64:016x}"}
        self.start_clock()
        self.since = outcome.moment
        self.write(metrics)
        share = "" if mfu is None else f" | mfu {mfu:.1%}"
        rates = f"{speed:,.0f} tokens/s{share} | {metrics['peak_memory_gib']:.1f} GiB"
        text = f"loss {loss:.4f} | grad norm {norm:.2f} | {rates}"
        left = time.strftime("%H:%M:%S", time.gmtime((self.steps - facts["step"]) * metrics["step_seconds"]))
        log.info("step %d/%d | %s | %s left", facts["step"], self.steps, text, left)
        if self.progress:
            self.progress.update(self.task, completed=facts["step"], description=text)

    def evaluation(self, step: int, result: dict):
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
        if self.progress:
            self.progress.stop()
        for _, finish in self.trackers:
            finish()


def start_logging(folder: Path, rank: int):
    """Rank 0 logs to stderr and log.txt, other ranks only warnings to stderr."""
    if not console.is_terminal:
        datasets.disable_progress_bars()
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    rich = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    log.handlers = [rich if console.is_terminal else logging.StreamHandler()]
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        log.addHandler(logging.FileHandler(folder / "log.txt", mode="w"))
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
