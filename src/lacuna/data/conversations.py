"""Conversations to token ids and a loss mask: what stands between the template's {% generation %} marks is trained."""

import copy
import json
import math
import re
from pathlib import Path
from threading import Lock

import jinja2
import numpy as np
import transformers
from jinja2.sandbox import SandboxedEnvironment
from tokenizers.processors import ByteLevel

from lacuna.config import Config, ConfigError, Source, blame, log
from lacuna.data.batch import Tokens, hide
from lacuna.data.tokenize import Encoder, TextEncoder, adds_bos, digest

FORMATS = {  # recognised by these columns
    "messages": ["messages"],
    "conversations": ["conversations"],
    "prompt and completion": ["prompt", "completion"],
    "instruction and output": ["instruction", "output"],
    "token ids": ["input_ids"],
}
OPTIONAL = ["tools", "system", "input", "labels", "assistant_masks", "completion_mask"]
# who speaks in ShareGPT's `from`; other names are roles already
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
TEMPLATES = Path(__file__).parent / "templates"
MARKS = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
CURE = "put {% generation %} before and {% endgeneration %} after what the assistant writes, its stop token included"
# A prompt and a completion that are plain text go through the same machinery, as the simplest of chats.
PLAIN = "{{ messages[0].content }}{% generation %}{{ messages[1].content }}{{ eos_token }}{% endgeneration %}"
SandboxedEnvironment.intercepted_binops = frozenset(["**"])  # hours in C, for large numbers
SandboxedEnvironment.default_binop_table["**"] = math.pow
RENDERING = Lock()  # transformers keeps the mask that it is making in the template: one at a time


def make_encoder(config: Config, tokenizer) -> Encoder:
    return ChatEncoder(tokenizer, config) if config.task == "sft" else TextEncoder(tokenizer)


class ChatEncoder:
    """The Encoder of conversations: what the assistant says is trained."""

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
        except jinja2.TemplateError as error:
            raise ConfigError(f"data.chat_template: {error}") from None
        except LookupError as error:  # token ids, and prompts and completions of plain text, need no template
            self.template, self.problem = None, error
        self.eos = self.tokenizer.eos_token_id

    def stop_token(self) -> str:
        ids, mask = self.render(as_turns("?", "user") + as_turns("yes", "assistant"), self.template)
        stop = int(ids[mask][-1]) if mask.any() else None
        if stop not in self.tokenizer.added_tokens_decoder:
            raise ConfigError(f"the chat template marks turns that do not end with one stop token: {CURE}")
        return self.tokenizer.convert_ids_to_tokens(stop)

    def columns(self, columns, source):
        row_format = recognise(columns, source)
        log.info("%s is read as %s", source.path, row_format)
        return [name for name in columns if name in FORMATS[row_format] + OPTIONAL]

    def documents(self, rows, source, numbers):
        columns = list({name: None for row in rows for name in row})
        row_format = recognise(columns, source)
        documents = []
        for number, row in zip(numbers, rows, strict=True):
            given = {name: value for name, value in row.items() if value is not None}
            problem = f"{source.path}, row {number} with {', '.join(columns)}, does not fit {row_format}"
            with blame(f"{problem}. Formats: {', '.join(FORMATS)}", seconds=10):
                documents.append(self.document(given, row_format))
        return documents

    def document(self, row: dict, row_format: str) -> Tokens:
        if row_format == "token ids":
            return self.fit(*read_ids(row))
        messages = read_messages(row, row_format)
        template = self.template
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and not row.get("system"):
            template = PLAIN
            messages[0]["content"] = self.bos + row["prompt"].removeprefix(self.bos)
            messages[1]["content"] = row["completion"].removesuffix(self.tokenizer.eos_token)
        flags = []
        for message in messages:  # templates see neither
            trained, weight = message.pop("train", True), message.pop("weight", 1)
            if message["role"] == "assistant":
                flags.append(trained and weight)
        ids, mask = self.render(messages, template, row.get("tools"))
        # marked tokens come in runs, one a turn: where each begins and ends, [turns, 2]
        turns = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
        if len(turns) != len(flags) or not set(flags) <= {0, 1}:
            raise ValueError(f"{len(turns)} of {len(flags)} assistant turns are marked, with weights {flags} (0 or 1)")
        # Each turn has one stop token, and it is the last one: else the model would learn to go on after it.
        stops = np.flatnonzero(mask & (ids == self.eos))
        if stops.tolist() != [end - 1 for _, end in turns]:
            return Tokens(ids[:0], "dropped: a stop token inside a turn, or none at its end")
        for (begin, end), flag in zip(turns, flags, strict=True):
            mask[begin:end] = flag
        return self.fit(ids, mask)

    def render(self, messages: list[dict], template: str | None, tools: list | str | None = None):
        """Token ids [n] of the whole conversation, and what of them the template marks, bool [n]."""
        if template is None:
            raise ConfigError(self.problem)
        if isinstance(tools, str):
            tools = json.loads(tools or "null")
        for key, used in [("tools", tools), ("tool_calls", any("tool_calls" in turn for turn in messages))]:
            if used and key not in template:
                raise ValueError(f"the chat template knows no {key}, which would be lost")
        options = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
        with RENDERING:
            out = self.tokenizer.apply_chat_template(messages, tools=tools or None, **options)
        return np.asarray(out["input_ids"], dtype=np.int32), np.asarray(out["assistant_masks"], dtype=bool)

    def fit(self, ids: np.ndarray, mask: np.ndarray) -> Tokens:
        """The document of ids [n] that are trained where mask [n] says so: at most seq_len of them."""
        long = len(ids) > self.seq_len
        if long and self.overlong == "error":
            raise ValueError(f"{len(ids)} tokens, over train.seq_len {self.seq_len}; or set data.overlong")
        if long and self.overlong == "drop":
            return Tokens(ids[:0], "dropped: longer than train.seq_len")
        if not mask[1 : self.seq_len].any():  # nothing predicts a first token
            return Tokens(ids[:0], "dropped: without a trained token")
        return Tokens(hide(ids, mask)[: self.seq_len], "truncated to train.seq_len" if long else "")

    def fingerprint(self):
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.template, self.bos, self.tokenizer.special_tokens_map]
        return digest(*parts, self.overlong, self.seq_len, transformers.__version__, Path(__file__).read_text())

    def adapt(self, tokenizer):
        tokenizer.eos_token = self.tokenizer.eos_token
        if self.given:  # plain Jinja, for programs that do not know the marks
            plain = {None: "if true", "end": "endif"}
            tokenizer.chat_template = MARKS.sub(lambda mark: mark[1] + plain[mark[2]] + mark[3], self.template)


