"""Conversations to token ids and a loss mask: what {% generation %} marks enclose is trained."""

import copy
import json
import re
import signal
from pathlib import Path
from threading import Lock, current_thread, main_thread

import jinja2
import numpy as np
import transformers
from tokenizers.processors import ByteLevel

from lacuna.config import Config, ConfigError, Source, blame, log
from lacuna.data.batch import Tokens, hide
from lacuna.data.tokenize import TextEncoder, added_bos, digest

MASKS = ["attention_mask", "loss_mask", "completion_mask", "assistant_masks"]
EXTRAS = ["tools", "system"]  # null or not, they make a chat
FORMATS = {  # by their first columns; a row may have the second ones
    "messages": (["messages"], EXTRAS),
    "conversations": (["conversations"], EXTRAS),
    "prompt and completion": (["prompt", "completion"], EXTRAS),
    "instruction and output": (["instruction", "output"], ["input", "history", *EXTRAS]),
    "token ids": (["input_ids"], ["labels", *MASKS]),
}
# Who speaks, under `role` or `from`, in the words of chat templates; a `call` is a turn of the assistant's.
ROLES = {"system": "system", "developer": "developer"} | dict.fromkeys(["user", "human"], "user")
ROLES |= dict.fromkeys(["assistant", "gpt", "bot", "model", "chatgpt"], "assistant")
ROLES |= dict.fromkeys(["tool", "function", "observation", "ipython", "environment"], "tool")
ROLES |= dict.fromkeys(["function_call", "tool_call"], "call")
FLAGS = ["train", "training", "trainable", "loss", "weight"]
YES = {"true", "1", "1.0"}
SAID = ["content", "value", "text", "parts"]  # the first that says something
PART = {"type", "text", "value", "thinking", "id", "cache_control", "annotations", "signature"}
REASONING = ["reasoning_content", "reasoning", "thinking"]
TURNS = re.compile(r"""\s*\[\s*\{(?=.*?["'](?:role|from)["']\s*:).*\}\s*\]\s*\Z""", re.DOTALL)
TEXTS = ["content", "reasoning_content", "tool_calls", "function_call", "function_calls", "functions", "tools"]
MARKS = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
CURE = "put {% generation %} before and {% endgeneration %} after what the assistant writes, its stop token included"
PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
# Plain prompt and completion go through the same machinery, as the simplest of chats.
PLAIN = "{{ messages[0].content }}{% generation %}{{ messages[1].content }}{{ eos_token }}{% endgeneration %}"
TEMPLATE_SECONDS = 5  # of processor time; one more for each 100 kB
WORD = "Zq{}xK"  # letters and digits: JSON and HTML leave them
RENDERING = Lock()  # transformers keeps its mask in the template


def make_encoder(config: Config, tokenizer) -> "ChatEncoder | TextEncoder":
    return ChatEncoder(tokenizer, config) if config.task == "sft" else TextEncoder(tokenizer)


