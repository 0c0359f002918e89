"""Conversations to token ids and a loss mask: five formats of rows, and one way to find what the assistant wrote.

A row becomes messages as OpenAI writes them; the chat template renders them whole, and the text is encoded once. What
stands between the template's {% generation %} marks is trained: transformers' own mask says so, and nothing here looks
for headers or stop tokens in ids. Only then is it checked that every turn ends with the stop token and has no other.
"""

import copy
import hashlib
import json
import re
from pathlib import Path
from threading import Lock

import jinja2
import numpy as np
import transformers
from tokenizers.processors import ByteLevel

from lacuna.config import Config, ConfigError, Source
from lacuna.data.tokenize import adds_bos, log

TEMPLATES = Path(__file__).parent / "templates"
MARKS = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
CURE = "put {% generation %} before and {% endgeneration %} after what the assistant writes, its stop token included"
FORMATS = {  # recognised by these columns
    "messages": ["messages"],
    "conversations": ["conversations"],
    "prompt and completion": ["prompt", "completion"],
    "instruction and output": ["instruction", "output"],
    "token ids": ["input_ids"],
}
OPTIONAL = ["tools", "system", "input", "labels", "assistant_masks", "completion_mask"]
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
NO_IDS = np.empty(0, dtype=np.int32)  # of a row that is dropped
RENDERING = Lock()  # transformers keeps the mask that it is making in the template: one at a time
# A prompt and a completion that are plain text go through the same machinery, as the simplest of chats.
PLAIN = (
    "{{ messages[0].content }}{% generation %}{{ messages[1].content }}"
    "{% if not messages[1].content.endswith(eos_token) %}{{ eos_token }}{% endif %}{% endgeneration %}"
)


