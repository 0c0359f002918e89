"""Which architectures lacuna trains exactly: one row for each class of transformers' causal language models.

usage: python benchmarks/models.py [NAME ...]               without names all, half an hour: docs/models.md
       python benchmarks/models.py --compiled [NAME ...]    loss and gradients, on a GPU where there is one

For each architecture a tiny random float32 model (2 to 6 layers, every layer type that it has, windows, chunks and
rope lengths shorter than the documents, no parameter at its start value) is saved by plain transformers.
Reference: plain transformers, eager attention and experts, every document alone, full logits, sum of cross-entropies,
gradients of all parameters. lacuna: its own `build_model` from the folder (CPU, sdpa, float32, uncompiled), five
documents of 5 to 41 tokens packed into two rows. Equal: loss and every gradient within 1e-4, relative.

equal     as the reference; of some with a patch of examples/, which the table names
refused   with a sentence that names the reason
WRONG     let through, and not equal: silently wrong
CRASH     an error that is no sentence
not made  no tiny config here, or transformers itself fails

scratch   from_scratch = true: mean and deviation of every parameter as in plain transformers
bf16      one rank, bfloat16, the default on one GPU: relative error of the loss
run       two steps of `lacuna pt`, with export, and from_pretrained of what was exported

--compiled: in float32 (attention sdpa) equal as above; in bfloat16 as a run on one GPU computes, the relative error of
the loss, and the cosine between all gradients as one vector and the reference's.
"""

import gc
import json
import logging
import sys
import tempfile
import warnings
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lacuna import train
from lacuna.config import ConfigError, blame, load_config
from lacuna.data.batch import PackedBatch
from lacuna.model import build_model
from lacuna.parallel import Ranks

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = EXAMPLES / "tiny"
CPU = torch.device("cpu")
SEQ_LEN, ROWS = 64, [[5, 37, 14], [23, 41]]  # documents; the first row has 8 slots left over
VOCAB, TOLERANCE = 4096, 1e-4

# Fields that are made small wherever a config has them.
SMALL = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    sliding_window=16, n_embd=64, n_layer=2, n_head=4, n_positions=512, n_ctx=512, rotary_dim=8, resid_pdrop=0.0,
    embd_pdrop=0.0, attn_pdrop=0.0, attention_dropout=0.0, hidden_dropout=0.0, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, dropout=0.0, activation_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0,
    layerdrop=0.0, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, moe_num_experts=4, moe_k=2, moe_topk=2,
    router_jitter_noise=0.0, input_jitter_noise=0.0, n_shared_experts=1, num_shared_experts=1, n_group=1, topk_group=1,
    q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    mamba_d_state=16, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=16, mamba_dt_rank=8,
    first_k_dense_replace=1, num_dense_layers=1, shared_intermediate_size=32, index_topk=8, index_head_dim=16,
    index_n_heads=2, num_nextn_predict_layers=0,
)  # fmt: skip
FULL, SLIDE, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIX = [SLIDE, FULL, SLIDE, FULL]
SPARSE = dict(mlp_layer_types=["dense", "sparse", "dense", "sparse"])
HYBRID = dict(layer_types=[LINEAR, FULL, LINEAR, FULL])
MLA = dict(num_key_value_heads=4, head_dim=8)
DSA = {**MLA, **SPARSE, "layer_types": None}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)

