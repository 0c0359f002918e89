"""Architectures, by the script that makes the table of docs/models.md: equal to plain transformers, or refused."""

import importlib.util

import pytest
from conftest import REPO

from lacuna.config import ConfigError

spec = importlib.util.spec_from_file_location("models", REPO / "benchmarks" / "models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)

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


REFUSED = {
    "aria_text": "mixture of experts",  # whose config says moe_topk
    "bloom": "attention that cannot be replaced",
    "falcon_h1": "convolutions",
    "gemma3_text+bidirectional": "attends to later tokens",
    "gemma4_text+moe": "mixture of experts",  # whose config says top_k_experts
    "llama+dynamic-rope": "set train.seq_len to 16",
    "modernbert-decoder": "more in its head",
    "phi3+longrope": "set train.seq_len to 32",
    "phimoe+sliding": "a window that its mask alone knows",
    "qwen3_5_text": r"linear_attention\): see examples/hybrid.py",
    "qwen4_exp_text": "qwen_sparse_attention",
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
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not mark its layers"):
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
