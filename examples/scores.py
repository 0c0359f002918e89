"""Attention whose scores are soft-capped (Gemma 2) or have a sink (gpt-oss), which FlashAttention has no gradients for.

model.patch = "examples/scores.py:scores" computes it by FlexAttention on a GPU, and under a mask on a CPU. Layers
without either stay as they are.
"""

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from lacuna.attention import packed_attention

# compiled, or it would hold an index for each pair of slots: 2 GB for 16,384 of them
block_mask = torch.compile(create_block_mask, dynamic=False)


def scores(model: PreTrainedModel):
    AttentionInterface.register("lacuna", attend)
    model.get_decoder().register_forward_pre_hook(add_block_masks, with_kwargs=True)


def attend(module, query, key, value, attention_mask=None, *, softcap=None, s_aux=None, block_masks=None, **options):
    """Arguments and result are those of `packed_attention`; s_aux [heads] is one more score of each query."""
    if softcap is None and s_aux is None:
        return packed_attention(module, query, key, value, attention_mask, **options)
    if attention_mask is not None or options.get("dropout") or options.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} has a mask, a bias or dropout of its own")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    window = options.get("sliding_window")
    if block_masks is None:
        return under_mask(query, key, value, options["document_mask"], scale, window, softcap, s_aux), None

    def cap(score, *_):
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    masked = {
        "block_mask": block_masks["all" if window is None else "window"],
        "scale": scale,
        "enable_gqa": True,
        "return_aux": AuxRequest(lse=True),
    }
    out, aux = flex_attention(query, key, value, cap, **masked)  # [1, heads, T, D]
    if s_aux is not None:
        # the sink's share of the weights goes to nothing
        out = out * torch.sigmoid(aux.lse - s_aux[None, :, None].float())[..., None].to(out.dtype)
    return out.transpose(1, 2), None


def add_block_masks(decoder, args, kwargs):
    """Which blocks of 128 slots see each other, for FlexAttention: made once a batch, outside of what is compiled."""
    if kwargs["backend"] == "sdpa":
        return None
    bounds = kwargs["cu_seqlens"]
    slots = torch.arange(kwargs["input_ids"].shape[1], device=bounds.device)
    document = torch.searchsorted(bounds[1:], slots, right=True)  # [T]
    window = getattr(decoder.config, "sliding_window", None) or len(slots)

    def causal(b, h, q, k):
        return (document[q] == document[k]) & (q >= k)

    def in_window(b, h, q, k):
        return causal(b, h, q, k) & (q - k < window)

    size = {"B": None, "H": None, "Q_LEN": len(slots), "KV_LEN": len(slots), "device": bounds.device}
    masks = {"all": block_mask(causal, **size), "window": block_mask(in_window, **size)}
    return args, kwargs | {"block_masks": masks}


def under_mask(query, key, value, mask, scale: float, window: int | None, softcap: float | None, sinks) -> torch.Tensor:
    """The same with all scores in memory; mask is [B, 1, S, S], T = B x S."""
    if window is not None:
        mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1 - window)
    rows = (mask.shape[0], mask.shape[-1])
    q, k, v = (x[0].unflatten(1, rows).transpose(0, 1) for x in (query, key, value))  # [B, heads, S, D]
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    score = (q @ k.transpose(-1, -2)).float() * scale  # [B, heads, S, S]
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat([score, sink], -1)
    weights = score.softmax(-1)[..., : rows[1]].to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(0, 1)[None]