# What a type needs besides.
MORE = {
    "afmoe": dict(layer_types=MIX),
    "aria_text": dict(moe_num_shared_experts=1),
    "axk1": dict(MLA),
    "axk2": dict(DSA, gated_norm_rank=4),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "bloom": dict(n_head=4),
    "cohere": dict(logit_scale=0.25),
    "cohere2": dict(layer_types=MIX, logit_scale=0.25),
    "cohere2_moe": dict(layer_types=MIX, logit_scale=0.25),
    "cohere_compass_text": dict(layer_types=MIX, rope_parameters={
                                k: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
                                for k in (FULL, SLIDE)}),
    "cwm": dict(layer_types=MIX, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}),
    "dbrx": dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=512,
                 attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                 ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}),
    "deepseek_v2": dict(MLA),
    "deepseek_v3": dict(MLA),
    "deepseek_v32": DSA,
    "deepseek_v4": dict(num_key_value_heads=1, layer_types=["heavily_compressed_attention",
                        "compressed_sparse_attention", SLIDE, SLIDE], compress_rates={
                        "compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, o_groups=2,
                        o_lora_rank=16, hc_mult=2, mlp_layer_types=["hash_moe", "moe", "moe", "moe"], index_topk=4),
    "doge": dict(keep_window_size=512, is_moe=False, num_experts=16, num_experts_per_tok=4),
    "dots1": dict(layer_types=MIX, num_key_value_heads=2),
    "ernie4_5_moe": dict(moe_num_shared_experts=1, moe_layer_end_index=3),
    "exaone4": dict(layer_types=MIX),
    "exaone_moe": dict(layer_types=MIX, **SPARSE),
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=96),
    "falcon_h1": dict(mamba_d_ssm=128, lm_head_multiplier=0.5),
    "gemma2": dict(layer_types=MIX, query_pre_attn_scalar=20),
    "gemma3_text": dict(layer_types=MIX, query_pre_attn_scalar=20),
    "gemma3n_text": dict(layer_types=MIX, intermediate_size=96, vocab_size_per_layer_input=VOCAB, laurel_rank=8,
                         hidden_size_per_layer_input=16, num_kv_shared_layers=2, altup_num_inputs=4,
                         activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0]),
    "gemma4_text": dict(layer_types=MIX, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16,
                        per_layer_config={"1": {"head_dim": 32}, "3": {"head_dim": 32}}),
    "gemma4_unified_text": dict(layer_types=MIX, use_bidirectional_attention=None,
                                per_layer_config={"1": {"head_dim": 32}, "3": {"head_dim": 32}}),
    "glm4_moe_lite": dict(MLA, **SPARSE),
    "glm_moe_dsa": dict(DSA, indexer_types=["full", "shared", "full", "shared"]),
    "gpt_neo": dict(num_layers=2, num_hidden_layers=2, num_heads=4, window_size=16,
                    attention_types=[[["global", "local"], 1]],
                    resid_dropout=0.0, embed_dropout=0.0),
    "gpt_oss": dict(layer_types=MIX, rope_parameters=YARN),
    "granite": dict(logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.1),
    "granite_swa": dict(layer_types=MIX, logits_scaling=4.0, attention_multiplier=0.1, layer_rope_theta=None),
    "granitemoe": dict(logits_scaling=4.0, attention_multiplier=0.1),
    "granitemoe_swa": dict(layer_types=MIX, logits_scaling=4.0, attention_multiplier=0.1, layer_rope_theta=None),
    "granitemoehybrid": dict(**HYBRID, logits_scaling=4.0, attention_multiplier=0.1, position_embedding_type="rope"),
    "granitemoeshared": dict(logits_scaling=4.0, attention_multiplier=0.1),
    "hrm_text": dict(num_layers_per_stack=2, num_hidden_layers=16, H_cycles=2, L_cycles=2, L_bp_cycles=[2]),
    "hunyuan_v1_moe": dict(num_experts=4),
    "hy_v3": SPARSE,
    "hy_v4": dict(DSA, indexer_types=["full", "shared", "full", "shared"], hc_mult=2),
    "hyperclovax": dict(logits_scaling=0.5, attention_multiplier=0.1),
    "inkling_text": dict(layer_types=None, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16,
                         sliding_window_size=16, d_rel=4, rel_extent=64, mlp_layer_types=["dense"] + ["sparse"] * 3,
                         vocab_size=VOCAB),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "jetmoe": dict(kv_channels=16),
    "kimi_linear": dict(MLA, **HYBRID, **SPARSE, linear_head_dim=16, linear_num_heads=4, num_experts_per_token=2),
    "laguna": dict(layer_types=MIX, **SPARSE, num_attention_heads_per_layer=[4, 4, 4, 4]),
    "lfm2": dict(layer_types=["conv", FULL, "conv", FULL], full_attn_idxs=None),
    "lfm2_moe": dict(layer_types=["conv", FULL, "conv", FULL]),
    "llama4_text": dict(layer_types=["chunked_attention"] * 3 + [FULL], attention_chunk_size=16, floor_scale=8,
                        intermediate_size_mlp=96, interleave_moe_layer_step=2, moe_layers=None, no_rope_layers=None),
    "longcat_flash": dict(MLA, num_layers=2, ffn_hidden_size=96, zero_expert_num=2, expert_ffn_hidden_size=32),
    "mamba": dict(state_size=8),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=16, chunk_size=16, n_groups=2),
    "falcon_mamba": dict(state_size=8),
    "mellum": dict(layer_types=MIX, **SPARSE),
    "mimo_v2_flash": dict(layer_types=MIX, v_head_dim=12, **SPARSE),
    "minicpm3": dict(MLA, dim_model_base=32),
    "minimax": dict(layer_types=[FULL, LINEAR, FULL, LINEAR], block_size=16),
    "minimax_m3_vl_text": dict(dense_intermediate_size=96, rotary_dim=8, mlp_layer_types=SPARSE["mlp_layer_types"],
                               index_block_size=8, index_topk_blocks=2),
    "ministral": dict(layer_types=MIX),
    "ministral3": dict(rope_parameters=YARN | {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "modernbert-decoder": dict(layer_types=MIX, local_attention=32, cls_token_id=0, sep_token_id=0, mlp_dropout=0.0),
    "mpt": dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=512),
    "nemotron_h": dict(layers_block_type=[LINEAR, "moe", FULL, "mlp"], mamba_num_heads=8, mamba_head_dim=16,
                       ssm_state_size=16, n_groups=2, chunk_size=16, moe_shared_expert_intermediate_size=32,
                       mtp_layers_block_type=[]),
    "olmo3": dict(layer_types=MIX),
    "olmo_hybrid": HYBRID,
    "opt": dict(ffn_dim=96, word_embed_proj_dim=64),
    "phi4_multimodal": dict(),
    "qwen2": dict(use_sliding_window=True, layer_types=[FULL, SLIDE] * 2),
    "qwen2_moe": dict(layer_types=[FULL] * 4),
    "qwen3": dict(use_sliding_window=True, layer_types=[FULL, SLIDE] * 2),
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": dict(layer_types=[LINEAR, "qwen_sparse_attention"] * 2, hc_count=2, hc_lowrank=8,
                           ngram_vocab_size_base=64, ple_embed_dim=16, make_ngram_vocab_size_divisible_by=8,
                           split_ngram_parts=2, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
                           indexer_budget=8, indexer_compress_ratio=2, heads_per_ngram=2, output_gate_type="silu"),
    "recurrent_gemma": dict(lru_width=64, attention_window_size=16, block_types=["recurrent", "attention"]),
    "smollm3": dict(no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=16, layer_types=MIX),
    "vaultgemma": dict(layer_types=MIX, query_pre_attn_scalar=20),
    "xlstm": dict(embedding_dim=64, num_blocks=2, num_heads=4, chunk_size=1, mode="train", num_hidden_layers=2),
    "zamba": dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, n_mamba_heads=2,
                  attention_hidden_size=128, attention_head_dim=32, num_hidden_layers=5,
                  layers_block_type=[LINEAR, LINEAR, "hybrid", LINEAR, "hybrid"], layer_types=None),
    "zamba2": dict(layers_block_type=[LINEAR, "hybrid"] * 2, n_mamba_heads=8, mamba_headdim=16, mamba_ngroups=1,
                   chunk_size=16, attention_hidden_size=128, attention_head_dim=32, adapter_rank=8,
                   hybrid_layer_ids=[1, 3], kv_channels=16, num_query_groups=4),
    "youtu": MLA,
    "zaya": dict(num_experts_per_tok=1, sliding_window=16, layer_types=["hybrid", "hybrid_sliding"] * 2,
                 router_hidden_size=16),
}  # fmt: skip
# Encoders, decoders of encoder-decoder models and models of pictures or sound: in the mapping, but nobody's text LM.
OTHERS = """bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert cpmant ctrl
data2vec-text electra emu3 ernie fuyu gemma4_assistant gemma4_unified_assistant git got_ocr2 gpt-sw3 marian mbart
megatron-bert mllama moshi musicgen musicgen_melody mvp openai-gpt pegasus plbart prophetnet reformer rembert roberta
roberta-prelayernorm roc_bert roformer rwkv trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod biogpt
gpt_neox_japanese aria_text gemma3 gemma3n gemma4 gemma4_unified llama4 qwen3_5 qwen3_5_moe qwen4_exp""".split()  # noqa: SIM905

