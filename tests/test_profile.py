"""`log.profile` writes what viewers open, and benchmarks/waits.py finds host waits where there are some."""

import gzip
import json
import sys

import pytest
import torch
from conftest import REPO
from test_train import options, texts  # noqa: F401  texts is a fixture

from lacuna import train as train_module
from lacuna.config import load_config
from lacuna.train import run

sys.path.append(str(REPO / "benchmarks"))
from waits import count_waits


def profiled(folder, texts, tmp_path, *more):  # noqa: F811
    argv = options(folder, texts, tmp_path, "--log.profile", *more)
    return run(load_config(None, argv)) / "profile"


def test_a_run_leaves_a_trace_of_three_steps_and_a_table(model_folder, texts, tmp_path):  # noqa: F811
    place = profiled(model_folder("llama"), texts, tmp_path, "--train.steps", "16")
    with gzip.open(place / "rank_0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::_foreach_norm") == 3  # clipping: once a step
    assert "aten::mm" in (place / "rank_0.txt").read_text()
    assert f"profile of a few steps in {place}" in (place.parent / "log.txt").read_text()


@pytest.mark.parametrize(("steps", "traced"), [("13", 3), ("5", 3), ("3", 2)])
def test_a_short_run_is_traced_too_and_one_without_the_key_is_not(steps, traced, model_folder, texts, tmp_path):  # noqa: F811
    place = profiled(model_folder("llama"), texts, tmp_path, "--train.steps", steps)
    with gzip.open(place / "rank_0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::_foreach_norm") == traced
    other = run(load_config(None, options(model_folder("llama"), texts, tmp_path, "--train.steps", "2", "--name", "b")))
    assert not (other / "profile").exists()


def test_waits_of_the_host_are_counted_but_not_the_profilers_own(tmp_path):
    names = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaLaunchKernel", "cudaEventSynchronize", None]
    events = [{"name": name} if name else {"ph": "M"} for name in names]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert count_waits(tmp_path / "trace.json.gz") == 2


@pytest.mark.gpu
def test_on_a_gpu_a_wait_is_counted_and_memory_is_there(model_folder, texts, tmp_path, monkeypatch):  # noqa: F811
    folder = model_folder("llama")
    place = profiled(folder, texts, tmp_path, "--train.steps", "16")
    assert count_waits(place / "rank_0.json.gz") == 0
    assert (place / "rank_0.memory.pickle").stat().st_size > 10_000

    def waiting(*args, real=train_module.accumulate_gradients):
        loss = real(*args)
        loss.item()
        return loss

    monkeypatch.setattr(train_module, "accumulate_gradients", waiting)
    torch.cuda.synchronize()
    place = profiled(folder, texts, tmp_path, "--train.steps", "16", "--name", "waiting")
    assert count_waits(place / "rank_0.json.gz") == 3
