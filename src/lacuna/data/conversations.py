"""Conversations to token ids and a loss mask: five formats of rows, and one way to find what the assistant wrote.

A row becomes messages as OpenAI writes them; the chat template renders them whole, and the text is encoded once. What
stands between the template's {% generation %} marks is trained: transformers' own mask says so, and nothing here looks
for headers or stop tokens in ids. Only then is it checked that every turn ends with the stop token and has no other.
"""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import jinja2
import numpy as np
import transformers
from tokenizers.processors import ByteLevel

from lacuna.config import Config, ConfigError, Source, log
from lacuna.data.batch import Tokens, hide
from lacuna.data.tokenize import Encoder, TextEncoder, adds_bos, digest

TEMPLATES = Path(__file__).parent / "templates"
MARKS = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
CURE = "put {% generation %} before and {% endgeneration %} after what the assistant writes, its stop token included"
RENDERING = Lock()  # transformers keeps the mask that it is making in the template: one at a time
# A prompt and a completion that are plain text go through the same machinery, as the simplest of chats.
PLAIN = (
    "{{ messages[0].content }}{% generation %}{{ messages[1].content }}"
    "{% if not messages[1].content.endswith(eos_token) %}{{ eos_token }}{% endif %}{% endgeneration %}"
)
FORMATS = {  # recognised by these columns
    "messages": ["messages"],
    "conversations": ["conversations"],
    "prompt and completion": ["prompt", "completion"],
    "instruction and output": ["instruction", "output"],
    "token ids": ["input_ids"],
}
OPTIONAL = ["tools", "system", "input", "labels", "assistant_masks", "completion_mask"]
# Who speaks in ShareGPT's `from`; other names are roles already.
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def make_encoder(config: Config, tokenizer) -> Encoder:
    """The encoder of the run's task."""
    if config.task == "sft":
        return ChatEncoder(tokenizer, config)
    return TextEncoder(tokenizer)


