"""What is made of conversations: a token cache, an exported tokenizer, packed rows, and a picture of them."""

import copy
import json
import re
import runpy
import sys
from collections import Counter
from itertools import islice, pairwise, takewhile
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer

from lacuna.config import Source
from lacuna.data.conversations import ChatEncoder
from lacuna.data.loader import RowDataset
from lacuna.data.sources import Cursor, tokenise

from .corpora import lacuna_log
from .test_conversations import (
    LONG,
    MINE,
    QWEN3,
    REPO,
    SHORT,
    chatml,
    config,
    encoded,
    expected,
    make,
    marked,
    say,
    taken_apart,
)
from .test_tokenize import SPECIAL, byte_level

# The fingerprint, and the token cache


def test_the_fingerprint_changes_with_anything_that_changes_a_token(tokenizer):
    def changed(change, **fields):
        other = copy.deepcopy(tokenizer)
        for name, value in fields.items():
            setattr(other, name, value)
        other.add_tokens(change)
        return make(other)

    encoders = {
        "first": make(tokenizer),
        "a given template": make(tokenizer, "--data.chat_template", "{# #}" + MINE),
        "its own template": changed([], chat_template=MINE),
        "no template": changed([], chat_template=None),
        "another EOS": changed([], chat_template=None, eos_token="<|pad|>"),
        "an added token": changed(["white whale"]),
        "overlong": make(tokenizer, "--data.overlong", "truncate"),
        "seq_len": make(tokenizer, "--train.seq_len", "64"),
        "no BOS": make(byte_level(**SPECIAL)),
        "BOS": make(byte_level("<s> $A", **SPECIAL)),
    }
    prints = {name: encoder.fingerprint() for name, encoder in encoders.items()}
    assert len(set(prints.values())) == len(prints), prints
    encoded(encoders["first"], {"messages": LONG})
    assert encoders["first"].fingerprint() == prints["first"]


def test_the_fingerprint_changes_with_a_special_token_that_the_template_writes(tokenizer):
    # FAILS: BOS counts only where the tokenizer itself adds it, but Llama 3's template writes `bos_token`.
    tokenizer.chat_template = "{{ bos_token }}" + MINE
    one = make(tokenizer)
    tokenizer.bos_token = "<|pad|>"
    two = make(tokenizer)
    assert encoded(one, {"messages": LONG})[0][0] != encoded(two, {"messages": LONG})[0][0]
    assert one.fingerprint() != two.fingerprint()


class Counting(ChatEncoder):
    rows = 0

    def documents(self, rows, source, numbers):
        self.rows += len(numbers)
        return super().documents(rows, source, numbers)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_token_cache_holds_until_template_tokenizer_overlong_or_seq_len_change(tmp_path, tokenizer):
    source = Source(path=str(write(tmp_path / "a.jsonl", [{"messages": LONG}] * 3)))
    given = [["--data.chat_template", "{# #}" + MINE], ["--data.overlong", "truncate"], ["--train.seq_len", "64"]]
    for made in (3, 0):
        for words, added in [([], []), *((words, []) for words in given), ([], ["white whale"])]:
            other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
            other.add_tokens(added)
            encoder = Counting(other, config(*words))
            tokens = tokenise(source, encoder, str(tmp_path / "cache"))
            assert encoder.rows == made, words
            assert [taken_apart(ids) for ids in tokens["ids"]] == [expected(tokenizer, chatml(LONG))] * 3


# The exported tokenizer


def test_a_given_template_is_exported_without_marks_and_renders_the_same(tokenizer, tmp_path):
    spaced = marked("{%- generation -%}", "<|im_end|>{%  endgeneration  %}{{ '\\n' }}").replace("{% else", "{%- else")
    for given in (MINE, spaced, "qwen3", "smollm2"):
        encoder = make(tokenizer, "--data.chat_template", given)
        encoder.adapt(tokenizer)
        tokenizer.save_pretrained(tmp_path)
        there = AutoTokenizer.from_pretrained(tmp_path)
        assert there.eos_token == "<|im_end|>"
        assert "generation %" not in there.chat_template.replace("add_generation", "")
        jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(there.chat_template)
        for messages in (LONG, SHORT):
            text = tokenizer.apply_chat_template(messages, chat_template=encoder.template, tokenize=False)
            assert text == there.apply_chat_template(messages, tokenize=False) == jinja.render(messages=messages)


@pytest.mark.parametrize("own", [None, QWEN3, MINE])
def test_the_models_own_template_stays_and_its_eos_becomes_the_end_of_turn(tokenizer, own):
    tokenizer.chat_template = own = own or tokenizer.chat_template
    before = tokenizer.eos_token, tokenizer.backend_tokenizer.to_str()
    encoder = make(tokenizer)
    encoded(encoder, {"messages": LONG})
    assert (tokenizer.eos_token, tokenizer.backend_tokenizer.to_str()) == before
    encoder.adapt(tokenizer)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", own)
    assert tokenizer.eos_token_id == encoder.eos


# Through the pipeline


SEQ_LEN = 96


