"""The chat templates that ship: the models' own text, with marks around what the model has to write.

Every template is held against the model's own (originals/, whose README says where they come from), twice: on what the
repository ships, with the tokenizer of examples/tiny, and on the real tokenizers and conversations of LACUNA_ASSETS.
What has to be trained is read off the original's text here, between the headers; the marks have no part in that.
"""

import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lacuna
from lacuna.config import ConfigError, load_config
from lacuna.data.conversations import ChatEncoder

TEMPLATES = Path(lacuna.__file__).parent / "data" / "templates"
ORIGINALS = Path(__file__).parent / "originals"
EXAMPLES = Path(__file__).parents[2] / "examples"
ASSETS = Path(os.environ["LACUNA_ASSETS"]) if "LACUNA_ASSETS" in os.environ else None

# A turn: after the generation prompt, up to and including the stop token.
CHATML = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
LLAMA = re.compile(r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eo[tm]_id\|>)", re.DOTALL)
LLAMA_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"]


class Model(NamedTuple):
    """An original template, the shipped one that stands for it, and what they are tried with."""

    shipped: str
    original: Path
    tokenizer: str
    turn: re.Pattern
    variables: dict


MODELS = {
    "chatml": Model("chatml", EXAMPLES / "tiny" / "chat_template.jinja", "smollm2", CHATML, {}),
    "smollm2": Model("smollm2", ORIGINALS / "smollm2.jinja", "smollm2", CHATML, {}),
    "qwen2.5": Model("qwen2.5", ORIGINALS / "qwen2.5.jinja", "qwen3", CHATML, {}),
    "qwen3": Model("qwen3", ORIGINALS / "qwen3.jinja", "qwen3", CHATML, {}),
    "qwen3 newer": Model("qwen3", ORIGINALS / "qwen3_newer.jinja", "qwen3", CHATML, {}),
    "llama3": Model("llama3", ORIGINALS / "llama3.jinja", "tiny", LLAMA, {}),
    "llama3.1": Model("llama3.1", ORIGINALS / "llama3.1.jinja", "tiny", LLAMA, {}),
    # Where no date is given, 3.2 writes today's and 3.1 always the same.
    "llama3.2": Model("llama3.2", ORIGINALS / "llama3.2.jinja", "tiny", LLAMA, {}),
    "llama3.2 dated": Model("llama3.2", ORIGINALS / "llama3.2.jinja", "tiny", LLAMA, {"date_string": "4 May 2025"}),
}


# Conversations


class Chat(NamedTuple):
    messages: list[dict]
    tools: list[dict] | None = None


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, *calls, **fields):
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {}) | fields


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(content):
    return {"role": "tool", "content": content}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather <now> & later, in 'plain' \"words\"; für Köln 東京 🌦",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
THOUGHT = "<think>\nOne thing, then another.\n</think>\n\n"
FIELD = "One thing,\n\nthen another."