# The same architecture with the fields that decide a refusal, or a rope, set another way: name -> (type, fields).
VARIANTS = {
    "llama+bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama+linear-rope": ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})),
    "llama+dynamic-rope": ("llama", dict(max_position_embeddings=16, rope_parameters={"rope_type": "dynamic",
                           "factor": 4.0, "rope_theta": 1e4})),
    "llama+dynamic-rope-long": ("llama", dict(max_position_embeddings=512, rope_parameters={"rope_type": "dynamic",
                                "factor": 4.0, "rope_theta": 1e4})),
    "llama+yarn": ("llama", dict(rope_parameters=YARN)),
    "olmo3+yarn": ("olmo3", dict(layer_types=MIX, rope_parameters={SLIDE: {"rope_type": "default", "rope_theta": 1e4},
                   FULL: YARN})),
    "gemma3_text+linear-rope": ("gemma3_text", dict(layer_types=MIX, query_pre_attn_scalar=20, rope_parameters={
                                SLIDE: {"rope_type": "default", "rope_theta": 1e4},
                                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}})),
    "hunyuan_v1_dense+alpha": ("hunyuan_v1_dense", dict(rope_parameters={"rope_type": "dynamic", "alpha": 1000.0,
                               "factor": 1.0, "rope_theta": 1e4})),
    "deepseek_v2+dense,yarn": ("deepseek_v2", dict(MLA, first_k_dense_replace=4, num_experts_per_tok=None,
                               rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})),
    "qwen3+yarn": ("qwen3", dict(rope_parameters=YARN)),
    "gemma3_text+bidirectional": ("gemma3_text", dict(layer_types=MIX, query_pre_attn_scalar=20,
                                  use_bidirectional_attention=True)),
    "llama+llama3-rope": ("llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                          "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32})),
    "phi3+longrope": ("phi3", dict(original_max_position_embeddings=32, max_position_embeddings=512, rope_parameters={
                      "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                      "original_max_position_embeddings": 32})),
    "phi3+longrope-short": ("phi3", dict(original_max_position_embeddings=256, max_position_embeddings=512,
                            rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                            "long_factor": [2.0] * 8, "original_max_position_embeddings": 256})),
    "phi3+partial-rope": ("phi3", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                          "partial_rotary_factor": 0.5})),
    "gemma+tied": ("gemma", dict(tie_word_embeddings=True)),
    "gemma3_text+softcap": ("gemma3_text", dict(MORE["gemma3_text"], final_logit_softcapping=3.0)),
    "gemma2+no-softcap": ("gemma2", dict(MORE["gemma2"], final_logit_softcapping=None, attn_logit_softcapping=None)),
    "gemma2+no-attention-softcap": ("gemma2", dict(MORE["gemma2"], final_logit_softcapping=3.0,
                                    attn_logit_softcapping=None)),
    "vaultgemma+no-attention-softcap": ("vaultgemma", dict(MORE["vaultgemma"], final_logit_softcapping=3.0,
                                        attn_logit_softcapping=None)),
    "gemma3n_text+no-sharing": ("gemma3n_text", dict(MORE["gemma3n_text"], num_kv_shared_layers=0)),
    "gemma4_text+no-ple": ("gemma4_text", dict(MORE["gemma4_text"], hidden_size_per_layer_input=0)),
    "gemma4_text+kv-sharing": ("gemma4_text", dict(MORE["gemma4_text"], num_kv_shared_layers=2)),
    "gemma4_text+moe": ("gemma4_text", dict(MORE["gemma4_text"], enable_moe_block=True, num_experts=4,
                        top_k_experts=2, moe_intermediate_size=32)),
    "gemma4_text+softcap": ("gemma4_text", dict(MORE["gemma4_text"], final_logit_softcapping=3.0)),
    "granite+plain-head": ("granite", dict(MORE["granite"], logits_scaling=1.0)),
    "granitemoehybrid+dense,plain-head": ("granitemoehybrid", dict(layer_types=[FULL] * 4, num_local_experts=0,
                                          num_experts_per_tok=0, attention_multiplier=0.1,
                                          position_embedding_type="rope")),
    "granitemoehybrid+dense": ("granitemoehybrid", dict(layer_types=[FULL] * 4, num_local_experts=0,
                               num_experts_per_tok=0, attention_multiplier=0.1, logits_scaling=10.0,
                               position_embedding_type="rope")),
    "cohere2+real-scale": ("cohere2", dict(MORE["cohere2"], logit_scale=0.0625)),
    "cohere+plain-head": ("cohere", dict(logit_scale=1.0, use_qk_norm=True)),
    "cohere2+plain-head": ("cohere2", dict(MORE["cohere2"], logit_scale=1.0)),
    "minicpm3+plain-head": ("minicpm3", dict(MLA, dim_model_base=64)),
    "nanochat+low-softcap": ("nanochat", dict(final_logit_softcapping=3.0)),
    "seed_oss+default-dropout": ("seed_oss", dict(attention_dropout=0.1, residual_dropout=0.1)),
    "gpt2+default-dropout": ("gpt2", dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)),
    "gpt_bigcode+default-dropout": ("gpt_bigcode", dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)),
    "deepseek_v2+dense": ("deepseek_v2", dict(MLA, first_k_dense_replace=4, num_experts_per_tok=None)),
    "deepseek_v3+dense": ("deepseek_v3", dict(MLA, first_k_dense_replace=4)),
    "deepseek_v3+yarn": ("deepseek_v3", dict(MLA, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})),
    "qwen2_moe+sliding": ("qwen2_moe", dict(use_sliding_window=True, layer_types=[FULL, SLIDE] * 2)),
    "phimoe+sliding": ("phimoe", dict(sliding_window=16)),
    "qwen3_moe+sliding": ("qwen3_moe", dict(use_sliding_window=True, sliding_window=16)),
    "qwen3_moe+dense": ("qwen3_moe", dict(mlp_only_layers=[0, 1, 2, 3])),
    "stablelm+qk-norm,parallel": ("stablelm", dict(qk_layernorm=True, use_parallel_residual=True)),
    "falcon+alibi": ("falcon", dict(alibi=True, new_decoder_architecture=False, multi_query=True, ffn_hidden_size=96)),
    "gpt_neox+sequential": ("gpt_neox", dict(use_parallel_residual=False)),
    "lfm2+attention-only": ("lfm2", dict(layer_types=[FULL] * 4)),
    "olmo+clip": ("olmo", dict(clip_qkv=0.5)),
    "jais2+tied": ("jais2", dict(tie_word_embeddings=True)),
    "nemotron_h+attention-only": ("nemotron_h", dict(MORE["nemotron_h"], layers_block_type=[FULL, "mlp"] * 2)),
}  # fmt: skip

