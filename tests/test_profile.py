"""`log.profile` writes what viewers open, and finds host waits where there are some."""

import gzip
import json

import pytest
import torch
from test_train import options, texts  # noqa: F401  texts is a fixture

from lacuna import train as train_module
from lacuna.config import load_config
from lacuna.profile import count_waits
from lacuna.train import run


def profiled(folder, texts, tmp_path, *more):  # noqa: F811
    argv = options(folder, texts, tmp_path, "--log.profile", *more)
    return run(load_config(None, argv)) / "profile"


def test_a_run_leaves_a_trace_of_three_steps_and_a_table(model_folder, texts, tmp_path):  # noqa: F811
    place = profiled(model_folder("llama"), texts, tmp_path, "--train.steps", "16")
    with gzip.open(place / "rank_0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::_foreach_norm") == 3  # clipping: once a step
    assert "aten::mm" in (place / "rank_0.txt").read_text()
    log = (place.parent / "log.txt").read_text()
    assert "steps 11 to 13, 0 times the host waited for the GPU, 0 graphs compiled" in log


@pytest.mark.parametrize(("steps", "traced"), [("5", "2 to 4"), ("3", "2 to 3")])
def test_a_short_run_is_traced_too_and_one_without_the_key_is_not(steps, traced, model_folder, texts, tmp_path):  # noqa: F811
    place = profiled(model_folder("llama"), texts, tmp_path, "--train.steps", steps)
    assert f"steps {traced}," in (place.parent / "log.txt").read_text()
    other = run(load_config(None, options(model_folder("llama"), texts, tmp_path, "--train.steps", "5", "--name", "b")))
    assert not (other / "profile").exists()


def test_waits_of_the_host_are_counted_but_not_the_profilers_own():
    names = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaLaunchKernel", "cudaEventSynchronize", None]
    assert count_waits([{"name": name} if name else {"ph": "M"} for name in names]) == 2


@pytest.mark.gpu
def test_on_a_gpu_a_wait_is_counted_and_memory_is_there(model_folder, texts, tmp_path, monkeypatch):  # noqa: F811
    folder = model_folder("llama")
    place = profiled(folder, texts, tmp_path, "--train.steps", "16")
    assert ", 0 times the host waited for the GPU, 0 graphs compiled" in (place.parent / "log.txt").read_text()
    assert (place / "rank_0.memory.pickle").stat().st_size > 10_000

    def waiting(*args, real=train_module.accumulate_gradients):
        loss = real(*args)
        loss.item()
        return loss

    monkeypatch.setattr(train_module, "accumulate_gradients", waiting)
    torch.cuda.synchronize()
    place = profiled(folder, texts, tmp_path, "--train.steps", "16", "--name", "waiting")
    assert ", 3 times the host waited for the GPU" in (place.parent / "log.txt").read_text()
