"""Architectures, by the script that makes the table of docs/models.md: equal to plain transformers, or refused."""

import importlib.util
import json
import shutil
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText

from lacuna.attention import packed_attention
from lacuna.checkpoint import export
from lacuna.config import ConfigError
from lacuna.metrics import flop

spec = importlib.util.spec_from_file_location("models", REPO / "benchmarks" / "models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


@pytest.fixture(autouse=True)
def attention_as_it_is():
    """A patch may put another function in its place, for the whole process."""
    yield
    AttentionInterface.register("lacuna", packed_attention)


# Each another head, norm, rotation, window, or way to hold its parts.
EQUAL = ["arcee", "bitnet", "cwm", "diffllama", "ernie4_5", "exaone4", "gemma", "gemma3_text", "gemma4_text", "glm4"]
EQUAL += [
    "helium",
    "hunyuan_v1_dense",
    "jais2",
    "llama+yarn",
    "ministral3",
    "olmo2",
    "olmo3+yarn",
    "persimmon",
]
# Logits that are multiplied or divided, before the head or after it, and soft-capped; layers in `h`, not in `layers`;
# a parent that initialises its children; a decoder that initialises itself.
EQUAL += ["cohere", "gemma2+no-attention-softcap", "gemma3n_text", "gpt2", "granite", "granitemoehybrid+dense"]
EQUAL += ["hyperclovax", "minicpm3", "nanochat+low-softcap"]
# A bias of the head; another name for it in files; what has a state, run on each document by itself (a patch of
# examples/); capped scores, by another patch.
EQUAL += ["phi", "gpt_neox", "qwen3_5_text", "lfm2", "bamba", "recurrent_gemma", "gemma2"]
EQUAL += ["phi3", "phi3+longrope-short", "qwen2", "seed_oss", "smollm3", "starcoder2", "youtu"]


@pytest.mark.parametrize("name", EQUAL)
def test_loss_gradients_and_first_weights_equal_plain_transformers(name):
    row = models.row(name, runs=False)
    assert row["class"] == "equal", row
    assert row["scratch"] == "ok"
    assert isinstance(row["bf16"], float) and row["bf16"] < 2e-3


# Experts that are stored one by one, or as one matrix (dbrx); routers with a bias that is saved and not trained; values
# narrower than keys; a window that attention is not told of; experts beside what has a state, and beside sinks.
MIXTURES = ["dbrx", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gemma4_text+moe", "glm4_moe", "gpt_oss", "mixtral"]
MIXTURES += ["nemotron_h", "olmoe", "qwen2_moe+sliding", "qwen3_5_moe_text", "qwen3_moe"]


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_equal_plain_transformers_and_go_out_as_they_came(name):
    row = models.row(name, runs=True)
    assert row["class"] == "equal" and row["run"] == "ok", row
    assert isinstance(row["bf16"], float) and row["bf16"] < 2e-3
    assert "is a mixture of experts: from scratch it needs a balancing loss" in str(row["scratch"])


def test_saved_buffers_and_layers_that_share_keys_go_through_a_whole_run():
    row = models.row("gemma4_text+kv-sharing", runs=True)
    assert row["class"] == "equal" and row["run"] == "ok", row


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_the_text_of_a_multimodal_checkpoint_is_trained_as_the_whole_model_computes_it(kind, tmp_path, caplog):
    """Its names are under `language_model`; what sees is left out, and said so; what goes out is a text model."""
    text = models.tiny_config(f"{kind}_text").to_dict()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1}
    sizes |= {"image_size": 28, "patch_size": 14, "num_heads": 2, "out_hidden_size": 64}
    config = models.CONFIG_MAPPING[kind](text_config=text)
    vision = config.vision_config.to_dict()
    config = models.CONFIG_MAPPING[kind](text_config=text, vision_config={k: sizes.get(k, vision[k]) for k in vision})
    torch.manual_seed(1)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path / "whole")
    models.AutoTokenizer.from_pretrained(models.TINY).save_pretrained(tmp_path / "whole")
    assert any("language_model." in name for name in load_file(tmp_path / "whole" / "model.safetensors"))
    patch = ["--model.patch", f"{models.EXAMPLES}/hybrid.py:on_each_document"] if kind == "qwen3_5" else []
    trainee = models.build(tmp_path / "whole", *patch)
    assert "tensors that see or hear are left out" in caplog.text
    want = 0.0
    for document in chain(*models.documents()):
        ids = torch.tensor([document])
        logits = whole(input_ids=ids).logits[0]
        want += F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
    loss, _ = trainee(models.pack(models.documents()))
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert models.whole_run(tmp_path / "whole", tmp_path, patch) == "ok"
    with pytest.raises(ConfigError, match="does not fit"):  # half of the text is no text
        half = {"num_hidden_layers": 2, "layer_types": text["layer_types"][:2]}
        models.build(tmp_path / "whole", *patch, "--model.overrides", json.dumps(half))


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
def test_what_goes_out_has_the_names_shapes_and_bytes_of_what_came_in(name, tmp_path):
    models.make_folder(name, tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert any(".experts.3." in stored or stored == "embed_out.weight" for stored in before)
    models.whole_run(tmp_path / "model", tmp_path, ["--optim.lr", "1e-40"])  # which changes nothing
    after = load_file(tmp_path / "runs" / "run" / "hf" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[stored], before[stored]) for stored in before)