@pytest.fixture
def corpus(tokenizer, tmp_path):
    """A file of conversations, words of the config, and the documents that must come of it."""
    lines = (REPO / "examples/chat/train.jsonl").read_text().splitlines()[:150]
    chats = [json.loads(line)["messages"] for line in lines]
    chats = [chat[: 2 + 2 * (i % 5)] for i, chat in enumerate(chats)]
    wanted = [expected(tokenizer, chatml(chat)) for chat in chats]
    fitting = [(tuple(ids), tuple(mask)) for ids, mask in wanted if len(ids) <= SEQ_LEN]
    assert 30 < len(fitting) < 120
    assert len(set(fitting)) == len(fitting)
    silent = [say("user: Hello?"), say("user: a", "assistant: b", train=False)]
    file = write(tmp_path / "chats.jsonl", [{"messages": chat, "id": i} for i, chat in enumerate(chats + silent)])
    words = ["--train.seq_len", str(SEQ_LEN), "--data.cache", str(tmp_path / "cache")]
    return (
        config(*words, path=file),
        Counter(fitting),
        len(chats) - len(fitting),
    )


def read(config, tokenizer, ranks=1, share=(0, 1)) -> Counter:
    """The documents of an epoch, from the rows of all ranks, with what the labels train of them."""
    found = Counter()
    for rank in range(ranks):
        encoder = ChatEncoder(tokenizer, config)
        data = RowDataset(config, config.data.sources, encoder, rank=rank, ranks=ranks, epochs=1, share=share)
        for row in islice(data, data.count_rows()):  # more than its own: the rest are empty
            for start, end in pairwise([*row.starts, SEQ_LEN]):
                if start < row.tokens:
                    ids, labels = row.ids[start:end].tolist(), row.labels[start:end].tolist()
                    assert labels[-1] == -100
                    assert all(label in (-100, target) for label, target in zip(labels, ids[1:], strict=False))
                    found[tuple(ids), (False, *(label != -100 for label in labels[:-1]))] += 1
            assert set(row.labels[row.tokens :].tolist()) <= {-100}
    return found


def test_an_epoch_trains_every_token_of_every_conversation_that_fits_once(corpus, tokenizer):
    config, fitting, overlong = corpus
    with lacuna_log() as messages:
        assert read(config, tokenizer) == fitting
    dropped = [message for message in messages if "dropped" in message]
    assert any(f"{overlong} of 152" in message and "train.seq_len" in message for message in dropped), messages
    assert any("2 of 152" in message for message in dropped), messages


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_held_out_share_is_disjoint_and_the_same_over_any_number_of_ranks(corpus, tokenizer, fraction):
    config, fitting, _ = corpus
    held_out, rest = (read(config, tokenizer, share=share) for share in [(0, fraction), (fraction, 1)])
    assert held_out + rest == fitting  # each conversation is there once
    assert held_out.total() == round(fraction * fitting.total())
    for ranks in (2, 3):
        assert read(config, tokenizer, ranks, (0, fraction)) == held_out
        assert read(config, tokenizer, ranks, (fraction, 1)) == rest


def test_a_stream_gives_the_same_documents(corpus, tokenizer):
    config, fitting, _ = corpus
    config.data.sources[0].streaming = True
    source = RowDataset(config, config.data.sources, ChatEncoder(tokenizer, config), rank=0, ranks=1).sources[0]
    epoch = takewhile(lambda document: document.epoch < 1, source.read(0, 1, Cursor()))
    found = Counter(tuple(map(tuple, taken_apart(document.key))) for document in epoch)
    assert found == fitting


# examples/explain.py

explain = runpy.run_path(REPO / "examples/explain.py")["explain"]


@pytest.fixture
def shown(tmp_path):
    """A file of one short conversation, and words of the command line that show it."""
    file = write(tmp_path / "one.jsonl", [{"messages": say("user: a", "assistant: b c", "user: d", "assistant: e")}])
    words = ["--model.name", str(REPO / "examples/tiny"), "--train.seq_len", "64"]
    return file, [*words, "--data.cache", str(tmp_path / "cache")]


# FAILS in a terminal without colour, since what counts is whether it is a terminal.
@pytest.mark.parametrize("terminal", [{}, {"FORCE_COLOR": "1", "TERM": "dumb"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}])
def test_a_row_is_shown_with_marks_where_there_is_no_colour(shown, capsys, monkeypatch, terminal):
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    explain(config(*shown[1], path=shown[0]), show=1)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for turn in (
        "user\na<|im_end|>\n",
        "assistant\n⟦b c<|im_end|>⟧\n",
        "user\nd<|im_end|>\n",
        "assistant\n⟦e<|im_end|>⟧\n",
    ):
        assert "<|im_start|>" + turn in out
    assert "row 0: 1 document(s), 31 of 64 slots, 5 trained" in out
    assert "33 slot(s) left over" in out


def test_a_row_is_shown_in_colour_on_a_terminal(shown, capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    explain(config(*shown[1], path=shown[0]), show=1)
    out = capsys.readouterr().out
    assert "\x1b[32mb c<|im_end|>\x1b[0m" in out
    assert "⟦" not in out


def test_the_command_shows_a_row_with_ids(shown, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    words = ["--data.sources", json.dumps([{"path": str(shown[0])}]), "--train.steps", "1", "--optim.warmup_steps", "0"]
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["explain.py", "--rows", "1", "--ids", "sft", *words, *shown[1]])
    runpy.run_path("examples/explain.py", run_name="__main__")
    out = capsys.readouterr().out
    words = [re.escape(f"{i}:{tokenizer.decode([i])!r}") for i in tokenizer("b c<|im_end|>")["input_ids"]]
    assert re.search(r"⟦" + r"\s+".join(words) + r"\s*⟧", out), out
