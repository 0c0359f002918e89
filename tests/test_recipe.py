"""A recipe is a file in place of pt or sft: what docs/preferences.md says of one is so."""

import json
import re
import runpy

import pytest
import torch
from conftest import EXAMPLES, REPO
from test_train import options, train_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from lacuna.config import ConfigError, load_config
from lacuna.train import run


@pytest.fixture
def recipe(tmp_path):
    """The recipe that docs/preferences.md shows, as a file."""
    text = (REPO / "docs" / "preferences.md").read_text()
    [code] = re.findall(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    file = tmp_path / "focal.py"
    file.write_text(code)
    return str(file)


def test_the_recipe_of_the_docs_has_the_loss_and_the_figure_that_it_says(recipe, model_folder, tmp_path):
    folder = model_folder("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = json.loads((EXAMPLES / "moby_dick" / "train.jsonl").read_text().splitlines()[0])["text"].split()
    texts = [" ".join(words[at : at + 5 + at % 7]) for at in range(0, 400, 50)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ("--train.seq_len", "256", "--train.micro_batch_size", "1", "--train.global_batch_size", "1")
    words += ("--train.steps", "1", "--optim.lr", "1e-3")
    argv = options(folder, tmp_path / "texts.jsonl", tmp_path, *words)
    [line] = train_lines(run(load_config(None, argv, recipe)))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weighted = weight = count = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        weighted += ((1 - log_p.exp()) * -log_p).sum().item()
        weight += (1 - log_p.exp()).sum().item()
        count += len(log_p)
    assert line["trained_tokens"] == count
    assert line["loss"] == pytest.approx(weighted / count, rel=1e-5)
    assert line["weight"] == pytest.approx(weight / count, rel=1e-5)


@pytest.mark.parametrize(
    ("code", "part"),
    [
        (None, "FileNotFoundError"),
        ("def make_encoder(:", "SyntaxError"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
    ],
)
def test_a_recipe_that_does_not_run_is_one_sentence(code, part, model_folder, tmp_path):
    file = tmp_path / "focal.py"
    if code:
        file.write_text(code)
    texts = EXAMPLES / "moby_dick" / "heldout.jsonl"
    argv = options(model_folder("llama"), texts, tmp_path, "--train.steps", "1")
    with pytest.raises(ConfigError) as caught:
        run(load_config(None, argv, str(file)))
    sentence = str(caught.value)
    assert sentence.startswith(f"the recipe {file}: ") and part in sentence and "\n" not in sentence


def test_a_recipe_has_no_default_learning_rate(recipe):
    words = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1"]
    with pytest.raises(ConfigError, match=r"optim\.lr: a recipe has no default"):
        load_config(None, words, recipe)


def test_pairs_are_shown_with_what_was_rejected_in_other_marks(tmp_path, capsys):
    explain = runpy.run_path(str(EXAMPLES / "explain.py"))["explain"]
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "good one", "rejected": "bad one"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    words = [
        "--model.name",
        str(EXAMPLES / "tiny"),
        "--train.steps",
        "1",
        "--data.cache",
        str(tmp_path),
        "--optim.lr",
        "1",
    ]
    words += ["--data.sources", json.dumps([{"path": str(tmp_path / "pairs.jsonl")}])]
    explain(load_config(None, words, str(EXAMPLES / "dpo.py")), show=1)
    shown = capsys.readouterr().out
    assert "⟦good one<|im_end|>⟧" in shown and "⟪bad one<|im_end|>⟫" in shown