PATCHED = dict.fromkeys(
    """bamba falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 minimax nemotron_h olmo_hybrid
    qwen3_5_text qwen3_5_moe_text qwen3_next recurrent_gemma zamba2 zaya nemotron_h+attention-only""".split(),  # noqa: SIM905
    "hybrid.py:on_each_document",
) | dict.fromkeys(
    ["gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "vaultgemma"], "scores.py:scores"
)


def tiny_config(name: str):
    kind, fields = VARIANTS.get(name, (name, MORE.get(name, {})))
    cls = CONFIG_MAPPING[kind]
    defaults = cls()
    fields_of = set(defaults.to_dict()) | set(getattr(cls, "attribute_map", {}))
    known = {k for k in SMALL if k in fields_of}
    small = {k: SMALL[k] for k in known if not isinstance(getattr(cls, k, None), property)}
    if getattr(defaults, "sliding_window", None) is None and "sliding_window" not in fields:
        small.pop("sliding_window", None)
        if kind in ("mistral", "mixtral", "ministral", "ministral3", "starcoder2", "phi3"):
            small["sliding_window"] = 16
    for key in ("n_shared_experts", "num_shared_experts", "layer_types"):
        small.pop(key, None) if getattr(defaults, key, 0) is None and kind not in ("dots1",) else None
    if isinstance(getattr(defaults, "layer_types", None), list) and "layer_types" not in fields:
        small["layer_types"] = list(defaults.layer_types[: small.get("num_hidden_layers", 4)])
    if isinstance(getattr(defaults, "mlp_layer_types", None), list) and "mlp_layer_types" not in fields:
        small["mlp_layer_types"] = list(defaults.mlp_layer_types[: small.get("num_hidden_layers", 4)])
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(cls, getattr(cls, "attribute_map", {}).get(key, key), None), property):
            small.pop(key, None)
    return cls(**(small | fields))


