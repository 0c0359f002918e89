"""LM head and cross-entropy without full logits [T, V]: 16,384 x 151,936 in float32 are 10 GB."""

import functools

import torch

from lacuna.data.batch import IGNORE, PackedBatch

LOGITS = 2**29  # elements of a chunk's logits: 1 GiB in bf16; more gains nothing on an H200


def head_loss(hidden, weight, batch: PackedBatch, compiled: bool, weights=None, **arithmetic):
    """The sum of weights * -log p of labels, nats, with its gradient; and -log p of each, float32 [T]."""
    # hidden is [T, H], weight [V, H]; weights [T], finite, are 1 by default; arithmetic: factor and cap of chunk_loss.
    # A sum: train.py divides by the trained tokens of the global batch, so no split of it changes a gradient.
    if weights is None:
        weights = (batch.labels != IGNORE).float()
    chunk_step = functools.partial(compiled_chunk if compiled else chunk_loss, **arithmetic)
    # asked here: inside the forward of an autograd function gradients are always off
    return ChunkedLoss.apply(hidden, weight, batch, weights, chunk_step, torch.is_grad_enabled())


class ChunkedLoss(torch.autograd.Function):
    """Computes gradients with the loss, chunk by chunk: no logits outlive their chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, batch, weights, chunk_step, with_grads):
        chunk_size = 2 ** ((LOGITS // weight.shape[0]).bit_length() - 1)  # a power of two
        head = weight.to(hidden.dtype)
        losses = torch.zeros_like(weights, dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if with_grads else None
        grad_weight = None
        # of a frozen head nobody needs one: a third of the products, and 1.2 GB for Qwen3-1.7B
        if with_grads and weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        # trained positions first: the chunks after them, most of them in chat data, have nothing to compute
        order = torch.argsort(batch.labels == IGNORE, stable=True)  # [T]
        for start in range(0, batch.counts["trained_tokens"], chunk_size):
            index = order[start : start + chunk_size]
            chunk = hidden[index]  # [C, H]
            losses[index], grad_logits = chunk_step(chunk @ head.T, batch.labels[index], weights[index])
            if with_grads:
                grad_hidden[index] = grad_logits @ head
            if grad_weight is None:
                continue
            # summed in float32 inside the matrix product: on an H200 that saves 10 ms a step
            if chunk.is_cuda and chunk.dtype != torch.float32:
                torch.addmm(grad_weight, grad_logits.T, chunk, out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight.addmm_(grad_logits.T.float(), chunk.float())
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place: both belong to this one backward
        grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight.mul_(grad)
        return grad_hidden, grad_weight, None, None, None, None


def chunk_loss(logits, labels, weights, factor=1.0, cap=None) -> tuple[torch.Tensor, ...]:
    """Of cap * tanh(factor * logits / cap), [C, V]: losses, and the gradient of their weighted sum."""
    exact = logits.float() * factor
    if cap is not None:
        exact = cap * torch.tanh(exact / cap)
    trained = labels != IGNORE
    target = torch.where(trained, labels, 0)[:, None]  # [C, 1]
    log_norm = exact.logsumexp(1, keepdim=True)  # [C, 1]
    losses = (log_norm - exact.gather(1, target))[:, 0] * trained
    hit = torch.arange(logits.shape[1], device=logits.device) == target  # [C, V]
    grad = ((exact - log_norm).exp() - hit.float()) * (factor * weights * trained)[:, None]
    if cap is not None:
        grad = grad * (1 - (exact / cap).square())
    return losses, grad.to(logits.dtype)


compiled_chunk = torch.compile(chunk_loss, dynamic=False)
