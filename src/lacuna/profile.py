"""`log.profile`: where the time and the memory of a few steps go, in files that the usual viewers open."""

import gzip
import json
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from lacuna.metrics import log
from lacuna.parallel import Ranks

WARMUP, STEPS = 10, 3  # by then all is compiled, and the host is as far ahead of the GPU as it gets


class Profile:
    """Every rank traces STEPS steps, or fewer in a shorter run, and writes into the run's `profile`:

    rank_N.json.gz        every operator and kernel, for ui.perfetto.dev or chrome://tracing
    rank_N.memory.pickle  every allocation on the GPU with its Python stack, for docs.pytorch.org/memory_viz
    rank_N.txt            the operators and kernels that took longest
    """

    def __init__(self, wanted: bool, ranks: Ranks, folder: Path, step: int, steps: int):
        self.first = min(step + 1 + WARMUP, max(step + 2, steps - STEPS)) if wanted else None
        self.stop = min(self.first + STEPS, steps + 1) if wanted else None
        self.place, self.on_gpu = folder / "profile" / f"rank_{ranks.rank}", ranks.device.type == "cuda"
        self.trace = None

    def begin(self, step: int):
        """Before every step, and after the last: start or stop where it is time to."""
        if step == self.first:
            if self.on_gpu:
                torch.cuda.memory._record_memory_history()
            self.graphs = counters["stats"]["unique_graphs"]
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if self.on_gpu else [ProfilerActivity.CPU]
            self.trace = profile(activities=activities, acc_events=True)  # else it warns
            self.trace.start()
        if self.trace and step == self.stop:
            self.end(step - 1)

    def end(self, last: int):
        """Write the files, and say in the log what should be zero."""
        trace, self.trace = self.trace, None
        trace.stop()
        self.place.parent.mkdir(exist_ok=True)
        trace.export_chrome_trace(f"{self.place}.json.gz")
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(f"{self.place}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        table = trace.key_averages().table(f"self_{'cuda' if self.on_gpu else 'cpu'}_time_total", row_limit=50)
        self.place.with_suffix(".txt").write_text(table)
        with gzip.open(f"{self.place}.json.gz") as file:
            waits = count_waits(json.load(file)["traceEvents"])
        graphs = counters["stats"]["unique_graphs"] - self.graphs
        what = f"steps {self.first} to {last}, {waits} times the host waited for the GPU, {graphs} graphs compiled"
        log.info("profile in %s: %s", self.place.parent, what)


def count_waits(events: list[dict]) -> int:
    """How often the host stood still for the GPU, in a trace; the profiler's own cudaDeviceSynchronize aside."""
    return sum(event.get("name") in ("cudaStreamSynchronize", "cudaEventSynchronize") for event in events)
