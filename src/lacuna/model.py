"""The builder: patch -> LoRA -> activation checkpointing -> torch.compile -> FSDP2, then weights.

Everything replaces `layer.forward` in place: parameter names stay Hugging Face's.
"""

import copy
import hashlib
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lacuna.attention import boundaries, choose_backend, packed_attention
from lacuna.config import Config, ConfigError, ModelConfig, blame, log
from lacuna.data.batch import PackedBatch
from lacuna.lora import add_adapters
from lacuna.loss import head_loss
from lacuna.parallel import Ranks, shard_model
from lacuna.weights import FLOATS, fill, held, load_weights, weight_folder

# Dear to recompute: matrix products and attention. Everything else is cheap.
aten = torch.ops.aten
SAVED_OPS = [aten.mm.default, aten.addmm.default, aten._grouped_mm.default, aten._scaled_mm.default]
SAVED_OPS += [torch.ops.torch_attn._varlen_attn.default]
SAVED_OPS += [aten._scaled_dot_product_flash_attention_for_cpu.default]


class Trainee(nn.Module):
    """A transformers model with its loss: what is sharded, called and trained."""

    def __init__(self, config: Config, ranks: Ranks, tokenizer, folder, frozen: bool):
        """Put together on the meta device: nothing is allocated yet."""
        super().__init__()
        on_gpu = ranks.device.type == "cuda"
        # what computes has this dtype; parameters that are trained are float32, frozen ones are held in it
        self.dtype = getattr(torch, config.model.dtype or ("bfloat16" if on_gpu else "float32"))
        self.compiled = on_gpu if config.train.compile is None else config.train.compile
        self.objective = None  # a recipe's, in place of the sum of losses
        held_in = self.dtype if frozen or config.lora.rank else torch.float32
        model = self.model = empty_model(config.model, folder, tokenizer, held_in, self.dtype)
        self.backend = choose_backend(config.model.attention, ranks.device, self.dtype)
        model.requires_grad_(not frozen)
        if config.model.patch:  # first: it replaces modules
            apply_patch(model, config.model.patch)
        layers = self.layers = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
        refuse_unfit(model, layers, config.train.seq_len, config.model.from_scratch)
        if config.lora.rank:
            add_adapters(model, layers, config.lora)
        if ranks.mesh is None and self.dtype != torch.float32:
            cast_in_forward(model, layers, self.dtype)
        # in the backward pass all of a layer is recomputed (full), or what is cheap (selective)
        recomputed = config.train.activation_checkpointing
        # an empty list, and not no list: else the partitioner would keep what `lora.Adapted` computes
        saved = SAVED_OPS if recomputed == "selective" else []
        options = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, saved)}
        for layer in layers:
            if recomputed != "none":
                layer.forward = partial(checkpoint, layer.forward, **options)
            # Compile wraps the checkpointed layer: the partitioner recomputes inside it; the other way round it would
            # be done twice. All layers share one graph: seconds, not minutes.
            if self.compiled and getattr(layer, "compiles", True):
                layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, dict]:
        """The batch's loss, nats, and a recipe's figures by name: sums over the same units."""
        if self.objective:
            return self.objective(self, batch)
        return self.head(batch)()[0], {}

    def head(self, batch: PackedBatch):
        """`head_loss` over a batch, as a function of its labels' weights."""
        head = self.model.get_output_embeddings()
        weight = head.weight
        hidden = self.hidden(batch)
        if head.bias is not None:  # one more column of weights, for an input of 1
            weight = torch.cat([weight, head.bias[:, None]], 1)
            hidden = nn.functional.pad(hidden, (0, 1), value=1.0)
        config = self.model.config
        # transformers keeps keys, too, that a config's class does not know, and does nothing with them
        keys = ("logit_scale", "logits_scaling", "final_logit_softcapping", "logits_soft_cap")
        known = {key: getattr(config, key) for key in keys if hasattr(type(config), key)}
        power = {"hyperclovax": 1}.get(config.model_type, -1)  # all others divide
        factor = (known.get("logits_scaling") or 1) ** power * (known.get("logit_scale") or 1)
        cap = known.get("final_logit_softcapping") or known.get("logits_soft_cap")
        return partial(head_loss, hidden, weight, batch, self.compiled, factor=factor, cap=cap)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The decoder's last hidden states [T, H]."""
        # transformers wants a batch: all rows are one long sample
        inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], "use_cache": False}
        return self.model.get_decoder()(**inputs, **boundaries(batch, self.backend)).last_hidden_state[0]