def make_folder(name: str, folder: Path):
    config = tiny_config(name)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 2e7:
        raise ValueError(f"no tiny config here: {size:,} parameters")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # so that no bias, norm, sink or multiplier is at its trivial start value
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


def documents() -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(7)
    return [[torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in row] for row in ROWS]


def pack(rows: list[list[list[int]]]) -> PackedBatch:
    ids, labels, positions, starts = [], [], [], []
    for row in rows:
        for document in row:
            starts.append(len(ids))
            ids += document
            positions += range(len(document))
            labels += [*document[1:], -100]
        left = -len(ids) % SEQ_LEN
        starts += [len(ids)] if left else []
        ids += [0] * left
        positions += range(left)
        labels += [-100] * left
    tensors = [torch.tensor(x) for x in (ids, labels, positions)]
    bounds = torch.tensor([*starts, len(ids)], dtype=torch.int32)
    counts = dict.fromkeys(("tokens", "pairs", "checksum", "dropped"), 0)
    counts["trained_tokens"] = sum(label >= 0 for label in labels)
    return PackedBatch(*tensors, bounds, SEQ_LEN, 0.0, counts)


def reference(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and gradients of plain transformers, each document alone."""
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    except ValueError:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    total = 0.0
    for document in chain(*documents()):
        ids = torch.tensor([document])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        loss = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def build(folder: Path, *options: str, device: torch.device = CPU):
    argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", str(folder)]
    argv += ["--train.seq_len", str(SEQ_LEN), *options]
    with blame(f"model.name {folder}, model.overrides {{}}"):  # as a run does
        ranks = Ranks(0, 1, device, None)
        return build_model(load_config(None, argv), ranks, AutoTokenizer.from_pretrained(TINY))


def train_once(folder: Path, *options: str, device: torch.device = CPU, experts: str | None = None):
    """lacuna's loss sum and gradients (a dict, on the CPU) of the packed documents; `experts`: how they compute."""
    trainee = build(folder, *options, device=device)
    trainee.model.config._experts_implementation = experts or trainee.model.config._experts_implementation
    loss, _ = trainee(pack(documents()).to(device))
    loss.backward()
    return loss.item(), {n: None if p.grad is None else p.grad.cpu() for n, p in trainee.model.named_parameters()}


def compare(wanted, trained) -> dict:
    """Relative errors of the loss and of the worst gradient."""
    want_loss, want = wanted
    loss, got = trained
    assert set(got) == set(want)
    scale = max(grad.norm() for grad in want.values() if grad is not None)
    worst = 0.0
    for name, grad in want.items():
        if grad is None and got[name] is None:  # takes no part, as keys and values of a layer that shares others'
            continue
        exact = torch.zeros_like(got[name]) if grad is None else grad
        mine = torch.zeros_like(exact) if got[name] is None else got[name]
        worst = max(worst, ((exact - mine).norm() / max(exact.norm(), 1e-4 * scale)).item())
    return {"loss": abs(loss - want_loss) / abs(want_loss), "grad": worst}


def cosine(want: dict, got: dict) -> float:
    """Between all gradients as one vector and all others."""
    pairs = [(want[name].flatten(), got[name].flatten()) for name in want if None not in (want[name], got[name])]
    ours, theirs = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    return (ours @ theirs / (ours.norm() * theirs.norm())).item()


def scratch(folder: Path, patch: list[str]) -> str:
    """Which parameters have another mean or deviation than plain transformers'."""
    model = build(folder, "--model.from_scratch", "true", *patch).model
    plain = AutoModelForCausalLM.from_config(model.config.__class__.from_pretrained(folder), dtype=torch.float32)
    wanted = dict(plain.named_parameters())
    odd = []
    for name, got in model.named_parameters():
        want = wanted[name]
        deviation = want.std(correction=0)
        exactness = 0.1 + 3 / want.numel() ** 0.5
        if want.numel() < 16:  # too few to tell
            continue
        if not abs(got.std(correction=0) - deviation) <= exactness * deviation + 1e-6:
            odd.append(f"{name} has deviation {got.std():.3g}, not {deviation:.3g}")
        elif not abs(got.mean() - want.mean()) <= 0.02 + 4 * deviation / want.numel() ** 0.5:
            odd.append(f"{name} has mean {got.mean():.3g}, not {want.mean():.3g}")
    return "; ".join(odd[:2]) or "ok"


def bf16(folder: Path, wanted, patch: list[str]) -> float:
    loss, _ = train_once(folder, "--model.dtype", "bfloat16", *patch)
    return abs(loss - wanted[0]) / abs(wanted[0])


def whole_run(folder: Path, work: Path, patch: list[str]) -> str:
    """Two steps of lacuna pt from the folder, export, and from_pretrained of what was exported."""
    texts = work / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "Call me Ishmael. " * n}) + "\n" for n in (2, 9, 4, 1, 7, 3) * 8))
    argv = ["--data.sources", json.dumps([{"path": str(texts)}]), "--train.steps", "2", "--model.name", str(folder)]
    argv += ["--data.cache", str(work / "cache"), "--out", str(work / "runs"), "--train.seq_len", str(SEQ_LEN)]
    argv += ["--train.micro_batch_size", "1", "--train.global_batch_size", "2", *patch]
    out = train.run(load_config(None, argv))
    logging.getLogger("lacuna").handlers.clear()
    _, info = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32, output_loading_info=True)
    bad = {key: sorted(names)[:2] for key, names in info.items() if names and key != "error_msgs"}
    return f"the export has {bad}" if bad else "ok"