class ChatEncoder:
    """Conversations to documents: what the assistant says is trained. Its methods are TextEncoder's."""

    def __init__(self, tokenizer, config: Config):
        self.tokenizer = copy.deepcopy(tokenizer)
        # some leave the space before a word out of its token's place, and transformers' mask ends at such a turn
        self.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
        self.data = config.data
        self.seq_len = config.train.seq_len
        self.unread = set()  # keys of messages, each with its source, that were told
        self.bos = tokenizer.bos_token if added_bos(tokenizer) else ""
        try:
            self.template = training_template(self.tokenizer, self.data.chat_template, self.render)
            with blame("data.chat_template"):
                ids, mask = self.render(PROBE, self.template, [])
                stop = self.tokenizer.decode(ids[mask][-1:])
                trained = self.tokenizer.decode(ids[mask])
                if stop not in self.tokenizer.added_tokens_encoder or "yes" not in trained:
                    raise ConfigError(f"data.chat_template: no marked answer ends with one stop token: {CURE}")
                self.tokenizer.eos_token = stop
        except (LookupError, jinja2.TemplateError) as error:  # rows of token ids need none
            self.template = None
            self.problem = error
        self.eos = TextEncoder(self.tokenizer).eos

    def columns(self, columns, source):
        row_format, known = recognise(columns, source)
        unread = ", ".join(sorted(set(columns) - set(known))) or "nothing"
        log.info("%s: %s ending in %s; not read: %s", source.path, row_format, self.tokenizer.eos_token, unread)
        return [name for name in columns if name in known]

    def documents(self, rows, source, numbers):
        if not rows:
            return []
        row_format, known = recognise(sorted(set().union(*rows)), source)
        documents = []
        for number, row in zip(numbers, rows, strict=True):
            given = {key: row[key] for key in known if key in row and not (row[key] is None and key not in EXTRAS)}
            with blame(f"data.sources {source.path}, row {number}, read as {row_format}"):
                documents.append(self.document(given, row_format, source))
        return documents

    def document(self, row: dict, row_format: str, source: Source) -> Tokens:
        first = FORMATS[row_format][0][0]
        if first not in row:
            raise ValueError(f"no {first}: rows of a source have one format")
        if row_format == "token ids":
            return self.fit(*read_ids(row, len(self.tokenizer)))
        messages = read_messages(row, row_format, source.roles)
        template = self.template
        texts = [message["content"] for message in messages]
        if row == dict(zip(["prompt", "completion"], texts, strict=False)):
            template = PLAIN
            messages[0]["content"] = self.bos + row["prompt"].removeprefix(self.bos)
            messages[1]["content"] = row["completion"].removesuffix(self.tokenizer.eos_token)
        wanted = [i for i, message in enumerate(messages) if message.pop("train")]  # templates do not see it
        for key in set().union(*messages) - {"role", "tool_call_id", *REASONING, *TEXTS}:
            if (source.path, key) not in self.unread:
                log.warning("%s: messages have %r, which lacuna does not read", source.path, key)
                self.unread.add((source.path, key))
        trained = [i for i in wanted if says_something(messages[i])]
        if not trained:
            return Tokens(note="dropped: an empty answer" if wanted else "dropped: without a trained token")
        tools = [decoded(tool) for tool in decoded(row.get("tools")) or []]
        left_out = self.left_out(messages, template, tools, trained[-1])
        if left_out and self.data.unrendered == "drop":
            return Tokens(note="dropped: the chat template leaves something out")
        if left_out:
            raise ValueError(f"the chat template leaves out {', '.join(left_out)}: see data.unrendered")
        ids, mask = self.render(messages, template, tools)
        ends = mask & ~np.append(mask[1:], False)  # marked tokens come in runs, one a turn
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if ends.sum() != len(answers):
            raise ValueError(f"the chat template marks {ends.sum()} of {len(answers)} assistant turns: {CURE}")
        # Each turn has one stop token, and it is the last one: else the model would learn to go on after it.
        if (ends != mask & (ids == self.eos)).any():
            return Tokens(note="dropped: a stop token inside a turn, or none at its end")
        turn = np.cumsum(ends) - ends  # each token's, from 0: the last is what follows answers
        is_trained = np.isin([*answers, -1], trained)
        return self.fit(ids, mask & is_trained[turn])

    def left_out(self, messages: list[dict], template: str | None, tools: list, last: int) -> list[str]:
        """What the template leaves out of messages; `last` is the last that is trained."""
        question = max((i for i in range(last) if messages[i]["role"] == "user"), default=0)
        # a copy is rendered with a word of its own in each text: short ones may be elsewhere
        copies = list(map(dict, messages))
        places = {}  # of each word: where it was put
        for number, message in enumerate(copies):
            for key in TEXTS:
                if key in message:
                    message[key] = marked(message[key], f"message {number} ({message['role']}), {key}", places)
            if "reasoning_content" in message:
                message |= dict.fromkeys(REASONING, message["reasoning_content"])
            if number < question and message["role"] == "assistant":
                before, _, _ = message["content"].rpartition("</think>")
                thoughts = before.rpartition("<think>")[2] + message.get("reasoning_content", "")
                places |= dict.fromkeys(re.findall(WORD.format(r"\d+"), thoughts))
        tools = copy.deepcopy(tools)
        for tool in tools:
            function = tool.get("function", tool)
            function["name"] = marked(str(function.get("name")), "tools", places)
        text = self.render(copies, template, tools, tokenize=False)
        stands_in = template not in (PLAIN, self.tokenizer.chat_template) and not self.data.chat_template
        if stands_in and self.render(copies, self.tokenizer.get_chat_template(), tools, tokenize=False) != text:
            raise ValueError(f"the model's own chat template differs: set data.chat_template, and {CURE}")
        there = set(re.findall(WORD.format(r"\d+"), text))
        return list(dict.fromkeys(place for word, place in places.items() if place and word not in there))

    def render(self, messages: list[dict], template: str | None, tools: list, **options):
        """Token ids [n] of a conversation, and which are marked, bool [n]; or its text."""
        if template is None:
            raise ConfigError(f"data.chat_template: {self.problem}")
        options = options or {"return_dict": True, "return_assistant_tokens_mask": True}
        seconds = TEMPLATE_SECONDS + len(str(messages)) // 10**5
        with RENDERING:
            if current_thread() is main_thread():  # in a stream it counts training's
                signal.signal(signal.SIGVTALRM, stop_template)
                signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)  # Jinja may swallow the first
            try:
                out = self.tokenizer.apply_chat_template(messages, tools or None, chat_template=template, **options)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if isinstance(out, str):
            return out
        return np.asarray(out["input_ids"], dtype=np.int32), np.asarray(out["assistant_masks"], dtype=bool)

    def fit(self, ids: np.ndarray, mask: np.ndarray) -> Tokens:
        """The document of ids [n], trained where mask [n] says so: at most seq_len of them."""
        long = len(ids) > self.seq_len
        if long and self.data.overlong == "drop":
            return Tokens(note="dropped: longer than train.seq_len")
        if not mask[1 : self.seq_len].any():  # nothing predicts a first token
            return Tokens(note="dropped: without a trained token")
        return Tokens(hide(ids, mask)[: self.seq_len], "truncated to train.seq_len" if long else "")

    def fingerprint(self):
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.special_tokens_map, self.bos]
        parts += [self.template, self.tokenizer.chat_template]
        return digest(*parts, self.data.overlong, self.data.unrendered, self.seq_len, transformers.__version__)

    def adapt(self, tokenizer):
        tokenizer.eos_token = self.tokenizer.eos_token
        if self.data.chat_template:  # for programs that do not know the marks
            plain = {None: "if true", "end": "endif"}
            tokenizer.chat_template = MARKS.sub(lambda mark: mark[1] + plain[mark[2]] + mark[3], self.template)


