"""Adapters: exact beside a float64 reference, read by peft, the same on any number of ranks; the base never moves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, pack, random_documents
from processes import finish
from safetensors.torch import load_file, save_file
from test_model import SEQ_LEN, batch_and_documents, build, compile_by
from test_train import lines, options, texts, train_lines
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lacuna import lora
from lacuna import train as train_module
from lacuna.checkpoint import export
from lacuna.config import ConfigError, LoraConfig, load_config
from lacuna.lora import merge
from lacuna.model import SAVED_OPS, build_model
from lacuna.optim import trained
from lacuna.train import run

assert texts  # a fixture
LORA = ("--lora.rank", "4", "--lora.alpha", "6")
RATE = ("--optim.lr", "1e-2")


def move_away(model):
    """B begins with zeros: a gradient of A would be zero, too."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trained(model).items()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)


def reference(folder: Path, adapters: dict[str, torch.Tensor], scale: float, documents) -> tuple[float, dict]:
    """Loss and the adapters' gradients in float64, of plain transformers with W + scale B A, each document alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    leaves = {name: tensor.double().requires_grad_() for name, tensor in adapters.items()}
    weights = dict(model.named_parameters())
    for name in adapters:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            product = leaves[f"{layer}.lora_B.weight"] @ leaves[name]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + scale * product
    total = 0.0
    for document in documents:
        ids = torch.tensor([document])
        logits = torch.func.functional_call(model, weights, (ids,)).logits[0]
        total += F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    total.backward()
    return total.item(), {name: leaf.grad for name, leaf in leaves.items()}


CASES = [(name, ()) for name in ARCHITECTURES]
CASES += [("qwen3", ("--train.activation_checkpointing", how)) for how in ("full", "selective")]
CASES += [("qwen2", ("--train.compile", "true"))]


@pytest.mark.parametrize("name, more", CASES)
def test_gradients_of_adapters_equal_a_float64_reference_and_nothing_else_has_any(
    name, more, model_folder, monkeypatch
):
    compile_by("aot_eager", monkeypatch)
    folder = model_folder(name)
    trainee = build(folder, *LORA, *more)
    move_away(trainee.model)
    batch, documents = batch_and_documents()
    loss, _ = trainee(batch)
    loss.backward()
    adapters = {name: p.detach() for name, p in trained(trainee.model).items()}
    want_loss, want = reference(folder, adapters, 6 / 4, documents)
    assert loss.item() == pytest.approx(want_loss, rel=1e-6)
    with_grad = {name for name, p in trainee.model.named_parameters() if p.grad is not None}
    assert with_grad == set(want) and len(want) == 2 * 2 * 7  # two layers of seven linear ones, A and B
    for name, parameter in trained(trainee.model).items():
        error = (parameter.grad - want[name]).norm() / want[name].norm()
        assert error < 1e-5, f"{name}: relative error {error}"


def two_products(x, weight, a, b):
    return x @ weight.T + x @ a.T @ b.T


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_in_bfloat16_a_gradient_through_the_sum_of_weights_is_as_exact_as_through_two_products(
    size, model_folder, monkeypatch
):
    """W + B A is rounded once more, where a small adapter may vanish: in the way down alone, never in the output."""
    folder = model_folder("qwen3")
    errors = []
    for product in (lora.Adapted.apply, two_products):
        monkeypatch.setattr(lora.Adapted, "apply", product)
        trainee = build(folder, *LORA, "--model.dtype", "bfloat16")
        move_away(trainee.model)
        with torch.no_grad():
            for name, parameter in trained(trainee.model).items():
                parameter.mul_(size if "lora_B" in name else 1.0)
        batch, documents = batch_and_documents()
        loss, _ = trainee(batch)
        loss.backward()
        adapters = {name: p.detach() for name, p in trained(trainee.model).items()}
        _, want = reference(folder, adapters, 6 / 4, documents)
        found = torch.cat([p.grad.flatten() for p in trained(trainee.model).values()])
        exact = torch.cat([grad.flatten() for grad in want.values()])
        errors.append((found - exact).norm() / exact.norm())
    assert errors[0] < 0.03 and errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_the_first_loss_is_the_base_models_bit_for_bit(how, model_folder):
    folder = model_folder("smollm2")
    more = ("--train.activation_checkpointing", how)
    batch, _ = batch_and_documents()
    assert build(folder, *LORA, *more)(batch)[0].item() == build(folder, *more)(batch)[0].item()


def test_what_is_frozen_takes_two_bytes_a_parameter_and_adapters_are_float32(model_folder):
    model = build(model_folder("llama"), *LORA, "--model.dtype", "bfloat16").model
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}


class Products(TorchDispatchMode):
    """Counts the values of what selective checkpointing keeps: results of matrix products (SAVED_OPS)."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in SAVED_OPS[:1]:
            self.values += out.numel()
        return out


