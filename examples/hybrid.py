"""Layers with a state, convolutions, linear attention, state spaces, in packed rows: each document by itself.

model.patch = "examples/hybrid.py:on_each_document" trains Qwen3.5, Qwen3-Next, LFM2, Granite 4, Nemotron-H and others.

A state would run from one document into the next. transformers hands kernels of other packages the boundaries, where
they are installed, and drops them without a word where they are not. So here
- a convolution that stands alone (LFM2) is told where documents begin, and compiled like any layer;
- the gated delta rule (Qwen3.5, Qwen3-Next, OLMo hybrid), too, where there is a GPU and flash-linear-attention (extra
  hybrid): arXiv 2412.06464;
- any other part is called once a document: exact on any device, and slow where documents are short. Such layers are
  not compiled: how many calls they take changes from batch to batch.
"""

import functools
import importlib.util
import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from lacuna.config import log
from lacuna.model import SAVED_OPS

BOUNDS: list[int] = []  # where the documents of the batch at hand begin, and the last one ends
OURS = {"backend", "cu_seqlens", "max_seqlen", "document_mask"}  # what lacuna tells attention
CHUNK = 64  # slots that the delta rule's kernels take at once


def on_each_document(model: PreTrainedModel):
    decoder = model.get_decoder()
    for layer in decoder.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for part in filter(has_state, list(layer.modules())):
            kind = OnAllDocuments if knows_documents(part) else OnEachDocument
            part.__class__ = before(type(part), kind)
            layer.sees_to_documents = True
            layer.compiles = kind is OnAllDocuments
    parts = list(decoder.modules())
    if any(isinstance(part, OnEachDocument) for part in parts):
        log.warning("%s: layers with a state run document by document, see docs/models.md", type(model).__name__)
        decoder.register_forward_pre_hook(note_bounds, with_kwargs=True)
    if any(isinstance(part, OnAllDocuments) for part in parts):
        decoder.register_forward_pre_hook(add_documents, with_kwargs=True)


@functools.cache  # one class for all layers, which so share one compiled graph
def before(own: type, kind: type) -> type:
    return type(own.__name__, (kind, own), {})


def has_state(module: nn.Module) -> bool:
    """Convolutions stand beside what they feed; MiniMax's linear attention has none."""
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return convolves or "LightningAttention" in type(module).__name__


def knows_documents(part: nn.Module) -> bool:
    """Whether a part can take a whole row: then what its class calls, where it is told of documents, is below."""
    called = vars(sys.modules[type(part).__module__])  # of transformers' file
    name = type(part).__name__
    if name.endswith("GatedDeltaNet") and has_kernels():
        replace(called, "torch_chunk_gated_delta_rule", gated_delta_rule)
    elif not name.endswith("ShortConv"):
        return False
    replace(called, "causal_conv1d_fn", convolve)
    return True


def has_kernels() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("fla") is not None


def replace(called: dict, name: str, ours):
    theirs = called[name]

    def either(*args, seq_idx=None, **kwargs):
        if seq_idx is None:
            return theirs(*args, **kwargs)
        return ours(*args, seq_idx=seq_idx, **kwargs)

    called[name] = either


# Document by document.


class OnEachDocument(nn.Module):
    """Before a module's own class: its forward, document by document, joined along the slots."""

    def forward(self, *args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in OURS}
        outputs = []
        for begin, end in pairwise(BOUNDS):
            mine = [tree_map(lambda value, begin=begin, end=end: share(value, begin, end), x) for x in (args, kwargs)]
            outputs.append(super().forward(*mine[0], **mine[1]))
        return tree_map(join, *outputs)


def share(value, begin: int, end: int):
    """Of a tensor with a value for each slot, [1, T, ...], a document's; anything else as it is."""
    of_slots = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == BOUNDS[-1]
    return value[:, begin:end] if of_slots else value


def join(first, *others):
    return torch.cat([first, *others], 1) if isinstance(first, Tensor) else first


def note_bounds(decoder, args, kwargs):
    BOUNDS[:] = kwargs["cu_seqlens"].tolist()


# All documents at once.


