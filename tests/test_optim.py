"""The fused step is torch's plain AdamW, in float64, of gradients clipped by the global norm of plain torch."""

import copy

import pytest
import torch
from conftest import model_config
from torch import nn
from transformers import AutoModelForCausalLM

from lacuna.config import OptimConfig
from lacuna.optim import AdamW, trained
from lacuna.parallel import gradient_norm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device):
    """A small model, and a float64 twin with torch's optimizer, decaying what the design says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("qwen3"), dtype=torch.float32).to(device)
    twin = copy.deepcopy(model).double()
    plain = [p for name, p in twin.named_parameters() if "embed" in name or "norm" in name or p.ndim < 2]
    decay = [p for p in twin.parameters() if all(p is not other for other in plain)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    return model, twin, reference


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torchs_adamw_with_torchs_clipping(device):
    model, twin, reference = make(device)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    no = torch.tensor(False, device=device)
    generator = torch.Generator(device).manual_seed(1)
    for step in range(6):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, device=device, generator=generator) * 10 ** (step - 3)  # from tiny to clipped
            q.grad = p.grad.double()
        want = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        norm, squares = gradient_norm(list(model.parameters()), None)
        assert norm.item() == pytest.approx(want.item(), rel=1e-6) and len(squares) == len(list(model.parameters()))
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        reference.step()
        update(optimizer, 1e-2 / (step + 1), (1.0 / (norm + 1e-6)).clamp(max=1).float(), no)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-6, (step, name)


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_step_changes_nothing_and_does_not_count(device):
    model, _, _ = make(device)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    scale = torch.tensor(1.0, device=device)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    update(optimizer, 1e-2, scale, torch.tensor(False, device=device))
    state = optimizer_tensors(optimizer, trained(model))
    everything = [*model.parameters(), *state.values()]
    before = [tensor.detach().clone() for tensor in everything]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    update(optimizer, 1e-2, scale * float("nan"), torch.tensor(True, device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))
    assert {state[key].item() for key in state if key.startswith("optimizer.step")} == {1.0}


def test_only_what_is_trained_is_in_the_optimizer():
    model, _, _ = make("cpu")
    model.get_input_embeddings().weight.requires_grad_(False)  # and with it the head, which is tied to it
    optimizer = build_optimizer(model, OptimConfig())
    names = [name for name, _ in model.named_parameters() if "embed" not in name]
    assert list(trained(model)) == names
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_parameters_that_are_not_float32_are_refused():
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="small updates"):
        build_optimizer(model, OptimConfig())
