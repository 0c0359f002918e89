"""How often the host stood still for the GPU in the traces that examples/profiler.py wrote: it should be never.

usage: waits.py profile/rank_0.json.gz [...]     graphs compiled late: run with TORCH_LOGS=recompiles
"""

import gzip
import json
import sys
from pathlib import Path

# the profiler's own cudaDeviceSynchronize aside
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def count_waits(trace: Path) -> int:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") in WAITS for event in events)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{count_waits(Path(name)):4} waits in {name}")
