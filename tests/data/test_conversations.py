"""Conversations to ids and masks: five formats, one template, and what goes wrong silently elsewhere.

The reference is made without lacuna: ChatML written here by hand (with tools: by the model's own template), cut into
turns by a regular expression, and encoded once by a plain call of the tokenizer.
"""

import copy
import json
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers.processors import ByteLevel

import lacuna
from lacuna.config import ConfigError, Source, load_config
from lacuna.data import conversations
from lacuna.data.conversations import ChatEncoder
from lacuna.data.sources import tokenise, without_nulls

from .corpora import lacuna_log
from .test_tokenize import SPECIAL, TEMPLATES, byte_level, sentencepiece

REPO = Path(__file__).parents[2]
SHIPPED = Path(lacuna.__file__).parent / "data" / "templates"
QWEN3 = (Path(__file__).parent / "originals" / "qwen3.jinja").read_text()
TURN = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}BEGIN{{ m.content }}END{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}"""


def marked(begin: str, end: str) -> str:
    """ChatML, with these words around what the assistant says."""
    return MARKED.replace("BEGIN", begin).replace("END", end)


MINE = marked("{% generation %}", "<|im_end|>{% endgeneration %}{{ '\\n' }}")


# Rows, and what must become of them


def say(*turns: str, **fields) -> list[dict]:
    """ "role: text" as messages; the fields go to the last one."""
    messages = [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]
    return [*messages[:-1], messages[-1] | fields]


def config(*words, path="x"):
    return load_config(None, ["--data.sources", json.dumps([{"path": str(path)}]), "--train.steps", "1", *words], "sft")


def make(tokenizer, *words) -> ChatEncoder:
    return ChatEncoder(tokenizer, config(*words))


def documents(encoder, *rows: dict) -> list[tuple[list[int], list[bool], str]]:
    """Ids, mask and note of rows that have the numbers 41, 42, …"""
    found = encoder.documents(copy.deepcopy(list(rows)), Source(path="some.jsonl"), range(41, 41 + len(rows)))
    assert all(ids.dtype == np.int32 and ("dropped" in note) == (len(ids) == 0) for ids, note in found), found
    return [(*taken_apart(ids), note) for ids, note in found]


def taken_apart(ids) -> tuple[list[int], list[bool]]:
    return [max(i, ~i) for i in np.asarray(ids).tolist()], [i >= 0 for i in np.asarray(ids).tolist()]


def encoded(encoder, row: dict) -> tuple[list[int], list[bool]]:
    """Ids and mask of a row that is neither cut nor dropped."""
    ((ids, mask, note),) = documents(encoder, row)
    assert note == ""
    return ids, mask


def chatml(messages: list[dict]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def expected(tokenizer, text: str, out=()) -> tuple[list[int], list[bool]]:
    """Ids and mask of a rendered text, without the turns `out`. The tokenizer's offsets must not be trimmed."""
    marks = []
    for i, piece in enumerate(TURN.split(text)):  # every second one is a turn
        marks += [i % 2 == 1 and i // 2 not in out] * len(piece)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return whole["input_ids"], [any(marks[a:b]) for a, b in whole["offset_mapping"]]


def refused(function, *words: str):
    with pytest.raises(ConfigError) as caught:
        function()
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


SHORT = say("system: Be brief.", "user: Who are you?", "assistant: The white whale 🐋.")
LONG = say("system: s", "user: a", "assistant:  b c", "user: d", "assistant: \n\ne", "user: f", "assistant: g\n")
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
SHARED = [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in LONG]


@pytest.fixture
def encoder(tokenizer):
    return make(tokenizer)


@pytest.fixture
def qwen(tokenizer):
    tokenizer.chat_template = QWEN3
    return tokenizer


# Formats


def test_the_five_formats_give_the_same_ids_and_masks(tokenizer, encoder):
    ids, mask = expected(tokenizer, chatml(SHORT))
    system, asked, answer = (m["content"] for m in SHORT)
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    for row in [
        {"messages": SHORT},
        {"conversations": [{"from": "system", "value": system}, *said]},
        {"conversations": said, "system": system},
        {"prompt": SHORT[:2], "completion": SHORT[2:]},
        {"instruction": asked, "output": answer, "system": system},
        {"input_ids": ids, "labels": [i if trained else -100 for i, trained in zip(ids, mask, strict=True)]},
        {"input_ids": ids, "assistant_masks": [int(trained) for trained in mask]},
        {"input_ids": ids, "labels": None, "completion_mask": mask},
    ]:
        assert encoded(encoder, row) == (ids, mask), row
    for row in [{"messages": LONG}, {"conversations": SHARED}, {"conversations": SHARED[1:], "system": "s"}]:
        assert encoded(encoder, row) == expected(tokenizer, chatml(LONG)), row
    for row in [{"conversations": SHARED[1:], "system": nothing} for nothing in (None, "")]:
        assert encoded(encoder, row) == expected(tokenizer, chatml(LONG[1:])), row
    for given, asked in [(None, "Add."), ("", "Add."), ("1 and 2", "Add.\n\n1 and 2")]:
        row = {"instruction": "Add.", "input": given, "output": "3"}
        assert encoded(encoder, row) == expected(tokenizer, chatml(say(f"user: {asked}", "assistant: 3"))), row
    turns = say("user: One?", "assistant: 1", "user: Two?", "assistant: 2", "user: Add.", "assistant: 3")
    for history in ([["One?", "1"], ["Two?", "2"]], '[["One?", "1"], ["Two?", "2"]]'):
        row = {"instruction": "Add.", "output": "3", "history": history}
        assert encoded(encoder, row) == expected(tokenizer, chatml(turns)), row


def test_keys_of_messages_that_are_not_read_are_told_once_a_source(encoder):
    turns = [message | {"mood": "", "score": 5, "weight": 1, "name": "Bob"} for message in SHORT]
    with lacuna_log() as messages:
        for path in ("a.jsonl", "a.jsonl", "b.jsonl"):
            encoder.documents(copy.deepcopy([{"messages": turns}] * 2), Source(path=path), range(2))
    told = sorted(message for message in messages if "messages have" in message)
    assert told == [
        f"{path}.jsonl: messages have '{key}', which lacuna does not read" for path in "ab" for key in ("name", "score")
    ]


CALL = {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}
TEXTUAL = CALL | {"arguments": json.dumps(CALL["arguments"])}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"a": "ü"}}}}}]
AFTER = say("tool: yes", "assistant: It rains.")


def sharing(call) -> dict:
    values = {"human": "Rain?", "function_call": json.dumps(call), "observation": "yes", "gpt": "It rains."}
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in values.items()]}


def test_tools_and_calls_are_read_alike_in_both_styles(qwen):
    calls = [{"type": "function", "function": CALL}, CALL, TEXTUAL, {"type": "function", "function": TEXTUAL}]
    chats = [[*say("user: Rain?", "assistant: ", tool_calls=[call]), *AFTER] for call in calls]
    chats.append([*say("user: Rain?", "assistant: ", tool_calls=calls[:1], content=None), *AFTER])
    text, encoder = qwen.apply_chat_template(chats[0], tools=TOOLS, tokenize=False), make(qwen)
    assert text.count('"weather", "arguments": {"city": "Köln", "days": [1, 2]}}') == 1
    for row in [*({"messages": chat} for chat in chats), sharing(CALL), sharing([TEXTUAL])]:
        for tools in (TOOLS, json.dumps(TOOLS)):
            assert encoded(encoder, row | {"tools": tools}) == expected(qwen, text), row
        plain = qwen.apply_chat_template(chats[0], tokenize=False)
        for tools in (None, [], "", "[]", "null"):
            assert encoded(encoder, row | {"tools": tools}) == expected(qwen, plain), (row, tools)
    row = {"prompt": chats[0][:3], "completion": chats[0][3:], "tools": TOOLS}
    assert encoded(encoder, row) == expected(qwen, text, out={0})