def test_selective_checkpointing_keeps_no_more_between_the_passes_than_without_adapters(model_folder):
    """What B gives is as large as what W gives: kept as well, a layer would hold twice as much."""
    folder = model_folder("llama")
    batch, _ = batch_and_documents()

    def kept(*more: str) -> int:
        trainee = build(folder, *more, "--train.activation_checkpointing", "selective")
        products = Products()
        with products:
            trainee(batch)
        return products.values

    thin = 2 * 7 * len(batch.input_ids) * 4  # what the A of two layers give
    assert kept(*LORA) == kept() + thin


def test_targets_may_be_named(model_folder):
    model = build(model_folder("qwen3"), *LORA, "--lora.targets", '["q_proj", "down_proj"]').model
    assert {name.split(".")[-3] for name in trained(model)} == {"q_proj", "down_proj"}
    assert model.model.layers[0].self_attn.q_proj.scale == 6 / 4


def test_adapters_begin_as_pefts_and_the_same_on_every_build(model_folder):
    folder = model_folder("llama")
    a = trained(build(folder, *LORA).model)
    b = trained(build(folder, *LORA).model)
    other = trained(build(folder, *LORA, "--seed", "1").model)
    for name in a:
        assert torch.equal(a[name], b[name])
        if "lora_B" in name:
            assert not a[name].any()
        else:
            limit = a[name].shape[1] ** -0.5  # kaiming_uniform with a = sqrt 5
            assert a[name].abs().max() <= limit and a[name].std().item() == pytest.approx(limit / 3**0.5, rel=0.2)
            assert not torch.equal(a[name], other[name])


def test_merging_rounds_once():
    torch.manual_seed(0)
    weight = torch.randn(32, 48).bfloat16()
    adapters = {"x.lora_A.weight": torch.randn(4, 48) * 0.5, "x.lora_B.weight": torch.randn(32, 4) * 0.5}
    weights = {"x.weight": weight.clone()}
    merge(weights, adapters, LoraConfig(rank=4, alpha=6.0))
    exact = weight.double() + 6 / 4 * adapters["x.lora_B.weight"].double() @ adapters["x.lora_A.weight"].double()
    assert (weights["x.weight"] == exact.float().bfloat16()).float().mean() > 0.995  # but for ties of float32
    assert weights["x.weight"].dtype == torch.bfloat16


# ---- whole runs


@pytest.fixture
def lora_run(model_folder, texts, tmp_path, monkeypatch):
    """A run of six steps: its folder, the trainee as it was at the end, the base's folder, its words."""
    kept = []
    monkeypatch.setattr(train_module, "build_model", lambda *a, real=build_model: kept.append(real(*a)) or kept[-1])
    base = model_folder("qwen2")
    words = options(base, texts, tmp_path, *LORA, *RATE, "--checkpoint.every", "3", "--checkpoint.keep", "9")
    path = run(load_config(None, [*words, "--train.steps", "6"]))
    return path, kept[0], base, words