def test_an_export_leaves_no_older_weights_beside_it(tmp_path):
    """transformers would read a model.safetensors before the shards, and an index before a model.safetensors."""
    models.make_folder("llama", tmp_path / "model")
    assert models.whole_run(tmp_path / "model", tmp_path, []) == "ok"
    hf = tmp_path / "runs" / "run" / "hf"
    right = load_file(hf / "model.safetensors")
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    save_file({"a": torch.zeros(1)}, hf / "model-00001-of-00002.safetensors")
    export(tmp_path / "runs" / "run" / "checkpoints" / "step_2", hf)
    assert [file.name for file in hf.glob("*safetensors*")] == ["model.safetensors"]
    got = load_file(hf / "model.safetensors")
    assert all(torch.equal(got[name], right[name]) for name in right)


def test_an_export_over_a_checkpoint_or_the_model_it_comes_from_is_refused_and_changes_nothing(tmp_path):
    """Over its base, LoRA's adapters would be lost: no other run or export could use them."""
    models.make_folder("llama", tmp_path / "model")
    models.whole_run(tmp_path / "model", tmp_path, ["--lora.rank", "2"])
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "step_2"
    shutil.copytree(checkpoint, checkpoint.with_name("step_1"))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    inside = [checkpoint.parent / "." / "step_2", checkpoint.with_name("step_1"), checkpoint / "hf"]
    for out in (*inside, tmp_path / "model"):
        with pytest.raises(ConfigError, match="holds what a model is made of: name another folder"):
            export(checkpoint, out)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_weights_may_be_read_by_whom_their_folder_allows(tmp_path):
    """safetensors writes them for the owner alone, whatever the umask: nobody else could serve them or go on."""
    models.make_folder("llama", tmp_path / "model")
    models.whole_run(tmp_path / "model", tmp_path, ["--lora.rank", "2"])
    files = sorted((tmp_path / "runs" / "run").rglob("*.safetensors"))
    assert {file.name.split("_")[0] for file in files} == {"rank", "model.safetensors", "adapter"}
    for file in files:
        assert file.stat().st_mode & 0o777 == file.parent.stat().st_mode & 0o666, file


def test_a_config_that_generation_refuses_does_not_cost_the_export(tmp_path):
    """Old conversions of Llama have pad_token_id = -1: all steps were trained, and then there was no model."""
    models.make_folder("llama", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": -1, "dtype": "float8_e4m3fn"}))
    models.whole_run(tmp_path / "model", tmp_path, [])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "run" / "hf", dtype="auto").dtype == torch.float32


def test_a_routers_bias_stays_float32_in_a_bf16_model(tmp_path):
    """transformers keeps it so: in bf16 the exported model would choose other experts than were trained."""
    models.make_folder("deepseek_v3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    bias = torch.tensor([7.0001, 7.0032, 7.0086, 7.0008])
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file(load_file(file) | {name: bias}, file)
    lora = models.build(tmp_path / "model", "--lora.rank", "2", "--model.dtype", "bfloat16")
    assert torch.equal(lora.model.state_dict()[name], bias)
    models.whole_run(tmp_path / "model", tmp_path, ["--model.dtype", "bfloat16", "--optim.lr", "1e-40"])
    assert torch.equal(load_file(tmp_path / "runs" / "run" / "hf" / "model.safetensors")[name], bias)


def test_a_tensor_that_is_there_under_two_names_is_refused(tmp_path):
    models.make_folder("gpt_neox", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {"lm_head.weight": torch.zeros_like(whole["embed_out.weight"])}, file)
    with pytest.raises(ConfigError, match=r"embed_out\.weight differs from lm_head\.weight"):
        models.build(tmp_path)


def test_an_adapter_is_written_only_where_peft_has_the_same_names(tmp_path, caplog):
    """Of a mixture it takes some for the experts', and those of a text in a multimodal folder match nothing."""
    for name, written in (("llama", True), ("deepseek_v3", False)):
        models.make_folder(name, tmp_path / name)
        models.whole_run(tmp_path / name, tmp_path / name, ["--lora.rank", "2"])
        hf = tmp_path / name / "runs" / "run" / "hf"
        assert (hf / "adapter" / "adapter_config.json").exists() == written
        assert (hf / "model.safetensors").exists()


def test_an_expert_that_is_missing_or_one_too_many_is_refused(tmp_path):
    models.make_folder("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    gone = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    save_file({name: tensor for name, tensor in whole.items() if name != gone}, file)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.experts\.down_proj is \[3, 64, 96\]"):
        models.build(tmp_path)
    save_file(whole | {gone.replace("experts.2", "experts.4"): whole[gone].clone()}, file)
    with pytest.raises(ConfigError, match=r"down_proj is \[5, 64, 96\], and should be \[4, 64, 96\]"):
        models.build(tmp_path)


def test_of_a_mixtures_experts_those_count_as_work_that_a_token_goes_through(tmp_path):
    for chosen in (1, 2):
        config = models.tiny_config("qwen3_moe")
        config.num_experts_per_tok = chosen
        model = models.AutoModelForCausalLM.from_config(config)
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        embeddings = model.get_input_embeddings().weight.numel()
        others = model.num_parameters() - experts - embeddings
        assert flop(model)[0] == 6 * (others + experts * chosen / 4)


GPU = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "deepseek_v3": {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_key_value_heads": 4},
    "gemma2": {"head_dim": 64},
    "gpt_oss": {"head_dim": 64},
    "qwen3_5_text": {"head_dim": 64},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
def test_on_a_gpu_too_compiled_in_bf16(name, tmp_path, monkeypatch):
    fields = models.tiny_config(name).to_dict() | {"hidden_size": 256, "head_dim": 64} | GPU[name]
    config = models.CONFIG_MAPPING[fields.pop("model_type")](**fields)
    monkeypatch.setattr(models, "tiny_config", lambda name: config)
    cuda = torch.device("cuda")
    models.make_folder(name, tmp_path)
    want, _ = models.reference(tmp_path)
    patch = ["--model.patch", f"{models.EXAMPLES}/{models.PATCHED[name]}"] if name in models.PATCHED else []
    trainee = models.build(tmp_path, *patch, device=cuda)
    assert trainee.compiled and trainee.backend != "sdpa"
    loss, _ = trainee(models.pack(models.documents()).to(cuda))
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=2e-3)
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainee.model.parameters())