def test_only_the_columns_of_the_format_are_read_and_the_log_names_it(encoder):
    for form, read, others in [
        ("messages", "messages tools", "id prompt"),
        ("messages", "messages system", "input history labels"),
        ("conversations", "conversations system", "id"),
        ("prompt and completion", "prompt completion", "score"),
        ("instruction and output", "instruction output input history", "id"),
        ("token ids", "input_ids labels attention_mask loss_mask", "id"),
        ("token ids", "input_ids assistant_masks", "tools system input"),
    ]:
        with lacuna_log() as messages:
            columns = encoder.columns([*others.split(), *read.split()[::-1]], Source(path="some.jsonl"))
        assert sorted(columns) == sorted(read.split())
        assert any("some.jsonl" in message and form in message for message in messages), messages
        stop = encoder.tokenizer.decode(encoder.eos)
        assert messages[-1].endswith(f"ending in {stop}; not read: {', '.join(sorted(others.split()))}")


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_gets_bos_once_where_the_tokenizer_adds_one_and_eos_once(kind, template):
    tokenizer = kind(TEMPLATES[template], **SPECIAL)
    encoder, bos = make(tokenizer), [tokenizer.bos_token_id] * ("BOS" in template)
    for prompt, completion in [("Call me", " Ishmael."), ("", "x y"), ("\n\n x", "y"), ("naïve ", "café\n")]:
        plain = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        ids = [*bos, *plain["input_ids"], tokenizer.eos_token_id]
        mask = [*(False for _ in bos), *(end > len(prompt) for _, end in plain["offset_mapping"]), True]
        for ended in (completion, completion + "</s>"):
            assert encoded(encoder, {"prompt": prompt, "completion": ended}) == (ids, mask), ended
    rows = [{"prompt": "a", "completion": "b</s>c"}, {"prompt": "a</s>", "completion": "c"}]
    (nothing, *_), (_, mask, _) = documents(encoder, *rows)
    assert nothing == []
    assert mask == [False] * (len(mask) - 2) + [True] * 2


def test_text_that_begins_with_bos_gets_no_second_one():
    # FAILS: BOS is put before the prompt without a look at what it begins with.
    tokenizer = byte_level("<s> $A", **SPECIAL)
    ids, _ = encoded(make(tokenizer), {"prompt": "<s>Call me", "completion": " Ishmael."})
    assert ids == [*tokenizer("Call me Ishmael.")["input_ids"], tokenizer.eos_token_id]


