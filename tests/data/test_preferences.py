"""Preference rows to ids and masks of both answers: every shape that pairs have on the Hub, and what is refused.

The reference is made without lacuna: the tokenizer's own template renders each side, a regular expression finds the
turns, and a plain call of the tokenizer encodes it once.
"""

import copy
import itertools
import json
import os
import runpy
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lacuna.config import ConfigError, Source, load_config
from lacuna.data import conversations
from lacuna.data.batch import IGNORE, SECOND, assemble, collate
from lacuna.data.loader import Loader, RowDataset
from lacuna.data.tokenize import load_tokenizer

from .corpora import lacuna_log
from .test_conversations import QWEN3, TOOLS, expected, refused, say

RECIPE = str(Path(__file__).parents[2] / "examples" / "dpo.py")
make_pair_encoder = runpy.run_path(RECIPE)["make_encoder"]
PREFERENCE = Path(os.environ.get("LACUNA_ASSETS", "nowhere")) / "preference"
needs_assets = pytest.mark.skipif(not PREFERENCE.is_dir(), reason="LACUNA_ASSETS is not set")


class Side(NamedTuple):
    ids: list[int]
    trained: list[bool]


class Sides(NamedTuple):
    chosen: Side
    rejected: Side


# ---- lacuna's side


def config(*words: str, task: str = RECIPE, path="x"):
    argv = ["--data.sources", json.dumps([{"path": str(path)}]), "--train.steps", "1", "--optim.lr", "1", *words]
    return load_config(None, argv, task)


def make(tokenizer, *words: str):
    return make_pair_encoder(config(*words), tokenizer)


def make_other(tokenizer, task: str):
    return conversations.make_encoder(config(task=task), tokenizer)


@pytest.fixture
def encoder(tokenizer):
    return make(tokenizer)


def documents(encoder, *rows: dict) -> list:
    """The Tokens of rows that have the numbers 41, 42, …"""
    return encoder.documents(copy.deepcopy(list(rows)), Source(path="some.jsonl"), range(41, 41 + len(rows)))


def taken_apart(ids: np.ndarray) -> Sides:
    """Of a pair's document: ids below 0 are context, and those with the bit are the rejected answer's, to its end."""
    assert ids.dtype == np.int32
    chosen = Side([], [])
    rejected = Side([], [])
    for stored in ids.tolist():
        magnitude = stored if stored >= 0 else ~stored
        side = rejected if magnitude & SECOND else chosen
        assert side is rejected or not rejected.ids, "the chosen answer goes on after the rejected one"
        side.trained.append(stored >= 0 and bool(side.ids))  # nothing predicts a first token
        side.ids.append(magnitude & ~SECOND)
    return Sides(chosen, rejected)


def encoded(encoder, row: dict) -> Sides:
    """Both sides of a row that is not dropped."""
    [tokens] = documents(encoder, row)
    assert tokens.note == ""
    return taken_apart(tokens.ids)


def note(encoder, row: dict) -> str:
    """Why a row is dropped."""
    [tokens] = documents(encoder, row)
    assert len(tokens.ids) == 0
    return tokens.note


# ---- the reference


def chat(tokenizer, prompt: list[dict], answer: list[dict], tools=None) -> Side:
    """The conversation as its template renders it; trained is what the assistant says in the answer."""
    text = tokenizer.apply_chat_template(prompt + answer, tools=tools, tokenize=False)
    context = [message for message in prompt if message["role"] == "assistant"]
    return Side(*expected(tokenizer, text, out=range(len(context))))


def chats(tokenizer, prompt: list[dict], chosen: list[dict], rejected: list[dict], tools=None) -> Sides:
    return Sides(chat(tokenizer, prompt, chosen, tools), chat(tokenizer, prompt, rejected, tools))


def text(tokenizer, prompt: str, answer: str) -> Side:
    """Plain text and a stop token, encoded at once; trained is every token that holds a character of the answer."""
    whole = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")  # of the template's turns
    mask = [end > len(prompt) for _, end in whole["offset_mapping"]]
    mask[0] = False  # nothing predicts a first token
    return Side([*whole["input_ids"], stop], [*mask, True])


