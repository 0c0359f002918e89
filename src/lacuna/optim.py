"""What is trained, torch's AdamW over it, and learning-rate schedules."""

import math

import torch
from torch import nn

from lacuna.config import OptimConfig


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer updates, by name: the one answer for norms, reports and checkpoints too."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), fused: one kernel for all parameters.

    Embeddings, norms and biases do not decay (karpathy/minGPT pull 24). The state is made at once and not in the first
    step, so that a checkpoint can be read into it.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    kept = {id(weight) for weight in embeddings}
    decaying = []
    constant = []
    for parameter in trained(model).values():
        assert parameter.dtype == torch.float32, "AdamW must own float32 parameters: bf16 ones lose small updates"
        if parameter.ndim > 1 and id(parameter) not in kept:
            decaying.append(parameter)
        else:
            constant.append(parameter)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": constant, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=tuple(config.betas), eps=config.eps, fused=True)
    for parameter in [*decaying, *constant]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def update(optimizer: torch.optim.Optimizer, lr: float, scale: torch.Tensor, failed: torch.Tensor):
    """One step of the gradients times `scale`; changes nothing at all where `failed` is true.

    The fused kernel does both on its way, by what torch made for GradScaler, so nothing waits for the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = 1 / scale
    optimizer.found_inf = failed.float()
    optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state as a checkpoint names it, float32, sharded like the parameters."""
    tensors = {}
    for name, parameter in parameters.items():
        for kind, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{kind}.{name}"] = tensor
    return tensors


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, in a run of this many steps.

    Warmup is linear and reaches the peak at step warmup_steps; the last step of linear, cosine and wsd (constant, then
    a linear decay: warmup-stable-decay, arXiv 2404.06395) has lr * min_lr_ratio.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, steps - (config.decay_steps or max(1, steps // 10)))
    done = min(1.0, max(0, step - begin) / max(1, steps - 1 - begin))
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
