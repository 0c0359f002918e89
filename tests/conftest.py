"""Shared by all tests: small models made on the spot, and the data that ships with the repository."""

import importlib
import os
import signal

os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read at import: no request to the Hub for local files
# Read at import, too, and by the server that processes.py forks from, which any test may start: with models this small,
# threads mostly wait for one another: four files of the suite took twice the time with two of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

REPO = Path(__file__).parents[1]
EXAMPLES = REPO / "examples"
ASSETS = Path(os.environ["LACUNA_ASSETS"]) if "LACUNA_ASSETS" in os.environ else None
# As in a terminal, though nohup or a script's background has started the tests: what is ignored stays ignored in a run.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def transformers_own_modules():
    """Liger replaces functions and classes of transformers' modules for the whole process: put them back."""
    names = ("llama", "qwen2", "qwen3", "mistral") if torch.cuda.is_available() else ()
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in names]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, own in zip(modules, before, strict=True):
        vars(module).update(own)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLES / "tiny")


# Each with its own trap: tied and untied heads, biases, head_dim apart from hidden / heads, sliding windows, and logits
# that are divided or soft-capped.
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
    "mistral": {"sliding_window": 24, "tie_word_embeddings": False, "head_dim": 32},
    "granite": {"tie_word_embeddings": True, "logits_scaling": 0.25, "embedding_multiplier": 3.0},
    "gemma2": {"tie_word_embeddings": True, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None},
}
# A mixture of experts: it cannot be initialised.
MIXTURES = {"qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}}


def model_config(name: str, **changes):
    fields = SMALL | {"model_type": name} | (ARCHITECTURES | MIXTURES)[name] | changes
    return AutoConfig.for_model(**fields)


def vocabulary(size: int) -> SimpleNamespace:
    """In place of a tokenizer, of which a model asks only for its ids: 0 to size - 1."""
    ids = {f"token{i}": i for i in range(size)}
    return SimpleNamespace(get_vocab=lambda: ids)


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


def pack(rows: list[list[list[int]]], seq_len: int, trained=lambda document, position: True):
    """A PackedBatch of these rows of documents (token ids), made without lacuna's loader; T = len(rows) * seq_len."""
    from lacuna.data.batch import PackedBatch

    ids, labels, positions, starts = [], [], [], []
    for row in rows:
        row = [*row, [0] * (seq_len - sum(map(len, row)))]  # what is left over
        for n, document in enumerate(row):
            if document:
                starts.append(len(ids))
            ids += document
            positions += range(len(document))
            last = n == len(row) - 1
            targets = [-100 if last or not trained(n, i) else token for i, token in enumerate(document)][1:]
            labels += [*targets, -100][: len(document)]
    total = seq_len * len(rows)
    return PackedBatch(
        *(torch.tensor(x) for x in (ids, labels, positions)),
        cu_seqlens=torch.tensor([*starts, total], dtype=torch.int32),
        max_seqlen=seq_len,
        epoch=0.0,
        counts=dict.fromkeys(("tokens", "pairs", "checksum"), 0)
        | dict.fromkeys(("trained_tokens", "units"), sum(label >= 0 for label in labels)),
    )


def random_documents(lengths: list[int], vocabulary: int = 4096, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
