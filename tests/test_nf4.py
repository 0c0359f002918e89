"""examples/nf4.py: codes are right, what is computed with them is too, and all that LoRA has goes on working."""

import json
import math
import shutil

import pytest
import torch
from conftest import EXAMPLES
from processes import finish
from safetensors.torch import load_file, save_file
from test_dpo import figures, pairs, train, words_of
from test_lora import move_away, reference
from test_model import batch_and_documents, build, compile_by
from test_train import options, texts, train_lines
from transformers import AutoModelForCausalLM

from lacuna.config import ConfigError, load_config
from lacuna.metrics import flop
from lacuna.optim import trained
from lacuna.train import run

assert pairs and texts  # fixtures
PATCH = ("--model.patch", f"{EXAMPLES / 'nf4.py'}:nf4")
NF4 = (*PATCH, "--lora.rank", "4", "--lora.alpha", "6")
# Of the paper's appendix E, with all digits.
VALUES = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
VALUES += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
VALUES += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each 64 weights as the nearest of 16 values times the largest of them, in float64, block by block."""
    blocks = []
    for block in weight.double().flatten().split(64):
        scale = block.abs().max()
        distances = (block[:, None] - scale * torch.tensor(VALUES, dtype=torch.float64)).abs()
        blocks.append(scale * torch.tensor(VALUES, dtype=torch.float64)[distances.argmin(1)])
    return torch.cat(blocks).view(weight.shape)


def encoded(model) -> dict:
    return {name: module for name, module in model.named_modules() if hasattr(module, "codes")}


def folder_of_rounded(folder, dtype=torch.float32):
    """A copy of a model whose decoder's linear layers are rounded beforehand, from weights of dtype."""
    copy = folder.with_name("rounded")
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = rounded(tensor.to(dtype)).float()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_held_are_the_nearest_of_sixteen_values_for_each_64_weights(dtype, model_folder):
    folder = model_folder("qwen2")
    stored = load_file(folder / "model.safetensors")
    # a block of nothing, and one whose largest is negative
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name][3] = 0.0
    stored[name][4] = -stored[name][4].abs()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    dtype = getattr(torch, dtype)
    model = build(folder, *NF4, "--model.dtype", str(dtype).removeprefix("torch.")).model
    assert len(encoded(model)) == 2 * 7
    for name, module in encoded(model).items():
        weight = stored[f"{name}.weight"].to(dtype)
        want = rounded(weight)
        assert torch.equal(module.weight, want.float().to(dtype)) or torch.allclose(module.weight, want.float(), 1e-6)
        assert module.weight.dtype == dtype
        # the paper's bound and the usual error of weights that are normally distributed
        assert ((want - weight).norm() / weight.norm()).item() == pytest.approx(0.09, abs=0.01)


def test_a_weight_may_come_in_parts(model_folder):
    """As from a checkpoint that several ranks wrote: rows by rows."""
    model = build(model_folder("llama"), *NF4).model
    layer = model.model.layers[0].mlp.down_proj
    weight = torch.randn(64, 128)
    place = model.state_dict()["model.layers.0.mlp.down_proj.weight"]
    place[:7] = weight[:7]
    place[7:] = weight[7:]
    assert torch.allclose(layer.weight, rounded(weight).float(), 1e-6)


def test_a_weight_takes_four_bits_and_its_share_of_a_scale(model_folder):
    folder = model_folder("llama")
    model = build(folder, *NF4, "--model.dtype", "bfloat16").model
    layers = encoded(model).values()
    held = sum(module.codes.nbytes + module.scales.nbytes for module in layers)
    size = sum(module.in_features * module.out_features for module in layers)
    assert held == size / 2 + 2 * size / 64
    assert {module.codes.dtype for module in layers} == {torch.uint8}
    assert not [name for name, _ in model.named_parameters() if "_proj.weight" in name]
    # what a run reports counts them
    plain = build(folder, *NF4[2:], "--model.dtype", "bfloat16").model
    assert flop(model) == flop(plain)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(only_trainable=True) == plain.num_parameters(only_trainable=True)