HANDMADE = [
    # Who speaks, and in which order
    Chat([user("Hello"), assistant("Hi there!")]),
    Chat([system("Be brief."), user("Hello"), assistant("Hi."), user("And?"), assistant("Nothing."), user("Bye")]),
    Chat([system(""), user(""), assistant("Hi.")]),
    Chat(
        [system("Be brief."), user("Hello"), system("Be long."), assistant("Once upon a time"), user("Oh"), user("?")]
    ),
    Chat([assistant("I begin."), user("No, I"), assistant("Well."), assistant("And more.")]),
    Chat([system("Only a system message.")]),
    Chat([user("A question without an answer")]),
    Chat([system("s"), {"role": "developer", "content": "d"}, user("u"), assistant("a")]),
    # Text
    Chat(
        [
            system("Grüße, 你好, مرحبا"),
            user("naïve 👩‍👩‍👧‍👦 e\u0301"),
            assistant("e\u0301 🇸🇪 “Ω≈ç√” \u00a0漢字 e\u0301\u200d"),
            user("…"),
        ]
    ),
    Chat([user("👍"), assistant("👍"), user("\u0301"), assistant("\u0301e\u0301"), user("12345"), assistant("67890")]),
    Chat([user("{{ x }} {% generation %}"), assistant("{% endgeneration %} {# no #} \\n <b>&amp;</b> 'a' \"b\"")]),
    Chat([user("assistant\n"), assistant("user\nassistant\n"), user("<|"), assistant("|>")]),
    Chat([user("a\r\nb\tc"), assistant("a\r\nb\tc\n\n    d\n"), user("?"), assistant("```py\nx = 1\n```")]),
    # Space at the edges, with turns after it: none of them may get lost
    Chat([user(" x"), assistant(" one space"), user("?"), assistant("next")]),
    Chat([user("x "), assistant("  two spaces  "), user("?"), assistant("\tnext\t")]),
    Chat([system("\nx\n"), user("\nx\n\n"), assistant("\nnew line\n"), user("?"), assistant("\n\n\nthree\n\n\n")]),
    Chat([user("x"), assistant(" \n mixed \n "), user("?"), assistant("\n "), user("?"), assistant("next")]),
    # Nothing
    Chat([user("x"), assistant(""), user("?"), assistant("  "), user("?"), assistant("")]),
    # Thinking, in the content and in a field of its own
    Chat([user("x"), assistant(THOUGHT + "Done.")]),
    Chat([user("x"), assistant("Done.", reasoning_content=FIELD)]),
    Chat([user("x"), assistant("Done.", reasoning_content=f"\n\n{FIELD}\n\n"), user("y"), assistant(THOUGHT + "End.")]),
    Chat([user("x"), assistant(THOUGHT + "Done."), user("y"), assistant("End.", reasoning_content=FIELD)]),
    Chat([user("x"), assistant(THOUGHT + "Done."), user("y"), assistant("End."), user("z")]),
    Chat([user("x"), assistant("Done.", reasoning_content=""), user("y"), assistant("End.", reasoning_content=None)]),
    Chat([user("x"), assistant(THOUGHT + "Kept.", reasoning_content=FIELD)]),
    Chat([user("x"), assistant("no beginning</think>Done.")]),
    Chat([user("x"), assistant("<think>no end"), user("y"), assistant("<think></think>"), assistant("<think>")]),
    Chat([user("x"), assistant("<think>a</think>b<think>c</think>d"), assistant("\n\n</think>\n\nd\n\n")]),
    Chat([user("x"), assistant(THOUGHT + "One."), assistant("Two."), assistant("Three.", reasoning_content=FIELD)]),
    # Tools, calls and results
    Chat([user("x"), assistant("y")], [WEATHER]),
    Chat([system("Be brief."), user("x"), assistant("y"), user("z"), assistant("a")], [WEATHER, CLOCK]),
    Chat([system(" s "), user(" x "), assistant(" y ")], [WEATHER]),
    Chat([user("x"), assistant("y")], []),
    Chat([user("x"), assistant("y")], [WEATHER["function"], {"name": "bare"}]),
    Chat([user("x"), assistant("", call("weather", city="Köln")), result("rain 🌧"), assistant("Rain.")], [WEATHER]),
    Chat([user("x"), assistant("I look.", call("clock")), result('{"h": 1}'), assistant("One."), user("y")], [CLOCK]),
    Chat(
        [
            system("Use tools."),
            user("Weather and time?"),
            assistant(THOUGHT, call("weather", city="東京", days=[1, 2], deep={"a": None, "b": 1.5})),
            result('{"sky": "<clear> & \'blue\'"}'),
            assistant("", call("clock"), reasoning_content=FIELD),
            result("12"),
            result("13"),
            assistant("", call("clock")),
            result(""),
            assistant("It is clear.", reasoning_content=FIELD),
            user("Thanks"),
            assistant("Welcome."),
        ],
        [WEATHER, CLOCK],
    ),
    Chat(
        [
            user("x"),
            assistant("Both.", call("weather", city="a"), call("weather", city="b")),
            result("1"),
            result("2"),
            assistant("Done."),
        ],
        [WEATHER],
    ),
    Chat([user("x"), assistant("\n", call("clock"), call("clock"), reasoning_content=FIELD)], [CLOCK]),
    Chat([user("x"), assistant("", {"name": "weather", "arguments": {"city": "a"}}), result("1")], [WEATHER]),
    Chat([user("x"), assistant("", {"function": {"name": "weather", "arguments": '{"city":  "a"}'}})], [WEATHER]),
    Chat([user("x"), assistant("", call("clock")), result("1"), user("y"), assistant(THOUGHT + "Done.")]),
    Chat([user("x"), assistant("a"), user("<tool_response>\n1\n</tool_response>"), assistant(THOUGHT + "Done.")]),
    Chat([user("x"), assistant("y", tool_calls=None)]),
    Chat([user("x"), assistant("y", tool_calls=[])]),
    Chat([result("1"), assistant("Two."), result("3")]),
    Chat([user("x"), assistant("", call("clock")), {"role": "ipython", "content": "1"}, assistant("One.")], [CLOCK]),
]
# What is no text is an error in some templates and not in others.
ODD = [
    Chat([user("x"), assistant(None)]),
    Chat([user("x"), assistant(None, call("clock")), result("1"), assistant("Done.")], [CLOCK]),
    Chat([user("x"), assistant(None, call("clock"), reasoning_content=FIELD), result("1")], [CLOCK]),
    Chat([user("x"), {"role": "assistant", "tool_calls": [call("clock")]}], [CLOCK]),
    Chat([user("x"), {"role": "assistant", "reasoning_content": FIELD}]),
    Chat([user(None), assistant("y")]),
    Chat([user("x"), assistant("", call("clock")), result(None), result({"h": 1}), assistant("y")], [CLOCK]),
    Chat([user([{"type": "text", "text": "x"}]), assistant([{"type": "text", "text": "y"}])]),
    Chat([user("x"), assistant("y", reasoning_content=["z"])]),
]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def glaive(row: dict) -> Chat:
    roles = {"human": user, "gpt": assistant, "observation": result}
    messages = []
    for turn in row["conversations"]:
        if turn["from"] == "function_call":
            made = json.loads(turn["value"])
            messages.append(assistant("", call(made["name"], **made["arguments"])))
        else:
            messages.append(roles[turn["from"]](turn["value"]))
    return Chat(messages, [{"type": "function", "function": tool} for tool in json.loads(row["tools"])] or None)