def test_a_prompt_with_a_system_turn_is_a_chat(tokenizer, encoder):
    turns = [("system", "S"), ("user", "Q"), ("assistant", "A")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    row = {"prompt": "Q", "completion": "A", "system": "S"}
    assert encoded(encoder, row) == encoded(encoder, chat)
    # of a source with such a column every row is a chat, or two rows of one file would be of two kinds
    for nothing in ({"system": ""}, {"system": None}, {"system": None, "tools": None}):
        assert encoded(encoder, row | nothing) == encoded(encoder, {"messages": chat["messages"][1:]})


def test_of_prompt_and_completion_the_completion_alone_is_trained(tokenizer, encoder):
    for cut, out in [(2, ()), (3, {0}), (4, {0}), (6, {0, 1})]:
        row = {"prompt": LONG[:cut], "completion": LONG[cut:]}
        assert encoded(encoder, row) == expected(tokenizer, chatml(LONG), out)


def test_token_ids_are_all_trained_unless_labels_or_a_mask_say_which(encoder):
    assert encoded(encoder, {"input_ids": [5, 0, 2]}) == ([5, 0, 2], [True] * 3)
    assert encoded(encoder, {"input_ids": [5, 0, 2], "labels": [-100, 0, -100]}) == ([5, 0, 2], [False, True, False])
    shifted = {"input_ids": [5, 6, 7], "labels": [6, 7, -100]}
    refused(lambda: documents(encoder, shifted), "row 41", "-100")
    for key in ("labels", "assistant_masks", "completion_mask"):
        refused(lambda key=key: documents(encoder, shifted | {"labels": None, key: [6, 7]}), "row 41", "token ids", key)


# Turns that are taken out


@pytest.mark.parametrize("field", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
def test_train_false_or_weight_0_takes_that_turn_out_and_no_other(tokenizer, encoder, field):
    for out in [{0}, {1}, {2}, {0, 2}, {1, 2}]:
        wanted = expected(tokenizer, chatml(LONG), out)
        for form, turns in [("messages", LONG), ("conversations", SHARED)]:
            marked = [turn | (field if i in {2 * n + 2 for n in out} else {}) for i, turn in enumerate(turns)]
            assert encoded(encoder, {form: marked}) == wanted


@pytest.mark.parametrize("field", [{"weight": 0}, {"weight": 1}, {"train": False}, {"train": True}])
def test_what_a_user_turn_says_of_training_changes_nothing(tokenizer, encoder, field):
    for on in ({}, {"train": True}, {"weight": 1}, {"weight": None}, {"train": None}):
        for at in (0, 1, 3, 5):
            messages = [m | (on if m["role"] == "assistant" else field if i == at else {}) for i, m in enumerate(LONG)]
            assert encoded(encoder, {"messages": messages}) == expected(tokenizer, chatml(LONG))


def test_rows_without_a_trained_token_are_dropped_and_noted(encoder):
    silent = [[m | {"train": False} for m in LONG], say("user: Hello?"), LONG]
    assert [not ids for ids, _, _ in documents(encoder, *({"messages": m} for m in silent))] == [True, True, False]
    for mask in ([0, 0], [1, 0]):  # nothing predicts a first token
        assert documents(encoder, {"input_ids": [5, 6], "completion_mask": mask})[0][0] == []
    assert [ids for ids, _, _ in documents(encoder, {"input_ids": []}, {"input_ids": [7]})] == [[], []]


# Stop tokens


def test_every_trained_turn_ends_with_its_one_stop_token(tokenizer):
    rows = [json.loads(line) for line in (REPO / "examples/chat/train.jsonl").read_text().splitlines()[:100]]
    encoder, stop = make(tokenizer, "--train.seq_len", "4096"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder.eos == stop
    for row in rows:
        ids, mask = encoded(encoder, row)
        assert (ids, mask) == expected(tokenizer, chatml(row["messages"]))
        ends = [ids[i] for i, (here, after) in enumerate(pairwise([*mask, False])) if here and not after]
        turns = sum(m["role"] == "assistant" for m in row["messages"])
        assert ends == [stop] * turns == [i for i, trained in zip(ids, mask, strict=True) if trained and i == stop]


def test_marks_that_end_before_the_stop_token_are_refused_with_the_cure(tokenizer):
    early = marked("{% generation %}", "{% endgeneration %}<|im_end|>\n")
    nowhere = marked("{% generation %}{% endgeneration %}", "<|im_end|>\n")
    for template in (early, nowhere):
        refused(lambda text=template: make(tokenizer, "--data.chat_template", text), "{% generation %}", "stop token")
        tokenizer.chat_template = template
        refused(lambda: make(tokenizer), "{% endgeneration %}", "stop token")


def test_marks_that_reach_past_the_stop_token_do_not_make_another_one(tokenizer):
    """Some models' own templates are like that: the marks end after the new line behind the stop token."""
    try:
        encoder = make(tokenizer, "--data.chat_template", marked("{% generation %}", "<|im_end|>\n{% endgeneration %}"))
    except ConfigError as error:
        assert "generation" in str(error)
        return
    encoder.adapt(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert encoded(encoder, {"messages": LONG})[0] == expected(tokenizer, chatml(LONG))[0]


def test_a_turn_that_spells_out_the_stop_token_is_dropped_and_noted(tokenizer, encoder):
    bad, other = say("user: a", "assistant: b<|im_end|>c"), say("user: a<|im_end|>", "assistant: b")
    (ids, _, _), kept = documents(encoder, {"messages": bad}, {"messages": other})
    assert ids == []
    assert kept == (*expected(tokenizer, chatml(other)), "")


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
def test_the_mask_is_the_templates_where_pad_is_eos_or_any_other_token(tokenizer, pad):
    tokenizer.pad_token, tokenizer.eos_token = pad, "<|im_end|>"
    assert encoded(make(tokenizer), {"messages": LONG}) == expected(tokenizer, chatml(LONG))


# Long rows


def test_overlong_rows_are_dropped_or_cut_as_asked(tokenizer):
    ids, mask = expected(tokenizer, chatml(LONG))
    for seq_len in (len(ids), len(ids) - 1, len(ids) - 12):
        for overlong in ("drop", "truncate"):
            encoder = make(tokenizer, "--train.seq_len", str(seq_len), "--data.overlong", overlong)
            if seq_len == len(ids):
                assert encoded(encoder, {"messages": LONG}) == (ids, mask)
            else:
                kept = 0 if overlong == "drop" else seq_len
                ((*got, note),) = documents(encoder, {"messages": LONG})
                assert got == [ids[:kept], mask[:kept]]
                assert "train.seq_len" in note


def test_a_row_that_is_cut_before_its_first_trained_token_is_dropped(tokenizer):
    encoder = make(tokenizer, "--train.seq_len", "16", "--data.overlong", "truncate")
    rows = [say("user: " + "a " * 20, "assistant: b"), say("user: a", "assistant: b")]
    assert [len(ids) > 0 for ids, _, _ in documents(encoder, *({"messages": m} for m in rows))] == [False, True]


# Which template


def test_the_users_template_may_be_text_a_file_or_a_name_and_wins(qwen, tmp_path):
    file, other = tmp_path / "mine.jinja", MINE.replace("<|im_start|>", "<|im_start|>The ")
    file.write_text(other)
    text = qwen.apply_chat_template(LONG, tokenize=False)
    assert encoded(make(qwen), {"messages": LONG}) == expected(qwen, text)
    qwen.chat_template = MINE
    assert encoded(make(qwen, "--data.chat_template", "qwen3"), {"messages": LONG}) == expected(qwen, text)
    for given in (str(file), other):
        ids, mask = encoded(make(qwen, "--data.chat_template", given), {"messages": LONG})
        assert qwen.decode(ids) == chatml(LONG).replace("<|im_start|>", "<|im_start|>The ")
        trained = [m["content"] + "<|im_end|>" for m in LONG if m["role"] == "assistant"]
        assert qwen.decode(np.asarray(ids)[mask]) == "".join(trained)


def test_a_given_template_that_is_none_or_has_no_marks_is_refused(tokenizer):
    plain = marked("", "<|im_end|>\n")
    refused(lambda: make(tokenizer, "--data.chat_template", plain), "data.chat_template", "{% generation %}")
    refused(lambda: make(tokenizer, "--data.chat_template", "no.jinja"), "data.chat_template", "no.jinja", "chatml")


@pytest.mark.parametrize("given", [MINE + "{% if", MINE + "{{ raise_exception('No, never.') }}"])
def test_a_given_template_with_a_fault_is_refused_in_one_sentence(tokenizer, given):
    # FAILS: Jinja's own errors come through, with a traceback and without the key.
    refused(lambda: make(tokenizer, "--data.chat_template", given), "data.chat_template")


def test_the_tokenizers_own_template_with_marks_wins_over_one_that_ships(tokenizer):
    for own in ("{# renders as chatml does #}" + MINE, MINE.replace("<|im_start|>", "<|im_start|>The ")):
        tokenizer.chat_template = own
        assert make(tokenizer).template == own


@pytest.mark.parametrize(
    ("shipped", "old", "new"),
    [
        ("chatml", "'<|im_end|>'", "'<|im_end|> '"),
        ("qwen3", "\\n<think>\\n", "\\n<think>"),
    ],
)
def test_a_template_that_ships_is_taken_only_where_it_renders_the_same(tokenizer, shipped, old, new):
    tokenizer.chat_template = own = QWEN3 if shipped == "qwen3" else tokenizer.chat_template
    assert make(tokenizer).template == (SHIPPED / f"{shipped}.jinja").read_text()
    assert old in own
    tokenizer.chat_template = own.replace(old, new)
    cure = ["{% generation %}", "data.chat_template"]
    refused(lambda: documents(make(tokenizer), {"messages": LONG}), tokenizer.name_or_path, *cure)


@pytest.mark.parametrize(
    ("shipped", "old", "new"),
    [
        ("chatml", "message['content']", "message['content'].strip()"),
        ("qwen3", "<tool_call>", "<tool-call>"),
        ("qwen3", "# Tools", "#Tools"),
    ],
)
def test_a_row_that_the_models_own_template_renders_otherwise_is_refused(tokenizer, shipped, old, new):
    """Templates that agree on the simplest chat may differ on tools, or on space at an edge."""
    own = QWEN3 if shipped == "qwen3" else tokenizer.chat_template
    tokenizer.chat_template = own.replace(old, new)
    encoder = make(tokenizer)
    assert encoder.template == (SHIPPED / f"{shipped}.jinja").read_text()
    plain = {"messages": say("user: a", "assistant: b")}
    assert encoded(encoder, plain)
    call = {"type": "function", "function": {"name": "rain", "arguments": {"where": "here"}}}
    chat = [*say("user: Rain? ", "assistant: ", tool_calls=[call]), *AFTER]
    row = {"messages": chat, "tools": TOOLS} if shipped == "qwen3" else {"messages": say("user: a ", "assistant: b")}
    refused(lambda: documents(encoder, row), "row 41", "own chat template", "{% generation %}", "data.chat_template")


def test_without_any_template_only_conversations_are_refused(tokenizer):
    tokenizer.chat_template = None
    encoder = make(tokenizer)
    assert encoder.eos == tokenizer.eos_token_id
    ids, _ = encoded(encoder, {"prompt": "a b", "completion": " c"})
    assert ids == [*tokenizer("a b c")["input_ids"], tokenizer.eos_token_id]
    assert encoded(encoder, {"input_ids": [5, 6]})[0] == [5, 6]
    for row in [{"messages": LONG}, {"conversations": SHARED}, {"instruction": "a", "output": "b"}]:
        refused(lambda row=row: documents(encoder, row), tokenizer.name_or_path, "data.chat_template")


# Ids of the whole text


def trimmed(tokenizer):
    """A token's place leaves out the space before its word, as for Llama 3."""
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert tokenizer("a white", return_offsets_mapping=True)["offset_mapping"][1] == (2, 7)
    return tokenizer


def metaspace(tokenizer):
    tokenizer = sentencepiece(prefix="▁", **SPECIAL)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("kind", [copy.deepcopy, trimmed, metaspace])
def test_the_ids_are_those_of_the_whole_text_encoded_once(tokenizer, kind):
    tokenizer.add_tokens(["\n\n"])  # may join the header's new line and that of the content
    given = kind(copy.deepcopy(tokenizer))
    reference = given if kind is metaspace else tokenizer
    encoder, apart = make(given, "--data.chat_template", MINE), 0
    for content in ["", " ", " a", "  b c ", "\nd", "\n\n\n", "é\u0301 👩‍👩‍👧‍👦", "\tx", " 1 23", "漢字 x", "white"]:
        messages = say("user: " + content, "assistant: " + content, "user: ?", "assistant: x" + content)
        whole = expected(reference, chatml(messages), () if content.strip() else {0})  # an empty answer trains nothing
        assert encoded(encoder, {"messages": messages}) == whole, repr(content)
        pieces = [reference(piece, add_special_tokens=False)["input_ids"] for piece in TURN.split(chatml(messages))]
        apart += whole[0] != list(chain(*pieces))
        ids, _ = encoded(encoder, {"prompt": "Q:" + content, "completion": content + " a"})
        assert ids == reference(f"Q:{content}{content} a<|im_end|>", add_special_tokens=False)["input_ids"]
    assert apart, "these texts no longer show the difference"


def test_an_encoder_encodes_alike_in_threads(tokenizer):
    encoder = make(trimmed(copy.deepcopy(tokenizer)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(4) as pool:  # training and evaluation read at the same time
        found = list(pool.map(lambda _: encoded(encoder, {"messages": LONG}), range(100)))
    sys.setswitchinterval(interval)
    assert found == [expected(tokenizer, chatml(LONG))] * 100


# Arguments of tool calls, and nulls


def calling(arguments) -> list[dict]:
    return say(
        "user: x", "assistant: ", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    )


def test_arguments_as_text_and_as_an_object_render_alike(qwen):
    encoder = make(qwen)
    for arguments in [{}, {"a": 1}, {"b": {"c": [1.5, "ü"], "d": '"quoted"'}}, {"n": 10**12}]:
        text = qwen.apply_chat_template(calling(arguments), tokenize=False)
        assert f'"arguments": {json.dumps(arguments, ensure_ascii=False)}}}' in text
        for given in (arguments, json.dumps(arguments), json.dumps(arguments, indent=2)):
            assert encoded(encoder, {"messages": calling(given)}) == expected(qwen, text), given


def test_an_empty_list_of_calls_is_none_for_templates_that_look_for_the_key(tokenizer):
    strict = MINE.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if 'tool_calls' in m %}{{ 1 / 0 }}{% endif %}"
    )
    messages = [m | {"tool_calls": []} for m in LONG]
    encoder = make(tokenizer, "--data.chat_template", strict)
    assert encoded(encoder, {"messages": messages}) == expected(tokenizer, chatml(LONG))


def test_nulls_that_arrow_fills_in_do_not_get_into_the_text(qwen):
    chats = [calling({"city": "Köln"}), calling({"days": 2, "deep": {"x": [1]}}), calling({}), LONG]
    chats[3] = [*LONG[:-1], LONG[-1] | {"train": True}]
    tools = [[{"name": "f", "a": {"b": "c"}}], [{"name": "g", "d": {"e": "f"}}], [], []]
    filled = datasets.Dataset.from_list([{"messages": m, "tools": t} for m, t in zip(chats, tools, strict=True)])
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["days"] is None, "Arrow fills no more"
    assert filled[0]["tools"][0]["d"] is None
    rows = [without_nulls(row) for row in filled]
    for chat, tool, got in zip(chats, tools, documents(make(qwen), *rows), strict=True):
        text = qwen.apply_chat_template(chat, tools=tool or None, tokenize=False)
        assert not re.search("null|None", text)
        assert got == (*expected(qwen, text), "")


# Errors


def test_a_row_that_does_not_fit_its_format_is_refused_with_file_and_number(encoder):
    turns = ["Hello", ["Hello"], [{"content": "Hello"}], say("user: a", "assistant: b", content=5)]
    turns.append(say("user: a", "assistant: b", content=[{"type": "image", "url": "c"}]))
    turns.append(say("user: a", "assistant: b", tool_calls=[CALL | {"arguments": "{"}]))
    turns.append({"role": ["user", "assistant"], "content": ["a", "b"]})
    shared = [[{"value": "Hello"}], [{"from": "function_call", "value": "no JSON"}]]
    for good, bad in [
        *(({"messages": LONG}, {"messages": messages}) for messages in turns),
        *(({"conversations": SHARED}, {"conversations": conversation}) for conversation in shared),
        ({"messages": LONG, "tools": "[]"}, {"messages": LONG, "tools": "no JSON"}),
        ({"messages": LONG, "tools": "[]"}, {"messages": None, "tools": "[]"}),
        ({"instruction": "a", "output": "b"}, {"instruction": None, "output": "b"}),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": 5}),
        ({"input_ids": [4, 5]}, {"input_ids": None}),
    ]:
        refused(lambda pair=(good, bad): documents(encoder, *pair), "some.jsonl", "row 42", "read as")


def test_columns_of_no_format_are_refused_with_the_formats(encoder):
    for columns in (["text", "id"], ["prompt", "chosen"], ["instruction"], ["labels"]):
        with pytest.raises(ConfigError) as caught:
            encoder.columns(columns, Source(path="some.jsonl"))
        words = ["some.jsonl", *columns, "messages", "conversations", "completion", "instruction", "token ids"]
        assert not [word for word in words if word not in str(caught.value)], caught.value


def test_content_in_parts_is_read_where_all_are_text(tokenizer, encoder):
    parts = [m | {"content": [{"type": "text", "text": part} for part in m["content"]]} for m in LONG]
    assert encoded(encoder, {"messages": parts}) == expected(tokenizer, chatml(LONG))


def test_a_text_before_a_completion_of_messages_is_refused_or_a_user_turn(tokenizer, encoder):
    row = {"prompt": "a", "completion": say("user: b", "assistant: c")}
    try:
        found = encoded(encoder, row)
    except ConfigError:
        return
    assert found == expected(tokenizer, chatml(say("user: a", "user: b", "assistant: c")))


# What a row says is what is trained

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
ASKED = say("user: Weather in Bonn?")


@pytest.mark.parametrize(
    ("template", "messages", "tools", "where"),
    [
        (
            QWEN3,
            say("developer: Answer in French.", *["user: Hi", "assistant: Salut"]),
            [],
            "message 0 (developer), content",
        ),
        (QWEN3, ASKED + say("assistant: It rains.", function_calls='weather(city="Bonn")'), [], "function_calls"),
        (QWEN3, ASKED + say("assistant: It rains.", function_call={"name": "weather"}), [], "message 1 (assistant)"),
        (
            QWEN3,
            [*say("system: Be brief.", tools=[TOOL]), *ASKED, *say("assistant: ok")],
            [],
            "message 0 (system), tools",
        ),
        (None, ASKED + say("assistant: It rains."), [TOOL], "tools"),
        (None, ASKED + say("assistant: ", tool_calls=[WEATHER]), [], "message 1 (assistant), tool_calls"),
        (None, ASKED + say("assistant: 2", reasoning_content="one and one"), [], "message 1 (assistant), reasoning"),
        (
            QWEN3,
            ASKED + say("assistant: 2", "user: ?", reasoning="one and one"),
            [],
            "message 1 (assistant), reasoning",
        ),
    ],
)
def test_what_the_template_leaves_out_is_an_error_that_names_row_message_and_key_or_dropped(
    tokenizer, template, messages, tools, where
):
    """Text that is there is found elsewhere too: Bonn stands in the question."""
    tokenizer.chat_template = template or tokenizer.chat_template
    if messages[-1]["role"] == "user":  # it is the turn before that has the reasoning
        messages = [*messages[:-2], messages[-2] | {"reasoning": "one and one"}, {"role": "user", "content": "?"}]
    row = {"messages": messages, "tools": tools}
    refused(lambda: documents(make(tokenizer), row), "row 41", where, "data.unrendered")
    dropping = make(tokenizer, "--data.unrendered", "drop")
    plain = {"messages": say("user: a", "assistant: b")}
    assert [note[:30] for _, _, note in documents(dropping, row, plain)] == ["dropped: the chat template lea", ""]


def test_thoughts_before_the_last_question_may_go_and_no_others(qwen):
    thoughtful = say("user: a", "assistant: b", thinking="early") + say("user: c", "assistant: d", thinking="late")
    encoder = make(qwen)
    rows = documents(encoder, *[{"messages": thoughtful}] * 3)
    for ids, mask, _ in rows:
        text = qwen.decode(ids)
        assert "early" not in text and "<think>\nlate\n</think>" in qwen.decode(
            [i for i, m in zip(ids, mask, strict=True) if m]
        )
    cut = [*thoughtful[:3], thoughtful[3] | {"train": False}]  # now the first turn is the one to be trained
    refused(lambda: documents(encoder, {"messages": cut}), "message 1 (assistant), reasoning")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_its_three_names_and_in_parts(qwen, name):
    wanted = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\none\n</think>\n\n2<|im_end|>\n"
    parts = [{"type": "reasoning", "value": "one"}, {"type": "text", "value": "2"}]
    for answer in (
        {"content": "2", name: "one"},
        {"content": parts},
        {"content": "2", name: "one", "reasoning": "one"},
    ):
        row = {"messages": [*say("user: 1+1?"), {"role": "assistant", **answer}]}
        assert encoded(make(qwen), row) == expected(qwen, wanted)


SPEAKING = {
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt", "bot", "model", "chatgpt", "Assistant"],
    "system": ["system"],
    "tool": ["tool", "function", "observation", "ipython", "environment"],
}


@pytest.mark.parametrize("key", ["role", "from"])
def test_roles_are_a_closed_set_under_both_keys(tokenizer, encoder, key):
    content = "value" if key == "from" else "content"
    for role, names in SPEAKING.items():
        turns = [(role, "x"), ("user", "y"), ("assistant", "z")]
        wanted = expected(tokenizer, chatml([{"role": r, "content": c} for r, c in turns]))
        for name in names:
            chat = [{key: name, content: "x"}, {key: "user", content: "y"}, {key: "assistant", content: "z"}]
            assert encoded(encoder, {"conversations": chat}) == wanted, name
    for alien in ("alien", 5, "tool_response", None):
        chat = [{key: alien, content: "x"}, {key: "assistant", content: "z"}]
        refused(lambda chat=chat: documents(encoder, {"conversations": chat}), "row 41", "ipython")


def test_a_source_may_say_who_speaks_by_names_of_its_own(tokenizer, encoder, tmp_path):
    """In turns of any kind; a name that it does not give, or gives for no known role, is refused as before."""
    roles = {"Expert": "assistant", "asker": "human", "tool_response": "tool", "user": "system"}
    turns = [("user", "Be brief."), ("asker", "x"), ("tool_response", "y"), ("Expert", "z")]
    said = [{"from": speaker, "value": content} for speaker, content in turns]
    known = dict(zip(roles, ("assistant", "user", "tool", "system"), strict=True))
    wanted = expected(tokenizer, chatml([{"role": known[role], "content": content} for role, content in turns]))
    source = Source(path="some.jsonl", roles=roles)
    for row in ({"conversations": said}, {"prompt": said[:-1], "completion": said[-1:]}):
        [tokens] = encoder.documents([copy.deepcopy(row)], source, [41])
        assert taken_apart(tokens.ids) == wanted
        refused(lambda row=row: documents(encoder, row), "row 41", "a turn of 'asker', none of system")
    alien = source.model_copy(update={"roles": roles | {"asker": "alien"}})
    refused(lambda: encoder.documents([{"conversations": said}], alien, [41]), "row 41", "'asker': 'alien'")
    # tokens that were made before the roles were given are not taken from the cache
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"conversations": [{"from": "user", "value": "x"}, {"from": "gpt", "value": "y"}]}))
    plain = Source(path=str(file))
    lengths = []
    for given in (plain, plain.model_copy(update={"roles": {"user": "assistant"}})):
        made = tokenise(given, encoder, str(tmp_path / "cache"))
        lengths.append(sum(i >= 0 for i in made[0]["ids"]))
    assert lengths[0] < lengths[1], "both turns are trained now"


@pytest.mark.parametrize(
    "part",
    [{"type": "image", "text": "a caption"}, {"type": "image_url", "image_url": "x"}, {"type": ["x"], "text": "y"}],
)
def test_a_part_that_is_no_text_is_refused_by_its_type(encoder, part):
    row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "z"}]}
    refused(lambda: documents(encoder, row), "row 41", str(part["type"]), "text and reasoning are read")