CASES = [("llama", ()), ("qwen2", ()), ("mistral", ())]
CASES += [("qwen3", ("--train.activation_checkpointing", how)) for how in ("full", "selective")]
CASES += [("qwen2", ("--train.compile", "true"))]
CASES += [
    ("llama", ("--train.compile", "true", "--train.activation_checkpointing", how)) for how in ("full", "selective")
]


@pytest.mark.parametrize("name, more", CASES)
def test_loss_and_gradients_are_those_of_a_model_that_was_rounded_beforehand(name, more, model_folder, monkeypatch):
    compile_by("aot_eager", monkeypatch)
    folder = model_folder(name)
    trainee = build(folder, *NF4, *more)
    move_away(trainee.model)
    batch, documents = batch_and_documents()
    loss, _ = trainee(batch)
    loss.backward()
    adapters = {name: p.detach() for name, p in trained(trainee.model).items()}
    want_loss, want = reference(folder_of_rounded(folder), adapters, 6 / 4, documents)
    assert loss.item() == pytest.approx(want_loss, rel=1e-6)
    assert set(want) == {name for name, p in trainee.model.named_parameters() if p.grad is not None}
    for name, parameter in trained(trainee.model).items():
        error = (parameter.grad - want[name]).norm() / want[name].norm()
        assert error < 1e-5, f"{name}: relative error {error}"


@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_in_bfloat16_it_computes_what_the_rounded_model_does_bit_for_bit(how, model_folder):
    """On one rank, whose layers run as copies with their weights handed in."""
    folder = model_folder("qwen2")
    more = ("--model.dtype", "bfloat16", "--train.activation_checkpointing", how)
    losses = []
    gradients = []
    for base, words in ((folder, NF4), (folder_of_rounded(folder, torch.bfloat16), NF4[2:])):
        trainee = build(base, *words, *more)
        move_away(trainee.model)
        loss, _ = trainee(batch_and_documents()[0])
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in trained(trainee.model).values()])
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *gradients))


def test_between_the_passes_no_weight_is_kept_decoded(model_folder):
    """The only thing that 4 bits are for: checked by what autograd saves, in the layers."""
    folder = model_folder("llama")
    batch, _ = batch_and_documents()
    kept = {}
    for how in ("none", "full", "selective"):
        trainee = build(folder, *NF4, "--train.activation_checkpointing", how)
        shapes = {tuple(module.weight.shape) for module in encoded(trainee.model).values()}
        kept[how] = 0

        def note(tensor, how=how, shapes=shapes):
            kept[how] += bool(shapes & {tuple(tensor.shape), tuple(tensor.shape[::-1])})
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainee(batch)
    assert kept == {"none": 2 * 7, "full": 0, "selective": 0}


