"""What is trained, AdamW over it with clipping inside, and learning-rate schedules."""

import math

import torch
from torch import Tensor, nn

from lacuna.config import OptimConfig
from lacuna.parallel import local


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is updated, by name, for optimizer, norm, reports and checkpoints."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) on float32 parameters, with clipping."""

    def __init__(self, model: nn.Module, layers: list[nn.Module], config: OptimConfig, compiled: bool):
        self.config = config
        # A layer is one compiled graph that reads each parameter, gradient and moment once: 28 bytes a parameter.
        # torch's fused kernel, the clipping in its `grad_scale`, moves 32: a step of 1.7B on an H100 took 1.2% longer.
        self.update = torch.compile(adamw, dynamic=False) if compiled else adamw
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in trained(model).values()}
        self.groups = []
        left = set(self.moments)
        for part in [*reversed(layers), model]:  # inner ones first, as in Zamba2
            self.groups.append([p for p in trained(part).values() if p in left])
            left.difference_update(self.groups[-1])
        # embeddings, norms and biases do not decay (karpathy/minGPT pull 24)
        embeddings = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
        self.decays = {p: config.weight_decay * (p.ndim > 1 and p not in embeddings) for p in self.moments}
        assert all(p.dtype == torch.float32 for p in self.moments), "bf16 parameters would lose small updates"
        self.count = torch.zeros((), device=next(iter(self.moments)).device)  # updates so far

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor, failed: Tensor):
        """Update by gradients times `scale`; nothing at all where `failed` is true."""
        beta1, beta2 = self.config.betas
        self.count += ~failed
        # what changes from step to step is a tensor: so nothing is compiled again, and nothing waits
        now = {"lr": torch.full_like(self.count, lr), "scale": scale, "failed": failed, "eps": self.config.eps}
        now["step_size"] = now["lr"] / (1 - beta1**self.count)
        now["root"] = (1 - beta2**self.count).sqrt()
        for group in self.groups:
            group = [p for p in group if p.grad is not None]  # others took no part in the loss
            tensors = [tuple(map(local, (p, p.grad, *self.moments[p]))) for p in group]
            # given an empty list, dynamo would never compile this function again: 130 ms a step
            if group:
                self.update(tensors, [*map(self.decays.get, group)], **now, beta1=beta1, beta2=beta2)

    def tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The state as a checkpoint names it, float32, sharded like the parameters."""
        average = {f"optimizer.exp_avg.{name}": self.moments[p][0] for name, p in parameters.items()}
        square = {f"optimizer.exp_avg_sq.{name}": self.moments[p][1] for name, p in parameters.items()}
        return {"optimizer.step": self.count} | average | square


def adamw(tensors: list[tuple], decays: list[float], *, lr, scale, failed, step_size, root, beta1, beta2, eps):
    """Update parameter and both moments in place: the arithmetic of torch.optim.AdamW."""
    for (parameter, grad, average, square), decay in zip(tensors, decays, strict=True):
        grad = grad * scale
        new_average = average.lerp(grad, 1 - beta1)
        new_square = square.lerp(grad * grad, 1 - beta2)
        kept = parameter * (1 - lr * decay)
        new = kept - step_size * new_average / (new_square.sqrt() / root + eps)
        for old, value in ((parameter, new), (average, new_average), (square, new_square)):
            old.copy_(torch.where(failed, old, value))


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, of so many: the last has lr * min_lr_ratio."""
    begin = config.warmup_steps
    if step < begin:
        return config.lr * (step + 1) / (begin + 1)
    # warmup-stable-decay, arXiv 2404.06395: constant, then a linear decay
    if config.schedule == "wsd":
        begin = max(begin, steps - 1 - (config.decay_steps or max(1, steps // 10)))
    done = max(0, step - begin) / max(1, steps - 1 - begin)
    shares = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    share = shares.get(config.schedule, 1 - done)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