def test_calls_as_turns_of_their_own_are_calls(qwen):
    said = {"messages": [*ASKED, *say("assistant: ", tool_calls=[WEATHER])], "tools": [TOOL]}
    for key, content, name in [("role", "content", "tool_call"), ("from", "value", "function_call")]:
        turn = {key: name, content: json.dumps(WEATHER["function"])}
        row = {"messages": [*ASKED, turn], "tools": json.dumps([json.dumps(TOOL)])}
        assert encoded(make(qwen), row) == encoded(make(qwen), said)


@pytest.mark.parametrize("name", ["train", "training", "trainable", "loss", "weight"])
def test_flags_are_read_under_the_names_in_use(tokenizer, encoder, name):
    wanted = expected(tokenizer, chatml(LONG), {0})
    for off, on in [(False, True), (0, 1), ("false", "true"), ("False", "True"), ("0", "1"), (0.0, None)]:
        row = {"messages": [m | ({name: off} if i == 2 else {name: on}) for i, m in enumerate(LONG)]}
        assert encoded(encoder, row) == wanted, off
    for value in (0.5, "no", 2, [], {}):
        row = {"messages": [m | {name: value} for m in LONG]}
        refused(lambda row=row: documents(encoder, row), "row 41", "true or false")


def test_masks_of_all_names_count_and_padding_is_cut_off(encoder):
    for name in ("loss_mask", "completion_mask", "assistant_masks"):
        assert encoded(encoder, {"input_ids": [7, 8, 9, 0], name: [0, 0, 1, 1]}) == (
            [7, 8, 9, 0],
            [False, False, True, True],
        )
    both = {"input_ids": [7, 8, 9], "loss_mask": [1, 1, 0], "completion_mask": [0, 1, 1]}
    assert encoded(encoder, both) == ([7, 8, 9], [False, True, False])
    for ids, attention in [([3, 3, 7, 8], [0, 0, 1, 1]), ([7, 8, 3, 3], [1, 1, 0, 0])]:
        labels = [i if seen else -100 for i, seen in zip(ids, attention, strict=True)]
        for more in ({}, {"labels": labels}):
            assert encoded(encoder, {"input_ids": ids, "attention_mask": attention, **more}) == ([7, 8], [True, True])
    refused(lambda: documents(encoder, {"input_ids": [7, 8], "loss_mask": [0.5, 1]}), "row 41", "loss_mask")