def attempt(function, *arguments, **options):
    """What a function returns, or the error that it raises."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return error


def row(name: str, runs: bool) -> dict:
    """One architecture's results, by column; `runs`: a whole run, too."""
    patch = ["--model.patch", f"{EXAMPLES}/{PATCHED[name]}"] if name in PATCHED else []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        made = attempt(make_folder, name, folder)
        wanted = made or attempt(reference, folder)
        if isinstance(wanted, Exception):
            return {"class": "not made", "why": first_line(wanted)}
        trained = attempt(train_once, folder, *patch)
        if isinstance(trained, Exception):
            return failure(trained, folder)
        result = compare(wanted, trained)
        exact = result["loss"] < TOLERANCE and result["grad"] < TOLERANCE
        result["class"] = "equal" if exact else "WRONG"
        result["patch"] = PATCHED.get(name, "")
        result["scratch"] = attempt(scratch, folder, patch)
        result["bf16"] = attempt(bf16, folder, wanted, patch)
        if runs:
            result["run"] = attempt(whole_run, folder, Path(work), patch)
        gc.collect()
        return result


def compiled_row(name: str) -> dict:
    """One architecture's results, compiled, by column."""
    patch = ["--model.patch", f"{EXAMPLES}/{PATCHED[name]}"] if name in PATCHED else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = ["--train.compile", "true", *patch]
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        make_folder(name, folder)
        wanted = reference(folder)
        # batched_mm: transformers' own stand-in for grouped products, which exist in bfloat16, cannot be compiled
        exact = [*options, "--model.dtype", "float32", "--model.attention", "sdpa"]
        trained = attempt(train_once, folder, *exact, device=device, experts="batched_mm")
        if isinstance(trained, Exception):
            return failure(trained, folder)
        result = compare(wanted, trained)
        equal = result["loss"] < TOLERANCE and result["grad"] < TOLERANCE
        result["class"] = "equal" if equal else "WRONG"
        torch._dynamo.reset()
        rounded = attempt(train_once, folder, "--model.dtype", "bfloat16", *options, device=device)
        if isinstance(rounded, Exception):
            return result | {"bf16": rounded}
        return result | {"bf16": compare(wanted, rounded)["loss"], "cosine": f"{cosine(wanted[1], rounded[1]):.4f}"}


