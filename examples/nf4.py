"""QLoRA (arXiv 2305.14314), the frozen base of a LoRA run in 4 bits: --model.patch examples/nf4.py:nf4 --lora.rank 16

Each 64 weights along a row share a scale, and each is held as the nearest of 16 values times it, in the same bytes as
bitsandbytes': .53 a weight of the decoder's linear layers. Embeddings, head, norms, and a mixture's experts stay in
bf16. The device never has the others all in bf16: they are rounded one by one as they are read, and decoded one by one
where they are multiplied. Autograd keeps the decoded ones for the backward pass where layers are not recomputed: let
train.activation_checkpointing be selective or full. On several ranks each has all codes.

hf/ is merged into the weights of model.name as they were before, as PEFT advises.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from lacuna.config import ConfigError, log
from lacuna.lora import ADAPTED, LoRALinear

BLOCK = 64
# The paper's appendix E: each is the nearest to about as many weights, where they are normally distributed.
NEGATIVE = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036]
POSITIVE = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
VALUES = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])
MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2
PAIRS = torch.cartesian_prod(VALUES, VALUES)  # [256, 2]: what each byte says


class NF4Linear(nn.Linear):
    """A linear layer that holds codes [out, in / 2], two a byte, and scales [out, in / 64] for its weight [out, in]."""

    @property
    def weight(self) -> torch.Tensor:
        values = self.pairs[self.codes.int()].view(self.out_features, -1, BLOCK)
        return (values * self.scales[..., None]).to(self.scales.dtype).flatten(1)

    def encode(self, rows: slice, weight: torch.Tensor):
        blocks = weight.to(self.scales).unflatten(1, (-1, BLOCK)).float()
        scales = blocks.abs().amax(-1, keepdim=True)
        # of nothing but zeros, 0 / 0: any code will do, times a scale of 0
        codes = torch.bucketize(blocks / scales, MIDDLES.to(blocks.device), out_int32=True).flatten(1)
        self.codes[rows] = (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8)
        self.scales[rows] = scales[..., 0].to(self.scales.dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool):
        """Where lacuna looks for what a folder must hold."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rows = torch.empty(self.out_features, self.in_features, device="meta").as_subclass(Rows)
        rows.layer = self
        destination[f"{prefix}weight"] = rows

    def _init_weights(self, module: nn.Module):
        """Called for buffers that no folder holds: with scales of 0 the weight is 0 till it is read."""
        self.pairs.copy_(PAIRS)
        self.scales.zero_()


class NF4LoRALinear(LoRALinear, NF4Linear):
    """The same with an adapter."""


ADAPTED[NF4Linear] = NF4LoRALinear


class Rows(torch.Tensor):
    """In the place of a weight that is nowhere: what is written to its rows is encoded."""

    def __setitem__(self, rows: slice, values: torch.Tensor):
        self.layer.encode(rows, values)


def nf4(model: PreTrainedModel):
    linear = {name: module for name, module in model.get_decoder().named_modules() if type(module) is nn.Linear}
    unfit = {name.split(".")[-1] for name, module in linear.items() if module.in_features % BLOCK}
    if unfit:
        log.info("nf4: %s stay as they are: their rows are no multiple of %d", ", ".join(sorted(unfit)), BLOCK)
    layers = [module for module in linear.values() if module.in_features % BLOCK == 0]
    size = sum(module.weight.numel() for module in layers)
    for module in layers:
        hold_codes(module)

    others = model.num_parameters
    model.num_parameters = lambda only_trainable=False: others(only_trainable) + (0 if only_trainable else size)
    model.register_state_dict_pre_hook(refuse_training)  # the builder asks for it before it reads weights


def hold_codes(module: nn.Linear):
    """On the meta device: codes and scales in place of the weight."""
    weight = module.weight
    rows, columns = weight.shape
    del module.weight
    module.__class__ = NF4Linear
    codes = weight.new_empty(rows, columns // 2, dtype=torch.uint8)
    module.register_buffer("codes", codes, persistent=False)
    module.register_buffer("scales", weight.new_empty(rows, columns // BLOCK), persistent=False)
    module.register_buffer("pairs", PAIRS.to("meta"), persistent=False)


def refuse_training(model: PreTrainedModel, *_):
    if model.get_input_embeddings().weight.requires_grad:
        raise ConfigError("model.patch nf4 rounds a frozen base: it needs lora.rank")
