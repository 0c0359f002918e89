"""The arms of benchmarks/choices.py: lacuna as it is, and lacuna with one choice taken back.

Where the config has a key for the choice, the arm sets it. Else the arm replaces one function of lacuna's, in a process
of its own, before the run begins.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lacuna.data.loader
import lacuna.model
import lacuna.train
from lacuna.data.batch import IGNORE, PackedBatch, Row, collate
from lacuna.data.pack import best_fit
from lacuna.optim import AdamW

HEAD_CHUNK = 512  # tokens: of a micro-batch of 16,384 there are 32 chunks, whose sums are rounded to bf16 one by one


def attend_across():
    """A token sees everything before it in its row, and positions run through the row."""
    lacuna.data.loader.collate = rows_as_documents


def rows_as_documents(rows: list[Row]) -> PackedBatch:
    batch = collate(rows)
    slots = torch.arange(len(batch.input_ids))
    edges = torch.arange(0, len(slots) + 1, batch.max_seqlen, dtype=torch.int32)
    return batch._replace(position_ids=slots % batch.max_seqlen, cu_seqlens=edges)


def concatenate_and_cut():
    """Documents lie end to end in the order in which they are drawn, and a row ends wherever it is full."""
    lacuna.data.loader.split_documents = split_at_rows
    lacuna.data.loader.best_fit = rows_in_order


def split_at_rows(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As lacuna's `split_documents`: the document [m], start [m], length [m] of each piece."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    edges = np.union1d(begins, np.arange(0, ends[-1], seq_len))  # a piece begins with its document, or with its row
    document = np.searchsorted(begins, edges, side="right") - 1
    return document, edges - begins[document], np.diff(edges, append=ends[-1])


def rows_in_order(sizes: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """As lacuna's `best_fit`: the pieces of each row."""
    row = (np.cumsum(sizes) - sizes) // seq_len
    return np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(row)) + 1)


def pack_as_drawn():
    """Best fit, too, but in the order in which documents are drawn: nothing is sorted."""
    lacuna.data.loader.best_fit = functools.partial(best_fit, sorted_over=1)


def pack_sorted():
    """Best fit, too, but the longest first of all pieces: lacuna up to November 2026."""
    lacuna.data.loader.best_fit = functools.partial(best_fit, sorted_over=0)


def head_gradient_in_bf16():
    """The head is plain torch, chunk by chunk; autograd adds the chunks' gradients of its weight up in bf16."""
    lacuna.model.head_loss = bf16_head_loss


def bf16_head_loss(hidden, weight, batch: PackedBatch, compiled: bool, **arithmetic) -> tuple[torch.Tensor, ...]:
    """As lacuna's `head_loss`, of hidden [T, H] and weight [V, H]; a Llama has no more arithmetic."""
    head = weight.bfloat16()  # one tensor for all chunks: what they send back meets here, before it becomes float32
    # no logits outlive their chunk; nothing is random, and to keep the generator's state would wait for the GPU
    options = {"use_reentrant": False, "preserve_rng_state": False}
    losses = []
    for chunk, labels in zip(hidden.bfloat16().split(HEAD_CHUNK), batch.labels.split(HEAD_CHUNK), strict=True):
        losses.append(checkpoint(chunk_loss, chunk, head, labels, **options))
    losses = torch.cat(losses)  # [T]
    return losses.sum(), losses


def chunk_loss(chunk, head, labels) -> torch.Tensor:
    return F.cross_entropy((chunk @ head.T).float(), labels, ignore_index=IGNORE, reduction="none")


def weights_in_bf16():
    """Weights are rounded to bf16 after each step, as if they were stored so; the moments stay float32."""
    step = AdamW.step

    @torch.no_grad()
    def step_and_round(self, *args):
        step(self, *args)
        for parameter in self.moments:
            parameter.copy_(parameter.bfloat16())

    AdamW.step = step_and_round


def decay_everything():
    """Embeddings, norms and biases decay like matrices."""
    begin = AdamW.__init__

    def begin_without_exceptions(self, *args):
        begin(self, *args)
        self.decays = dict.fromkeys(self.moments, self.config.weight_decay)

    AdamW.__init__ = begin_without_exceptions