REFUSED = {
    "aria_text": "mixture of experts",  # whose config says moe_topk
    "bloom": "attention that cannot be replaced",
    "falcon_h1": "convolutions",
    "gemma2": "capped scores or sinks: see docs/models.md",
    "gpt_oss": "capped scores or sinks: see docs/models.md",
    "gemma3_text+bidirectional": "attends to later tokens",
    "gemma4_text+moe": "mixture of experts",  # whose config says top_k_experts
    "llama+dynamic-rope": "set train.seq_len to 16",
    "modernbert-decoder": "more in its head",
    "phi3+longrope": "set train.seq_len to 32",
    "phimoe+sliding": "hides a window in its mask",
    "qwen3_5_text": r"linear_attention\): see docs/models.md",
    "qwen4_exp_text": r"convolutions, \w+_attention",
    "qwen3_moe": "mixture of experts",
    "recurrent_gemma": "cannot keep packed documents apart",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_exact_is_refused_by_name_and_reason(name, tmp_path):
    models.tiny_config(name).save_pretrained(tmp_path)
    models.AutoTokenizer.from_pretrained(models.TINY).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=REFUSED[name]):
        models.build(tmp_path, "--model.from_scratch", "true")


@pytest.mark.parametrize("name", ["doge", "hrm_text", "stablelm"])
def test_what_only_files_or_a_first_batch_can_tell_is_a_sentence_too(name):
    """Its own mask, weights that are stored joined, arguments that layers do not pass on."""
    assert models.row(name, runs=False)["class"] == "refused"


def test_from_scratch_each_weight_is_written_once(tmp_path):
    """By its own seed: not again where a sibling's parent initialises them all, as GPT-2's attention its `c_proj`."""
    models.make_folder("gpt2", tmp_path)
    model = models.build(tmp_path, "--model.from_scratch", "true").model
    assert {parameter._version for parameter in model.parameters()} == {1}


def test_a_model_that_does_not_mark_its_layers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lacuna.model.GradientCheckpointingLayer", models.PackedBatch)
    models.make_folder("llama", tmp_path)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no layer that is a GradientCheckpointingLayer"):
        models.build(tmp_path)


def test_a_quantized_config_is_refused(tmp_path):
    config = models.tiny_config("llama")
    config.quantization_config = {"quant_method": "bitnet"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="quantized"):
        models.build(tmp_path, "--model.from_scratch", "true")


def test_a_short_document_does_not_depend_on_a_long_one_beside_it(tmp_path):
    """As transformers has it, where one is longer: its rotary frequencies are of the longest."""
    models.make_folder("phi3+longrope-short", tmp_path)
    models.build(tmp_path, "--train.seq_len", "256")
    with pytest.raises(ConfigError, match=r"set train\.seq_len to 256"):
        models.build(tmp_path, "--train.seq_len", "257")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_compiled_loss_and_gradients_equal_plain_transformers(name):
    """RESULTS.md has a GPU's table of all."""
    row = models.compiled_row(name)
    assert row["class"] == "equal", row
    assert row["bf16"] < 2e-3 and float(row["cosine"]) > 0.999
