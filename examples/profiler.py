"""Where the time and memory of a run go: `--model.patch examples/profiler.py:profile`.

Traces from the 11th forward pass of training to the 14th: three micro-batches, or three steps where gradients are not
accumulated (train.global_batch_size = train.micro_batch_size x ranks). profile/rank_N.json.gz is for ui.perfetto.dev,
rank_N.txt is a table, rank_N.memory.pickle (on a GPU) is for pytorch.org/memory_viz. By then all is compiled, and the
host is as far ahead of the GPU as it gets.
"""

import os
from pathlib import Path

import torch
from torch.profiler import profile as torch_profile
from torch.profiler import schedule

PLACE = Path("profile") / f"rank_{os.environ.get('RANK', 0)}"
WHEN = schedule(skip_first=9, wait=0, warmup=1, active=3, repeat=1)


def profile(model):
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=100_000)

    def write(trace):
        PLACE.parent.mkdir(exist_ok=True)
        trace.export_chrome_trace(f"{PLACE}.json.gz")
        if on_gpu:
            torch.cuda.memory._dump_snapshot(f"{PLACE}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        table = trace.key_averages().table(f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=50)
        PLACE.with_suffix(".txt").write_text(table)
        print(f"profile of three micro-batches in {PLACE.parent}")

    trace = torch_profile(schedule=WHEN, on_trace_ready=write, acc_events=True)  # without acc_events it warns
    trace.start()

    def before_forward(decoder, inputs):
        if torch.is_grad_enabled():  # no evaluation, no reference model
            trace.step()

    model.get_decoder().register_forward_pre_hook(before_forward)
