"""Preferences, end to end: a run of examples/dpo.py, what it reports, that it goes on, that ranks change nothing."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES
from processes import finish
from safetensors.torch import load_file
from test_objectives import FACTS, RECIPE, log_probability, text_pair
from test_train import lines, options, train_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from lacuna import train as train_module
from lacuna.config import ConfigError, load_config
from lacuna.model import build_model
from lacuna.train import run

RATE = ("--optim.lr", "2e-3", "--optim.schedule", "constant", "--optim.weight_decay", "0")
SAVES = ("--checkpoint.every", "3", "--checkpoint.keep", "9")
LORA = ("--lora.rank", "4")


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Forty pairs of plain text, of very different lengths: the next words of a book, or others."""
    first = json.loads((EXAMPLES / "moby_dick" / "train.jsonl").read_text().splitlines()[0])["text"]
    words = first.split()
    rows = []
    for number in range(40):
        at = 50 * number % (len(words) - 100)
        asked, said, other = 2 + number % 5, 3 + number * 7 % 23, 3 + number * 11 % 31
        row = {"prompt": " ".join(words[at : at + asked])}
        row["chosen"] = " " + " ".join(words[at + asked : at + asked + said])
        row["rejected"] = " " + " ".join(words[at + 30 : at + 30 + other][::-1])
        rows.append(row)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def words_of(folder, pairs, tmp_path, *more: str) -> list[str]:
    sizes = ("--train.seq_len", "256", "--train.micro_batch_size", "1", "--train.global_batch_size", "4")
    return options(folder, pairs, tmp_path, *sizes, *RATE, *more)


def train(*words: str) -> Path:
    return run(load_config(None, list(words), RECIPE))


def figures(path: Path) -> list[list]:
    """Of each step what must not change."""
    names = ["step", "loss", "grad_norm", "batch_checksum", *FACTS]
    return [[line[name] for name in names] for line in train_lines(path)]


@pytest.fixture
def six_steps(model_folder, pairs, tmp_path, monkeypatch):
    """A run of six steps: its folder, its words, and its model as it was built."""
    kept = []
    monkeypatch.setattr(train_module, "build_model", lambda *a, real=build_model: kept.append(real(*a)) or kept[-1])
    words = words_of(model_folder("qwen3"), pairs, tmp_path, *SAVES, "--train.steps", "6", "--eval.fraction", "0.2")
    return train(*words), words, kept[0]