@pytest.mark.parametrize("bad", [-7, 4096, 5.0, True, "5", [5], 2**40])
def test_an_id_outside_the_vocabulary_is_an_error_with_the_rows_number(encoder, bad):
    refused(lambda: documents(encoder, {"input_ids": [5, 6]}, {"input_ids": [bad]}), "row 42", "0 to 4095")


def test_an_empty_answer_is_dropped_by_its_own_reason(encoder):
    for nothing in ("", " \n", None, [], [{"type": "text", "text": ""}]):
        chat = [*ASKED, {"role": "assistant", "content": nothing}]
        assert documents(encoder, {"messages": chat})[0][2] == "dropped: an empty answer", nothing
    for nothing in ("", " ", None):
        assert documents(encoder, {"instruction": "a", "output": nothing})[0][2] == "dropped: an empty answer", nothing
    for nothing in (None, "", "<|im_end|>"):  # the stop token alone says nothing
        assert documents(encoder, {"prompt": "a", "completion": nothing})[0][2] == "dropped: an empty answer", nothing
    for history in ([{"role": "user", "content": "y"}], [{"user": "x", "assistant": "y"}], [["a"]]):
        with pytest.raises(ConfigError, match=r"some.jsonl, row 41, .*history is no list of pairs.*take it out"):
            documents(encoder, {"instruction": "a", "output": "b", "history": history})
    later = [*ASKED, {"role": "assistant", "content": ""}, *say("user: b", "assistant: c")]
    assert sum(encoded(encoder, {"messages": later})[1]) == len(["c", "<|im_end|>"])


def test_messages_may_be_json_as_text(tokenizer, encoder):
    wanted = expected(tokenizer, chatml(SHORT))
    assert encoded(encoder, {"messages": json.dumps(SHORT)}) == wanted


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "video"])
def test_parts_that_are_no_text_are_refused(encoder, kind):
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: "x"}]
    refused(lambda: documents(encoder, {"messages": [{"role": "user", "content": parts}]}), "row 41", kind)


def test_preference_pairs_are_refused_by_name(encoder, tokenizer):
    for columns in (["prompt", "chosen", "rejected"], ["chosen", "rejected", "messages"]):
        refused(lambda columns=columns: encoder.columns(columns, Source(path="x")), "preferences")


def test_lacunas_template_is_compared_on_the_datas_own_rows(tokenizer):
    """The model's own is Qwen3's, with another word in the tools' turns that begin with one of a certain kind."""
    tokenizer.chat_template = QWEN3.replace(
        "<tool_response>\\n' }}", "<tool_response>\\n' }}{% if 'odd' in message.content %}!{% endif %}", 1
    )
    encoder = make(tokenizer)
    assert encoder.template != tokenizer.chat_template
    call = say("user: x", "assistant: ", tool_calls=[WEATHER])
    plain = {"messages": [*call, *say("tool: even", "assistant: b")]}
    odd = {"messages": [*call, *say("tool: odd", "assistant: b")]}
    assert documents(encoder, *[plain] * 150)[149][2] == ""
    refused(lambda: documents(encoder, *[plain] * 2, odd), "row 43", "data.chat_template")


