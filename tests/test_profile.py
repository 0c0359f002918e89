"""examples/profiler.py writes what viewers open, and benchmarks/waits.py finds host waits where there are some."""

import gzip
import json
import sys

import pytest
import torch
from conftest import EXAMPLES, REPO
from test_train import options, texts  # noqa: F401  texts is a fixture

from lacuna import train as train_module
from lacuna.config import load_config
from lacuna.train import run

sys.path.append(str(REPO / "benchmarks"))
from waits import count_waits


@pytest.fixture
def profiled(texts, tmp_path, monkeypatch):  # noqa: F811
    """A run under the patch, in a folder of its own; gives the folder of its traces."""
    monkeypatch.chdir(tmp_path)

    def profiled(folder, *more):
        argv = options(folder, texts, tmp_path, "--model.patch", f"{EXAMPLES / 'profiler.py'}:profile", *more)
        run(load_config(None, [*argv, "--train.global_batch_size", "2", "--train.micro_batch_size", "2"]))
        return tmp_path / "profile"

    return profiled


def test_a_run_leaves_a_trace_of_three_steps_and_a_table(model_folder, profiled, capsys):
    place = profiled(model_folder("llama"), "--train.steps", "16")
    with gzip.open(place / "rank_0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::_foreach_norm") == 3  # clipping: once a step
    assert "aten::mm" in (place / "rank_0.txt").read_text()
    assert "profile of three micro-batches in profile" in capsys.readouterr().out


def test_waits_of_the_host_are_counted_but_not_the_profilers_own(tmp_path):
    names = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaLaunchKernel", "cudaEventSynchronize", None]
    events = [{"name": name} if name else {"ph": "M"} for name in names]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert count_waits(tmp_path / "trace.json.gz") == 2


@pytest.mark.gpu
def test_on_a_gpu_a_wait_is_counted_and_memory_is_there(model_folder, profiled, monkeypatch):
    folder = model_folder("llama")
    place = profiled(folder, "--train.steps", "16")
    assert count_waits(place / "rank_0.json.gz") == 0
    assert (place / "rank_0.memory.pickle").stat().st_size > 10_000

    def waiting(*args, real=train_module.accumulate_gradients):
        parts = real(*args)
        parts[0]["loss"].item()
        return parts

    monkeypatch.setattr(train_module, "accumulate_gradients", waiting)
    torch.cuda.synchronize()
    place = profiled(folder, "--train.steps", "16", "--name", "waiting")
    assert count_waits(place / "rank_0.json.gz") == 3
