"""Shared by all tests: small models made on the spot, and the data that ships with the repository."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
REPO = Path(__file__).parents[1]
EXAMPLES = REPO / "examples"
ASSETS = Path(os.environ["LACUNA_ASSETS"]) if "LACUNA_ASSETS" in os.environ else None


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLES / "tiny")


# Each with its own trap: tied and untied heads, biases, head_dim apart from hidden / heads, sliding windows.
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": False},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
    "mistral": {"sliding_window": 24, "tie_word_embeddings": False, "head_dim": 16},
}


def model_config(name: str):
    fields = SMALL | {"model_type": name} | ARCHITECTURES[name]
    return AutoConfig.for_model(**fields)


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    """A function that makes the Hugging Face folder of a small random model; returns its path."""

    def make(name: str) -> Path:
        from transformers import AutoModelForCausalLM

        folder = tmp_path / name
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(model_config(name), dtype=torch.float32)
        with torch.no_grad():  # so that no bias or norm is at its trivial start value
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make