def test_thoughts_inside_a_content_may_go_though_the_answer_is_one_word(qwen):
    thought = "<think>\nOne thing, then another.\n</think>\n\n"
    chat = say("user: 1+1?", f"assistant: {thought}2", "user: 2+2?", f"assistant: {thought}4")
    ids, _ = encoded(make(qwen), {"messages": chat})
    assert qwen.decode(ids).count("One thing") == 1


def test_a_prompt_and_a_completion_may_be_messages_as_json_text(tokenizer, encoder):
    row = {"prompt": json.dumps(SHORT[:2]), "completion": json.dumps(SHORT[2:])}
    assert encoded(encoder, row) == expected(tokenizer, chatml(SHORT))


@pytest.mark.parametrize(
    "messages",
    [
        say("system: Use functions.", functions='[{"name": "weather"}]') + ASKED + say("assistant: It rains."),
        say("user: Weather?", tool_calls=[WEATHER]) + say("assistant: It rains."),
    ],
    ids=["functions, a word of Qwen3's prose", "calls of a user's turn"],
)
def test_a_word_in_the_templates_prose_is_no_use_of_a_key(qwen, messages):
    refused(lambda: documents(make(qwen), {"messages": messages}), "row 41", "message 0")
    empty = [message | {"functions": [], "tools": ""} for message in LONG]
    assert encoded(make(qwen), {"messages": empty}) == encoded(make(qwen), {"messages": LONG})


def test_tools_are_missed_by_their_names_where_a_template_has_the_word_alone(tokenizer):
    encoder = make(tokenizer, "--data.chat_template", "{# knows no tools #}" + MINE)
    refused(lambda: documents(encoder, {"messages": LONG, "tools": [TOOL]}), "row 41", "leaves out tools")


CALLED = say("user: x", "assistant: ", tool_calls=[{"id": "c1", "type": "function", "function": CALL}])


@pytest.mark.parametrize(
    ("written", "lost"),
    [
        ("{{ c.name }}{{ c.arguments | tojson }}", None),
        ("{{ c.name }}{% for k, v in c.arguments | items %}{{ k }}={{ v }}{% endfor %}", None),
        ("{{ c.arguments | tojson }}", "its name"),
        ("{{ c.name }}", "its arguments"),
        ("{{ c.name }}{{ c.arguments['days'] }}", "one of them"),
        ("", "all of it"),
    ],
)
def test_a_call_is_written_whole_name_and_arguments(tokenizer, written, lost):
    """Though the template asks for message.tool_calls, as those do that then leave something out."""
    calls = "{% for call in m.tool_calls or [] %}{% set c = call.function %}" + written + "{% endfor %}"
    encoder = make(tokenizer, "--data.chat_template", MINE.replace("{{ m.content }}", "{{ m.content }}" + calls))
    if lost:
        refused(lambda: documents(encoder, {"messages": CALLED}), "row 41", "message 1 (assistant), tool_calls")
    else:
        [(ids, _, note)] = documents(encoder, {"messages": CALLED})
        assert not note and "Köln" in tokenizer.decode(ids)


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",  # each below Jinja's own limit
    "{% if 10 ** (10 ** 9) %}{% endif %}",  # arithmetic of constants: Jinja swallows an error in it once
]


@pytest.mark.parametrize("endless", ENDLESS)
def test_a_template_that_does_not_end_is_an_error_with_its_row_and_no_clock_runs_on(endless, tokenizer, monkeypatch):
    monkeypatch.setattr(conversations, "TEMPLATE_SECONDS", 0.3)
    once = "{% if messages[0].content == 'Again?' %}" + endless + "{% endif %}"
    chats = make(tokenizer, "--data.chat_template", MINE + once)
    rows = [{"messages": say(f"user: {question}", "assistant: Yes.")} for question in ("Once?", "Again?")]
    refused(lambda: documents(chats, *rows), "row 42", "TimeoutError", "the chat template does not end")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    # of any conversation at all: before the first row
    refused(lambda: make(tokenizer, "--data.chat_template", MINE + endless), "data.chat_template", "does not end")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


THINKS = MINE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


@pytest.mark.parametrize(
    "messages",
    [
        ASKED + say("assistant: <think>\none and one make two\n</think>\n\n2"),
        ASKED + say("assistant: Let me see.\n<think>\nt\n</think>\n\nb"),
        ASKED + say("assistant: <think>a</think>b<think>c</think>d"),
        say("system: Close by </think>") + ASKED + say("assistant: yes"),
    ],
)
def test_what_stands_before_the_end_of_a_thought_is_trained_or_missed(tokenizer, messages):
    encoder = make(tokenizer, "--data.chat_template", THINKS)
    refused(lambda: documents(encoder, {"messages": messages}), "row 41", "content", "data.unrendered")


def test_before_the_last_question_what_an_answer_thought_may_go(tokenizer):
    encoder = make(tokenizer, "--data.chat_template", THINKS)
    chat = say("user: a", "assistant: <think>early</think>b", "user: c", "assistant: d")
    ids, _ = encoded(encoder, {"messages": chat})
    assert "early" not in tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["arguments", "parameters", "input"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_calls_arguments_are_read_under_their_three_names(qwen, name, as_text):
    given = {"city": "Köln", "id": "A-17", "type": "urgent"}
    call = {"name": "weather", name: json.dumps(given) if as_text else given}
    calls = [{"type": "function", "function": call}]
    for written in (calls, json.dumps(calls), [call]):
        row = {"messages": ASKED + say("assistant: ", tool_calls=written)}
        ids, _ = encoded(make(qwen), row)
        assert '{"name": "weather", "arguments": {"city": "Köln", "id": "A-17", "type": "urgent"}}' in qwen.decode(ids)


def test_a_call_with_another_key_is_refused_and_so_is_one_whose_id_among_its_arguments_is_left_out(qwen, tokenizer):
    row = {"messages": ASKED + say("assistant: ", tool_calls=[{"function": {"name": "weather", "kwargs": {"a": 1}}}])}
    refused(lambda: documents(make(qwen), row), "row 41", "kwargs", "name and arguments are read")
    one = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments.city }}{% endfor %}"
    encoder = make(tokenizer, "--data.chat_template", MINE.replace("{{ m.content }}", "{{ m.content }}" + one))
    call = {"name": "weather", "arguments": {"city": "Köln", "id": "A-17"}}
    row = {"messages": ASKED + say("assistant: ", tool_calls=[{"function": call}])}
    refused(lambda: documents(encoder, row), "row 41", "tool_calls")


def test_tools_are_missed_though_their_names_stand_elsewhere(tokenizer):
    """A template that reads them from a message, and a question that names one."""
    reads = "{% if messages[0].tools %}{{ messages[0].tools }}{% endif %}"
    encoder = make(tokenizer, "--data.chat_template", reads + MINE)
    chat = say("user: Call weather.", "assistant: weather()")
    refused(lambda: documents(encoder, {"messages": chat, "tools": [TOOL]}), "row 41", "leaves out tools")


JSON_ANSWERS = [
    json.dumps([{"name": "weather", "arguments": {"city": "Bonn"}}]),
    json.dumps(say("user: hi", "assistant: yo")),
    '[{"a": 1}] is what?',
]


@pytest.mark.parametrize("answer", JSON_ANSWERS)
def test_text_that_is_json_is_text(tokenizer, encoder, answer):
    ids, mask = encoded(encoder, {"prompt": "As JSON: ", "completion": answer})
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == answer + "<|im_end|>"
    want = encoded(encoder, {"messages": say("user: As JSON:", f"assistant: {answer}")})
    assert encoded(encoder, {"instruction": "As JSON:", "output": answer}) == want
    want = encoded(encoder, {"messages": say(f"user: {answer}", "assistant: ok")})
    assert encoded(encoder, {"instruction": answer, "output": "ok"}) == want