PARTS = ["text", "reasoning", "tool_call"]


def reasoning(row: dict, field: bool) -> Chat:
    """Thinking in a field of its own, or in the content."""
    messages = []
    for message in row["messages"]:
        parts = {kind: [part["value"] for part in message["content"] if part["type"] == kind] for kind in PARTS}
        text, thought = ("".join(parts[kind]) for kind in ("text", "reasoning"))
        message = {"role": message["role"], "content": text}
        if thought and field:
            message["reasoning_content"] = thought
        elif thought:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{text}"
        if parts["tool_call"]:
            made = [json.loads(value) for value in parts["tool_call"]]
            message["tool_calls"] = [{"type": "function", "function": function} for function in made]
        messages.append(message)
    return Chat(messages, json.loads(row["tools"]))


def alpaca(row: dict) -> Chat:
    return Chat([user("\n".join(filter(None, [row["instruction"], row["input"]]))), assistant(row["output"])])


@functools.cache
def conversations(corpus: str) -> list[Chat]:
    if corpus == "shipped":
        return HANDMADE + [Chat(row["messages"]) for row in lines(EXAMPLES / "chat" / "train.jsonl")[:300]]
    chat = ASSETS / "chat"
    reasoned = lines(chat / "lf_reason_tool_use_demo_50.jsonl")
    return [
        *HANDMADE,
        *map(glaive, json.loads((chat / "lf_glaive_toolcall_en_demo.json").read_text())),
        *(reasoning(row, field=True) for row in reasoned[:25]),
        *(reasoning(row, field=False) for row in reasoned[25:]),
        *map(alpaca, json.loads((chat / "lf_alpaca_en_demo.json").read_text())[:50]),
    ]


# Rendering


@functools.cache
def tokenizer_of(name: str, corpus: str) -> PreTrainedTokenizerFast:
    model = MODELS[name]
    if corpus == "assets" and model.tokenizer != "tiny":
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer" / model.tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny")
    if model.turn is LLAMA:
        tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
        tokenizer.add_tokens(LLAMA_TOKENS, special_tokens=True)
    tokenizer.chat_template = model.original.read_text()
    return tokenizer


def render(tokenizer, chat: Chat, template: str | None = None, **variables) -> str | None:
    """The text, or None where the template refuses the conversation."""
    try:
        return tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, chat_template=template, tokenize=False, **variables
        )
    except Exception:  # a template raises what it likes: its own errors, and those of the values in it
        return None


