"""examples/memory.py: what it reckons is what was measured on GPUs (benchmarks/RESULTS.md), and it needs none."""

import json
import runpy
from argparse import Namespace

import pytest
from conftest import EXAMPLES, REPO

from lacuna.config import ConfigError, load_config

memory = runpy.run_path(str(EXAMPLES / "memory.py"))
GIB = 2**30
H200 = 139.8 * GIB
QWEN = "benchmarks/qwen3_1.7b"
LLAMA = "llama3_8b"
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


@pytest.fixture
def estimate(tmp_path, monkeypatch):
    """The Estimate of a shape, by name, for so many GPUs."""
    monkeypatch.chdir(REPO)

    def make(shape: str, gpus: int, seq_len: int, rows: int, *words: str, task="pt"):
        if shape == LLAMA:
            shape = tmp_path / LLAMA
            shape.mkdir(exist_ok=True)
            (shape / "config.json").write_text(json.dumps(LLAMA_CONFIG))
        argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", str(shape)]
        argv += ["--model.tokenizer", "examples/tiny", "--train.seq_len", str(seq_len)]
        argv += ["--train.micro_batch_size", str(rows), "--train.global_batch_size", str(gpus * rows)]
        return memory["Estimate"](load_config(None, [*argv, *words], task), gpus, H200)

    return make


SELECTIVE = ("--train.activation_checkpointing", "selective")
FULL = ("--train.activation_checkpointing", "full")
LORA = ("--lora.rank", "32")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "gpus", "rows", "seq_len", "words", "measured"),
    [
        (QWEN, 4, 4, 4096, (), 42.1),
        (LLAMA, 2, 2, 8192, SELECTIVE, 98.9),
        (QWEN, 1, 4, 4096, FULL, 27.5),
        (LLAMA, 1, 1, 4096, LORA + FULL, 19.1),
    ],
)
def test_the_peak_is_within_a_fiftieth_of_what_was_measured(estimate, shape, gpus, rows, seq_len, words, measured):
    found = estimate(shape, gpus, seq_len, rows, *words)
    assert sum(found.at_peak(rows).values()) / GIB == pytest.approx(measured, rel=0.02)


def test_the_command_prints_kinds_and_the_largest_micro_batch(monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    memory["main"](Namespace(task="pt", gpus=1, gib=80), ["benchmarks/qwen3_1.7b.toml"])
    *kinds, largest = capsys.readouterr().out.splitlines()
    sizes = {line.split()[0]: float(line.split()[1]) for line in kinds}
    assert list(sizes) == ["parameters", "optimizer", "activations", "head", "peak"]
    peak = sizes.pop("peak")
    assert peak == pytest.approx(sum(sizes.values()), abs=0.2)
    assert peak == pytest.approx(56.4, rel=0.02)
    # measured with 8 rows: 87.4
    assert largest == "largest train.micro_batch_size that fits 80 GiB, less a twentieth: 6"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--train.compile", "false"], "only compiled runs in bfloat16 on a GPU are estimated"),
        (["--model.dtype", "float32"], "only compiled runs in bfloat16 on a GPU are estimated"),
        (
            ["--model.name", "benchmarks/qwen3_5", "--model.patch", "examples/hybrid.py:on_each_document"],
            "cannot be estimated: model.name benchmarks/qwen3_5, model.patch examples/hybrid.py",
        ),
    ],
)
def test_what_is_not_estimated_is_a_sentence(words, sentence, monkeypatch):
    monkeypatch.chdir(REPO)
    options = Namespace(task="pt", gpus=1, gib=80)
    with pytest.raises(ConfigError, match=sentence):
        memory["main"](options, ["configs/pt.toml", "--model.tokenizer", "examples/tiny", *words])


def test_a_reference_is_there_beside_the_model_where_the_loss_has_one(estimate):
    recipe = {"task": str(EXAMPLES / "dpo.py")}
    found = estimate(QWEN, 1, 4096, 4, "--optim.lr", "1e-6", **recipe)
    assert sum(found.at_peak(4).values()) / GIB == pytest.approx(59.6, rel=0.02)
    without = estimate(QWEN, 1, 4096, 4, "--optim.lr", "1e-6", "--recipe", '{"loss": "simpo"}', **recipe)
    assert found.always["frozen"] - without.always["frozen"] == 2 * found.always["parameters"] / 4


def test_more_rows_take_more_and_checkpointing_less(estimate):
    each = [estimate("examples/tiny", 1, 256, 4, *words) for words in (FULL, SELECTIVE, ())]
    assert each[0].kept_a_row < each[1].kept_a_row < each[2].kept_a_row
    for found in each:
        peaks = [sum(found.at_peak(rows).values()) for rows in range(4, 400, 7)]
        assert peaks == sorted(set(peaks))
    # gradients of the micro-batch before are there while the next one runs
    assert each[2].at_peak(3)["gradients"] == each[2].gradients
    assert each[2].at_peak(100)["gradients"] == 0