def test_all_layers_share_one_graph(model_folder, monkeypatch):
    from torch._dynamo.utils import counters

    compile_by("aot_eager", monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    trainee = build(model_folder("llama"), *NF4, "--train.compile", "true")
    for _ in range(2):
        trainee(batch_and_documents()[0])[0].backward()
    # the first layer, whose input needs no gradient, the others, and the loss of a chunk of logits
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


# ---- whole runs


@pytest.fixture
def words(model_folder, texts, tmp_path):
    words = options(model_folder("llama"), texts, tmp_path, *NF4, "--optim.lr", "1e-2", "--train.steps", "6")
    words += ["--train.activation_checkpointing", "selective", "--checkpoint.every", "3", "--checkpoint.keep", "9"]
    return [*words, "--eval.fraction", "0.2", "--eval.every", "3"]


def test_a_run_goes_on_bit_for_bit_and_its_adapter_is_merged_into_the_base_as_it_is(words, tmp_path):
    path = run(load_config(None, words))
    shutil.copytree(path / "checkpoints/step_3", tmp_path / "runs/again/checkpoints/step_3")
    again = run(load_config(None, [*words, "--name", "again"]))
    figures = [(m["loss"], m["grad_norm"]) for m in train_lines(path)]
    assert [(m["loss"], m["grad_norm"]) for m in train_lines(again)] == figures[3:]
    assert figures[-1][0] < figures[0][0] - 0.05
    adapter = load_file(path / "hf/adapter/adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7
    base = load_file(tmp_path / "llama/model.safetensors")
    merged = load_file(path / "hf/model.safetensors")
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in adapter:
            tensor += 6 / 4 * adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    AutoModelForCausalLM.from_pretrained(path / "hf")


def test_of_preferences_the_rounded_base_is_the_reference(model_folder, pairs, tmp_path):
    folder = model_folder("llama")
    more = ("--train.steps", "3")
    found = figures(train(*words_of(folder, pairs, tmp_path, *NF4, *more)))
    beforehand = ("--name", "beforehand", *NF4[2:], *more)
    wanted = figures(train(*words_of(folder_of_rounded(folder), pairs, tmp_path, *beforehand)))
    assert found[0][1] == pytest.approx(math.log(2), rel=1e-6)  # nothing is learned yet
    for step, want in zip(found, wanted, strict=True):
        assert step[1:3] == pytest.approx(want[1:3], rel=1e-5)  # loss, gradient norm


@pytest.mark.slow
def test_one_and_two_ranks_train_the_same_adapters(words, tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    for ranks, name in ((1, "one"), (2, "two")):
        done = finish(tmp_path, "pt", str(empty), *words, "--name", name, ranks=ranks)
        assert done.status == 0, done.output[-3000:]
    one, two = (train_lines(tmp_path / "runs" / name) for name in ("one", "two"))
    for wanted, found in zip(one, two, strict=True):
        assert found["batch_checksum"] == wanted["batch_checksum"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    adapter = load_file(tmp_path / "runs/two/hf/adapter/adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "runs/one/hf/adapter/adapter_model.safetensors").items():
        assert torch.allclose(adapter[name], tensor, atol=1e-4), name


# ---- what is refused, and what stays


@pytest.mark.parametrize("more", [(), ("--model.from_scratch", "true")])
def test_without_lora_it_is_refused(more, model_folder, texts, tmp_path):
    config = load_config(None, options(model_folder("llama"), texts, tmp_path, *PATCH, "--train.steps", "1", *more))
    with pytest.raises(ConfigError, match=r"^model.patch nf4 rounds a frozen base: it needs lora.rank$"):
        run(config)


def test_targets_may_be_named_and_the_others_are_in_four_bits_too(model_folder):
    model = build(model_folder("llama"), *NF4, "--lora.targets", '["q_proj"]').model
    assert {name.split(".")[-3] for name in trained(model)} == {"q_proj"}
    assert len(encoded(model)) == 2 * 7


def test_rows_that_do_not_divide_into_blocks_stay_as_they_are_and_are_named(model_folder, caplog):
    folder = model_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    stored = load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        if "mlp.down_proj" in name:
            stored[name] = tensor[:, :96].contiguous()
        elif ".mlp." in name:
            stored[name] = tensor[:96].contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level("INFO"):
        model = build(folder, *NF4).model
    assert "nf4: down_proj stay as they are: their rows are no multiple of 64" in caplog.text
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, stored["model.layers.1.mlp.down_proj.weight"])
    assert len(encoded(model)) == 2 * 6 and len(trained(model)) == 2 * 2 * 7


def test_a_base_with_a_weight_of_another_shape_or_without_one_is_refused(model_folder):
    folder = model_folder("llama")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(stored | {name: stored[name][:64].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{name} is \[64, 64\], and should be \[128, 64\]"):
        build(folder, *NF4)
    del stored[name]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"missing \['{name}'\]"):
        build(folder, *NF4)