def mean_of_means():
    """Every micro-batch weighs the same, however many of its tokens are trained."""
    lacuna.train.accumulate_gradients = accumulate_means


def accumulate_means(trainee, batches: list[PackedBatch], units, ranks) -> list[dict]:
    parts = []
    for batch in batches:
        loss, figures = trainee(batch)
        loss = loss / max(1, batch.counts["units"]) / len(batches)
        loss.backward()
        parts.append({**figures, "loss": loss.detach()})
    return parts


class Arm(NamedTuple):
    data: str  # long, short or chat
    keys: dict | None = None  # of the config, by section
    replace: Callable[[], None] | None = None


TENFOLD = {"optim": {"weight_decay": 1.0}}

# Those without anything else are lacuna as it is: in docs/choices/results.jsonl, as it was with `pack_sorted`.
# Of one seed they run in this order.
ARMS = {
    "long": Arm("long"),
    "short": Arm("short"),
    "short-boundary": Arm("short", {"data": {"mask_boundary": False}}),
    "long-boundary": Arm("long", {"data": {"mask_boundary": False}}),
    "short-across": Arm("short", replace=attend_across),
    "long-across": Arm("long", replace=attend_across),
    "short-cut": Arm("short", replace=concatenate_and_cut),
    "long-cut": Arm("long", replace=concatenate_and_cut),
    "short-drawn": Arm("short", replace=pack_as_drawn),
    "long-drawn": Arm("long", replace=pack_as_drawn),
    "short-sorted": Arm("short", replace=pack_sorted),
    "long-sorted": Arm("long", replace=pack_sorted),
    "chat": Arm("chat"),
    "chat-means": Arm("chat", replace=mean_of_means),
    "long-head": Arm("long", replace=head_gradient_in_bf16),
    "long-weights": Arm("long", replace=weights_in_bf16),
    "chat-weights": Arm("chat", replace=weights_in_bf16),
    "long-decay": Arm("long", replace=decay_everything),
    "long-tenfold": Arm("long", TENFOLD),
    "long-tenfold-decay": Arm("long", TENFOLD, decay_everything),
}

START = "long"  # chats begin with what this arm of the same seed has learned


class Experiment(NamedTuple):
    title: str
    pairs: list[tuple[str, str]]  # lacuna's arm, and the other one
    behind: bool = False  # documents are shown behind another one, too


EXPERIMENTS = {
    "boundary": Experiment(
        "The first token of a document is not predicted from the document before / it is",
        [("short", "short-boundary"), ("long", "long-boundary")],
        behind=True,
    ),
    "across": Experiment(
        "Attention inside documents / across them",
        [("short", "short-across"), ("long", "long-across")],
        behind=True,
    ),
    "cut": Experiment(
        "Best fit / concatenate and cut",
        [("short", "short-cut"), ("long", "long-cut")],
        behind=True,
    ),
    "sorted": Experiment(
        "Best fit / best fit of all pieces, the longest first",
        [("short", "short-sorted"), ("long", "long-sorted")],
        behind=True,
    ),
    "drawn": Experiment(
        "Best fit / best fit of documents as they are drawn",
        [("short", "short-drawn"), ("long", "long-drawn")],
        behind=True,
    ),
    "whole": Experiment(
        "Documents as they are drawn: best fit / concatenate and cut",
        [("short-drawn", "short-cut"), ("long-drawn", "long-cut")],
        behind=True,
    ),
    "head": Experiment(
        "The head's weight gradient is summed in float32 / in bf16",
        [("long", "long-head")],
    ),
    "weights": Experiment(
        "Weights are float32 / bf16",
        [("long", "long-weights"), ("chat", "chat-weights")],
    ),
    "decay": Experiment(
        "Embeddings and norms do not decay / they do",
        [("long", "long-decay"), ("long-tenfold", "long-tenfold-decay")],
    ),
    "means": Experiment(
        "The loss is a mean over the tokens of a step / over the means of its micro-batches",
        [("chat", "chat-means")],
    ),
}