def texts(tokenizer, prompt: str, chosen: str, rejected: str) -> Sides:
    return Sides(text(tokenizer, prompt, chosen), text(tokenizer, prompt, rejected))


# ---- formats: each of them a row, the prompt that is meant, and both answers

ASKED = say("system: Be brief.", "user: Who are you?")
GOOD = say("assistant: The white whale 🐋.")
BAD = say("assistant: I am Ahab, and you?")
TALK = say("user: a b", "assistant: c", "user: d e")  # a context with an assistant's turn
WORDS = {"system": "system", "user": "human", "assistant": "gpt"}


def shared(messages: list[dict]) -> list[dict]:
    """As ShareGPT writes them."""
    return [{"from": WORDS[message["role"]], "value": message["content"]} for message in messages]


CONVERSATIONS = {
    "TRL, explicit": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, ASKED),
    "TRL, explicit, an earlier turn": ({"prompt": TALK, "chosen": GOOD, "rejected": BAD}, TALK),
    "TRL, implicit": ({"chosen": ASKED + GOOD, "rejected": ASKED + BAD}, ASKED),
    "TRL, implicit, an earlier turn": ({"chosen": TALK + GOOD, "rejected": TALK + BAD}, TALK),
    "a null prompt": ({"prompt": None, "chosen": ASKED + GOOD, "rejected": ASKED + BAD}, ASKED),
    "the prompt in it and beside it": ({"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD}, ASKED),
    "its question beside it": ({"prompt": TALK[-1]["content"], "chosen": TALK + GOOD, "rejected": TALK + BAD}, TALK),
    "an id and a time in each turn": (
        {"chosen": [m | {"id": i} for i, m in enumerate(TALK + GOOD)], "rejected": TALK + BAD},
        TALK,
    ),
    "a text and lists of one": ({"prompt": "Who?", "chosen": GOOD, "rejected": BAD}, say("user: Who?")),
    "a text and dicts": ({"prompt": "Who?", "chosen": GOOD[0], "rejected": BAD[0]}, say("user: Who?")),
    "messages and dicts": ({"prompt": TALK, "chosen": GOOD[0], "rejected": BAD[0]}, TALK),
    "messages and texts": (
        {"prompt": TALK, "chosen": GOOD[0]["content"], "rejected": BAD[0]["content"]},
        TALK,
    ),
    "a system column": ({"system": "S", "prompt": TALK, "chosen": GOOD, "rejected": BAD}, [*say("system: S"), *TALK]),
    "an empty system column": ({"system": "", "prompt": TALK, "chosen": GOOD, "rejected": BAD}, TALK),
    "a column `messages`": ({"messages": TALK, "chosen": GOOD, "rejected": BAD}, TALK),
    "a column `messages`, and dicts": ({"messages": TALK, "chosen": GOOD[0], "rejected": BAD[0]}, TALK),
    "LLaMA-Factory": (
        {"conversations": shared(ASKED), "chosen": shared(GOOD)[0], "rejected": shared(BAD)[0]},
        ASKED,
    ),
    "LLaMA-Factory, an earlier turn": (
        {"conversations": shared(TALK), "chosen": shared(GOOD)[0], "rejected": shared(BAD)[0]},
        TALK,
    ),
    "ShareGPT, a system column": (
        {"system": "S", "conversations": shared(TALK), "chosen": shared(GOOD), "rejected": shared(BAD)},
        [*say("system: S"), *TALK],
    ),
    "ShareGPT, implicit": ({"chosen": shared(TALK + GOOD), "rejected": shared(TALK + BAD)}, TALK),
    "UltraFeedback": (
        {
            "prompt": "a b",
            "prompt_id": "f0e37e9f",
            "chosen": say("user: a b") + GOOD,
            "rejected": say("user: a b") + BAD,
            "messages": say("user: a b") + GOOD,
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        say("user: a b"),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_of_every_shape_are_a_prompt_and_two_answers(name, tokenizer, encoder):
    row, prompt = CONVERSATIONS[name]
    assert encoded(encoder, row) == chats(tokenizer, prompt, GOOD, BAD)


def test_the_first_words_of_two_answers_that_are_equal_are_trained(tokenizer, encoder):
    """What both begin with is a matter of whole messages: simpo and orpo would see other lengths."""
    chosen = say("assistant: Yes, of course.")
    rejected = say("assistant: Yes, of blubber.")
    want = chats(tokenizer, ASKED, chosen, rejected)
    assert encoded(encoder, {"chosen": ASKED + chosen, "rejected": ASKED + rejected}) == want
    assert encoded(encoder, {"prompt": ASKED, "chosen": chosen, "rejected": rejected}) == want


def test_answers_of_several_turns_train_the_assistants(tokenizer, encoder):
    chosen = [*GOOD, *say("user: And then?", "assistant: The end.", "user: Oh", "assistant: Yes.")]
    rejected = [*BAD, *say("user: And then?", "assistant: No idea.")]
    want = chats(tokenizer, TALK, chosen, rejected)
    assert sum(np.diff(want.chosen.trained, prepend=False) == 1) == 6  # three turns begin, and end
    assert encoded(encoder, {"prompt": TALK, "chosen": chosen, "rejected": rejected}) == want
    assert encoded(encoder, {"chosen": TALK + chosen, "rejected": TALK + rejected}) == want
    assert encoded(encoder, {"messages": TALK, "chosen": chosen, "rejected": rejected}) == want


def test_conversations_that_begin_otherwise_have_no_prompt_in_common(tokenizer, encoder):
    chosen = say("user: x", "assistant: y")
    rejected = say("user: z", "assistant: y")
    want = chats(tokenizer, [], chosen, rejected)
    assert encoded(encoder, {"chosen": chosen, "rejected": rejected}) == want


def test_tools_and_calls_are_in_both_answers(tokenizer):
    tokenizer.chat_template = QWEN3
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    chosen = [*say("assistant: ", tool_calls=[call]), *say("tool: rain", "assistant: It rains.")]
    rejected = say("assistant: How should I know?")
    prompt = say("system: Be brief.", "user: Rain?")
    want = chats(tokenizer, prompt, chosen, rejected, TOOLS)
    assert want != chats(tokenizer, prompt, chosen, rejected)
    for tools in (TOOLS, json.dumps(TOOLS)):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools}
        assert encoded(make(tokenizer), row) == want
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected, "tools": TOOLS}
    assert encoded(make(tokenizer), row) == want


def test_plain_text_stays_plain_text(tokenizer, encoder):
    for prompt, chosen, rejected in [
        ("Call me", " Ishmael.", " Ahab, or what you like"),
        ("Question: 1 + 1?\nAnswer:", " 2", " 3"),
        ("naïve ", "café\n", "cafe"),
        ("", "x y", "z"),
    ]:
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        assert encoded(encoder, row) == texts(tokenizer, prompt, chosen, rejected), row


def test_texts_without_a_prompt_have_what_both_begin_with(tokenizer, encoder):
    """As Anthropic's hh-rlhf."""
    prompt = "\n\nHuman: Is it far?\n\nAssistant: Where?\n\nHuman: There.\n\nAssistant:"
    for chosen, rejected in [(" Not at all.", " It is."), (" Far\n\nHuman: oh", " Away"), (" 1", " 2")]:
        want = texts(tokenizer, prompt, chosen, rejected)
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        assert encoded(encoder, row) == want, row
        assert encoded(encoder, row | {"prompt": None}) == want


def test_texts_may_part_behind_a_line(tokenizer, encoder):
    """No word of the question is trained, whether or not the line's end is."""
    prompt = "Human: Is it far?\nAssistant:"
    found = encoded(encoder, {"chosen": prompt + "\nYes", "rejected": prompt + "\nNo"})
    assert found in (texts(tokenizer, prompt, "\nYes", "\nNo"), texts(tokenizer, prompt + "\n", "Yes", "No"))


def test_texts_of_which_one_goes_on_keep_the_word_where_they_part(tokenizer, encoder):
    prompt = "Human: Is it far?\n\nAssistant:"
    for short, long in [
        (" Yes", " Yes, very"),
        (" Yes", " Yes, sir"),
        (" Yes", " Yes sir"),
        (" Yes sir", " Yesterday"),
    ]:
        for chosen, rejected in ((short, long), (long, short)):
            row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
            assert encoded(encoder, row) == texts(tokenizer, prompt, chosen, rejected), row


def test_a_tokenizer_without_a_template_is_enough_for_plain_text(tokenizer):
    tokenizer.chat_template = None
    row = {"prompt": "Call me", "chosen": " Ishmael.", "rejected": " Ahab"}
    sides = encoded(make(tokenizer), row)
    end = tokenizer.eos_token_id
    assert [side.ids[-1] for side in sides] == [end, end]
    assert sides.chosen.ids[:-1] == tokenizer("Call me Ishmael.")["input_ids"]
    refused(lambda: documents(make(tokenizer), {"prompt": TALK, "chosen": GOOD, "rejected": BAD}), "data.chat_template")


def count_dropped(found, wanted: list, seq_len: int) -> int:
    """Every pair that fits is what is wanted, and every other one is dropped: how many of these?"""
    dropped = 0
    for tokens, want in zip(found, wanted, strict=True):
        if len(want.chosen.ids) + len(want.rejected.ids) <= seq_len:
            assert taken_apart(tokens.ids) == want
        else:
            assert tokens.note.startswith("dropped")
            dropped += 1
    return dropped


@needs_assets
def test_llama_factorys_demo_is_read_whole(tokenizer):
    encoder = make(tokenizer, "--train.seq_len", "8192")
    rows = json.loads((PREFERENCE / "lf_dpo_en_demo.json").read_text())
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    wanted = []
    for row in rows:
        turns = [*row["conversations"], row["chosen"], row["rejected"]]
        *prompt, chosen, rejected = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
        wanted.append(chats(tokenizer, prompt, [chosen], [rejected]))
    assert count_dropped(documents(encoder, *rows), wanted, 8192) < 10


@needs_assets
def test_the_gsm8k_pairs_are_read_whole(tokenizer, encoder):
    rows = [json.loads(line) for line in (PREFERENCE / "gsm8k_pairs_model_vs_model.jsonl").read_text().splitlines()]
    wanted = [texts(tokenizer, row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    assert count_dropped(documents(encoder, *rows), wanted, 1024) < 50


# ---- what is dropped


def test_equal_answers_are_dropped_and_say_so(encoder):
    for row in [
        {"prompt": "Call me", "chosen": " Ishmael.", "rejected": " Ishmael."},
        {"prompt": ASKED, "chosen": GOOD, "rejected": GOOD},
        {"prompt": ASKED, "chosen": GOOD, "rejected": shared(GOOD)},  # the same in other words
        {"conversations": shared(ASKED), "chosen": shared(GOOD)[0], "rejected": shared(GOOD)[0]},
        {"chosen": ASKED + GOOD, "rejected": ASKED + GOOD},
    ]:
        assert note(encoder, row).startswith("dropped: "), row
    reasons = {note(encoder, {"prompt": "a", "chosen": " b", "rejected": " b"})}
    reasons.add(note(encoder, {"prompt": ASKED, "chosen": GOOD, "rejected": GOOD}))
    assert len(reasons) == 1


def test_an_empty_answer_drops_the_pair(encoder):
    for row in [
        {"prompt": "Call me", "chosen": " Ishmael.", "rejected": ""},
        {"prompt": "Call me", "chosen": "", "rejected": " Ishmael."},
        {"prompt": ASKED, "chosen": say("assistant: "), "rejected": BAD},
        {"prompt": ASKED, "chosen": [], "rejected": BAD},
        {"prompt": ASKED, "chosen": GOOD, "rejected": None},
        {"conversations": shared(ASKED), "chosen": shared(GOOD)[0], "rejected": {"from": "gpt", "value": ""}},
        {"chosen": ASKED + GOOD, "rejected": ASKED + GOOD + TALK[:2]},  # what both begin with is all of chosen's
    ]:
        assert note(encoder, row).startswith("dropped: "), row


def test_pairs_longer_together_than_a_row_are_dropped_and_never_cut(tokenizer):
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    want = chats(tokenizer, ASKED, GOOD, BAD)
    length = len(want.chosen.ids) + len(want.rejected.ids)
    assert encoded(make(tokenizer, "--train.seq_len", str(length)), row) == want
    short = ("--train.seq_len", str(length - 1))
    assert len(want.chosen.ids) < length - 1
    assert note(make(tokenizer, *short), row).startswith("dropped: ")
    with pytest.raises(ConfigError, match=r"data\.overlong"):
        make(tokenizer, "--data.overlong", "truncate")


# ---- what is refused


def test_only_the_columns_that_count_are_read(encoder):
    for columns, read in [
        (["prompt", "chosen", "rejected"], ["prompt", "chosen", "rejected"]),
        (["chosen", "rejected"], ["chosen", "rejected"]),
        (["conversations", "chosen", "rejected", "id"], ["conversations", "chosen", "rejected"]),
        (["chosen", "rejected", "tools", "system", "score"], ["chosen", "rejected", "tools", "system"]),
    ]:
        assert encoder.columns(columns, Source(path="x")) == read
    ultra = ["prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"]
    got = encoder.columns(ultra, Source(path="x"))
    assert {"prompt", "chosen", "rejected"} <= set(got)
    assert not {"prompt_id", "score_chosen", "score_rejected"} & set(got)


def test_rows_without_both_answers_are_refused_and_their_columns_named(encoder):
    for columns in (["text"], ["messages"], ["prompt", "chosen"], ["prompt", "completion"], ["input_ids"]):
        refused(lambda columns=columns: encoder.columns(columns, Source(path="x")), "x", "chosen", "rejected", *columns)


def test_a_question_under_another_name_is_not_lost(tokenizer, encoder):
    """As Intel's orca_dpo_pairs and LLaMA-Factory's alpaca pairs have it."""
    for columns in (["system", "question", "chosen", "rejected"], ["instruction", "input", "chosen", "rejected"]):
        encoder.columns(columns, Source(path="some.jsonl"))
        name = next(column for column in columns if column in ("question", "instruction"))
        row = {"chosen": "It is Rome", "rejected": "It is Paris"}
        for asked in ({}, {"prompt": ""}, {"prompt": None, "messages": []}):
            refused(lambda row=row | asked: documents(encoder, row), "row 41", f'fields = {{prompt = "{name}"}}')
    encoder.columns(["question", "chosen", "rejected"], Source(path="some.jsonl"))  # whole conversations need none
    row = {"chosen": TALK + GOOD, "rejected": TALK + BAD}
    assert encoded(encoder, row) == chats(tokenizer, TALK, GOOD, BAD)
    encoder.columns(["chosen", "rejected"], Source(path="some.jsonl"))
    for row in ({"chosen": "Rome", "rejected": "Paris"}, {"chosen": "It is Rome", "rejected": "It is Paris"}):
        for asked in ({}, {"prompt": None, "messages": []}):
            refused(lambda row=row | asked: documents(encoder, row), "row 41", "there is no prompt")
    for row in ({"chosen": GOOD, "rejected": BAD}, {"prompt": None, "chosen": GOOD[0], "rejected": BAD[0]}):
        refused(lambda row=row: documents(encoder, row), "row 41", "nothing in common")


def test_a_prompt_that_stands_twice_or_in_the_answers_too_is_refused(tokenizer, encoder):
    asked = "Question: is it far?\nAnswer:"
    row = {"prompt": asked, "chosen": asked + " Yes", "rejected": asked + " No"}
    refused(lambda: documents(encoder, row), "row 41", "begin with the prompt")
    assert encoded(encoder, row | {"prompt": None}) == texts(tokenizer, asked, " Yes", " No")
    greeting = ("Thank you", "Thank you, too!", "Thank you. Go away.")  # answers may do so
    row = dict(zip(("prompt", "chosen", "rejected"), greeting, strict=True))
    assert encoded(encoder, row) == texts(tokenizer, *greeting)
    both = {"prompt": "And in Spain?", "messages": TALK, "chosen": GOOD, "rejected": BAD}
    refused(lambda: documents(encoder, both), "row 41", "prompt and messages are both the prompt")


def test_sources_of_one_folder_have_questions_of_their_own(encoder):
    first, second = (Source(path="folder", data_files=[name]) for name in ("a.jsonl", "b.jsonl"))
    encoder.columns(["question", "chosen", "rejected"], first)
    encoder.columns(["prompt", "chosen", "rejected"], second)
    rows = [{"prompt": "P", "chosen": "yes", "rejected": "no"}]
    assert encoder.documents(rows, second, [0])[0].note == ""


def test_of_a_mixture_each_source_has_questions_of_its_own(encoder):
    """Where data streams, all sources are opened before the first row."""
    encoder.columns(["question", "chosen", "rejected"], Source(path="some.jsonl"))
    encoder.columns(["prompt", "chosen", "rejected"], Source(path="other.jsonl"))
    row = {"question": "Q", "chosen": "The answer is good", "rejected": "The answer is bad"}
    refused(lambda: documents(encoder, row), "row 41", 'fields = {prompt = "question"}')
    rows = [{"prompt": "P", "chosen": "yes", "rejected": "no"}]
    assert encoder.documents(rows, Source(path="other.jsonl"), [0])[0].note == ""


PROMPTS = [
    json.dumps(say("user: Who  are you?")),
    "\n\nHuman: Who are you?\n\nAssistant:",
    "Be brief.\n\nWho are you?",
    " Who are\r\nyou?\n",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_beside_whole_conversations_may_be_written_in_other_ways(prompt, tokenizer, encoder):
    asked = say("user: Who  are you?")
    row = {"prompt": prompt, "chosen": asked + GOOD, "rejected": asked + BAD}
    assert encoded(encoder, row) == chats(tokenizer, asked, GOOD, BAD)


def test_calls_that_differ_in_their_ids_are_the_same(tokenizer):
    tokenizer.chat_template = QWEN3
    encoder = make(tokenizer)

    def talk(**more):
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}} | more
        return [*say("user: Q?"), *say("assistant: ", tool_calls=[call]), *say("tool: 1")]

    wanted = {"chosen": talk() + GOOD, "rejected": talk() + BAD}
    want = encoder.documents([wanted], Source(path="x"), [0])[0]
    for row in (
        {"chosen": talk(id="a") + GOOD, "rejected": talk(id="b", index=0) + BAD},
        {"prompt": talk(id="c"), "chosen": talk() + GOOD, "rejected": talk(id="b") + BAD},
    ):
        assert encoder.documents([row], Source(path="x"), [0])[0].ids.tolist() == want.ids.tolist()


def test_whole_conversations_without_the_prompt_beside_them_are_refused(encoder):
    row = {"prompt": "In another context.", "chosen": TALK + GOOD, "rejected": TALK + BAD}
    refused(lambda: documents(encoder, row), "row 41", "no turn before they part has the prompt")
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    asked = [*say("user: Q?"), *say("assistant: ", tool_calls=[call]), *say("tool: 1")]
    other = [*say("user: Q?"), *say("assistant: ", tool_calls=[{"function": {"name": "g"}}]), *say("tool: 1")]
    row = {"prompt": other, "chosen": asked + GOOD, "rejected": asked + BAD}
    refused(lambda: documents(encoder, row), "row 41", "do not begin with the prompt")


def test_whole_conversations_as_json_beside_their_question_are_conversations(tokenizer, encoder):
    """As UltraFeedback is where its turns are written as text."""
    prompt = say("user: Q?")
    row = {"prompt": "Q?", "chosen": json.dumps(prompt + GOOD), "rejected": json.dumps(prompt + BAD)}
    assert encoded(encoder, row) == chats(tokenizer, prompt, GOOD, BAD)


def test_answers_that_speak_of_turns_in_json_are_turns(tokenizer, encoder):
    chosen = say('assistant: It is [{"role": "user"}]')
    row = {"prompt": ASKED, "chosen": chosen, "rejected": say('assistant: It is "role": []')}
    assert encoded(encoder, row) == chats(tokenizer, ASKED, row["chosen"], row["rejected"])
    row["rejected"] = chosen
    assert documents(encoder, row)[0].note == "dropped: both answers are the same"


def test_a_prompt_that_holds_the_answer_already_is_refused(encoder):
    row = {"messages": ASKED + GOOD, "chosen": GOOD[0], "rejected": BAD[0]}
    refused(lambda: documents(encoder, row), "row 41", "ends with an answer already")
    row = {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": BAD}
    refused(lambda: documents(encoder, row), "row 41", "one is a whole conversation")


def test_a_prompt_in_other_words_than_the_conversations_is_the_same(tokenizer, encoder):
    for prompt in (shared(TALK), [turn | {"name": None} for turn in TALK]):
        row = {"prompt": prompt, "chosen": TALK + GOOD, "rejected": TALK + BAD}
        assert encoded(encoder, row) == chats(tokenizer, TALK, GOOD, BAD)


def test_columns_that_are_not_read_are_named(encoder):
    with lacuna_log() as lines:
        encoder.columns(["prompt", "chosen", "rejected", "score"], Source(path="x"))
    assert lines == ["x: preference pairs; not read: score"]


def test_a_prompt_that_the_conversations_do_not_begin_with_is_refused(encoder):
    row = {"prompt": say("system: Be brief.", "user: a"), "chosen": say("user: a") + GOOD}
    row["rejected"] = say("user: a") + BAD
    refused(lambda: documents(encoder, row), "row 41", "do not begin with the prompt")


def test_answers_that_are_json_are_text(tokenizer, encoder):
    chosen, rejected = '[{"name": "f", "arguments": {}}]', '[{"name": "g", "arguments": {}}]'
    row = {"prompt": "Call: ", "chosen": chosen, "rejected": rejected}
    assert encoded(encoder, row) == texts(tokenizer, "Call: ", chosen, rejected)


def test_sft_and_pt_refuse_pairs_by_name(tokenizer):
    columns = ["prompt", "chosen", "rejected"]
    refused(lambda: make_other(tokenizer, "sft").columns(columns, Source(path="x")), "x", "preferences")
    refused(lambda: make_other(tokenizer, "pt").columns(columns, Source(path="x")), "x", *columns)
    # a column `messages` does not make a conversation of a pair
    refused(lambda: make_other(tokenizer, "sft").columns([*columns, "messages"], Source(path="x")), "preferences")


def test_rows_of_no_shape_name_their_number(encoder):
    good = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    for bad in [
        good | {"chosen": 7},
        good | {"rejected": [{"role": "nobody", "content": "x"}]},
        good | {"rejected": ["x"]},
        {"prompt": "a", "chosen": GOOD, "rejected": 1.5},
    ]:
        refused(lambda bad=bad: documents(encoder, good, bad), "some.jsonl", "row 42")


def test_a_null_answer_is_dropped_or_refused_by_its_number(encoder):
    for row in [{"prompt": "a", "chosen": None, "rejected": "b"}, {"prompt": ASKED, "chosen": GOOD, "rejected": None}]:
        try:
            [tokens] = documents(encoder, row)
        except ConfigError as error:
            assert "row 41" in str(error)
        else:
            assert tokens.note.startswith("dropped: ")


def test_the_fingerprint_is_not_that_of_sft(tokenizer):
    prints = {make_other(tokenizer, task).fingerprint() for task in ("pt", "sft")}
    assert len(prints | {make(tokenizer).fingerprint()}) == 3


# ---- rows of the loader


def unpacked(batch) -> list[Sides]:
    """The pairs of a batch; a label's token is trained. Documents with labels are by turns chosen and rejected."""
    sides = []
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        ids = batch.input_ids[begin:end].tolist()
        labels = batch.labels[begin:end].tolist()
        assert labels[-1] == IGNORE, "a document's last token predicts the next one's first"
        assert all(label in (IGNORE, token) for label, token in zip(labels, ids[1:], strict=False))
        side = Side(ids, [False, *(label != IGNORE for label in labels[:-1])])
        sides += [side] if any(side.trained) else []
    assert len(sides) == 2 * batch.counts["units"] or not sides
    return [Sides(*both) for both in zip(sides[::2], sides[1::2], strict=True)]


@pytest.mark.parametrize("mask_boundary", [True, False])
def test_no_answers_last_token_predicts_the_next_ones_first(mask_boundary, tokenizer, encoder):
    """Also where answers have no prompt, so that their first tokens would be trained."""
    rows = [{"prompt": "", "chosen": f"x y {n}", "rejected": f"{n} z"} for n in range(3)]
    pieces = [(tokens.ids, 0, len(tokens.ids)) for tokens in documents(encoder, *rows)]
    batch = collate([assemble(pieces, 64, filler=encoder.eos, mask_boundary=mask_boundary, place=0)])
    wanted = [texts(tokenizer, "", row["chosen"], row["rejected"]) for row in rows]
    assert unpacked(batch) == wanted


@pytest.mark.parametrize("streaming", [False, True])
def test_every_pair_is_in_one_row_whole_and_once_an_epoch(streaming, tmp_path, tokenizer):
    generator = np.random.default_rng(0)
    wanted = Counter()
    lines = []
    for number in range(120):
        prompt, chosen, rejected = (
            " ".join(["whale"] * int(n)) for n in generator.lognormal((2.0, 2.5, 2.5), 0.7).clip(1, 90)
        )
        row = {"prompt": f"{number}: {prompt}", "chosen": f" 1 {chosen}", "rejected": f" 2 {rejected}"}
        lines.append(json.dumps(row) + "\n")
        want = texts(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        if len(want.chosen.ids) + len(want.rejected.ids) <= 256:
            wanted[str(want)] += 1
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    words = ["--data.cache", str(tmp_path / "cache"), "--train.seq_len", "256", "--train.micro_batch_size", "2"]
    words += ["--train.global_batch_size", "2", "--model.name", tokenizer.name_or_path]
    settings = config(*words, path=tmp_path / "pairs.jsonl")
    settings.data.sources[0].streaming = streaming
    encoder = make_pair_encoder(settings, load_tokenizer(settings.model))
    dataset = RowDataset(settings, settings.data.sources, encoder, rank=0, ranks=1, epochs=1)
    loader = Loader(settings, dataset, torch.device("cpu"))
    found = Counter()
    [batch] = loader.step()
    while batch.counts["units"]:
        found.update(str(pair) for pair in unpacked(batch))
        [batch] = loader.step()
    loader.close()
    assert found == wanted
    assert 100 < sum(wanted.values()) <= 120


def test_a_recipe_that_is_changed_makes_the_token_cache_anew(tokenizer, tmp_path):
    code = Path(RECIPE).read_text()
    prints = []
    for name, text in (
        ("same", code),
        ("copy", code),
        ("other", code.replace('["chosen", "rejected"]', '["rejected", "chosen"]')),
    ):
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        words = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--optim.lr", "1"]
        config = load_config(None, words, str(file))
        prints.append(runpy.run_path(str(file))["make_encoder"](config, tokenizer).fingerprint())
    assert code.count('["chosen", "rejected"]') == 1
    assert prints[0] == prints[1] != prints[2]
