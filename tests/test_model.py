"""The builder: packed equals alone (invariant 1), whatever is applied; weights, ties and buffers are right."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, EXAMPLES, model_config, pack, random_documents, vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lacuna import loss as loss_module
from lacuna.config import ConfigError, load_config
from lacuna.data.batch import PackedBatch
from lacuna.model import build_model
from lacuna.parallel import Ranks
from lacuna.train import run

SEQ_LEN = 64
LENGTHS = [[3, 40, 11], [64], [1, 30, 2, 25]]  # three rows; Mistral's window of 24 is shorter than some documents
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor on a CPU needs a C++ compiler")


VOCABULARY = vocabulary(4096)


def build(folder, *options: str, device="cpu", tokenizer=VOCABULARY):
    """The trainee; of a tokenizer that is the model's own, only the size counts."""
    argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", str(folder), *options]
    return build_model(load_config(None, argv), Ranks(0, 1, torch.device(device), None), tokenizer)


def batch_and_documents() -> tuple[PackedBatch, list[list[int]]]:
    rows = [random_documents(lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
    return pack(rows, SEQ_LEN), [document for row in rows for document in row]


def alone(folder, documents, device="cpu") -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of losses and its gradients from plain transformers, one document at a time, eager attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
    total = 0.0
    for document in documents:
        ids = torch.tensor([document], device=device)
        logits = model(input_ids=ids).logits[0]
        loss = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def assert_packed_equals_alone(folder, *options, device="cpu", tolerance=1e-5):
    trainee = build(folder, *options, device=device)
    batch, documents = batch_and_documents()
    batch = batch.to(torch.device(device))
    loss, _ = trainee(batch)
    loss.backward()
    want_loss, want = alone(folder, documents, device)
    assert loss.item() == pytest.approx(want_loss, rel=tolerance)
    got = dict(trainee.model.named_parameters())
    assert set(got) == set(want)
    for name, parameter in got.items():
        error = (parameter.grad - want[name]).norm() / want[name].norm()
        assert error < tolerance * 10, f"{name}: relative error {error}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_loss_and_gradients_equal_plain_transformers_on_each_document_alone(name, model_folder):
    assert_packed_equals_alone(model_folder(name))


@pytest.mark.parametrize("how", ["full", "selective"])
def test_activation_checkpointing_changes_no_gradient_and_recomputes(how, model_folder):
    folder = model_folder("qwen3")
    assert_packed_equals_alone(folder, "--train.activation_checkpointing", how)
    trainee = build(folder, "--train.activation_checkpointing", how)
    calls = []
    for layer in trainee.model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *a: calls.append(1))
    trainee(batch_and_documents()[0])[0].backward()
    assert len(calls) == 4  # two layers, forward and recomputed


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # Qwen2's linear layers have a bias: another operator
def test_selective_checkpointing_computes_no_matrix_product_twice(name, model_folder):
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for how in ("none", "full", "selective"):
        trainee = build(model_folder(name), "--train.activation_checkpointing", how)
        with FlopCounterMode(display=False) as counter:
            trainee(batch_and_documents()[0])[0].backward()
        flops[how] = counter.get_total_flops()
    assert flops["selective"] == flops["none"] < flops["full"]


def compile_by(backend: str, monkeypatch):
    """aot_eager makes the same graphs, forward and backward, as Inductor, and does not wait for a C++ compiler."""
    compiler = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(loss_module, "compiled_chunk", compiler(loss_module.chunk_loss, dynamic=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "backend"),
    [
        pytest.param([], "inductor", marks=needs_compiler),
        (["--train.activation_checkpointing", "full"], "aot_eager"),
    ],
)
def test_compiled_layers_share_one_graph_and_later_batches_recompile_nothing(
    options, backend, model_folder, monkeypatch
):
    import torch._dynamo.testing
    from torch._dynamo.utils import counters

    compile_by(backend, monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    folder = model_folder("qwen3")
    assert_packed_equals_alone(folder, "--train.compile", "true", *options)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2  # the layers, and the loss of a chunk of logits
    trainee = build(folder, "--train.compile", "true", *options)
    for seed in range(3):  # other documents, other boundaries
        rows = [random_documents(lengths, seed=seed) for lengths in ([7, 7, 50 - seed], [20, 20], [64])]
        trainee(pack(rows, SEQ_LEN))[0].backward()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_bfloat16_on_one_rank_computes_in_bfloat16_and_keeps_float32_parameters(model_folder):
    folder = model_folder("qwen2")
    trainee = build(folder, "--model.dtype", "bfloat16")
    batch, documents = batch_and_documents()
    assert trainee.hidden(batch).dtype == torch.bfloat16
    loss, _ = trainee(batch)
    loss.backward()
    want_loss, want = alone(folder, documents)
    assert loss.item() == pytest.approx(want_loss, rel=3e-3)
    for name, parameter in trainee.model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert (parameter.grad - want[name]).norm() / want[name].norm() < 0.05, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_ties_and_rotary_buffers_are_those_of_from_pretrained(name, model_folder):
    folder = model_folder(name)
    ours, plain = build(folder).model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (key, a), (other, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert key == other and torch.equal(a, b)
    for (key, a), (other, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        assert key == other and torch.equal(a, b), key
    tied = ARCHITECTURES[name]["tie_word_embeddings"]
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_scratch_has_the_distribution_of_transformers_and_depends_on_the_seed_only(name, tmp_path):
    model_config(name).save_pretrained(tmp_path)
    a, b, c = (build(tmp_path, "--model.from_scratch", "true", "--seed", seed).model for seed in ("0", "0", "1"))
    plain = AutoModelForCausalLM.from_config(model_config(name)).state_dict()
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key])
        assert value.ndim == 1 or not torch.equal(value, c.state_dict()[key])
        assert value.std(correction=0).item() == pytest.approx(
            plain[key].std(correction=0).item(), rel=0.1, abs=1e-6
        ), key
        assert value.mean().item() == pytest.approx(plain[key].mean().item(), abs=0.01), key


def test_overrides_change_the_config_and_unknown_ones_are_refused_by_name(tmp_path):
    model_config("llama").save_pretrained(tmp_path)
    options = ["--model.from_scratch", "true", "--model.overrides"]
    assert len(build(tmp_path, *options, '{"num_hidden_layers": 3}').model.model.layers) == 3
    with pytest.raises(ConfigError, match="num_hiden_layers"):
        build(tmp_path, *options, '{"num_hiden_layers": 3}')


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    model_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"vocab_size 4096 is without \['token4096', .*: see model\.tokenizer"):
        build(tmp_path, "--model.from_scratch", "true", tokenizer=vocabulary(5000))
    hole = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 5000})
    with pytest.raises(ConfigError, match=r"without \['b'\]"):
        build(tmp_path, "--model.from_scratch", "true", tokenizer=hole)


