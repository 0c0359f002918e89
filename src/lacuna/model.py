"""The builder: kernels -> activation checkpointing -> torch.compile -> FSDP2, then weights into the shards.

Kernels patch modules, so they come first. Compile wraps the checkpointed layer, because the partitioner recomputes
inside it; the other way round would recompute twice. FSDP2 comes last, because its hooks would break the graphs.
Everything replaces `layer.forward` in place: parameter names stay those of Hugging Face from beginning to end.
"""

import copy
import difflib
import functools
import hashlib
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lacuna.attention import boundaries, choose_backend
from lacuna.config import Config, ConfigError, ModelConfig
from lacuna.data.loader import PackedBatch
from lacuna.loss import head_loss
from lacuna.parallel import Ranks, shard_model


class Trainee(nn.Module):
    """A transformers model with its loss: what is sharded, called and trained."""

    def __init__(self, model: PreTrainedModel, backend: str, head_options: dict):
        super().__init__()
        self.model, self.backend, self.head_options = model, backend, head_options

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """The sum of the batch's losses, nats."""
        weight = self.model.get_output_embeddings().weight
        return head_loss(self.hidden(batch), weight, batch.labels, batch.trained_tokens, **self.head_options)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """The decoder's last hidden states [T, H]."""
        inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], "use_cache": False}
        return self.model.get_decoder()(**inputs, **boundaries(batch, self.backend)).last_hidden_state[0]


def build_model(config: Config, ranks: Ranks, vocabulary: int, checkpoint: Path | None = None) -> Trainee:
    """The model of `config.model`, sharded over ranks.mesh, ready to train, with its own weights or a checkpoint's."""
    on_gpu = ranks.device.type == "cuda"
    dtype = getattr(torch, config.model.dtype or ("bfloat16" if on_gpu else "float32"))
    compiled = on_gpu if config.train.compile is None else config.train.compile
    model, folder = empty_model(config.model, vocabulary, checkpoint)
    layers = list(model.get_decoder().layers)
    apply_kernels(model, config.model, on_gpu, compiled)
    if config.model.fp8:
        compute_in_fp8(layers, ranks.device, dtype)
    if ranks.mesh is None and dtype != torch.float32:
        compute_in(model, layers, dtype)
    checkpoint_activations(layers, config.train.activation_checkpointing)
    options = {"post_grad_custom_pre_pass": Float32Gradients()} if on_gpu else {}
    if compiled:  # regionally: all layers share one graph, which takes seconds; the whole model would take minutes
        for layer in layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, options=options)
    accum_dtype = torch.float32 if config.model.accum_dtype == "float32" else dtype
    backend = choose_backend(config.model.attention, ranks.device, dtype)
    trainee = Trainee(model, backend, {"head": config.model.head, "accum_dtype": accum_dtype, "compiled": compiled})
    if ranks.mesh is not None:
        shard_model(trainee, layers, ranks, config.dist, dtype)
    trainee.to_empty(device=ranks.device)
    model.tie_weights(recompute_mapping=False)  # to_empty gives each module a tensor of its own
    initialise(model, config.seed, buffers_only=folder is not None)
    if folder is not None:
        load_weights(model, folder)
    model.config.dtype = dtype
    return trainee


def empty_model(config: ModelConfig, vocabulary: int, checkpoint: Path | None) -> tuple[PreTrainedModel, Path | None]:
    """The model on the meta device, and the folder of its weights (None: from scratch)."""
    try:
        hf_config = AutoConfig.from_pretrained(config.name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name {config.name}: {error}") from None
    for key, value in config.overrides.items():
        if not hasattr(hf_config, key):
            near = difflib.get_close_matches(key, hf_config.to_dict(), 1)
            raise ConfigError(f"model.overrides.{key} is no field of {config.name}'s config; nearest: {near or 'none'}")
        setattr(hf_config, key, value)
    with torch.device("meta"):
        trust = config.trust_remote_code
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, trust_remote_code=trust)
    refuse_unfit(model)
    model.set_attn_implementation("lacuna")
    if vocabulary > hf_config.vocab_size:
        sizes = f"the tokenizer has {vocabulary} tokens, the model {hf_config.vocab_size}"
        raise ConfigError(f"{sizes}: set model.tokenizer, or train from_scratch with model.overrides.vocab_size")
    if config.from_scratch or checkpoint:
        return model, checkpoint
    if Path(config.name).is_dir():
        return model, Path(config.name)
    return model, Path(snapshot_download(config.name, allow_patterns=["*.safetensors", "*.json"]))


def refuse_unfit(model: PreTrainedModel):
    """Refuse, by name, architectures that packed documents would leak through or whose head is not a plain matrix."""
    config, name = model.config, type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv1d)]
    if not model._supports_attention_backend or getattr(model, "_is_stateful", False) or kinds or convolutions:
        why = ", ".join(sorted(kinds)) or ("convolutions" if convolutions else "its attention cannot be replaced")
        raise ConfigError(f"{name} cannot keep packed documents apart ({why}); use a model with attention layers only")
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1.0):
            raise ConfigError(f"{name} has {key}, which lacuna's head and attention do not compute")
    if getattr(config, "num_experts_per_tok", None):
        raise ConfigError(f"{name} is a mixture of experts, whose balancing loss lacuna does not compute")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError(f"{name} has a bias in its head, which lacuna does not compute")
    if getattr(config, "attention_dropout", 0.0):
        raise ConfigError("model.overrides.attention_dropout must be 0: packed attention has no dropout")


