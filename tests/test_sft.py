"""Supervised fine-tuning, end to end: `lacuna sft`, what it trains on, what it leaves behind, and examples/chat.py."""

import io
import json
import runpy
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, model_config
from test_train import options as train_options
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lacuna.config import load_config
from lacuna.data.conversations import ChatEncoder
from lacuna.data.loader import Loader, RowDataset
from lacuna.model import build_model
from lacuna.parallel import Ranks
from lacuna.train import accumulate_gradients, evaluate, run

ONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture
def chats(tmp_path):
    """Twenty short conversations, one of which has a turn that is not to be trained."""
    lines = [json.loads(line) for line in (EXAMPLES / "chat" / "heldout.jsonl").read_text().splitlines()]
    lines = sorted(lines, key=lambda line: len(json.dumps(line)))[:20]
    next(m for m in lines[3]["messages"] if m["role"] == "assistant")["train"] = False
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def options(folder, chats, tmp_path, *more: str) -> list[str]:
    sizes = ("--train.seq_len", "512", "--train.global_batch_size", "2")
    return train_options(folder, chats, tmp_path, *sizes, *more)


def labelled(file, tokenizer):
    """Of each conversation: ids of the whole ChatML text [1, n], and labels: an assistant's words and <|im_end|>.

    Written by hand for ChatML, turn by turn; the pieces are cut at special tokens, where encoding cannot merge.
    """
    for line in file.read_text().splitlines():
        ids, labels = [], []
        for message in json.loads(line)["messages"]:
            head = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
            body = tokenizer(message["content"] + "<|im_end|>")["input_ids"]
            rest = tokenizer("\n")["input_ids"]
            trained = message["role"] == "assistant" and message.get("train", True)
            ids += head + body + rest
            labels += [-100] * len(head) + (body if trained else [-100] * len(body)) + [-100] * len(rest)
        yield torch.tensor([ids]), torch.tensor([labels])


def losses_of_each_alone(model, file, tokenizer) -> tuple[torch.Tensor, int]:
    """Sum of the losses of the trained tokens in plain transformers, one conversation at a time, and their number."""
    nats, count = 0.0, 0
    for pair in labelled(file, tokenizer):
        ids, labels = (tensor.to(model.device) for tensor in pair)
        logits = model(input_ids=ids).logits[0].to(torch.promote_types(model.dtype, torch.float32))
        nats += F.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] >= 0).sum())
    return nats, count


def open_rows(config, tokenizer) -> RowDataset:
    return RowDataset(config, config.data.sources, ChatEncoder(tokenizer, config), rank=0, ranks=1, epochs=1)


