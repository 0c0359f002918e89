"""`log.profile`: where the time and the memory of a few steps go, in files that the usual viewers open.

rank_N.json.gz        every operator and kernel, for ui.perfetto.dev or chrome://tracing
rank_N.memory.pickle  the last allocations on the GPU with their Python stacks, for docs.pytorch.org/memory_viz
rank_N.txt            the operators and kernels that took longest
"""

from pathlib import Path

import torch
from torch.profiler import profile, schedule

from lacuna.config import log
from lacuna.parallel import Ranks

# By then all is compiled, and the host is as far ahead of the GPU as it gets.
SCHEDULE = schedule(skip_first=9, wait=0, warmup=1, active=3, repeat=1)


def start_profile(ranks: Ranks, folder: Path) -> profile:
    """A profiler to be told of every step: 11 to 13 are traced into the run's `profile`, by each rank."""
    place = folder / "profile" / f"rank_{ranks.rank}"
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=100_000)

    def write(trace: profile):
        place.parent.mkdir(exist_ok=True)
        trace.export_chrome_trace(f"{place}.json.gz")
        if on_gpu:
            torch.cuda.memory._dump_snapshot(f"{place}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        order = f"self_{ranks.device.type}_time_total"
        place.with_suffix(".txt").write_text(trace.key_averages().table(order, row_limit=50))
        log.info("profile of three steps in %s", place.parent)

    trace = profile(schedule=SCHEDULE, on_trace_ready=write, acc_events=True)  # without acc_events it warns
    trace.start()
    return trace