class ChatEncoder:
    """Encodes conversations. Picklable, so that loader workers can have their own."""

    def __init__(self, tokenizer, config: Config):
        self.tokenizer = copy.deepcopy(tokenizer)
        # some leave the space before a word out of its token's place, and transformers' mask ends at such a turn
        self.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
        self.overlong, self.seq_len = config.data.overlong, config.train.seq_len
        self.bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
        self.given = config.data.chat_template
        try:
            self.template = training_template(tokenizer, self.given)
            self.tokenizer.eos_token = self.stop_token()
        except LookupError as error:  # no template: token ids, and prompts and completions of plain text, need none
            self.template, self.problem = None, error
        self.eos = self.tokenizer.eos_token_id

    def stop_token(self) -> str:
        """What ends the turns that the template marks; ConfigError where the tokenizer has it not as one token."""
        try:
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
            ids, mask = self.render(messages, self.template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"data.chat_template: {error}") from None
        stop = int(ids[mask][-1]) if mask.any() else None
        if stop not in self.tokenizer.added_tokens_decoder:
            why = f"do not end with a stop token that {self.tokenizer.name_or_path} has as one token"
            raise ConfigError(f"the turns that the chat template marks {why}: {CURE}")
        return self.tokenizer.convert_ids_to_tokens(stop)

    def columns(self, columns: list[str], source: Source) -> list[str]:
        """Those columns that are read; ConfigError where they fit no format."""
        form = recognise(columns, source)
        log.info("%s is read as %s", source.path, form)
        return [name for name in columns if name in FORMATS[form] + OPTIONAL]

    def documents(self, batch: dict[str, list], source: Source, numbers) -> list[tuple[np.ndarray, str]]:
        """Of each row: its token ids, int32 [n], as the complement ~id where nothing is trained, and a note: empty, or
        why the row was cut or dropped (then it has no ids). ConfigError with the number of a row that fits no format.
        """
        form, documents = recognise(list(batch), source), []
        for number, *values in zip(numbers, *batch.values(), strict=True):
            row = without_nulls(dict(zip(batch, values, strict=True)))
            try:
                documents.append(self.fit(*given_ids(row)) if form == "token ids" else self.conversation(row, form))
            except ConfigError:
                raise
            except Exception as error:  # whatever the shape of a row, or a template, brings about
                what = f"{source.path}, row {number} with {', '.join(batch)}, does not fit {form}"
                kind = "missing or null" if isinstance(error, KeyError) else type(error).__name__
                raise ConfigError(f"{what}: {kind}: {error}. Formats: {', '.join(FORMATS)}") from None
        return documents

    def conversation(self, row: dict, form: str) -> tuple[np.ndarray, str]:
        """The document of a row, and a note."""
        messages, tools, template = to_messages(row, form), row.get("tools"), self.template
        plain = isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)
        if plain and not row.get("system"):
            messages[0]["content"], template = self.bos + row["prompt"].removeprefix(self.bos), PLAIN
        flags = [m.pop("train", True) and m.pop("weight", 1) for m in messages if m["role"] == "assistant"]
        tools = json.loads(tools or "null") if isinstance(tools, str) else tools
        ids, mask = self.render(messages, template, tools or None)
        for key, used in {"tools": tools, "tool_calls": any("tool_calls" in m for m in messages)}.items():
            if used and key not in template:
                raise ValueError(f"the chat template knows no {key}, which would be lost")
        turns = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
        if len(turns) != len(flags) or not set(flags) <= {0, 1}:
            raise ValueError(f"{len(turns)} of {len(flags)} assistant turns are marked, with weights {flags} (0 or 1)")
        if np.flatnonzero(mask & (ids == self.eos)).tolist() != [end - 1 for _, end in turns]:
            return NO_IDS, "dropped: a stop token inside a turn, or none at its end"
        for (begin, end), flag in zip(turns, flags, strict=True):
            mask[begin:end] = flag
        return self.fit(ids, mask)

    def fit(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, str]:
        """The document that is trained of these ids [n], where mask [n] says so, and a note."""
        note = ""
        if len(ids) > self.seq_len:
            if self.overlong == "error":
                raise ValueError(f"{len(ids)} tokens, over train.seq_len {self.seq_len}; or set data.overlong")
            if self.overlong == "drop":
                return NO_IDS, "dropped: longer than train.seq_len"
            ids, mask, note = ids[: self.seq_len], mask[: self.seq_len], "truncated to train.seq_len"
        if not mask[1:].any():
            return NO_IDS, "dropped: without a trained token"
        return np.where(mask, ids, ~ids), note

    def render(self, messages: list[dict], template: str | None, tools: list | None = None):
        """Token ids [n] of the whole conversation, and what of them the template marks, bool [n]."""
        if template is None:
            raise ConfigError(self.problem)
        options = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
        with RENDERING:
            out = self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        return np.asarray(out["input_ids"], dtype=np.int32), np.asarray(out["assistant_masks"], dtype=bool)

    def fingerprint(self) -> str:
        """Changes with anything that could change a token or a mask."""
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.template, self.bos, self.tokenizer.special_tokens_map]
        parts += [self.overlong, self.seq_len, transformers.__version__, Path(__file__).read_text()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def adapt(self, tokenizer):
        """Make the model's own tokenizer end turns, and render chats, as in training."""
        tokenizer.eos_token = self.tokenizer.eos_token
        if self.given:  # plain Jinja, for programs that do not know the marks
            plain = {None: "if true", "end": "endif"}
            tokenizer.chat_template = MARKS.sub(lambda m: m[1] + plain[m[2]] + m[3], self.template)


def recognise(columns: list[str], source: Source) -> str:
    for form, required in FORMATS.items():
        if set(required) <= set(columns):
            return form
    raise ConfigError(f"data.sources {source.path} has {', '.join(columns)}: no format. Formats: {', '.join(FORMATS)}")


def given_ids(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] and mask [n] of a row that is tokenised, with labels (-100: not trained), or a mask, or neither."""
    ids = np.asarray(row["input_ids"], dtype=np.int32)
    labels = np.asarray(row.get("labels", ids))
    mask = np.asarray(row.get("assistant_masks", row.get("completion_mask", labels != -100)), dtype=bool)
    if len(mask) != len(ids) or ((labels != ids) & (labels != -100)).any():
        raise ValueError("a mask of another length, or a label that is neither -100 nor the token at its own place")
    return ids, mask


def to_messages(row: dict, form: str) -> list[dict]:
    """A row as OpenAI's messages, text in one piece, arguments of tool calls as objects."""
    if form in ("messages", "conversations"):
        turns = row[form]
    else:
        asked = row["prompt"] if "prompt" in row else "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
        answer = row["completion"] if "completion" in row else row["output"]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        turns = [turn | {"train": False} for turn in asked] + answer
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    messages = []
    for turn in turns:
        if "from" in turn:
            speaker, text = turn.pop("from"), turn.pop("value")
            turn |= {"role": ROLES.get(speaker, speaker), "content": text}
            if speaker == "function_call":
                calls = json.loads(text)
                calls = calls if isinstance(calls, list) else [calls]
                turn |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
        content, calls = turn.pop("content", ""), turn.pop("tool_calls", [])
        content = content if isinstance(content, str) else "".join(part["text"] for part in content)
        for call in calls:
            function = call.get("function", call)
            if isinstance(function["arguments"], str):  # else a template would quote it a second time
                function["arguments"] = json.loads(function["arguments"] or "{}")
        messages.append(turn | {"content": content} | ({"tool_calls": calls} if calls else {}))
    return messages


def without_nulls(value):
    """A copy without the nulls that Arrow puts into structs whose keys differ from row to row."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def training_template(tokenizer, given: str | None) -> str:
    """The template with marks: the user's, else the tokenizer's own, else the one of lacuna's that renders the same.

    LookupError where there is none, which matters only if the data needs one; ConfigError where the user's is wrong.
    """
    shipped = {file.stem: file.read_text() for file in sorted(TEMPLATES.glob("*.jinja"))}
    if given is not None:
        if "{" not in given and given not in shipped and not Path(given).is_file():
            raise ConfigError(f"data.chat_template {given}: no such file, no Jinja text, none of {', '.join(shipped)}")
        template = given if "{" in given else shipped.get(given) or Path(given).read_text()
        if not MARKS.search(template):
            raise ConfigError(f"data.chat_template has no marks: {CURE}")
        return template
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
    what = f"{name}'s chat template has no marks, and none of lacuna's ({', '.join(shipped)}) renders the same"
    raise LookupError(f"{what}: copy it to a file, {CURE}, and set data.chat_template to that file")


def rendered(tokenizer, template: str, probe: dict) -> str | None:
    try:
        options = {"tools": probe.get("tools"), "chat_template": template}
        return tokenizer.apply_chat_template(probe["messages"], tokenize=False, **options)
    except Exception:  # a template may refuse a probe: tools, or a system turn
        return None
