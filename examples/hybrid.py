"""Layers with a state, convolutions, linear attention, state spaces, in packed rows: each document by itself.

model.patch = "examples/hybrid.py:on_each_document" trains Qwen3.5, Qwen3-Next, LFM2, Granite 4, Nemotron-H and others.

A state would run from one document into the next. transformers hands kernels of other packages the boundaries, where
they are installed, and drops them without a word where they are not. So here
- a convolution that stands alone (LFM2) is told where documents begin, and takes them all at once;
- any other part is called once a document: exact on any device, and slow where documents are short. The number
  of calls changes from batch to batch.

None of these layers is compiled.
"""

import functools
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

BOUNDS: list[int] = []  # where the documents of the batch at hand begin, and the last one ends
OURS = {"backend", "cu_seqlens", "max_seqlen", "document_mask"}  # what lacuna tells attention


def on_each_document(model: PreTrainedModel):
    decoder = model.get_decoder()
    for layer in decoder.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for part in filter(has_state, list(layer.modules())):
            kind = OnAllDocuments if knows_documents(part) else OnEachDocument
            part.__class__ = before(type(part), kind)
            layer.sees_to_documents = True
            # convolutions, too: compiled they are right on a CPU, and were not compared on a GPU yet
            layer.compiles = False
    parts = list(decoder.modules())
    if any(isinstance(part, OnEachDocument) for part in parts):
        log.warning("%s: layers with a state run document by document, see docs/models.md", type(model).__name__)
        decoder.register_forward_pre_hook(note_bounds, with_kwargs=True)
    if any(isinstance(part, OnAllDocuments) for part in parts):
        decoder.register_forward_pre_hook(add_documents, with_kwargs=True)


@functools.cache  # one class for all layers
def before(own: type, kind: type) -> type:
    return type(own.__name__, (kind, own), {})


def has_state(module: nn.Module) -> bool:
    """Convolutions stand beside what they feed; MiniMax's linear attention has none."""
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return convolves or "LightningAttention" in type(module).__name__


def knows_documents(part: nn.Module) -> bool:
    """Whether a part convolves and no more: then what its class calls, where it is told of documents, is `convolve`."""
    if not type(part).__name__.endswith("ShortConv"):
        return False
    replace(vars(sys.modules[type(part).__module__]), "causal_conv1d_fn", convolve)
    return True


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
    """Each slot's document, [1, T], under the name that transformers hands on to convolutions."""
    slots = torch.arange(kwargs["input_ids"].shape[1], device=kwargs["input_ids"].device)
    document = torch.searchsorted(kwargs["cu_seqlens"][1:], slots, right=True)
    return args, kwargs | {"seq_idx": document[None]}


def convolve(x, weight, bias=None, activation=None, *, seq_idx, **others) -> Tensor:
    """Causal convolution, channel by channel, of x [1, C, T] with weight [C, W]: nothing of another document."""
    taps = weight.shape[1]
    wide = x.float()
    out = wide * weight[:, -1:].float()
    for lag in range(1, taps):
        earlier = F.pad(x, (lag, 0))[..., :-lag].float()  # cast first, Inductor makes wrong gradients on a CPU
        same = F.pad(seq_idx, (lag, 0), value=-1)[..., :-lag] == seq_idx  # [1, T]
        out = out + torch.where(same, earlier, 0.0) * weight[:, taps - 1 - lag, None].float()
    if bias is not None:
        out = out + bias[:, None].float()
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(x.dtype)
