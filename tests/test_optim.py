"""AdamW is torch's AdamW, in float64, of gradients that were clipped by the global norm of plain torch."""

import copy
import shutil

import pytest
import torch
from conftest import model_config
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, get_scheduler

from lacuna.config import OptimConfig
from lacuna.optim import AdamW, learning_rate, trained
from lacuna.parallel import gradient_norm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device):
    """A small model, its layers, and a float64 twin with torch's optimizer, decaying what the design says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("qwen3"), dtype=torch.float32).to(device)
    twin = copy.deepcopy(model).double()
    plain = [p for name, p in twin.named_parameters() if "embed" in name or "norm" in name or p.ndim < 2]
    decay = [p for p in twin.parameters() if all(p is not other for other in plain)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    return model, model.get_decoder().layers, twin, reference


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torchs_adamw_with_torchs_clipping(device, compiled):
    model, layers, twin, reference = make(device)
    optimizer = AdamW(model, layers, OptimConfig(lr=1e-2, weight_decay=0.1), compiled)
    graphs, no, generator = [], torch.tensor(False, device=device), torch.Generator(device).manual_seed(1)
    for step in range(6):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, device=device, generator=generator) * 10 ** (step - 3)  # from tiny to clipped
            q.grad = p.grad.double()
        want = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        norm = gradient_norm(list(model.parameters()), None)
        assert norm.item() == pytest.approx(want.item(), rel=1e-6)
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        reference.step()
        optimizer.step(1e-2 / (step + 1), (1.0 / (norm + 1e-6)).clamp(max=1).float(), no)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-6, (step, name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1  # another learning rate or scale compiles nothing again


def test_a_parameter_of_two_layers_is_updated_once():
    """Zamba2's layers hold layers: what was in both went two steps at once, and decayed twice."""
    model, layers, twin, reference = make("cpu")
    optimizer = AdamW(model, [*layers, layers[0].mlp], OptimConfig(lr=1e-2, weight_decay=0.1), False)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    for group in reference.param_groups:
        group["lr"] = 1e-2
    reference.step()
    optimizer.step(1e-2, torch.tensor(1.0), torch.tensor(False))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6, name


@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), pytest.param("cuda", True, marks=pytest.mark.gpu)])
def test_a_failed_step_changes_nothing_and_does_not_count(device, compiled):
    model, layers, _, _ = make(device)
    optimizer = AdamW(model, layers, OptimConfig(lr=1e-2), compiled)
    scale = torch.tensor(1.0, device=device)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-2, scale, torch.tensor(False, device=device))
    everything = [*model.parameters(), *optimizer.tensors(trained(model)).values()]
    before = [tensor.detach().clone() for tensor in everything]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(1e-2, scale * float("nan"), torch.tensor(True, device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True)) and optimizer.count == 1


def test_only_what_is_trained_is_in_the_optimizer():
    model, layers, _, _ = make("cpu")
    model.get_input_embeddings().weight.requires_grad_(False)  # and with it the head, which is tied to it
    layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = AdamW(model, layers, OptimConfig(), False)
    frozen = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight")
    names = [name for name, _ in model.named_parameters() if not name.endswith(frozen)]
    assert list(trained(model)) == names
    assert sum(map(len, optimizer.groups)) == len(names)
    assert len(optimizer.tensors(trained(model))) == 2 * len(names) + 1


def test_parameters_that_are_not_float32_are_refused():
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="small updates"):
        AdamW(model, [], OptimConfig(), False)


def test_a_parameter_without_a_gradient_stays_as_it_is_and_ends_nothing():
    """As with torch's: a layer may take another's keys and values, and its own have no part in the loss."""
    model, layers, _, _ = make("cpu")
    optimizer = AdamW(model, layers, OptimConfig(lr=1e-2, weight_decay=0.1), False)
    idle = layers[1].self_attn.k_proj.weight
    before = idle.detach().clone()
    for p in model.parameters():
        p.grad = None if p is idle else torch.ones_like(p)
    parameters = trained(model)
    norm = gradient_norm(list(parameters.values()), None)
    assert norm.item() == pytest.approx((model.num_parameters() - idle.numel()) ** 0.5)
    optimizer.step(1e-2, torch.tensor(1.0), torch.tensor(False))
    assert torch.equal(idle, before)
    assert not torch.equal(layers[0].self_attn.k_proj.weight, before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor on a CPU needs a C++ compiler")
def test_a_group_without_parameters_does_not_undo_the_compiled_update_of_the_others():
    """dynamo gives up a function that it has found empty once: with LoRA all adapters were updated op by op."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[2].requires_grad_(False)  # what is outside the layers
    optimizer = AdamW(model, [model[0], model[1]], OptimConfig(lr=1e-3), compiled=True)
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step(1e-3, torch.tensor(1.0), torch.tensor(False))
        model.zero_grad()
    assert "aten::lerp" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(("steps", "decay_steps", "decayed"), [(30, 4, 4), (30, 1, 1), (30, None, 3), (9, None, 1)])
def test_wsd_is_constant_and_then_falls_in_so_many_equal_steps(steps, decay_steps, decayed):
    config = OptimConfig(lr=2.0, schedule="wsd", min_lr_ratio=0.1, decay_steps=decay_steps)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    falling = torch.linspace(2.0, 0.2, decayed + 1, dtype=torch.float64).tolist()
    assert rates == pytest.approx([2.0] * (steps - decayed - 1) + falling)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_other_schedules_are_transformers_own_after_the_warmup(schedule):
    """transformers' would reach the lowest rate one step after the end; lacuna's last step has it."""
    config = OptimConfig(lr=2.0, schedule=schedule, min_lr_ratio=0.0, warmup_steps=5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=24)
    for step in range(5, 30):
        assert learning_rate(config, step, 30) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert [learning_rate(config, step, 30) for step in range(5)] == pytest.approx([2 * i / 6 for i in range(1, 6)])
