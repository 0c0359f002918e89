"""examples/nf4.py: codes are right, what is computed with them is too, and all that LoRA has goes on working."""

import json
import shutil

import pytest
import torch
from conftest import EXAMPLES
from processes import finish
from safetensors.torch import load_file, save_file
from test_lora import move_away, reference
from test_model import batch_and_documents, build, compile_by
from test_train import options, texts, train_lines
from transformers import AutoModelForCausalLM

from lacuna.config import ConfigError, load_config
from lacuna.metrics import flop
from lacuna.optim import trained
from lacuna.train import run

assert texts  # a fixture
PATCH = ("--model.patch", f"{EXAMPLES / 'nf4.py'}:nf4")
NF4 = (*PATCH, "--lora.rank", "4", "--lora.alpha", "6")
# Of the paper's appendix E, with all digits.
VALUES = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
VALUES += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
VALUES += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each 64 weights as the nearest of 16 values times the largest of them, in float64, block by block."""
    blocks = []
    for block in weight.double().flatten().split(64):
        scale = block.abs().max()
        distances = (block[:, None] - scale * torch.tensor(VALUES, dtype=torch.float64)).abs()
        blocks.append(scale * torch.tensor(VALUES, dtype=torch.float64)[distances.argmin(1)])
    return torch.cat(blocks).view(weight.shape)


def encoded(model) -> dict:
    return {name: module for name, module in model.named_modules() if hasattr(module, "codes")}


def folder_of_rounded(folder):
    """A copy of a model whose decoder's linear layers are rounded beforehand."""
    copy = folder.with_name("rounded")
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = rounded(tensor).float()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_held_are_the_nearest_of_sixteen_values_for_each_64_weights(dtype, model_folder):
    folder = model_folder("qwen2")
    stored = load_file(folder / "model.safetensors")
    # a block of nothing, and one whose largest is negative
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name][3] = 0.0
    stored[name][4] = -stored[name][4].abs()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    dtype = getattr(torch, dtype)
    model = build(folder, *NF4, "--model.dtype", str(dtype).removeprefix("torch.")).model
    assert len(encoded(model)) == 2 * 7
    for name, module in encoded(model).items():
        weight = stored[f"{name}.weight"].to(dtype)
        want = rounded(weight)
        assert torch.equal(module.weight, want.float().to(dtype)) or torch.allclose(module.weight, want.float(), 1e-6)
        assert module.weight.dtype == dtype
        # the paper's bound and the usual error of weights that are normally distributed
        assert ((want - weight).norm() / weight.norm()).item() == pytest.approx(0.09, abs=0.01)


def test_a_weight_takes_four_bits_and_its_share_of_a_scale(model_folder):
    folder = model_folder("llama")
    model = build(folder, *NF4, "--model.dtype", "bfloat16").model
    layers = encoded(model).values()
    held = sum(module.codes.nbytes + module.scales.nbytes for module in layers)
    size = sum(module.in_features * module.out_features for module in layers)
    assert held == size / 2 + 2 * size / 64
    assert {module.codes.dtype for module in layers} == {torch.uint8}
    assert not [name for name, _ in model.named_parameters() if "_proj.weight" in name]
    # what a run reports counts them
    plain = build(folder, *NF4[2:], "--model.dtype", "bfloat16").model
    assert flop(model) == flop(plain)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(only_trainable=True) == plain.num_parameters(only_trainable=True)


CASES = [("llama", ()), ("qwen2", ()), ("mistral", ())]
CASES += [("qwen3", ("--train.activation_checkpointing", how)) for how in ("full", "selective")]
CASES += [("qwen2", ("--train.compile", "true"))]
CASES += [
    ("llama", ("--train.compile", "true", "--train.activation_checkpointing", how)) for how in ("full", "selective")
]


@pytest.mark.parametrize("name, more", CASES)
def test_loss_and_gradients_are_those_of_a_model_that_was_rounded_beforehand(name, more, model_folder, monkeypatch):
    compile_by("aot_eager", monkeypatch)
    folder = model_folder(name)
    trainee = build(folder, *NF4, *more)
    move_away(trainee.model)
    batch, documents = batch_and_documents()
    loss, _ = trainee(batch)
    loss.backward()
    adapters = {name: p.detach() for name, p in trained(trainee.model).items()}
    want_loss, want = reference(folder_of_rounded(folder), adapters, 6 / 4, documents)
    assert loss.item() == pytest.approx(want_loss, rel=1e-6)
    assert set(want) == {name for name, p in trainee.model.named_parameters() if p.grad is not None}
    for name, parameter in trained(trainee.model).items():
        error = (parameter.grad - want[name]).norm() / want[name].norm()
        assert error < 1e-5, f"{name}: relative error {error}"