def recognise(columns: list[str], source: Source) -> str:
    for row_format, required in FORMATS.items():
        if set(required) <= set(columns):
            return row_format
    raise ConfigError(f"data.sources {source.path} has {', '.join(columns)}: no format. Formats: {', '.join(FORMATS)}")


def read_ids(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] and mask [n] of a row that is tokenised, with labels (-100: not trained), or a mask, or neither."""
    ids = np.asarray(row["input_ids"], dtype=np.int32)
    labels = np.asarray(row.get("labels", ids))
    mask = np.asarray(row.get("assistant_masks", row.get("completion_mask", labels != -100)), dtype=bool)
    if len(mask) != len(ids) or ((labels != ids) & (labels != -100)).any():
        raise ValueError("a mask of another length, or a label that is neither -100 nor the token at its own place")
    return ids, mask


def read_messages(row: dict, row_format: str) -> list[dict]:
    """A row as OpenAI's messages, text in one piece, arguments of tool calls as objects."""
    if row_format == "prompt and completion":  # each of them text or messages; the completion alone is trained
        turns = [turn | {"train": False} for turn in as_turns(row["prompt"], "user")]
        turns += as_turns(row["completion"], "assistant")
    elif row_format == "instruction and output":
        asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
        turns = as_turns(asked, "user") + as_turns(row["output"], "assistant")
    else:
        turns = row[row_format]
    if row.get("system"):
        turns = as_turns(row["system"], "system") + turns
    return [read_turn(turn) for turn in turns]


def as_turns(said: str | list[dict], role: str) -> list[dict]:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def read_turn(turn: dict) -> dict:
    """A turn in OpenAI's words, or in ShareGPT's, as one of OpenAI's messages."""
    turn = {name: value for name, value in turn.items() if value is not None}
    if "from" in turn:
        speaker, said = turn.pop("from"), turn.pop("value")
        turn["role"] = ROLES.get(speaker, speaker)
        if speaker == "function_call":
            calls = json.loads(said)
            calls = calls if isinstance(calls, list) else [calls]
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        else:
            turn["content"] = said
    if not isinstance(turn.setdefault("content", ""), str):
        turn["content"] = "".join(part["text"] for part in turn["content"])
    for call in turn.get("tool_calls", []):
        function = call.get("function", call)
        if isinstance(function["arguments"], str):  # else a template would quote it a second time
            function["arguments"] = json.loads(function["arguments"] or "{}")
    if "tool_calls" in turn and not turn["tool_calls"]:  # some templates look for the key alone
        del turn["tool_calls"]
    return turn


def training_template(tokenizer, given: str | None) -> str:
    """The template with marks: the user's, the tokenizer's, or lacuna's that renders the same; LookupError if none."""
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
    wanted = [rendered(tokenizer, own, **probe) for probe in probes]
    for template in shipped.values():
        if [rendered(tokenizer, template, **probe) for probe in probes] == wanted:
            return template
    problem = f"{name}'s chat template has no marks, and none of lacuna's ({', '.join(shipped)}) renders the same"
    raise LookupError(f"{problem}: copy it to a file, {CURE}, and set data.chat_template to that file")


def rendered(tokenizer, template: str, messages: list[dict], tools: list[dict] | None = None) -> str | None:
    """The text of a probe, or None where the template refuses it: tools, or a system turn."""
    try:
        return tokenizer.apply_chat_template(messages, tools, chat_template=template, tokenize=False)
    except Exception:
        return None
