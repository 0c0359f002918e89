"""Whole runs on a GPU: deterministic where asked, and nothing recompiles after the first step."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLES, REPO, model_config
from test_train import no_config, options, texts, train_lines  # noqa: F401  texts is a fixture
from transformers import AutoModelForCausalLM

from lacuna.config import load_config
from lacuna.metrics import Report
from lacuna.parallel import Ranks

pytestmark = pytest.mark.gpu


def lacuna(*argv: str, **environ: str) -> str:
    command = [sys.executable, "-m", "lacuna", "pt", *argv]
    path = os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0"} | environ,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture
def base(texts, tmp_path, tokenizer):  # noqa: F811
    folder = tmp_path / "model"
    config = model_config("qwen3")
    config.head_dim = 64
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    more = ["--model.from_scratch", "true", "--train.steps", "8", "--train.global_batch_size", "4"]
    return [*no_config(tmp_path), *options(folder, texts, tmp_path, *more)]


@pytest.mark.parametrize("attention", [["--model.attention", "varlen"], []])
def test_two_deterministic_runs_are_bit_identical(base, attention, tmp_path):
    losses = []
    for name in ("a", "b"):
        lacuna(*base, "--name", name, "--train.deterministic", "true", *attention)
        losses.append([(m["loss"], m["grad_norm"]) for m in train_lines(tmp_path / "runs" / name)])
    assert len(losses[0]) == 8 and losses[0] == losses[1]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_nothing_recompiles_after_the_first_step(base, checkpointing):
    log = lacuna(*base, "--train.activation_checkpointing", checkpointing, TORCH_LOGS="recompiles,graph_breaks")
    assert "step 8/8" in log and "Graph break" not in log
    # the update of the layers, then that of the embeddings, which is another graph
    assert re.findall(r"Recompiling function (\w+)", log) == ["adamw"]


def test_a_line_has_the_speed_of_its_own_steps_however_far_ahead_the_host_is(tmp_path):
    """Figures are read up to two steps late, but for the last ones, and those before a save."""
    device = torch.device("cuda", 0)
    config = load_config(None, ["--data.sources", '[{"path": "x"}]', "--train.steps", "9", "--log.every", "3"])
    state = {"step": 0, "tokens": 0, "trained_tokens": 0}
    model = AutoModelForCausalLM.from_config(model_config("llama"))
    report = Report(config, Ranks(0, 1, device, None), tmp_path, 9, model, state, again=False)
    names = ("loss", "grad_norm", "stop_asked", "tokens", "trained_tokens", "pairs", "units", "checksum")
    before = torch.cuda.Event()
    for step in range(1, 10):
        torch.cuda._sleep(10**8)  # cycles: some .05 s
        before.synchronize()  # less than a step ahead: as far as the driver's queue lets a host be
        before.record()
        sums = {name: torch.ones((), dtype=torch.float64, device=device) for name in names}
        sums["stop_asked"] = torch.zeros_like(sums["loss"])
        facts = {"step": step, "lr": 1.0, "epoch": 0.0, "data_seconds": 0.0, "ends_interval": False, "figures": []}
        report.step(facts, sums)
    report.flush()
    speeds = [line["step_seconds"] for line in train_lines(tmp_path)[1:]]
    assert len(speeds) == 3 and max(speeds) < 1.1 * min(speeds)


def test_fp8_learns_as_bfloat16_does(base, tmp_path):
    pytest.importorskip("torchao")
    for name, patch in (("fp8", ["--model.patch", str(REPO / "examples/fp8.py:fp8")]), ("bf16", [])):
        lacuna(*base, "--name", name, *patch, "--train.activation_checkpointing", "selective")
    losses = [[m["loss"] for m in train_lines(tmp_path / "runs" / name)] for name in ("fp8", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_the_default_run_learns_on_a_gpu_too(tmp_path):
    data = '[{"path": "%s"}]' % (EXAMPLES / "moby_dick" / "train.jsonl")
    held_out = data.replace("train.jsonl", "heldout.jsonl")
    argv = ["--out", str(tmp_path), "--model.name", str(EXAMPLES / "tiny"), "--data.cache", str(tmp_path / "cache")]
    lacuna(str(REPO / "configs" / "pt.toml"), *argv, "--data.sources", data, "--eval.sources", held_out)
    metrics = train_lines(tmp_path / "moby-dick")
    assert metrics[0]["loss"] > 8 and metrics[-1]["loss"] < 5.7


def test_adapters_go_on_bit_for_bit_in_bf16_and_their_update_is_one_graph(base, tmp_path):
    lacuna(*base, "--name", "base")
    more = ["--model.from_scratch", "false", "--lora.rank", "8", "--train.deterministic", "true"]
    words = [*base, "--model.name", str(tmp_path / "runs/base/hf"), *more]
    words += ["--checkpoint.every", "4", "--checkpoint.keep", "9"]
    log = lacuna(*words, "--name", "whole", TORCH_LOGS="recompiles")
    # the first layer, whose input has no gradient, has a graph of its own; no group of adapters is empty or another
    assert "adamw" not in re.findall(r"Recompiling function (\w+)", log)
    runs = tmp_path / "runs"
    shutil.copytree(runs / "whole/checkpoints/step_4", runs / "again/checkpoints/step_4")
    lacuna(*words, "--name", "again")
    wanted = [(m["loss"], m["grad_norm"]) for m in train_lines(runs / "whole")][4:]
    assert len(wanted) == 4 and [(m["loss"], m["grad_norm"]) for m in train_lines(runs / "again")] == wanted
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (runs / "whole/hf" / file).read_bytes() == (runs / "again/hf" / file).read_bytes()