def test_a_tokenizer_may_have_gemmas_token_for_images_which_its_text_models_do_not(tmp_path):
    model_config("llama").save_pretrained(tmp_path)
    ids = VOCABULARY.get_vocab() | {"<image_soft_token>": 4096}
    build(tmp_path, "--model.from_scratch", "true", tokenizer=SimpleNamespace(get_vocab=lambda: ids))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_attention_that_a_config_names_is_never_fetched(key, model_folder, monkeypatch):
    """transformers takes `owner/name` for a kernel of the Hub, and would fetch and run it while the model is built."""
    folder = model_folder("llama")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {key: "stranger/kernel"}))
    asked = []
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def spy(self, implementation, *arguments, **options):
        asked.append(implementation)
        return check(self, implementation, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", spy)
    assert build(folder).model.config._attn_implementation == "lacuna"
    assert "stranger/kernel" not in asked and "lacuna" in asked


def test_a_model_whose_attention_cannot_be_replaced_is_a_sentence(tokenizer, tmp_path):
    config = AutoConfig.for_model("falcon", num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    config.save_pretrained(tmp_path / "falcon")
    tokenizer.save_pretrained(tmp_path / "falcon")
    (tmp_path / "text.jsonl").write_text('{"text": "whale"}\n')
    argv = ["--model.name", str(tmp_path / "falcon"), "--model.from_scratch", "true", "--train.steps", "1"]
    argv += ["--data.sources", json.dumps([{"path": str(tmp_path / "text.jsonl")}])]
    argv += ["--data.cache", str(tmp_path / "cache"), "--out", str(tmp_path / "runs")]
    with pytest.raises(
        ConfigError, match=r"model\.name .*falcon: config.json, model\.overrides {}: KeyError: 'lacuna'"
    ):
        run(load_config(None, argv))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "attention", "options"),
    [
        ("qwen3", "varlen", []),
        ("qwen3", "fa4", ["--train.activation_checkpointing", "selective"]),
        ("qwen3", "sdpa", ["--train.compile", "false", "--model.patch", str(EXAMPLES / "liger.py:liger")]),
        ("mistral", "varlen", ["--train.compile", "false"]),
        ("mistral", "fa4", []),
        ("llama", "varlen", ["--train.activation_checkpointing", "full"]),
    ],
)
def test_on_a_gpu_packed_equals_alone_within_bfloat16(name, attention, options, model_folder):
    from lacuna.attention import choose_backend

    try:
        choose_backend(attention, torch.device("cuda"), torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    assert_packed_equals_alone(
        model_folder(name), "--model.attention", attention, *options, device="cuda", tolerance=4e-3
    )