def failure(error: Exception, folder: Path) -> dict:
    what = "refused" if isinstance(error, ConfigError) else "CRASH"
    return {"class": what, "why": first_line(error).replace(str(folder), "FOLDER")}


def first_line(error: Exception) -> str:
    return f"{'' if isinstance(error, ConfigError) else type(error).__name__ + ': '}{error}".splitlines()[0][:200]


def show(cell) -> str:
    if isinstance(cell, Exception):
        return first_line(cell)
    return f"{cell:.0e}" if isinstance(cell, float) else str(cell)


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL + 1)
    everything = [*(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in OTHERS), *VARIANTS]
    names = [word for word in sys.argv[1:] if word != "--compiled"] or everything
    compiled = "--compiled" in sys.argv
    headings = {"class": "", "loss": "loss", "grad": "gradients"}
    if compiled:
        headings |= {"bf16": "bf16", "cosine": "cosine", "why": "why"}
    else:
        headings |= {"scratch": "from scratch", "bf16": "bf16", "run": "run", "why": "why", "patch": "model.patch"}
    print("| type |", " | ".join(headings.values()), "|")
    print("|---" * (len(headings) + 1) + "|")
    for name in names:
        result = compiled_row(name) if compiled else row(name, runs=True)
        cells = [show(result.get(key, "")) for key in headings]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