def shipped(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


@functools.cache
def own_texts(name: str, corpus: str) -> list[str | None]:
    """All conversations by the model's own template."""
    model, tokenizer = MODELS[name], tokenizer_of(name, corpus)
    return [render(tokenizer, chat, **model.variables) for chat in conversations(corpus)]


class Encoded(NamedTuple):
    chat: Chat
    own: str  # the text by the model's own template
    ids: list[int]
    runs: list[list[int]]  # of trained tokens


@functools.cache
def encoded(name: str, corpus: str) -> list[Encoded]:
    """What lacuna gets from the shipped template, for all conversations that the model's own can render."""
    model, tokenizer = MODELS[name], tokenizer_of(name, corpus)
    rows = []
    for chat, own in zip(conversations(corpus), own_texts(name, corpus), strict=True):
        if own is None:
            continue
        out = tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            chat_template=shipped(model.shipped),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **model.variables,
        )
        groups = itertools.groupby(zip(out["input_ids"], out["assistant_masks"], strict=True), key=lambda pair: pair[1])
        runs = [[token for token, _ in group] for trained, group in groups if trained]
        rows.append(Encoded(chat, own, out["input_ids"], runs))
    assert len(rows) >= 300
    return rows


def turns(name: str, corpus: str, text: str, ids: list[int]) -> list[str]:
    """What the model has to write, turn by turn, read off the text of its own template."""
    tokenizer = tokenizer_of(name, corpus)
    found = []
    for match in MODELS[name].turn.finditer(text):
        start, end = match.span(1)
        if text[start].isspace():
            prompt = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
            if ids[: len(prompt)] != prompt:
                start -= 1  # one token holds the prompt's last newline and the space that the turn begins with
        found.append(text[start:end])
    normalizer = tokenizer.backend_tokenizer.normalizer
    return [normalizer.normalize_str(turn) if normalizer else turn for turn in found]


@pytest.fixture(params=["shipped", pytest.param("assets", marks=pytest.mark.slow)])
def corpus(request):
    if request.param == "assets" and ASSETS is None:
        pytest.skip("LACUNA_ASSETS is not set")
    return request.param


models = pytest.mark.parametrize("name", MODELS)


# The text


@models
def test_the_text_is_byte_for_byte_that_of_the_models_own_template(name, corpus):
    model, tokenizer = MODELS[name], tokenizer_of(name, corpus)
    rendered = 0
    for chat, own in zip(conversations(corpus), own_texts(name, corpus), strict=True):
        assert render(tokenizer, chat, shipped(model.shipped), **model.variables) == own, chat
        rendered += own is not None
    assert rendered >= 300


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3 newer"])
def test_what_is_no_text_is_written_or_refused_as_by_the_models_own_template(name):
    model, tokenizer = MODELS[name], tokenizer_of(name, "shipped")
    for chat in ODD:
        own = render(tokenizer, chat, **model.variables)
        assert render(tokenizer, chat, shipped(model.shipped), **model.variables) == own, chat


@models
def test_the_generation_prompt_is_that_of_the_models_own_template(name):
    model, tokenizer = MODELS[name], tokenizer_of(name, "shipped")
    for chat in HANDMADE:
        own = render(tokenizer, chat, add_generation_prompt=True, **model.variables)
        assert render(tokenizer, chat, shipped(model.shipped), add_generation_prompt=True, **model.variables) == own
        assert own is None or own != render(tokenizer, chat, **model.variables)


@pytest.mark.parametrize("name", ["qwen3", "qwen3 newer"])
@pytest.mark.parametrize("enable_thinking", [True, False, None])
def test_thinking_can_be_switched_off_as_in_the_models_own_template(name, enable_thinking):
    tokenizer = tokenizer_of(name, "shipped")
    for chat in HANDMADE:
        own = render(tokenizer, chat, add_generation_prompt=True, enable_thinking=enable_thinking)
        ours = render(tokenizer, chat, shipped("qwen3"), add_generation_prompt=True, enable_thinking=enable_thinking)
        assert ours == own is not None, chat


@pytest.mark.parametrize(
    "variables",
    [
        {"date_string": "1 Jan 2030"},
        {"tools_in_user_message": False},
        {"custom_tools": [CLOCK]},
        {"builtin_tools": ["code_interpreter", "brave_search", "weather"]},
        {"builtin_tools": []},
    ],
    ids=str,
)
def test_what_a_caller_may_tell_llama_3_1_does_the_same_as_in_its_own_template(variables):
    tokenizer = tokenizer_of("llama3.1", "shipped")
    rendered = 0
    for chat in HANDMADE + ODD:
        own = render(tokenizer, chat, **variables)
        assert render(tokenizer, chat, shipped("llama3.1"), **variables) == own, chat
        rendered += own is not None
    assert rendered > len(HANDMADE) / 2


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "qwen3", "smollm2"])
def test_a_template_is_found_for_a_tokenizer_without_bos_though_others_would_begin_with_one(name, tokenizer):
    """Qwen has none, and what ships is tried in the order of names: Llama's first."""
    tokenizer.bos_token = None
    tokenizer.chat_template = MODELS[name].original.read_text()
    config = load_config(None, ["--data.sources", '[{"path": "x"}]', "--train.steps", "1"], "sft")
    assert ChatEncoder(tokenizer, config).template == shipped(name)


