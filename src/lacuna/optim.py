"""AdamW with decay groups, and learning-rate schedules."""

import math

import torch
from torch import nn

from lacuna.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over float32 parameters; embeddings, norms and biases do not decay (karpathy/minGPT pull 24)."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decay, no_decay = [], []
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32, "AdamW must own float32 parameters: bf16 ones lose small updates"
        (no_decay if parameter.ndim < 2 or id(parameter) in embeddings else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)
    for parameter in model.parameters():  # as AdamW would in its first step: a checkpoint is read into them
        optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer


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