def test_a_run_begins_at_ln_2_reports_its_facts_learns_its_pairs_and_goes_on_bit_for_bit(six_steps, tmp_path):
    path, words, trainee = six_steps
    steps = train_lines(path)
    first, last = steps[0], steps[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [first[name] for name in FACTS[:4]] == [0.0, 0.0, 0.0, 0.0]
    for line in steps:
        assert 1 < line["tokens_chosen"] < 256 and 1 < line["tokens_rejected"] < 256  # means over pairs
        margin = line["reward_chosen"] - line["reward_rejected"]
        assert line["reward_margin"] == pytest.approx(margin, rel=1e-4, abs=1e-6)
    assert last["reward_accuracy"] > 0.9
    assert last["reward_margin"] > 0.1
    assert last["loss"] < first["loss"] - 0.05
    told = (path / "log.txt").read_text()
    about = [line for line in told.splitlines() if re.search(r"step \d+/|: eval|reward", line)]
    assert max(map(len, about)) <= 80, "a terminal's columns"
    assert f"reward_accuracy={last['reward_accuracy']:.5g}" in told, "a name and its figure stay together"
    evaluations = [line for line in lines(path) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 6]
    assert evaluations[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(evaluations[0][f"eval_{name}"] == 0.0 for name in FACTS[:4])
    assert all(math.isfinite(evaluations[1][f"eval_{name}"]) for name in FACTS)

    # what it leaves: the policy alone, which plain transformers reads
    parameters = {name: p.detach() for name, p in trainee.model.named_parameters()}
    plain = AutoModelForCausalLM.from_pretrained(path / "hf")
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    stored = load_file(path / "checkpoints/step_6/rank_00000.safetensors")
    assert {name for name in stored if not name.startswith("optimizer.")} == set(parameters)

    # from step 3 again
    shutil.copytree(path / "checkpoints/step_3", tmp_path / "runs/again/checkpoints/step_3")
    again = train(*words, "--name", "again")
    assert figures(again) == figures(path)[3:]
    assert (again / "hf/model.safetensors").read_bytes() == (path / "hf/model.safetensors").read_bytes()
    assert [line for line in lines(again) if "eval_loss" in line][-1]["eval_loss"] == evaluations[1]["eval_loss"]
    sure = train(*words, "--name", "sure", "--train.steps", "3")
    base = Path(words[words.index("--model.name") + 1])
    shutil.copy(sure / "hf/model.safetensors", base / "model.safetensors")
    with pytest.raises(ConfigError, match="has other weights than when this run began"):
        train(*words, "--name", "again", "--train.steps", "7", "--checkpoint.resume_changed", "true")
    with pytest.raises(ConfigError, match=r"cannot go on with another recipe \(was \{\}\)"):
        train(*words, "--name", "again", "--recipe", '{"beta": 0.2}')


def test_held_out_figures_are_means_over_pairs_of_a_float64_loop(model_folder, pairs, tmp_path):
    """Of another file's pairs, whatever the rows: those of a run's end, beside plain transformers."""
    base = model_folder("qwen3")
    held_out = tmp_path / "held_out.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    sources = ("--eval.sources", json.dumps([{"path": str(held_out)}]))
    path = train(*words_of(base, pairs, tmp_path, *sources, "--train.steps", "3", "--recipe", '{"beta": 0.2}'))
    found = [line for line in lines(path) if "eval_loss" in line][-1]

    tokenizer = AutoTokenizer.from_pretrained(base)
    policy = AutoModelForCausalLM.from_pretrained(path / "hf", dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    sums = dict.fromkeys(["loss", *FACTS], 0.0)
    with torch.no_grad():
        for row in rows[:7]:
            pair = text_pair(tokenizer, row)
            rewards = []
            for answer, side in zip(pair, ("chosen", "rejected"), strict=True):
                logp, count = log_probability(lambda ids: policy(ids).logits, answer)
                logp_before, _ = log_probability(lambda ids: reference(ids).logits, answer)
                rewards.append(0.2 * (logp - logp_before).item())
                sums[f"reward_{side}"] += rewards[-1]
                sums[f"tokens_{side}"] += count
            sums["reward_margin"] += rewards[0] - rewards[1]
            sums["reward_accuracy"] += rewards[0] > rewards[1]
            sums["loss"] += math.log1p(math.exp(rewards[1] - rewards[0]))
    for name, total in sums.items():
        assert found[f"eval_{name}"] == pytest.approx(total / 7, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_other_losses_learn_the_pairs_too(loss, model_folder, pairs, tmp_path):
    words = words_of(
        model_folder("smollm2"), pairs, tmp_path, "--recipe", json.dumps({"loss": loss}), "--train.steps", "6"
    )
    steps = train_lines(train(*words))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["reward_accuracy"] > 0.8
    if loss == "ipo":
        assert steps[0]["loss"] == pytest.approx(25.0, rel=1e-6)  # (1 / 2 beta)^2, beta .1
        assert steps[0]["reward_margin"] == 0.0


def test_adapters_begin_at_ln_2_go_on_and_leave_the_reference_alone(model_folder, pairs, tmp_path):
    base = model_folder("qwen2")
    before = (base / "model.safetensors").read_bytes()
    words = words_of(base, pairs, tmp_path, *LORA, *SAVES, "--optim.lr", "1e-2", "--train.steps", "6")
    path = train(*words)
    steps = train_lines(path)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [steps[0][name] for name in FACTS[:4]] == [0.0, 0.0, 0.0, 0.0]
    assert steps[-1]["reward_accuracy"] > 0.9
    assert (base / "model.safetensors").read_bytes() == before
    assert (path / "hf/adapter/adapter_model.safetensors").exists()
    shutil.copytree(path / "checkpoints/step_3", tmp_path / "runs/again/checkpoints/step_3")
    assert figures(train(*words, "--name", "again")) == figures(path)[3:]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_two_ranks_and_other_micro_batches_train_the_same(more, model_folder, pairs, tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    base = model_folder("llama")
    words = [RECIPE, str(empty), *words_of(base, pairs, tmp_path, *SAVES, "--train.steps", "4", *more)]
    for ranks, name, rows in ((1, "one", "4"), (2, "two", "1")):
        done = finish(tmp_path, *words, "--name", name, "--train.micro_batch_size", rows, ranks=ranks)
        assert done.status == 0, done.output[-3000:]
    runs = tmp_path / "runs"
    for wanted, found in zip(train_lines(runs / "one"), train_lines(runs / "two"), strict=True):
        assert found["batch_checksum"] == wanted["batch_checksum"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        for name in FACTS:
            assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name
    assert train_lines(runs / "two")[0]["reward_margin"] == 0.0
    two = load_file(runs / "two/hf/model.safetensors")
    for name, tensor in load_file(runs / "one/hf/model.safetensors").items():
        assert torch.allclose(two[name], tensor, atol=1e-4), name


def test_what_is_counted_is_said(model_folder, pairs, tmp_path):
    rows = [{"prompt": "a", "chosen": " b", "rejected": " b"}]
    rows.append({"prompt": "a", "chosen": " whale" * 200, "rejected": " sea" * 200})
    with open(pairs, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    path = train(*words_of(model_folder("llama"), pairs, tmp_path, "--train.steps", "1"))
    said = (path / "log.txt").read_text()
    assert said.count("1 of 42 documents dropped: ") == 2
    assert "40 documents of " in said


def test_keys_that_a_recipe_does_not_know_or_cannot_be_are_refused(model_folder, pairs, tmp_path):
    words = words_of(model_folder("llama"), pairs, tmp_path, "--train.steps", "1")
    for keys, word in [
        ({"loss": "kto"}, "loss"),
        ({"beta": 0.0}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"bet": 0.1}, "bet"),
        ({"margin": "much"}, "margin"),
    ]:
        with pytest.raises(ConfigError, match=rf"(?s)recipe.*{word}"):
            train(*words, "--recipe", json.dumps(keys))
    with pytest.raises(ConfigError, match="from_scratch"):
        train(*words, "--model.from_scratch", "true")
    sources = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1"]
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        load_config(None, sources, RECIPE)