def test_a_template_that_raises_is_no_template_for_rows_that_need_none(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('a system turn, please') }}"
    config = load_config(None, ["--data.sources", '[{"path": "x"}]', "--train.steps", "1"], "sft")
    encoder = ChatEncoder(tokenizer, config)
    [source] = config.data.sources
    [tokens] = encoder.documents([{"input_ids": [5, 6]}], source, [0])
    assert tokens.ids.tolist() == [5, 6]
    with pytest.raises(ConfigError, match="a system turn, please"):
        encoder.documents([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], source, [0])


# The ids, and which of them are trained


@models
def test_the_ids_are_those_of_the_whole_text_encoded_once(name, corpus):
    tokenizer = tokenizer_of(name, corpus)
    for row in encoded(name, corpus):
        assert row.ids == tokenizer(row.own, add_special_tokens=False)["input_ids"], row.chat


@models
def test_the_trained_text_is_what_follows_the_generation_prompt_up_to_the_stop_token(name, corpus):
    tokenizer = tokenizer_of(name, corpus)
    for row in encoded(name, corpus):
        trained = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in row.runs]
        assert trained == turns(name, corpus, row.own, row.ids), row.chat


@models
def test_every_assistant_turn_is_trained_once_and_ends_with_its_one_stop_token(name, corpus):
    tokenizer = tokenizer_of(name, corpus)
    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>" if MODELS[name].turn is LLAMA else "<|im_end|>")
    for row in encoded(name, corpus):
        assert len(row.runs) == sum(message["role"] == "assistant" for message in row.chat.messages), row.chat
        assert [run.count(stop) for run in row.runs] == [1] * len(row.runs), row.chat
        assert all(run[-1] == stop for run in row.runs), row.chat


def test_a_call_of_a_built_in_tool_is_trained_up_to_the_end_of_its_message():
    tokenizer = tokenizer_of("llama3.1", "shipped")
    chat = Chat([user("x"), assistant("", call("weather", city="Köln", day="1")), result("1"), assistant("Rain.")])
    out = tokenizer.apply_chat_template(
        chat.messages,
        chat_template=shipped("llama3.1"),
        return_dict=True,
        return_assistant_tokens_mask=True,
        builtin_tools=["weather"],
    )
    trained = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    expected = '<|python_tag|>weather.call(city="Köln", day="1")<|eom_id|>Rain.<|eot_id|>'
    assert tokenizer.decode(trained, clean_up_tokenization_spaces=False) == expected


def test_thinking_is_trained_where_the_text_has_it():
    chat = Chat([user("x"), assistant("One."), user("y"), assistant("Two.", reasoning_content="Hm."), assistant("3")])
    tokenizer = tokenizer_of("qwen3", "shipped")
    out = tokenizer.apply_chat_template(
        chat.messages, chat_template=shipped("qwen3"), return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    turns = ["One.", "<think>\nHm.\n</think>\n\nTwo.", "<think>\n\n</think>\n\n3"]
    assert tokenizer.decode(trained) == "".join(f"{turn}<|im_end|>" for turn in turns)


# Which template is whose


def agrees(name: str, template: str) -> bool:
    tokenizer = tokenizer_of(name, "shipped")
    return all(render(tokenizer, chat, template) == render(tokenizer, chat) for chat in HANDMADE)


@models
def test_of_all_that_ship_the_intended_template_alone_agrees_with_a_models_own(name):
    agreeing = {path.stem for path in TEMPLATES.glob("*.jinja") if agrees(name, path.read_text())}
    assert agreeing == {MODELS[name].shipped}


def test_every_template_that_ships_is_tested():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {model.shipped for model in MODELS.values()}


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_the_originals_are_those_of_the_real_tokenizers(name):
    if ASSETS is None:
        pytest.skip("LACUNA_ASSETS is not set")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer" / name)
    assert tokenizer.chat_template == MODELS[name].original.read_text()


def test_the_two_templates_of_qwen3_differ_for_what_is_no_text_alone():
    older, newer = (tokenizer_of(name, "shipped") for name in ("qwen3", "qwen3 newer"))
    differing = [chat for chat in HANDMADE + ODD if render(older, chat) != render(newer, chat)]
    assert differing
    assert all(chat in ODD for chat in differing)