def test_peft_and_plain_transformers_read_what_a_run_leaves_and_give_lacunas_logits(lora_run):
    from peft import PeftModel

    path, trainee, base, _ = lora_run
    document = random_documents([50])[0]
    ids = torch.tensor([document])
    with torch.no_grad():
        weight = trainee.model.get_output_embeddings().weight
        want = trainee.hidden(pack([[document]], SEQ_LEN))[:50] @ weight.T
        merged = AutoModelForCausalLM.from_pretrained(path / "hf", attn_implementation="eager")(ids).logits[0]
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        before = plain(ids).logits[0]
        peft = PeftModel.from_pretrained(plain, path / "hf" / "adapter")
        adapted = peft(ids).logits[0]
    assert torch.allclose(merged, want, atol=1e-5)
    assert torch.allclose(adapted, want, atol=1e-5)
    assert not torch.allclose(before, want, atol=1e-2)
    stored = load_file(path / "hf" / "adapter" / "adapter_model.safetensors")
    used = {name.replace(".default", ""): p for name, p in peft.named_parameters() if "lora_" in name}
    assert used.keys() == stored.keys()
    assert all(torch.equal(used[name], stored[name]) for name in stored)
    about = json.loads((path / "hf" / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(base)


def test_the_base_does_not_move_and_checkpoints_hold_the_adapters_alone(lora_run):
    path, trainee, base, _ = lora_run
    stored = load_file(base / "model.safetensors")
    state = trainee.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    names = {
        name.removeprefix("optimizer.exp_avg.")
        for name in load_file(path / "checkpoints/step_6/rank_00000.safetensors")
    }
    assert {name for name in names if not name.startswith("optimizer.")} == set(trained(trainee.model))


def test_a_run_that_goes_on_is_bit_identical(lora_run, tmp_path):
    path, _, _, words = lora_run
    shutil.copytree(path / "checkpoints/step_3", tmp_path / "runs/again/checkpoints/step_3")
    again = run(load_config(None, [*words, "--train.steps", "6", "--name", "again"]))
    wanted = [(m["loss"], m["grad_norm"], m["batch_checksum"]) for m in train_lines(path)][3:]
    assert [(m["loss"], m["grad_norm"], m["batch_checksum"]) for m in train_lines(again)] == wanted
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (again / "hf" / file).read_bytes() == (path / "hf" / file).read_bytes()


def test_another_base_is_refused_and_so_is_an_adapters_checkpoint_as_a_model(lora_run, texts, tmp_path):
    path, _, base, words = lora_run
    stored = load_file(base / "model.safetensors")
    stored["model.norm.weight"] += 1e-3
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.name .* has other weights than when this run began"):
        run(load_config(None, [*words, "--train.steps", "6"]))
    with pytest.raises(ConfigError, match=r"model.name .* has other weights than when this run began"):
        export(path / "checkpoints/step_3", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    alone = options(path / "checkpoints/step_6", texts, tmp_path, "--train.steps", "1", "--name", "alone")
    with pytest.raises(ConfigError, match=r"does not fit .* unknown .*lora_A.* \(adapters: `lacuna export` first\)"):
        run(load_config(None, alone))


@pytest.mark.slow
def test_one_two_and_four_ranks_train_the_same_adapters(model_folder, texts, tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    words = ["pt", str(empty), *options(model_folder("llama"), texts, tmp_path, *LORA, *RATE)]
    words += ["--checkpoint.every", "3", "--checkpoint.keep", "9", "--train.steps", "6"]
    for ranks, name, copies in ((1, "one", 1), (2, "two", 1), (4, "four", 2)):
        done = finish(tmp_path, *words, "--name", name, "--dist.dp_replicate", str(copies), ranks=ranks)
        assert done.status == 0, done.output[-3000:]
    runs = tmp_path / "runs"
    shutil.copytree(runs / "four/checkpoints/step_3", runs / "moved/checkpoints/step_3")
    assert finish(tmp_path, *words, "--name", "moved").status == 0
    one = train_lines(runs / "one")
    for name in ("two", "four", "moved"):
        many = train_lines(runs / name)
        for wanted, found in zip(one[-len(many) :], many, strict=True):
            assert found["batch_checksum"] == wanted["batch_checksum"]
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    adapter = load_file(runs / "four/hf/adapter/adapter_model.safetensors")
    for name, tensor in load_file(runs / "one/hf/adapter/adapter_model.safetensors").items():
        assert torch.allclose(adapter[name], tensor, atol=1e-4), name
    assert len(lines(runs / "moved")) >= 3


# ---- what is refused


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ("--lora.targets", '["q_proj", "w1"]'),
            r"lora.targets .*'w1'.* are not all linear layers here: .*q_proj",
        ),
        (("--model.from_scratch", "true"), "lora.rank adapts a model: not from_scratch"),
    ],
)
def test_what_cannot_be_adapted_is_refused(words, sentence, model_folder):
    with pytest.raises(ConfigError, match=sentence):
        build(model_folder("llama"), *LORA, *words)


def test_a_patch_that_has_replaced_the_linear_layers_is_refused_and_not_overridden(model_folder, tmp_path):
    patch = tmp_path / "patch.py"
    patch.write_text(
        "from torch import nn\n"
        "class Other(nn.Linear): pass\n"
        "def replace(model):\n"
        "    for module in model.modules():\n"
        "        if type(module) is nn.Linear: module.__class__ = Other\n"
    )
    with pytest.raises(ConfigError, match="not all linear layers here: none"):
        build(model_folder("llama"), *LORA, "--model.patch", f"{patch}:replace")


def test_the_rate_and_alpha_have_defaults_of_their_own():
    argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--lora.rank", "8"]
    config = load_config(None, argv, "sft")
    assert config.optim.lr == 2e-4 and config.lora.alpha == 16
    assert load_config(None, [*argv, "--optim.lr", "1e-5"]).optim.lr == 1e-5
