"""Layers with a state, convolutions, linear attention, state spaces, in packed rows: each document by itself.

model.patch = "examples/hybrid.py:on_each_document" trains Qwen3.5, Qwen3-Next, LFM2, Granite 4, Nemotron-H and others.

A state would run from one document into the next. transformers hands kernels of other packages the boundaries, where
they are installed, and drops them without a word where they are not. So such a part is called once a document here:
exact on any device, and slow where documents are short. These layers are not compiled: how many calls they take
changes from batch to batch. Their other parts, such as attention, see the whole row as ever.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

BOUNDS: list[int] = []  # where the documents of the batch at hand begin, and the last one ends
OURS = {"backend", "cu_seqlens", "max_seqlen", "document_mask"}  # what lacuna tells attention


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
    of_slots = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == BOUNDS[-1]
    return value[:, begin:end] if of_slots else value


def join(first, *others):
    return torch.cat([first, *others], 1) if isinstance(first, torch.Tensor) else first


def has_state(module: nn.Module) -> bool:
    """Convolutions stand beside what they feed; MiniMax's linear attention has none."""
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return convolves or "LightningAttention" in type(module).__name__


def note_bounds(decoder, args, kwargs):
    BOUNDS[:] = kwargs["cu_seqlens"].tolist()


def on_each_document(model: PreTrainedModel):
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(note_bounds, with_kwargs=True)
    for layer in decoder.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for part in filter(has_state, list(layer.modules())):
            part.__class__ = type(type(part).__name__, (OnEachDocument, type(part)), {})
            layer.sees_to_documents = True