def apply_kernels(model: PreTrainedModel, config: ModelConfig, on_gpu: bool, compiled: bool):
    """Fused layers. Under compile Inductor fuses better: Liger's norms and SwiGLU cost 3,500 of 40,000 tokens/s."""
    auto = "liger" if on_gpu and not compiled else "none"
    kernels = config.kernels or auto
    if kernels == "liger":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        if not on_gpu:
            raise ConfigError('model.kernels = "liger" needs a GPU; use "none"')
        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


def compute_in_fp8(layers: list[nn.Module], device: torch.device, dtype: torch.dtype):
    """The layers' matrix products in fp8, forward and backward, one scale a tensor (torchao); not the head's.

    1.7B parameters, one H200: 49,900 tokens/s; in bf16 46,400; with a scale for each row 43,100, slower than bf16.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0) or dtype != torch.bfloat16:
        raise ConfigError("model.fp8 needs a Hopper GPU or later, and bfloat16: leave it false")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise ConfigError("model.fp8 needs the extra: uv sync --extra fp8") from None
    for layer in layers:  # _scaled_mm takes multiples of 16 only
        fits = lambda module, _: not (module.in_features % 16 or module.out_features % 16)  # noqa: E731
        convert_to_float8_training(layer, module_filter_fn=fits)


def compute_in(model: PreTrainedModel, layers: list[nn.Module], dtype: torch.dtype):
    """On a rank without FSDP: float32 parameters, computation in dtype, the casts inside what is compiled."""
    for module in (*layers, model.get_decoder().norm):
        template = copy.deepcopy(module)  # on meta: it has the code, `module` has the weights
        module.forward = functools.partial(run_in, template, module, dtype)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))


def run_in(template: nn.Module, module: nn.Module, dtype: torch.dtype, *args, **kwargs):
    return functional_call(template, {name: p.to(dtype) for name, p in module.named_parameters()}, args, kwargs)


class Float32Gradients(CustomGraphPass):
    """In a compiled graph, a matrix product that is cast to float32 writes float32 itself.

    So the gradient of a weight that was cast to bf16 is never rounded to bf16, and 1.7B parameters on an H200 save the
    2.3 ms that the casts took.
    """

    def __call__(self, graph: torch.fx.Graph):
        for cast in graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default):
            product, dtype = cast.args
            if product.target is torch.ops.aten.mm.default and len(product.users) == 1 and dtype == torch.float32:
                with graph.inserting_before(cast):
                    exact = graph.call_function(torch.ops.aten.mm.dtype, (*product.args, dtype))
                exact.meta.update(cast.meta)
                cast.replace_all_uses_with(exact)
                graph.erase_node(cast)
                graph.erase_node(product)

    def uuid(self) -> str:
        return "lacuna.Float32Gradients 1"  # part of the key of the compile cache: count up with every change


# Dear to recompute: matrix products and attention. Everything else is cheap and recomputed.
SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.lacuna.fa4.default,
    torch.ops.torch_attn._varlen_attn.default,
]


def checkpoint_activations(layers: list[nn.Module], how: str):
    """Recompute in the backward pass: everything (full), or all but the dear operators (selective)."""
    contexts = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
    options = {"context_fn": contexts} if how == "selective" else {}
    for layer in layers if how != "none" else []:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **options)


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int, buffers_only: bool):
    """Initialise as transformers does, the same on any number of ranks; buffers always: `to_empty` leaves garbage."""
    device, done = next(model.buffers()).device, set()
    for name, module in model.named_modules():
        mine = {} if buffers_only else {k: p for k, p in module.named_parameters(recurse=False) if p not in done}
        done |= set(mine.values())
        whole = {k: nn.Parameter(torch.empty(p.shape, device=device)) for k, p in mine.items()}
        buffers = [b for b in module.buffers(recurse=False) if b.is_floating_point()]
        tensors = [*whole.values(), *buffers]
        for tensor in tensors:
            tensor.fill_(float("nan"))
        if tensors:
            module._parameters.update(whole)
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
            model._init_weights(module)
            module._parameters.update(mine)
        if any(tensor.isnan().any() for tensor in tensors):
            raise ConfigError(f"{type(model).__name__} does not say how to initialise {name}")
        for key, p in mine.items():
            if isinstance(p, DTensor):  # this rank's part; nothing is sent, as every rank made the same whole
                whole[key] = distribute_tensor(whole[key], p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(whole[key])


def load_weights(model: PreTrainedModel, folder: Path):
    """Read this rank's part of every parameter from safetensors files."""
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    stored = {name: tensor.size for name, tensor in metadata.state_dict_metadata.items()}
    if not stored:
        raise ConfigError(f"model.name {folder} has no *.safetensors; to begin without, set model.from_scratch = true")
    tied = set(model.all_tied_weights_keys)
    parameters = {k: p for k, p in model.named_parameters(remove_duplicate=False) if k not in tied}
    missing = sorted(parameters.keys() - stored)
    unknown = stored.keys() - parameters - tied  # a checkpoint also holds the optimizer
    unknown = sorted(k for k in unknown if not k.endswith("inv_freq") and not k.startswith("optimizer."))
    misfit = f"model.name {folder} does not fit {type(model).__name__}"
    if missing or unknown:
        raise ConfigError(f"{misfit}: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, parameter in parameters.items():
        if stored[name] != parameter.shape:
            raise ConfigError(f"{misfit}: {name} is {list(stored[name])}, the model wants {list(parameter.shape)}")
    read_tensors(parameters, folder)


def read_tensors(tensors: dict[str, torch.Tensor], folder: Path, **options):
    """Fill tensors, sharded or not, from the safetensors files of a folder, whatever number of ranks wrote them."""
    with warnings.catch_warnings(action="ignore"):  # torch warns where one rank is alone
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), **options)