def open_loader(config, tokenizer, device) -> tuple[Loader, RowDataset]:
    dataset = open_rows(config, tokenizer)
    return Loader(config, dataset, device), dataset


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_loss_and_gradient_of_packed_conversations_are_those_of_each_alone(name, model_folder, chats, tmp_path):
    folder = model_folder(name)
    config = load_config(None, options(folder, chats, tmp_path, "--train.epochs", "1"), "sft")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader, dataset = open_loader(config, tokenizer, ONE.device)
    batches = [batch for _ in range(-(-dataset.count_rows() // 2)) for batch in loader.step()]
    loader.close()
    trained = sum(batch.counts["trained_tokens"] for batch in batches)
    trainee = build_model(config, ONE, tokenizer)
    loss = sum(part["loss"] for part in accumulate_gradients(trainee, batches, torch.tensor(trained), ONE))

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    nats, count = losses_of_each_alone(plain, chats, tokenizer)
    (nats / count).backward()
    assert trained == count
    assert loss.item() == pytest.approx((nats / count).item(), rel=1e-5)
    wanted = dict(plain.named_parameters())
    for key, parameter in trainee.model.named_parameters():
        difference = (parameter.grad - wanted[key].grad).norm() / wanted[key].grad.norm()
        assert difference < 1e-5, key


@pytest.mark.gpu
def test_on_a_gpu_they_are_as_near_as_plain_transformers_in_bfloat16_is(chats, tmp_path, tokenizer):
    """Against float64, lacuna's packed bfloat16 gradient is off by no more than that of each conversation alone."""
    shape = model_config("qwen3")
    shape.head_dim = 64
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(shape, dtype=torch.float64, attn_implementation="eager")
    exact.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = load_config(None, options(tmp_path / "model", chats, tmp_path, "--train.epochs", "1"), "sft")
    ranks = Ranks(0, 1, torch.device("cuda"), None)
    loader, dataset = open_loader(config, tokenizer, ranks.device)
    batches = [batch for _ in range(-(-dataset.count_rows() // 2)) for batch in loader.step()]
    loader.close()
    trained = torch.tensor(sum(batch.counts["trained_tokens"] for batch in batches), device="cuda")
    trainee = build_model(config, ranks, tokenizer)
    loss = sum(part["loss"].item() for part in accumulate_gradients(trainee, batches, trained, ranks))
    ours = {key: parameter.grad.double().cpu() for key, parameter in trainee.model.named_parameters()}

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).cuda()
    losses, gradients = {}, {}
    for name, model in {"exact": exact, "plain": plain}.items():
        nats, count = losses_of_each_alone(model, chats, tokenizer)
        (nats / count).backward()
        losses[name] = (nats / count).item()
        gradients[name] = {key: parameter.grad.double().cpu() for key, parameter in model.named_parameters()}

    def error(of: dict) -> float:
        return sum((of[key] - g).square().sum().item() for key, g in gradients["exact"].items()) ** 0.5

    size = sum(g.square().sum().item() for g in gradients["exact"].values()) ** 0.5
    print(f"loss {loss} {losses}, gradient's relative error {error(ours) / size} {error(gradients['plain']) / size}")
    assert abs(loss - losses["exact"]) < 2e-3
    assert error(ours) < 1.1 * error(gradients["plain"])


def test_evaluation_weighs_tokens_and_is_the_same_packed_or_not(model_folder, chats, tmp_path):
    folder = model_folder("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        nats, count = losses_of_each_alone(plain, chats, tokenizer)
    for seq_len in ("512", "2048"):
        argv = options(folder, chats, tmp_path, "--train.steps", "1", "--train.seq_len", seq_len)
        config = load_config(None, argv, "sft")
        dataset = open_rows(config, tokenizer)
        trainee = build_model(config, ONE, tokenizer)
        result = evaluate(trainee, config, dataset, ONE, tokenizer)
        assert result["eval_tokens"] == count
        assert result["eval_loss"] == pytest.approx((nats / count).item(), rel=1e-5)


def test_a_run_counts_what_it_drops_and_exports_a_model_that_stops(model_folder, chats, tmp_path):
    folder = model_folder("smollm2")  # eos of model and tokenizer: <|endoftext|>
    long = {"messages": [{"role": "user", "content": "so " * 600}, {"role": "assistant", "content": "no"}]}
    mute = {"messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "x", "weight": 0}]}
    with open(chats, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in (long, mute, mute))
    argv = options(folder, chats, tmp_path, "--train.steps", "2", "--eval.fraction", "0.2")
    path = run(load_config(None, argv, "sft"))
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    said = (path / "log.txt").read_text()
    assert "1 of 23 documents dropped: longer than train.seq_len" in said
    assert "2 of 23 documents dropped: without a trained token" in said
    assert [m["step"] for m in metrics if "eval_loss" in m] == [0, 2]
    assert "examples/chat.py" in (path / "log.txt").read_text()

    tokenizer = AutoTokenizer.from_pretrained(path / "hf")
    assert tokenizer.eos_token == "<|im_end|>"
    assert AutoConfig.from_pretrained(path / "hf").eos_token_id == tokenizer.eos_token_id
    ends = GenerationConfig.from_pretrained(path / "hf").eos_token_id
    assert tokenizer.eos_token_id == (ends[0] if isinstance(ends, list) else ends)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    again = load_config(str(path / "config.toml"), [], "sft")
    assert again.task == "sft"


def test_generation_settings_of_the_model_survive_and_stop_at_the_end_of_a_turn(model_folder, chats, tmp_path):
    folder = model_folder("llama")
    GenerationConfig(eos_token_id=[0, 3], temperature=0.3, do_sample=True).save_pretrained(folder)
    path = run(load_config(None, options(folder, chats, tmp_path, "--train.steps", "1"), "sft"))
    settings = GenerationConfig.from_pretrained(path / "hf")
    assert (settings.eos_token_id, settings.temperature) == ([2, 0, 3], 0.3)


def test_a_template_of_the_users_own_is_exported_without_marks(model_folder, chats, tmp_path):
    marked = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|pad|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    argv = options(model_folder("llama"), chats, tmp_path, "--train.steps", "1", "--data.chat_template", marked)
    path = run(load_config(None, argv, "sft"))
    tokenizer = AutoTokenizer.from_pretrained(path / "hf")
    assert "generation %}" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    assert tokenizer.eos_token == "<|pad|>"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: a\nassistant: b<|pad|>\n"


@pytest.fixture
def chat(monkeypatch):
    """The command, with words of its command line and lines that are typed."""

    def run_chat(*words, typed: str = ""):
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_path(EXAMPLES / "chat.py", run_name="__main__")

    return run_chat


def test_chat_talks_to_a_run_until_an_empty_line_or_ctrl_c(model_folder, chats, tmp_path, monkeypatch, capsys, chat):
    path = run(load_config(None, options(model_folder("llama"), chats, tmp_path, "--train.steps", "1"), "sft"))
    capsys.readouterr()
    chat(path, typed="Hello\nAnd you?\n\n")
    said = capsys.readouterr().out
    assert said.count("you: ") == 3
    assert said.count("model: ") == 2
    chat(path, typed="Hello\nAnd you?\n")  # ends as by Ctrl-D
    assert capsys.readouterr().out == said

    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    chat(path)


def test_a_model_of_text_goes_on_with_a_text_and_is_not_asked(model_folder, tmp_path, capsys, chat):
    text = EXAMPLES / "moby_dick" / "heldout.jsonl"
    argv = options(model_folder("llama"), text, tmp_path, "--train.steps", "1")
    path = run(load_config(None, argv, "pt"))
    capsys.readouterr()
    chat(path, typed="Call me\n\n")
    said = capsys.readouterr().out
    assert said.count("text: ") == 2 and "you: " not in said
    shutil.rmtree(path / "hf")
    with pytest.raises(SystemExit, match=r"is not over, .* lacuna export \S+step_1 FOLDER"):
        chat(path)


def test_chat_says_in_a_sentence_what_it_cannot_talk_to(tmp_path, chat):
    with pytest.raises(SystemExit, match=r"^no model there: [^\n]+$"):
        chat(tmp_path / "nothing")
    (tmp_path / "state.json").touch()
    with pytest.raises(SystemExit, match=r"^\S+ is a checkpoint: [^\n]* lacuna export \S+ FOLDER$"):
        chat(tmp_path)
    for words in ([], ["--help"], ["a", "b"]):
        with pytest.raises(SystemExit, match=r"^usage: chat\.py "):
            chat(*words)