class ChatEncoder:
    """The Encoder of conversations: of what it makes, only the assistant's turns are trained."""

    def __init__(self, tokenizer, config: Config):
        self.tokenizer = copy.deepcopy(tokenizer)
        # some leave the space before a word out of its token's place, and transformers' mask ends at such a turn
        self.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
        self.overlong = config.data.overlong
        self.seq_len = config.train.seq_len
        self.bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
        self.given = config.data.chat_template
        self.template = None
        try:
            self.template = training_template(tokenizer, self.given)
            self.tokenizer.eos_token = self.stop_token()
        except LookupError as error:  # token ids, and prompts and completions of plain text, need no template
            self.problem = error
        self.eos = self.tokenizer.eos_token_id

    def stop_token(self) -> str:
        """What ends the turns that the template marks; ConfigError where the tokenizer has it not as one token."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
        try:
            ids, mask = self.render(messages, self.template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"data.chat_template: {error}") from None
        stop = int(ids[mask][-1]) if mask.any() else None
        if stop not in self.tokenizer.added_tokens_decoder:
            problem = f"do not end with a stop token that {self.tokenizer.name_or_path} has as one token"
            raise ConfigError(f"the turns that the chat template marks {problem}: {CURE}")
        return self.tokenizer.convert_ids_to_tokens(stop)

    def columns(self, columns: list[str], source: Source) -> list[str]:
        row_format = recognise(columns, source)
        log.info("%s is read as %s", source.path, row_format)
        return [name for name in columns if name in FORMATS[row_format] + OPTIONAL]

    def documents(self, batch: dict[str, list], source: Source, numbers: Sequence[int]) -> list[Tokens]:
        row_format = recognise(list(batch), source)
        documents = []
        for number, *values in zip(numbers, *batch.values(), strict=True):
            row = without_nulls(dict(zip(batch, values, strict=True)))
            try:
                documents.append(self.document(row, row_format))
            except ConfigError:
                raise
            except Exception as error:  # whatever the shape of a row, or a template, brings about
                place = f"{source.path}, row {number} with {', '.join(batch)}"
                kind = "missing or null" if isinstance(error, KeyError) else type(error).__name__
                problem = f"does not fit {row_format}: {kind}: {error}"
                raise ConfigError(f"{place}, {problem}. Formats: {', '.join(FORMATS)}") from None
        return documents

    def document(self, row: dict, row_format: str) -> Tokens:
        """The document of a row, or an empty one with the reason why it is dropped."""
        if row_format == "token ids":
            ids, mask = read_ids(row)
            return self.fit(ids, mask)
        messages = read_messages(row, row_format)
        template = self.template
        if is_plain(row):
            messages[0]["content"] = self.bos + row["prompt"].removeprefix(self.bos)
            template = PLAIN
        flags = [take_flag(message) for message in messages if message["role"] == "assistant"]
        ids, mask = self.render(messages, template, read_tools(row))
        turns = runs(mask)
        if len(turns) != len(flags) or not set(flags) <= {0, 1}:
            raise ValueError(f"{len(turns)} of {len(flags)} assistant turns are marked, with weights {flags} (0 or 1)")
        stops = np.flatnonzero(mask & (ids == self.eos))
        if stops.tolist() != [end - 1 for _, end in turns]:
            return dropped("a stop token inside a turn, or none at its end")
        for (begin, end), flag in zip(turns, flags, strict=True):
            mask[begin:end] = flag
        return self.fit(ids, mask)

    def render(self, messages: list[dict], template: str | None, tools: list | None = None):
        """Token ids [n] of the whole conversation, and what of them the template marks, bool [n]."""
        if template is None:
            raise ConfigError(self.problem)
        used = {"tools": tools, "tool_calls": any("tool_calls" in message for message in messages)}
        for key in used:
            if used[key] and key not in template:
                raise ValueError(f"the chat template knows no {key}, which would be lost")
        with RENDERING:
            out = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
        return np.asarray(out["input_ids"], dtype=np.int32), np.asarray(out["assistant_masks"], dtype=bool)

    def fit(self, ids: np.ndarray, mask: np.ndarray) -> Tokens:
        """The document of these ids [n] that are trained where mask [n] says so, if it is at most seq_len long."""
        note = ""
        if len(ids) > self.seq_len:
            if self.overlong == "error":
                raise ValueError(f"{len(ids)} tokens, over train.seq_len {self.seq_len}; or set data.overlong")
            if self.overlong == "drop":
                return dropped("longer than train.seq_len")
            ids = ids[: self.seq_len]
            mask = mask[: self.seq_len]
            note = "truncated to train.seq_len"
        if not mask[1:].any():  # nothing predicts a first token
            return dropped("without a trained token")
        return Tokens(hide(ids, mask), note)

    def fingerprint(self) -> str:
        tokenizer = self.tokenizer.backend_tokenizer.to_str()
        settings = [self.template, self.bos, self.tokenizer.special_tokens_map, self.overlong, self.seq_len]
        return digest(tokenizer, settings, transformers.__version__, Path(__file__).read_text())

    def adapt(self, tokenizer):
        """End turns, and render chats, as in training."""
        tokenizer.eos_token = self.tokenizer.eos_token
        if self.given:  # plain Jinja, for programs that do not know the marks
            plain = re.sub(MARKS, lambda mark: mark[1] + ("endif" if mark[2] else "if true") + mark[3], self.template)
            tokenizer.chat_template = plain


def dropped(reason: str) -> Tokens:
    return Tokens(np.empty(0, dtype=np.int32), f"dropped: {reason}")


def runs(mask: np.ndarray) -> np.ndarray:
    """Where each run of trues in a mask [n] begins and ends, int [runs, 2]."""
    edges = np.diff(mask, prepend=False, append=False)  # [n + 1], true where a run begins, and behind its end
    return np.flatnonzero(edges).reshape(-1, 2)


# Rows: which format, and from it to messages or ids


def recognise(columns: list[str], source: Source) -> str:
    for row_format, required in FORMATS.items():
        if set(required) <= set(columns):
            return row_format
    raise ConfigError(f"data.sources {source.path} has {', '.join(columns)}: no format. Formats: {', '.join(FORMATS)}")


def without_nulls(value):
    """A copy without the nulls that Arrow puts into structs whose keys differ from row to row."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def read_messages(row: dict, row_format: str) -> list[dict]:
    """A row as OpenAI's messages, text in one piece, arguments of tool calls as objects."""
    if row_format == "prompt and completion":
        turns = read_prompt(row)
    elif row_format == "instruction and output":
        turns = read_instruction(row)
    else:
        turns = row[row_format]
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return [read_turn(turn) for turn in turns]