def stop_template(number: int, frame):
    raise TimeoutError("the chat template does not end")


def marked(value, place: str, places: dict[str, str]):
    """A copy with a word, noted in `places`, in each text, and beside each </think>."""
    if isinstance(value, list):
        return [marked(inner, place, places) for inner in value]
    if isinstance(value, dict):
        is_call = {"function", "arguments"} & value.keys()  # whose id and type templates drop
        texts = [key for key in value if not is_call or key not in ("id", "type", "index")]
        return value | {key: marked(value[key], place, places) for key in texts}
    if value is None:
        return value
    pieces = re.split("(</?think>)", str(value))
    for i in range(0, len(pieces), 2):
        if pieces[i].strip():
            word = WORD.format(len(places))
            places[word] = place
            end = len(pieces[i].rstrip())
            # before the last word: templates trim, and look at how a text begins and ends
            at = pieces[i].rfind(" ", 0, end) + 1 or end
            pieces[i] = pieces[i][:at] + word + pieces[i][at:]
    return "".join(pieces)


def recognise(columns: list[str], source: Source) -> tuple[str, list[str]]:
    """The format of such rows, of those that `fields` names if it can, and its columns."""
    if ({"rejected", "kto_tag"} & set(columns) or {"completion", "label"} <= set(columns)) and not source.fields:
        raise ConfigError(f"data.sources {source.path} holds preferences: see examples/dpo.py")
    named = set(source.fields)
    for row_format, (required, optional) in sorted(FORMATS.items(), key=lambda form: named.isdisjoint(form[1][0])):
        if set(required) <= set(columns):
            return row_format, required + optional
    raise ConfigError(f"data.sources {source.path} has {', '.join(columns)}: no format. Formats: {', '.join(FORMATS)}")


def read_ids(row: dict, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] and mask [n] of a tokenised row without its padding: labels and masks say what counts."""
    ids = np.asarray(row["input_ids"])
    if ids.size and (ids.dtype.kind not in "iu" or ids.ndim != 1 or ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(f"input_ids are not all whole numbers from 0 to {vocabulary - 1}")
    labels = np.asarray(row.get("labels", ids))
    if labels.shape != ids.shape or ((labels != ids) & (labels != -100)).any():
        raise ValueError("labels are not one for each id: the id itself, or -100")
    masks = {name: np.asarray(row.get(name, np.ones(len(ids)))) for name in MASKS}
    for name, mask in masks.items():
        if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{name} is not a 0 or 1 for each of {len(ids)} ids")
    present = masks["attention_mask"] == 1
    trained = (labels != -100) & np.all(list(masks.values()), axis=0)
    return ids[present].astype(np.int32), trained[present]


def read_messages(row: dict, row_format: str, roles: dict[str, str]) -> list[dict]:
    """A row as OpenAI's messages: text in one piece, arguments as objects, and `train`, a bool."""
    system = as_turns(row.get("system") or [], "system")
    if row_format == "prompt and completion":
        if isinstance(row["prompt"], list) or TURNS.match(str(row["prompt"])):
            turns = [name for name in ("prompt", "completion") if TURNS.match(str(row.get(name)))]
            row = row | {name: decoded(row[name]) for name in turns}
        asked = [turn | {"train": False} for turn in as_turns(row["prompt"], "user")]
        turns = asked + as_turns(row.get("completion", ""), "assistant")
    elif row_format == "instruction and output":
        asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
        turns = []
        for pair in [*(decoded(row.get("history")) or []), [asked, row.get("output", "")]]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError("history is no list of pairs, [question, answer]: rewrite it, or take it out")
            turns += as_turns(pair[0], "user") + as_turns(pair[1], "assistant")
    else:
        turns = as_turns(decoded(row[row_format]), "user")
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a turn is no object with role and content")
    return [read_turn(turn, roles) for turn in system + turns]


