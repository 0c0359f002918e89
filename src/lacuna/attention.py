"""Causal attention that never leaves a document, over rows of packed documents laid end to end.

transformers calls `packed_attention` in place of its own, with what `boundaries` gives the model.
Backends: `varlen`, FlashAttention-2; `fa4`, an extra, up to twice as fast; `sdpa`, torch's own over
each row with a mask, which costs seq_len^2, on any device.
"""

import os
import warnings
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface

from lacuna.config import ConfigError
from lacuna.data.batch import PackedBatch

# FlashAttention-4 compiles itself for seconds: keep the result (in /tmp; its .._CACHE_DIR names another place).
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
warnings.filterwarnings("ignore", module="cutlass")  # FlashAttention-4's, about itself


def choose_backend(asked: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for `model.attention`, set up; ConfigError where this machine cannot run it."""
    can_flash = device.type == "cuda" and dtype == torch.bfloat16
    capability = torch.cuda.get_device_capability(device) if can_flash else (0, 0)
    has_fa4 = find_spec("flash_attn") and find_spec("flash_attn.cute")
    can = {"fa4": capability >= (9, 0) and has_fa4, "varlen": capability >= (8, 0), "sdpa": True}
    possible = [backend for backend in can if can[backend]]
    if asked and asked not in possible:
        raise ConfigError(f"model.attention {asked} does not run here, but {', '.join(possible)}")
    chosen = asked or possible[0]
    if chosen == "fa4":
        use_fa4()
    return chosen


def boundaries(batch: PackedBatch, backend: str) -> dict:
    """Arguments that carry a batch's document boundaries through a transformers model."""
    limits = {"backend": backend, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    # one graph for any number of documents: padding cost FlashAttention-4 7 of 350 ms (Qwen3-1.7B, H200)
    torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
    # which slots of its row a slot sees: itself, and those before it in its document
    if backend == "sdpa":
        document = torch.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(batch.input_ids))  # [T]
        document = document.view(-1, batch.max_seqlen)  # [B, S]
        limits["document_mask"] = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # [B, 1, S, S]
    return limits


def packed_attention(module, query, key, value, attention_mask=None, *, backend=None, **options):
    """Attention of every document to itself alone; returns [1, T, heads, D] and no weights."""
    # query is [1, heads, T, D], key and value [1, kv_heads, T, D]; options are the model's, and those of `boundaries`
    foreign = [attention_mask, options.get("softcap"), options.get("s_aux"), options.get("position_bias")]
    if backend is None or options.get("dropout") or any(value is not None for value in foreign):
        what = "soft-capped scores, sinks, a bias, a mask or dropout, or does not pass on where documents end"
        raise ConfigError(f"{type(module).__name__} has {what}: lacuna cannot train it")
    cu_seqlens = options["cu_seqlens"]
    max_seqlen = options["max_seqlen"]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    # keys to its left that a query sees; -1: all of its document's
    left = -1 if window is None or window >= max_seqlen else window - 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if backend == "sdpa":
        mask = options["document_mask"]
        if left >= 0:
            mask = mask & torch.ones_like(mask[0, 0]).triu(-left)
        rows = (mask.shape[0], mask.shape[-1])
        q, k, v = (x.unflatten(0, rows).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, D]
        groups = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=groups)
        out = out.transpose(1, 2).flatten(0, 1)
    else:
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # DeepSeek's values are narrower
        q, k, v = (x.contiguous() for x in (q, k, v))
        limits = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        out = varlen.varlen_attn(q, k, v, *limits, scale=scale, window_size=(left, 0))[..., : value.shape[-1]]
    return out[None], None  # [1, T, heads, D]


def use_fa4():
    """FlashAttention-4 inside of torch's varlen_attn."""
    # torch's own switch, `activate_flash_attention_impl`, knows no windows in 2.11 and changes aten
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def options(cu_seqlens, _, max_seqlen, *rest) -> dict:
        *_, scale, [left, _] = rest
        limits = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "softmax_scale": scale}
        limits |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        return limits | {"window_size_left": {-1: None}.get(left, left), "window_size_right": 0}

    # with heads of 48, 72, 80 or 104 its gradients are wrong, without a word (4.0.0b36 on an H200)
    def forward(q, k, v, *rest):
        if q.shape[-1] % 32:
            return varlen._varlen_attn._init_fn(q, k, v, *rest)
        out, lse, *_ = _flash_attn_fwd(q, k, v, **options(*rest), return_lse=True)
        return out, lse, lse.new_empty(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, *rest):
        if q.shape[-1] % 32:
            return varlen._varlen_attn_backward._init_fn(grad, q, k, v, out, lse, *rest)
        how = options(*rest) | {"deterministic": torch.are_deterministic_algorithms_enabled()}
        return _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, **how)[:3]

    varlen._varlen_attn.register_kernel("cuda", forward)
    varlen._varlen_attn_backward.register_kernel("cuda", backward)


AttentionInterface.register("lacuna", packed_attention)
