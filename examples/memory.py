"""What a run takes of each GPU's memory, by kind, before anything is loaded; and the largest micro-batch that fits.

uv run python examples/memory.py [--gib 80] [--gpus N] pt|sft|RECIPE.py [CONFIG.toml] [--section.key VALUE ...]

Needs no GPU; of the model only config.json and tokenizer are read. What layers keep for their backward pass is counted:
the builder's model, on the meta device, is compiled up to where code would be made, which decides what is kept and what
computed again, and runs forward. All else is arithmetic, each term something that a compiled run in bf16 allocates.
The sum is what PyTorch calls allocated, peak_memory_gib in metrics.jsonl; CUDA and NCCL take 1 to 2 GiB besides.
"""

import logging
import runpy
import sys
from argparse import ArgumentParser

import torch
from torch.autograd.graph import saved_tensors_hooks

from lacuna.cli import parse
from lacuna.config import Config, ConfigError, blame
from lacuna.data.batch import PackedBatch
from lacuna.data.tokenize import load_tokenizer
from lacuna.loss import LOGITS
from lacuna.model import Trainee
from lacuna.parallel import Ranks

GIB = 2**30


class Estimate:
    """Bytes on each of so many GPUs, of so many bytes each."""

    def __init__(self, config: Config, gpus: int, memory: float):
        trainee = on_meta(config, config.train.activation_checkpointing, gpus > 1)
        self.seq_len = config.train.seq_len
        self.rows_a_step = config.train.global_batch_size / gpus
        parameters = set(trainee.model.parameters())
        trained = {p for p in parameters if p.requires_grad}
        layers = [set(layer.parameters()) for layer in trainee.layers]

        # What FSDP2 has gathered, in bf16: as parallel.py decides, all layers, or of a large model one, or its buffer.
        size = 2 * count(parameters)
        frozen_is_whole = size < memory / 5
        sharded = set()
        if gpus > 1:
            sharded = trained if frozen_is_whole else parameters
        in_layers = [2 * count(layer & sharded) for layer in layers]
        self.gathered_rest = 2 * count(sharded - set.union(*layers))
        self.gathered = self.gathered_rest + (sum(in_layers) if size <= memory / 20 else max(in_layers))

        # What is always there: float32; frozen bf16, also in a recipe's reference, and codes of 4 bits.
        shards = max(1, gpus // config.dist.dp_replicate)
        frozen = size if has_reference(config) else 2 * count(parameters - trained)
        codes = sum(buffer.nbytes for buffer in trainee.model.buffers())
        self.always = {"parameters": 4 * count(trained) / shards, "optimizer": 8 * count(trained) / shards}
        self.always["frozen"] = codes + frozen / (1 if frozen_is_whole else shards)
        self.gradients = 4 * count(trained) / shards

        # The head has a gradient in float32, and a copy in bf16, unless it is gathered or frozen so.
        head = trainee.model.get_output_embeddings().weight
        self.head_shape = head.shape
        self.head_gradient = 4 * count({head} & trained)
        self.head_copy = 2 * count({head} & trained - sharded)
        # Embeddings tied to it have a second one to add. FSDP2 reduces all but layers at once: bf16, copied to float32.
        tied = head is trainee.model.get_input_embeddings().weight
        self.rest_gradient = max(self.head_gradient * tied, 3 * self.gathered_rest)

        # Activations grow with rows. What does not: layers that recompute nothing keep their weights in bf16, too.
        one, two = (sum(kept(trainee, rows, self.seq_len)) for rows in (1, 2))
        self.kept_a_row = two - one
        self.kept_weights = one - self.kept_a_row
        # A layer's backward pass has all of its own, and gradients of the widest, an MLP's, at the same time.
        sizes = kept(on_meta(config, "none", gathered=True), 1, self.seq_len)
        self.layer_a_row = (sum(sizes) + max(sizes) * sizes.count(max(sizes))) / len(layers)
        self.layer_kept_a_row = min(sum(sizes), self.kept_a_row) / len(layers)
        self.layer_weights = 2 * max(count(layer & trained) for layer in layers)  # in bf16, or their gradients

    def at_peak(self, rows: int) -> dict[str, float]:
        """By kind, when most is there: in the head, or in the backward pass of the last or the first layer."""
        vocabulary, width = self.head_shape
        slots = rows * self.seq_len
        chunk = min(slots, 2 ** ((LOGITS // vocabulary).bit_length() - 1))  # as in loss.py
        logits = 2 * vocabulary * chunk * (2 if chunk == slots else 3)  # its gradient, and that of the chunk before
        hidden = 2 * width * slots * 2  # the last states, bf16, and their gradient
        layer = self.layer_weights + self.layer_a_row * rows
        forward = {
            "activations": self.kept_weights + self.kept_a_row * rows,
            "head": self.head_gradient + hidden,
            "gathered": self.gathered,
            "gradients": self.gradients if rows < self.rows_a_step else 0,  # of the micro-batches before
        }
        in_head = forward | {"head": self.head_gradient + hidden + self.head_copy + logits}
        in_last = forward | {"layer": layer - self.layer_kept_a_row * rows}
        in_first = {"layer": max(layer, self.rest_gradient), "gathered": self.gathered_rest}
        in_first |= {"gradients": self.gradients}
        return self.always | max(in_head, in_last, in_first, key=lambda kinds: sum(kinds.values()))


def count(parameters: set[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def has_reference(config: Config) -> bool:
    """Whether a recipe holds the model once more, as examples/dpo.py does without LoRA, for some losses."""
    recipe = runpy.run_path(config.task) if config.task.endswith(".py") and not config.lora.rank else {}
    return config.recipe.get("loss", "dpo") in recipe.get("HAVE_REFERENCE", [])


def on_meta(config: Config, checkpointing: str, gathered: bool) -> Trainee:
    """What the builder builds, without memory; layers compiled, without code. From FSDP2 they get weights in bf16."""
    config = config.model_copy(deep=True)
    config.model.dtype = "bfloat16"
    config.model.attention = None  # as the machine at hand has no GPU, till below
    config.train.compile = False
    config.train.activation_checkpointing = checkpointing
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    trainee = Trainee(config, ranks, load_tokenizer(config.model), folder=config.model.name, frozen=False)
    trainee.backend = "fa4"  # varlen keeps as much
    if gathered:
        trainee.model.to(torch.bfloat16)
    options = {"backend": "aot_eager_decomp_partition", "fullgraph": True, "dynamic": False}
    for layer in trainee.layers:
        if getattr(layer, "compiles", True):
            layer.forward = torch.compile(layer.forward, **options)
    return trainee


def kept(trainee: Trainee, rows: int, seq_len: int) -> list[int]:
    """Bytes of each storage that a forward pass over so many rows keeps for the backward pass."""
    with torch.device("meta"):
        ids = torch.zeros(rows * seq_len, dtype=torch.int64)
        bounds = torch.zeros(rows + 1, dtype=torch.int32)
    batch = PackedBatch(ids, ids, ids, bounds, max_seqlen=seq_len, epoch=0.0, counts={})
    torch._dynamo.reset()  # or each number of rows would count as one more of the few graphs that a layer may have
    storages = {}  # views share one. Alive till all are seen, or an address could come again

    def see(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(see, lambda tensor: tensor):
        trainee.hidden(batch)
    for tensor in [*trainee.model.parameters(), *trainee.model.buffers()]:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return [storage.nbytes() for storage in storages.values()]


def main(options, words: list[str]):
    config = parse(options.task, words)
    unlike = {
        'model.dtype = "float32"': config.model.dtype == "float32",
        'model.attention = "sdpa"': config.model.attention == "sdpa",
        "train.compile = false": config.train.compile is False,
    }
    for key, there in unlike.items():
        if there:
            raise ConfigError(f"only compiled runs in bfloat16 on a GPU are estimated: leave out {key}")
    with blame(f"cannot be estimated: model.name {config.model.name}, model.patch {config.model.patch}"):
        gpus = options.gpus or config.dist.dp_replicate
        estimate = Estimate(config, gpus, options.gib * GIB)
    kinds = estimate.at_peak(config.train.micro_batch_size)
    for kind, size in (kinds | {"peak": sum(kinds.values())}).items():
        if size >= 0.005 * GIB:
            print(f"{kind:12}{size / GIB:8.2f} GiB")
    room = 0.95 * options.gib * GIB  # the rest for CUDA's own, and for gaps between tensors
    fitting = [rows for rows in range(1, 2**16) if sum(estimate.at_peak(rows).values()) < room]
    print(f"largest train.micro_batch_size that fits {options.gib:g} GiB, less a twentieth: {max(fitting, default=0)}")


if __name__ == "__main__":
    parser = ArgumentParser(description="A GPU's memory in a run, by kind, and the largest micro-batch that fits.")
    parser.add_argument("task", help="pt, sft or a recipe; then its config and keys, as for lacuna")
    parser.add_argument("--gib", type=float, default=80, help="memory of a GPU")
    parser.add_argument("--gpus", type=int, help="how many train together; default: dist.dp_replicate")
    logging.disable()
    try:
        main(*parser.parse_known_args())
    except ConfigError as error:
        sys.exit(f"memory: {error}")