def as_turns(said: str | list[dict], role: str) -> list[dict]:
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def read_turn(turn: dict, roles: dict[str, str]) -> dict:
    """A turn in OpenAI's, ShareGPT's or a source's words, as OpenAI's message."""
    flags = {str(turn[name]).lower() for name in FLAGS if turn.get(name) is not None}
    turn = {name: value for name, value in turn.items() if value not in (None, "", []) and name not in FLAGS}
    calls = decoded(turn.pop("tool_calls", "")) or []  # some templates look for the key alone
    speaker = str(turn.pop("from", turn.get("role")))
    turn["role"] = ROLES.get(roles.get(speaker, speaker).lower())
    if turn["role"] is None:
        raise ValueError(f"a turn of {speaker!r}, none of {', '.join(ROLES)}: data.sources have roles = {roles}")
    if not flags <= {*YES, "false", "0", "0.0"}:
        raise ValueError(f"{' '.join(FLAGS)}: true or false (or 1, 0), not {', '.join(flags)}")
    name = next((name for name in SAID if name in turn), "content")
    content = turn.pop(name, "")
    if turn["role"] == "call":
        calls = [*calls, *np.atleast_1d(decoded(content or "[]")).tolist()]
        turn["role"] = "assistant"
        content = ""
    thoughts = [turn.pop(name) for name in REASONING if name in turn]
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = {"text": [], "reasoning": []}
    for part in parts:
        if not isinstance(part, dict):
            raise ValueError("a part is no object")
        kind = re.sub("^(input|output)_", "", str(part.get("type", "text"))).replace("thinking", "reasoning")
        others = {key for key, value in part.items() if value not in (None, "", [], False)} - PART
        text = [part[key] for key in ("text", "value", "thinking") if type(part.get(key)) is str]
        if kind not in texts or others or len(text) != 1:
            raise ValueError(f"a part {part!s:.60}: text and reasoning are read")
        texts[kind] += filter(None, text)
    turn["content"] = "".join(texts["text"]).encode().decode()  # half a surrogate pair has no bytes
    thoughts = filter(str.strip, [*thoughts, "\n".join(texts["reasoning"])])
    thoughts = {thought.strip(): thought for thought in thoughts}
    if "</think>" in turn["content"] and any(thought in turn["content"] for thought in thoughts):
        raise ValueError("one thought is in content and beside it: take one out")
    if thoughts:  # templates differ
        turn |= dict.fromkeys(REASONING, "\n".join(thoughts.values()))
    calls = [one if "function" in one else {"type": "function", "function": one} for one in calls]
    for call in calls:
        function = call["function"]
        for name in ("parameters", "input"):
            if name in function and function.get("arguments") is None:
                function["arguments"] = function.pop(name)
        given = {key for key, value in function.items() if value is not None}
        if not given <= {"name", "arguments", "id", "type", "index"} or call.get("arguments"):
            raise ValueError(f"a call has {[*call, *function]}: name and arguments are read")
        function["arguments"] = decoded(function.get("arguments") or "{}")  # text would be quoted twice
    if calls:
        turn["tool_calls"] = calls
    turn["train"] = turn["role"] == "assistant" and flags <= YES
    return turn


def decoded(value):
    """What a column says that holds JSON as text."""
    return json.loads(value or "null") if isinstance(value, str) else value


def says_something(message: dict) -> bool:
    return any(str(message[key]).strip() for key in TEXTS if message.get(key))


def training_template(tokenizer, given: str | None, render) -> str:
    """The user's template, the tokenizer's, or lacuna's of the same text; LookupError without marks."""
    shipped = {file.stem: file.read_text() for file in sorted(Path(__file__).parent.glob("templates/*.jinja"))}
    if given is not None:
        if "{" not in given and given not in shipped and not Path(given).is_file():
            raise ConfigError(f"data.chat_template {given}: no file, no Jinja, none of {', '.join(shipped)}")
        return given if "{" in given else shipped.get(given) or Path(given).read_text("utf-8-sig")
    if tokenizer.chat_template:
        own = tokenizer.get_chat_template()
        # two answers: some drop what was thought before the first; rows are compared, too: `left_out`
        text = render(2 * PROBE, own, [], tokenize=False)
        for name, template in {"the model's": own, **shipped}.items():
            if MARKS.search(template) and render(2 * PROBE, template, [], tokenize=False) == text:
                log.info("chats   template: %s", name)
                return template
    cure = f"set data.chat_template to one of {', '.join(shipped)}, or to a file, and {CURE}"
    raise LookupError(f"{tokenizer.name_or_path} has no chat template with marks: {cure}")