class OnAllDocuments(nn.Module):
    """Before a module's own class: its forward without what lacuna tells attention; `add_documents` tells it more."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **{name: value for name, value in kwargs.items() if name not in OURS})


def add_documents(decoder, args, kwargs):
    """Where documents are, in transformers' words, once a batch and outside of what is compiled."""
    bounds = kwargs["cu_seqlens"]
    slots = torch.arange(kwargs["input_ids"].shape[1], device=bounds.device)
    document = torch.searchsorted(bounds[1:], slots, right=True)  # [T]
    # the delta rule's chunks: of each its document, and its place there
    sizes = (bounds.diff() + CHUNK - 1) // CHUNK
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=bounds.device), sizes)
    place = torch.arange(len(owner), device=bounds.device) - (sizes.cumsum(0) - sizes)[owner]
    chunks = torch.stack([owner, place], 1).to(bounds.dtype)  # [chunks, 2]
    torch._dynamo.mark_dynamic(chunks, 0)
    return args, kwargs | {"seq_idx": document[None], "cu_seq_lens_q": bounds, "chunks": chunks}


def convolve(x, weight, bias=None, activation=None, *, seq_idx, **others) -> Tensor:
    """Causal convolution, channel by channel, of x [1, C, T] with weight [C, W]: nothing of another document."""
    taps = weight.shape[1]
    wide = x.float()
    out = wide * weight[:, -1:].float()
    for lag in range(1, taps):
        earlier = F.pad(wide, (lag, 0))[..., :-lag]
        same = F.pad(seq_idx, (lag, 0), value=-1)[..., :-lag] == seq_idx  # [1, T]
        out = out + torch.where(same, earlier, 0.0) * weight[:, taps - 1 - lag, None].float()
    if bias is not None:
        out = out + bias[:, None].float()
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(x.dtype)


def gated_delta_rule(query, key, value, g, beta, *, cu_seqlens, chunks, **others) -> tuple[Tensor, None]:
    """query and key [1, T, heads, K], value [1, T, heads, V], g (log of the decay) and beta [1, T, heads]."""
    inputs = [x.contiguous() for x in (unit(query), unit(key), value, g, beta)]
    return delta_rule(*inputs, cu_seqlens, chunks)[0], None


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, with transformers' epsilon: it moves gradients of a tiny model by .1%."""
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


# As for FlashAttention-4 in lacuna/attention.py: torch.compile cannot trace the kernels, and two opaque operators keep
# the graph whole.
@torch.library.custom_op("lacuna::delta_rule", mutates_args=())
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, chunks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs: sums of g, and a triangle for each chunk."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    options = {"initial_state": None, "output_final_state": False, "cu_seqlens": cu_seqlens, "chunk_indices": chunks}
    sums, out, triangles, *_ = chunk_gated_delta_rule_fwd(q, k, v, g, beta, k.shape[-1] ** -0.5, **options)
    return out, sums, triangles


@torch.library.custom_op("lacuna::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    sums: Tensor,
    triangles: Tensor,
    cu_seqlens: Tensor,
    chunks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd

    options = {"initial_state": None, "dht": None, "cu_seqlens": cu_seqlens, "chunk_indices": chunks}
    options |= {"scale": k.shape[-1] ** -0.5, "do": grad.contiguous()}
    dq, dk, dv, dbeta, dg, *_ = chunk_gated_delta_rule_bwd(q, k, v, sums, beta, triangles, **options)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(sums.dtype), dbeta.to(beta.dtype)


def save(ctx, inputs, output):
    q, k, v, _, beta, cu_seqlens, chunks = inputs
    _, sums, triangles = output
    ctx.save_for_backward(q, k, v, beta, sums, triangles, cu_seqlens, chunks)


def grads(ctx, grad, *_):
    return *delta_rule_backward(grad, *ctx.saved_tensors), None, None


delta_rule.register_fake(
    lambda q, k, v, g, *_: (torch.empty_like(v), torch.empty_like(g), k.new_empty(*v.shape[:3], CHUNK))
)
delta_rule_backward.register_fake(
    lambda grad, q, k, v, beta, sums, *_: tuple(map(torch.empty_like, (q, k, v, sums, beta)))
)
delta_rule.register_autograd(grads, setup_context=save)
SAVED_OPS.append(torch.ops.lacuna.delta_rule.default)