def build_model(config: Config, ranks: Ranks, tokenizer, checkpoint: Path | None = None, frozen=False) -> Trainee:
    """The model of `config.model`, ready to train: with its own weights or a checkpoint's."""
    # a run that goes on has the config that it began with, whatever has become of its model's folder
    origin = not config.checkpoint.resume_changed and checkpoint
    trainee = Trainee(config, ranks, tokenizer, origin or config.model.name, frozen)
    model = trainee.model
    folder = checkpoint
    if config.lora.rank or (folder is None and not config.model.from_scratch):
        folder = weight_folder(config.model.name)
    log.info("weights %s", folder or "are random")
    # after torch.compile, whose graphs FSDP2's hooks would break
    if ranks.mesh is not None:
        shard_model(trainee, ranks)
    # allocate this rank's share, then fill it: from the folder, or from scratch
    trainee.to_empty(device=ranks.device)
    model.tie_weights(recompute_mapping=False)  # to_empty gives each module a tensor of its own
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # those that `initialise` makes are not
    model.get_input_embeddings().padding_idx = None  # nothing is padded: all ids learn
    initialise(model, config.seed, set(held(model).values()) if folder else set())
    if folder:
        load_weights(model, folder)
    return trainee


def apply_patch(model: PreTrainedModel, patch: str):
    """Call a function of the user's file with the empty model."""
    file, _, function = patch.rpartition(":")
    with blame(f"model.patch {patch} (a file.py:function)"):
        # a real module: torch.compile looks up by the module's name what layers call in it
        spec = spec_from_file_location(f"patch_{Path(file).stem}", file)
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        getattr(module, function)(model)


def empty_model(config: ModelConfig, folder, tokenizer, held_in, dtype) -> PreTrainedModel:
    """A folder's model on the meta device, with lacuna's attention."""
    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    hf_config = whole.get_text_config()
    for key in config.overrides:
        if not hasattr(hf_config, key):
            raise ConfigError(f"model.overrides.{key} is no field of {config.name}'s config")
    # made anew from its file, so that fields that follow from others follow from the new ones
    if config.overrides and folder == config.name:
        fields, _ = hf_config.get_config_dict(folder)
        fields = fields.get("text_config", fields)
        kinds = fields.pop("layer_types", None)
        if kinds != getattr(type(hf_config).from_dict(copy.deepcopy(fields)), "layer_types", None):
            fields["layer_types"] = kinds  # the model's own: they follow from nothing
        if "rope_parameters" in config.overrides:
            fields.pop("rope_scaling", None)  # its older name, which would win
        hf_config = type(hf_config).from_dict(fields | copy.deepcopy(config.overrides))
    if config.tokenizer:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(hf_config, key, getattr(tokenizer, key))
    # before the model is built: transformers would fetch and run a kernel that a config names as its attention
    hf_config._attn_implementation = "lacuna"
    stored = next((kind for kind in (whole.dtype, hf_config.dtype) if kind in FLOATS), dtype)
    lost = [token for token, id in tokenizer.get_vocab().items() if id >= hf_config.vocab_size]
    if lost not in ([], ["<image_soft_token>"]):  # Gemma 3's
        raise ConfigError(f"vocab_size {hf_config.vocab_size} is without {lost[:3]}: see model.tokenizer")
    if getattr(hf_config, "num_hidden_layers", 0) > 10_000:
        raise ConfigError("num_hidden_layers is above 10,000")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=held_in)
    # what goes out has the dtype of what came in, unless model.dtype says otherwise
    model.config.dtype = dtype if config.dtype or config.from_scratch else stored
    return model