def test_marks_around_what_the_user_says_are_refused(tokenizer):
    template = MINE.replace("m.role == 'assistant'", "m.role == 'user'")
    assert template != MINE
    refused(lambda: make(tokenizer, "--data.chat_template", template), "data.chat_template", "marked answer")


def test_a_template_in_a_file_with_a_bom_is_read_without_it(tokenizer, tmp_path):
    (tmp_path / "bom.jinja").write_text(MINE, "utf-8-sig")
    with_bom = make(tokenizer, "--data.chat_template", str(tmp_path / "bom.jinja"))
    assert encoded(with_bom, {"messages": LONG}) == encoded(
        make(tokenizer, "--data.chat_template", MINE), {"messages": LONG}
    )


def test_another_template_of_the_model_makes_the_token_cache_anew(qwen):
    before = make(qwen).fingerprint()
    qwen.chat_template = qwen.chat_template.replace("# Tools", "# Functions")
    assert make(qwen).fingerprint() != before


def test_columns_that_fields_names_are_read_before_others(tokenizer):
    encoder = make(tokenizer)
    source = Source(path="x", fields={"instruction": "question", "output": "answer"})
    known = encoder.columns(["prompt", "completion", "instruction", "output"], source)
    assert known == ["instruction", "output"]
    plain = encoder.columns(["prompt", "completion", "instruction", "output"], Source(path="x"))
    assert plain == ["prompt", "completion"]


@pytest.mark.parametrize("turn", [None, ["user", "a"], "user: a"])
def test_a_turn_that_is_no_object_is_refused(encoder, turn):
    refused(lambda: documents(encoder, {"messages": [turn, *say("assistant: b")]}), "row 41", "a turn is no object")


@pytest.mark.parametrize("said", [{"text": "a"}, {"value": "a"}, {"parts": [{"text": "a"}]}])
def test_what_a_turn_says_is_read_under_the_names_in_use(encoder, said):
    row = {"messages": [{"role": "user", **said}, *say("assistant: b")]}
    assert encoded(encoder, row) == encoded(encoder, {"messages": say("user: a", "assistant: b")})


def test_a_turn_without_a_word_is_one_whose_word_is_null(encoder):
    """Arrow gives a null where JSON has no key."""
    for empty in ({"role": "user"}, {"role": "user", "content": None}):
        row = {"messages": [empty, *say("assistant: b")]}
        assert encoded(encoder, row) == encoded(encoder, {"messages": say("user: ", "assistant: b")})
    assert (
        documents(encoder, {"messages": [*say("user: a"), {"role": "assistant"}]})[0][2] == "dropped: an empty answer"
    )


def test_parts_of_openais_and_anthropics_types_are_read(qwen):
    parts = [{"type": "thinking", "thinking": "one"}, {"type": "output_text", "text": "2"}]
    row = {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]}]}
    row["messages"].append({"role": "assistant", "content": parts})
    wanted = {"messages": say("user: 1+1?") + say("assistant: 2", reasoning_content="one")}
    assert encoded(make(qwen), row) == encoded(make(qwen), wanted)


def test_without_eos_and_template_it_is_said_that_there_is_none(tokenizer):
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    refused(lambda: make(tokenizer), "model.tokenizer", "no EOS token")


JSON_PROMPTS = [
    (json.dumps(SHORT[:2]), json.dumps(SHORT[2:])),
    (json.dumps(SHORT[:2], indent=1), SHORT[2]["content"]),
    (json.dumps([{"content": "a } b", "role": "user"}]), json.dumps(say("assistant: c"))),
]


@pytest.mark.parametrize(("prompt", "completion"), JSON_PROMPTS)
def test_a_prompt_that_is_messages_in_json_is_messages_whatever_is_beside_it(encoder, prompt, completion):
    asked = json.loads(prompt)
    answer = json.loads(completion) if completion.startswith("[") else say(f"assistant: {completion}")
    for beside in ({}, {"system": "You are nice."}):
        system = say(*(f"system: {text}" for text in beside.values())) if beside else []
        row = {"prompt": prompt, "completion": completion, **beside}
        want = {"messages": [*system, *({**turn, "train": False} for turn in asked), *answer]}
        assert encoded(encoder, row) == encoded(encoder, want)


@pytest.mark.parametrize(
    "call",
    [
        {"name": "weather", "arguments": {"city": "Bonn"}, "parameters": None},
        {"name": "weather", "arguments": None, "input": {"city": "Bonn"}},
        {"name": "weather", "arguments": {"city": "Bonn"}, "strict": None},
    ],
)
def test_nulls_of_a_call_are_no_keys_and_take_no_arguments_away(qwen, call):
    ids, _ = encoded(make(qwen), {"messages": ASKED + say("assistant: ", tool_calls=[{"function": call}])})
    assert '"arguments": {"city": "Bonn"}}' in qwen.decode(ids)


def test_arguments_under_two_names_are_refused(qwen):
    call = {"name": "weather", "arguments": {"city": "Bonn"}, "parameters": {"city": "Ulm"}}
    row = {"messages": ASKED + say("assistant: ", tool_calls=[{"function": call}])}
    refused(lambda: documents(make(qwen), row), "row 41", "parameters")


def test_only_what_an_answer_thought_may_go_not_what_it_said_before(qwen):
    chat = say("user: a", "assistant: Sure.<think>t</think> yes", "user: c", "assistant: d")
    refused(lambda: documents(make(qwen), {"messages": chat}), "row 41", "message 1 (assistant), content")


def test_rows_of_another_format_or_with_a_null_in_its_place_say_what_is_missing(encoder):
    """Two formats in one file, and a question that is null."""
    refused(lambda: documents(encoder, {"messages": LONG}, {"prompt": "a", "completion": "b"}), "row 42", "no messages")
    refused(lambda: documents(encoder, {"instruction": None, "output": "b"}), "row 41", "no instruction", "one format")


@pytest.mark.parametrize(
    "text", ['[{"content": "a", "id": 1}]\nSum up', '[{"role": "user"}] <- mend', '[{"value": 1}]']
)
def test_a_prompt_that_only_begins_like_messages_is_text(tokenizer, encoder, text):
    ids, _ = encoded(encoder, {"prompt": text, "completion": " ok"})
    assert tokenizer.decode(ids) == text + " ok<|im_end|>"


@pytest.mark.parametrize("first", [{"name": None}, {"text": "q"}])
def test_a_prompt_of_messages_in_json_may_begin_with_any_key(encoder, first):
    turn = first | {"role": "user"} | ({} if "text" in first else {"content": "q"})
    row = {"prompt": json.dumps([turn]), "completion": json.dumps(say("assistant: a"))}
    assert encoded(encoder, row) == encoded(encoder, {"messages": say("user: q", "assistant: a")})


def test_of_several_names_for_what_a_turn_says_content_counts_if_it_says_something(encoder):
    want = encoded(encoder, {"messages": say("user: q", "assistant: hello")})
    for answer in ({"content": "hello", "value": "positive"}, {"content": "", "text": "hello"}, {"value": "hello"}):
        row = {"messages": [*say("user: q"), {"role": "assistant", **answer}]}
        assert encoded(encoder, row) == want


@pytest.mark.parametrize("key", ["function_calls", "functions", "function_call"])
def test_an_empty_answer_with_an_empty_list_of_calls_is_empty(encoder, key):
    row = {"messages": say("user: q", "assistant: ", **{key: []})}
    assert documents(encoder, row)[0][2] == "dropped: an empty answer"


def test_turns_that_speak_of_turns_in_json_are_turns(encoder):
    """What a list of turns says may look like JSON of turns, and so may an answer."""
    asked = say('user: What is [{"role": "user"}]?')
    answer = say('assistant: A list: [{"role": "user"}]')
    row = {"prompt": asked, "completion": answer}
    want = {"messages": [asked[0] | {"train": False}, *answer]}
    assert encoded(encoder, row) == encoded(encoder, want)
    as_json = row | {"prompt": json.dumps(asked)}
    assert encoded(encoder, as_json) == encoded(encoder, want)


LLAMA = (Path(__file__).parent / "originals/llama3.1.jinja").read_text()