def read_prompt(row: dict) -> list[dict]:
    """Prompt and completion, each of them text or messages; only the completion is trained."""
    prompt = row["prompt"]
    completion = row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [turn | {"train": False} for turn in prompt] + completion


def is_plain(row: dict) -> bool:
    """Whether a row is a prompt and a completion that no chat template is meant for."""
    return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and not row.get("system")


def read_instruction(row: dict) -> list[dict]:
    """Alpaca's instruction and input, with an empty line between them, and its output."""
    asked = row["instruction"]
    if row.get("input"):
        asked = f"{asked}\n\n{row['input']}"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def read_turn(turn: dict) -> dict:
    """A turn in ShareGPT's words or OpenAI's, as one of OpenAI's messages."""
    if "from" in turn:
        turn = read_shared(turn)
    content = turn.pop("content", "")
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    calls = turn.pop("tool_calls", [])
    for call in calls:
        function = call.get("function", call)
        if isinstance(function["arguments"], str):  # else a template would quote it a second time
            function["arguments"] = json.loads(function["arguments"] or "{}")
    message = turn | {"content": content}
    return message | {"tool_calls": calls} if calls else message


def read_shared(turn: dict) -> dict:
    """A turn of ShareGPT's in OpenAI's words."""
    speaker = turn.pop("from")
    text = turn.pop("value")
    turn["role"] = ROLES.get(speaker, speaker)
    if speaker != "function_call":
        return turn | {"content": text}
    calls = json.loads(text)
    if not isinstance(calls, list):
        calls = [calls]
    return turn | {"tool_calls": [{"type": "function", "function": call} for call in calls]}


def read_tools(row: dict) -> list | None:
    """The tools of a row, which may be JSON; None where there is none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools or "null")
    return tools or None


def take_flag(message: dict) -> float:
    """What a message says of its training, which no template should see: 1, or 0 where it is only context."""
    trained = message.pop("train", True)
    weight = message.pop("weight", 1)
    return weight if trained else 0


def read_ids(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] and mask [n] of a row that is tokenised, with labels (-100: not trained), or a mask, or neither."""
    ids = np.asarray(row["input_ids"], dtype=np.int32)
    labels = np.asarray(row.get("labels", ids))
    mask = row.get("assistant_masks", row.get("completion_mask", labels != -100))
    mask = np.asarray(mask, dtype=bool)
    if len(mask) != len(ids) or ((labels != ids) & (labels != -100)).any():
        raise ValueError("a mask of another length, or a label that is neither -100 nor the token at its own place")
    return ids, mask


# Templates


def training_template(tokenizer, given: str | None) -> str:
    """The template with marks: the user's, else the tokenizer's own, else the one of lacuna's that renders the same.

    LookupError where there is none, which matters only if the data needs one; ConfigError where the user's is wrong.
    """
    shipped = {file.stem: file.read_text() for file in sorted(TEMPLATES.glob("*.jinja"))}
    if given is not None:
        return read_template(given, shipped)
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise LookupError(f"{name} has no chat template: set data.chat_template to a file or one of {list(shipped)}")
    own = tokenizer.get_chat_template()
    if MARKS.search(own):
        return own
    probes = json.loads((TEMPLATES / "probes.json").read_text())
    for template in shipped.values():
        if all(rendered(tokenizer, template, probe) == rendered(tokenizer, own, probe) for probe in probes):
            return template
    problem = f"{name}'s chat template has no marks, and none of lacuna's ({', '.join(shipped)}) renders the same"
    raise LookupError(f"{problem}: copy it to a file, {CURE}, and set data.chat_template to that file")


def read_template(given: str, shipped: dict[str, str]) -> str:
    """The user's template: Jinja text, the name of one that ships, or a file."""
    if "{" in given:
        template = given
    elif given in shipped:
        template = shipped[given]
    elif Path(given).is_file():
        template = Path(given).read_text()
    else:
        raise ConfigError(f"data.chat_template {given}: no such file, no Jinja text, none of {', '.join(shipped)}")
    if not MARKS.search(template):
        raise ConfigError(f"data.chat_template has no marks: {CURE}")
    return template


def rendered(tokenizer, template: str, probe: dict) -> str | None:
    """The text of a probe, or None where a template refuses it: tools, or a system turn."""
    try:
        return tokenizer.apply_chat_template(
            probe["messages"], tools=probe.get("tools"), chat_template=template, tokenize=False
        )
    except Exception:
        return None
