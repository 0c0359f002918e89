"""What a run reports, and to whom: the terminal, log.txt, metrics.jsonl, and trackers if asked."""

import json
import logging
import sys
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from lacuna.config import Config
from lacuna.parallel import Ranks

log = logging.getLogger("lacuna")
# Dense bf16 peaks, FLOP/s, from the vendors' datasheets; the first name that the device's name contains counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}
MFU_CONVENTION = (
    "mfu: 6 FLOP a weight and token (input embeddings left out) + 6 x heads x head_dim a layer x the sum of squared "
    "document lengths (causal: halved), over the dense bf16 peak; recomputation does not count"
)


class Work:
    """FLOP of a training step, counted as MFU_CONVENTION says."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.a_pair = 6 * config.num_attention_heads * head_dim
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        self.windows = [
            window if kind == "sliding_attention" or not hasattr(config, "layer_types") else None for kind in kinds
        ]
        # of a mixture of experts, a token passes through top_k of num_experts
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
        share = config.num_experts_per_tok / experts if experts else 1
        weights = sum(p.numel() * (share if ".experts." in name else 1) for name, p in model.named_parameters())
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        self.a_token = 6 * (weights - (0 if tied else model.get_input_embeddings().weight.numel()))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for key, peak in PEAKS.items() if key in name), None)

    def mfu(self, slots: int, pairs: int, seconds: float, devices: int) -> float | None:
        """Share of the devices' peak, None where the peak is not known (on a CPU)."""
        attention = sum(min(pairs, 2 * window * slots) if window else pairs for window in self.windows)
        flop = self.a_token * slots + self.a_pair * attention
        return flop / seconds / devices / self.peak if self.peak else None


class Report:
    """Rank 0 reports; on other ranks every method does nothing."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path, steps: int):
        self.active, self.steps, self.device = ranks.rank == 0, steps, ranks.device
        self.progress, self.trackers = None, []
        if not self.active:
            return
        self.file = open(folder / "metrics.jsonl", "w", buffering=1)  # noqa: SIM115  line by line: a killed run keeps its lines
        console = Console(file=sys.stderr)
        if console.is_terminal:
            log.handlers = [h for h in log.handlers if isinstance(h, logging.FileHandler)]
            log.addHandler(RichHandler(console=console, show_path=False, show_level=False))
            columns = (
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("", total=steps)
            self.progress.start()
        for name in config.log.trackers:
            self.trackers.append(open_tracker(name, config, folder))

    def step(self, metrics: dict):
        """Report one logged step."""
        self.write(metrics)
        if not self.active:
            return
        mfu = "" if metrics["mfu"] is None else f" | mfu {metrics['mfu']:.1%}"
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s{mfu} | {metrics['peak_memory_gib']:.1f} GiB"
        text = f"loss {metrics['loss']:.4f} | grad norm {metrics['grad_norm']:.2f} | {speed}"
        if self.progress:
            self.progress.update(self.task, completed=metrics["step"], description=text)
        left = (self.steps - metrics["step"]) * metrics["step_seconds"]
        log.info("step %d/%d | %s | %s left", metrics["step"], self.steps, text, duration(left))

    def write(self, metrics: dict):
        """One line of metrics.jsonl, and the same to the trackers."""
        if self.active:
            self.file.write(json.dumps(metrics) + "\n")
            for track in self.trackers:
                track({k: v for k, v in metrics.items() if isinstance(v, int | float)})

    def close(self):
        if self.progress:
            self.progress.stop()

    def peak_memory(self) -> float:
        """GiB: of the device since the last call, or of this process on a CPU."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak / 2**30
        return psutil.Process().memory_info().rss / 2**30


def start_logging(folder: Path, rank: int):
    """Rank 0 logs to stderr and log.txt; other ranks log warnings to stderr."""
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    log.handlers = [logging.StreamHandler()]
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        log.addHandler(logging.FileHandler(folder / "log.txt", mode="w"))
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


def open_tracker(name: str, config: Config, folder: Path):
    """A function that takes one step's metrics. The packages are extras: wandb, tensorboard, trackio."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        return lambda metrics: [writer.add_scalar(k, v, metrics["step"]) for k, v in metrics.items()]
    module = __import__(name)  # wandb and trackio share one interface
    module.init(project="lacuna", name=config.name, config=config.model_dump())
    return lambda metrics: module.log(metrics)


def duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