@pytest.mark.parametrize("template", [QWEN3, LLAMA])
def test_calls_are_read_with_function_around_name_and_arguments_or_without(tokenizer, template):
    tokenizer.chat_template = template
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    encoder = make(tokenizer)
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    wanted = encoded(encoder, {"messages": ASKED + say("assistant: ", tool_calls=[{"function": call}])})
    for written in ([call], json.dumps([call])):
        assert encoded(encoder, {"messages": ASKED + say("assistant: ", tool_calls=written)}) == wanted, written


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_are_json_or_text_each_or_all(qwen, tools):
    encoder = make(qwen)
    wanted = encoded(encoder, {"messages": SHORT, "tools": [TOOL]})
    assert encoded(encoder, {"messages": SHORT, "tools": tools}) == wanted


def test_thoughts_in_the_content_and_beside_it_are_refused(qwen):
    """Qwen3's template would write both: the same thought would be trained twice."""
    row = {"messages": say("user: 1+1?") + say("assistant: <think>one</think>2", reasoning_content="one")}
    refused(lambda: documents(make(qwen), row), "row 41", "one thought is in content and beside it")


@pytest.mark.parametrize("content", [["Paris", "Rome"], {"text": "20 C"}, [["text", "x"]]])
def test_content_that_is_no_text_and_no_parts_is_refused(encoder, content):
    """A tool's result as an object or a list is none: whose words would be joined, and whose keys would go?"""
    row = {"messages": [*say("user: a", "assistant: b"), {"role": "tool", "content": content}, *say("assistant: c")]}
    refused(lambda: documents(encoder, row), "row 41", "a part")


def test_text_without_bytes_is_refused_by_what_is_wrong_with_it(encoder):
    refused(lambda: documents(encoder, {"messages": say("user: a", "assistant: \ud83d")}), "row 41", "surrogates")


PARTS = [
    [{"text": "secret", "thought": True}, {"text": "Answer"}],  # Gemini's thoughts
    [{"text": "see", "image": "a.png"}],
    [{"type": "text", "text": "see", "value": "lost"}],
    [{"type": "tool_use", "name": "f", "input": {"a": 1}}],
    [{"type": "text", "text": None}],
]


@pytest.mark.parametrize("parts", PARTS)
def test_a_part_that_says_more_than_a_text_is_refused(encoder, parts):
    row = {"messages": [*say("user: a"), {"role": "assistant", "content": parts}]}
    refused(lambda: documents(encoder, row), "row 41", "a part", "text and reasoning are read")


def test_what_a_part_says_to_a_server_and_nulls_are_no_text(encoder):
    part = {"type": "text", "text": "a", "image_url": None, "cache_control": {"type": "ephemeral"}}
    row = {"messages": [{"role": "user", "content": [part]}, *say("assistant: b")]}
    assert encoded(encoder, row) == encoded(encoder, {"messages": say("user: a", "assistant: b")})


def test_a_thought_that_comes_twice_in_parts_is_thought_twice(qwen):
    thoughts = ["Wait.", "No.", "Wait."]
    parts = [{"type": "thinking", "thinking": thought} for thought in thoughts] + [{"type": "text", "text": "A"}]
    row = {"messages": [*say("user: Q"), {"role": "assistant", "content": parts}]}
    wanted = {"messages": say("user: Q") + say("assistant: A", reasoning_content="\n".join(thoughts))}
    assert encoded(make(qwen), row) == encoded(make(qwen), wanted)


def test_arguments_beside_the_function_are_refused(qwen):
    call = {"function": {"name": "add"}, "arguments": {"a": 1, "b": 2}}
    row = {"messages": ASKED + say("assistant: ", tool_calls=[call])}
    refused(lambda: documents(make(qwen), row), "row 41", "a call has ['function', 'arguments', 'name']")


@pytest.mark.parametrize("value", [1, 2.5, True])
def test_arguments_that_are_numbers_are_missed_as_texts_are(tokenizer, value):
    names = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    encoder = make(tokenizer, "--data.chat_template", MINE.replace("{{ m.content }}", "{{ m.content }}" + names))
    row = {"messages": ASKED + say("assistant: ", tool_calls=[{"function": {"name": "f", "arguments": {"a": value}}}])}
    refused(lambda: documents(encoder, row), "row 41", "leaves out", "tool_calls")


def test_an_empty_word_beside_the_one_that_says_something_is_not_told(encoder):
    said = [{"from": "system", "value": ""}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    with lacuna_log() as messages:
        documents(encoder, {"conversations": said})
    assert messages == []


def test_an_answer_that_is_a_number_is_no_text(encoder):
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": 0}]
    refused(lambda: documents(encoder, {"conversations": said}), "row 41", "text and reasoning are read")


def test_answers_with_a_label_are_refused_as_preferences(encoder):
    """KTO's rows: half of them say what should not be said."""
    refused(lambda: encoder.columns(["prompt", "completion", "label"], Source(path="x")), "x", "preferences")
    named = Source(path="x", fields={"prompt": "prompt"})
    assert encoder.columns(["prompt", "completion", "label"], named) == ["prompt", "completion"]


def test_two_thoughts_in_two_places_and_a_tag_in_prose_are_no_thought_twice(qwen):
    for content, thought in [("<think>a</think>2", "b"), ("It ends with `</think>`.", "b")]:
        ids, mask = encoded(make(qwen), {"messages": say("user: Q") + say(f"assistant: {content}", reasoning=thought)})
        trained = qwen.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert trained.count(thought) == 1 and content in trained


def test_a_thought_under_a_key_and_in_a_part_is_one_and_an_empty_one_is_none(qwen):
    text = {"type": "text", "text": "2"}
    for name in ("reasoning", "reasoning_content"):
        answer = {"role": "assistant", name: "One.", "content": [{"type": "thinking", "thinking": "One."}, text]}
        wanted = {"messages": say("user: Q") + say("assistant: 2", reasoning_content="One.")}
        assert encoded(make(qwen), {"messages": [*say("user: Q"), answer]}) == encoded(make(qwen), wanted)
    parts = [{"type": "thinking", "thinking": "", "signature": "s"}, {"type": "text", "text": "<think>a</think>2"}]
    row = {"messages": [*say("user: Q"), {"role": "assistant", "content": parts}]}
    assert encoded(make(qwen), row) == encoded(make(qwen), {"messages": say("user: Q", "assistant: <think>a</think>2")})


def test_a_part_as_openais_responses_have_it_is_its_text(encoder):
    part = {"type": "output_text", "text": "b", "annotations": [], "logprobs": [], "id": "msg_1", "image": ""}
    row = {"messages": [*say("user: a"), {"role": "assistant", "content": [part]}]}
    assert encoded(encoder, row) == encoded(encoder, {"messages": say("user: a", "assistant: b")})


def test_calls_have_a_place_and_nulls_beside_their_function(qwen):
    function = {"name": "f", "arguments": {"a": 1, "b": None, "c": [True, 2.5]}}
    wanted = encoded(make(qwen), {"messages": ASKED + say("assistant: ", tool_calls=[{"function": function}])})
    whole = {"id": "call_1", "type": "function", "index": 0, "function": function, "arguments": None, "name": None}
    for call in (whole, whole | {"function": function | {"index": 1}}, function | {"id": "call_1", "index": 0}):
        assert encoded(make(qwen), {"messages": ASKED + say("assistant: ", tool_calls=[call])}) == wanted


@pytest.mark.parametrize("columns", [["instruction", "output", "kto_tag"], ["messages", "kto_tag"]])
def test_answers_with_llama_factorys_label_are_refused_as_preferences(encoder, columns):
    refused(lambda: encoder.columns(columns, Source(path="x")), "x", "preferences")


def test_an_answer_under_a_key_that_is_not_read_is_told_by_that_key(encoder):
    with lacuna_log() as messages:
        documents(encoder, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "message": "b"}]})
    assert [message for message in messages if "'message', which lacuna does not read" in message]


def test_a_blank_thought_is_none(tokenizer, encoder):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>t</think>b"}]
    assert encoded(encoder, {"messages": [turns[0], turns[1] | {"reasoning_content": " "}]}) == encoded(
        encoder, {"messages": turns}
    )
