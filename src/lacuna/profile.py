"""`log.profile`: where three steps' time (ui.perfetto.dev, and a table) and memory (pytorch.org/memory_viz) go."""

from pathlib import Path

import torch
from torch.profiler import profile, schedule

from lacuna.config import log
from lacuna.parallel import Ranks


def start_profile(ranks: Ranks, folder: Path, steps: int) -> profile:
    """A profiler to be told of every step: the 11th to 13th, or a shorter run's last, go to the run's `profile`."""
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
        table = trace.key_averages().table(f"self_{ranks.device.type}_time_total", row_limit=50)
        place.with_suffix(".txt").write_text(table)
        log.info("profile of a few steps in %s", place.parent)

    # by then all is compiled, and the host is as far ahead of the GPU as it gets
    begin = schedule(skip_first=max(0, min(9, steps - 4)), wait=0, warmup=1, active=3, repeat=1)
    trace = profile(schedule=begin, on_trace_ready=write, acc_events=True)  # without acc_events it warns
    trace.start()
    return trace