def refuse_unfit(model: PreTrainedModel, layers: list[nn.Module], seq_len: int, from_scratch: bool):
    """Refuse, by name and with the reason, what would not be exact."""
    config = model.config
    # leaks: what would let a document depend on its neighbours
    unseen = [layer for layer in layers if not hasattr(layer, "sees_to_documents")]
    kinds = getattr(config, "layer_types", None) or []
    leaks = {kind for kind, layer in zip(kinds, layers, strict=False) if layer in unseen}
    leaks -= {"full_attention", "sliding_attention", "mlp", "moe"}
    if any(isinstance(module, nn.Conv1d) for module in nn.ModuleList(unseen).modules()):
        leaks.add("convolutions")
    if unseen and "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(model).__module__]):
        leaks.add("attention that cannot be replaced")
    ropes = str(getattr(config, "rope_parameters", None))
    longest = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", 0)
    too_long = seq_len > longest and ("'longrope'" in ropes or "'dynamic'" in ropes)
    scores = getattr(config, "attn_logit_softcapping", None) or "sinks" in " ".join(dict(model.named_parameters()))
    inside = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    problems = {
        f"cannot keep packed documents apart ({', '.join(sorted(leaks))}): see docs/models.md": leaks,
        f"rotates by the longest document of a batch: set train.seq_len to {longest}": too_long,
        "has capped scores or sinks: see docs/models.md": scores and AttentionInterface()["lacuna"] is packed_attention,
        "has more in its head than one matrix": set(model.parameters()) - inside,
        "hides a window in its mask": config.model_type == "phimoe" and seq_len > (config.sliding_window or seq_len),
        "is a mixture of experts: from scratch it needs a balancing loss": from_scratch and experts(model),
        "attends to later tokens, too": not all(getattr(part, "is_causal", True) for part in model.modules()),
        "is quantized: take a copy without quantization_config": getattr(config, "quantization_config", None),
        "must have model.overrides.attention_dropout = 0.0": getattr(config, "attention_dropout", 0.0),
        "has no layer that is a GradientCheckpointingLayer (num_hidden_layers)": not layers,
    }
    for problem, there in problems.items():
        if there:
            raise ConfigError(f"{type(model).__name__} {problem}")


def experts(model: nn.Module) -> list[nn.Module]:
    """Those of a mixture: one module holds all of a layer's, whatever the config calls them."""
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def cast_in_forward(model: PreTrainedModel, layers: list[nn.Module], dtype: torch.dtype):
    """On a rank without FSDP: float32 parameters, cast to dtype inside what is compiled."""
    inside = set(nn.ModuleList(layers).modules())
    for module in model.get_decoder().modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.to(dtype))
        elif module in layers or (module._parameters and module not in inside):
            # the copy, which stays on meta, is run with the weights of `module`
            module.forward = partial(run_in, copy.deepcopy(module), module, dtype)


def run_in(template: nn.Module, module: nn.Module, dtype: torch.dtype, *args, **kwargs):
    cast = {name: p.to(dtype) for name, p in module.named_parameters()}
    return functional_call(template, cast | dict(module.named_buffers()), args, kwargs)


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int, done: set[Tensor]):
    """What is not done, as transformers or LoRA begins with, on any ranks: a seed for each name."""
    for name, module in model.named_modules():
        mine = {key: p for key, p in module.named_parameters(recurse=False) if p not in done}
        # tied weights are made once, with the first module that has them
        done |= set(mine.values())
        whole = {key: nn.Parameter(torch.empty(p.shape, device=p.device)) for key, p in mine.items()}
        tensors = [*whole.values(), *(b for b in module.buffers(recurse=False) if b not in done)]
        if not tensors:
            continue
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
        module._parameters.update(whole)
        for tensor in tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        parent = model.get_submodule(name.rpartition(".")[0])
        for part in (module, parent):  # a parent may do it otherwise, as GPT-2's does
            getattr(part, "_init_weights", model._init_weights)(part)
        if any(tensor.isnan().any() for tensor in tensors):
            raise ConfigError(f"{type(model).__name__} does not say how to initialise {name}")
        module._parameters.update(mine)
        for key, parameter in mine.items():  # of the same whole each rank takes its rows
            fill(parameter, [torch.atleast_1d(whole[key])], name)
