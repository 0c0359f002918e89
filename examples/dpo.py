"""Preferences: which of two answers was chosen. A recipe: `lacuna examples/dpo.py configs/dpo.toml`.

A pair is two documents, side by side in one row, so pairs are packed as everything else is. Its loss depends on the
log-probabilities of whole answers. A first pass of the head gives them, without a gradient; the derivative of the loss
by an answer's is what each of its tokens weighs in a second pass, which is that of pretraining and SFT. So one head
computes every gradient, and never all logits; it costs one product of the head more (a 20th of a step at 1.7B).

Rows have `chosen` and `rejected`: texts, turns, or whole conversations; and beside them `prompt`, `conversations` or
`messages`, `system` and `tools`. Keys, as [recipe] in TOML: see Keys.
"""

import copy
import functools
import itertools
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lacuna.config import Config, ConfigError, Source, blame, log
from lacuna.data.batch import IGNORE, SECOND, PackedBatch, Tokens, reveal
from lacuna.data.conversations import EXTRAS, TEXTS, TURNS, ChatEncoder, as_turns, read_turn
from lacuna.data.tokenize import digest
from lacuna.lora import LoRALinear
from lacuna.model import Trainee, build_model

ANSWERS = ["chosen", "rejected"]
PROMPTS = ["prompt", "conversations", "messages"]
QUESTIONS = ["question", "instruction", "query", "input"]  # other names of a prompt: `fields` makes one of it


class Keys(BaseModel):
    """What [recipe] may hold."""

    model_config = ConfigDict(extra="forbid")
    loss: Literal["dpo", "dpo_norm", "ipo", "simpo", "orpo"] = "dpo"
    beta: float = Field(0.1, gt=0)  # how much a reward weighs; of orpo, how much its odds do. SimPO: 2, dpo_norm: 5
    margin: float = Field(1.0, ge=0)  # simpo: by how much a chosen answer should be ahead


# ---- the losses: of two scores [N], one loss each


def dpo(chosen, rejected, keys: Keys) -> torch.Tensor:
    """Direct preference optimization, arXiv 2305.18290. Scores are log p of the answer over the reference's."""
    return -F.logsigmoid(keys.beta * (chosen - rejected))


def dpo_norm(chosen, rejected, keys: Keys) -> torch.Tensor:
    """dpo of scores a token, as for Tülu 3, arXiv 2411.15124, which takes beta 5."""
    return dpo(chosen, rejected, keys)


def ipo(chosen, rejected, keys: Keys) -> torch.Tensor:
    """Identity preference optimization, arXiv 2310.12036; scores as dpo's, but a token, as its authors say."""
    return (chosen - rejected - 1 / (2 * keys.beta)).square()


def simpo(chosen, rejected, keys: Keys) -> torch.Tensor:
    """Simple preference optimization, arXiv 2405.14734. Scores are log p a token; margin is its gamma."""
    return -F.logsigmoid(keys.beta * (chosen - rejected) - keys.margin)


def orpo(chosen, rejected, keys: Keys) -> torch.Tensor:
    """Odds-ratio preference optimization, arXiv 2403.07691: SFT and, times beta, odds. Scores as simpo's."""
    certain = -1e-6  # of a probability of 1 the odds are infinite, and have no derivative
    odds = [
        score.clamp(max=certain) - torch.log(-torch.expm1(score.clamp(max=certain))) for score in (chosen, rejected)
    ]
    return -chosen - keys.beta * F.logsigmoid(odds[0] - odds[1])


LOSSES = {"dpo": dpo, "dpo_norm": dpo_norm, "ipo": ipo, "simpo": simpo, "orpo": orpo}
HAVE_REFERENCE = ["dpo", "dpo_norm", "ipo"]


# ---- from the rows of a batch to their loss


def make_objective(config: Config, ranks, tokenizer):
    """What `Trainee` calls in place of the sum of losses."""
    keys = read_keys(config)
    reference = None
    if keys.loss in HAVE_REFERENCE:
        reference = without_adapters if config.lora.rank else frozen_copy(config, ranks, tokenizer)
    return functools.partial(objective, keys, reference)


def read_keys(config: Config) -> Keys:
    if config.model.from_scratch:
        raise ConfigError("model.from_scratch: preferences are taught to a model that can speak")
    try:
        return Keys(**config.recipe)
    except ValidationError as error:
        problems = "; ".join(f"recipe.{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"{problems}. There are {', '.join(Keys.model_fields)}") from None


def frozen_copy(config: Config, ranks, tokenizer):
    """-log p of the labels by the model that training began with: in the dtype of computation, sharded as it is."""
    log.info("reference: the same model as it is now, frozen")
    frozen = build_model(config, ranks, tokenizer, frozen=True)
    frozen.eval()
    frozen.objective = lambda frozen, batch: frozen.head(batch)()[1]  # inside its forward, as FSDP wants it
    return lambda trainee, batch: frozen(batch)


def without_adapters(trainee: Trainee, batch: PackedBatch) -> torch.Tensor:
    """-log p of the labels by the model that the adapters began with."""
    LoRALinear.active = False
    try:
        return trainee.head(batch)()[1]
    finally:
        LoRALinear.active = True


def objective(keys: Keys, reference, trainee: Trainee, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
    """The sum of the losses of a batch's pairs, and figures, summed over pairs."""
    trainee.eval()  # dropout would be another one in each pass
    losses_before = None
    if reference:
        with torch.no_grad():
            losses_before = reference(trainee, batch)
    return preference_loss(trainee.head(batch), losses_before, batch, keys)


def preference_loss(head, losses_before, batch: PackedBatch, keys: Keys) -> tuple[torch.Tensor, dict]:
    """head(weights [T]) gives the weighted sum of -log p of the labels, and each [T], as losses_before does."""
    trained = batch.labels != IGNORE
    tokens = by_document(trained.float(), batch)
    # Only answers have labels, and those of a pair follow one another: so every other one of them is a chosen one.
    answer = tokens > 0
    pair = answer & (answer.cumsum(0) % 2 == 1)
    with torch.no_grad():
        _, losses = head()
    log_p = -by_document(losses, batch)
    log_p_before = 0 if losses_before is None else -by_document(losses_before, batch)
    with torch.enable_grad():
        log_p.requires_grad_()
        gain = log_p - log_p_before
        mean = gain / tokens.clamp(min=1)
        score = gain if keys.loss == "dpo" else mean
        # the rejected answer is the next document; where there is no pair, -1 has a loss and a derivative, too
        chosen = torch.where(pair, score, -1)
        rejected = torch.where(pair, score.roll(-1), -1)
        loss = torch.where(pair, LOSSES[keys.loss](chosen, rejected, keys), 0).sum()
    [slope] = torch.autograd.grad(loss, log_p)  # [N]
    loss = loss.detach()
    if torch.is_grad_enabled():
        weights = -slope.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(trained)) * trained  # [T]
        weighted, _ = head(weights)
        loss = weighted - weighted.detach() + loss  # the loss, with the gradient of the second pass
    reward = keys.beta * (gain if keys.loss in HAVE_REFERENCE else mean).detach()
    margin = reward - reward.roll(-1)
    figures = {
        "reward_chosen": reward,
        "reward_rejected": reward.roll(-1),
        "reward_margin": margin,
        "reward_accuracy": margin > 0,  # a tie, as at the first step, is none
        "tokens_chosen": tokens,
        "tokens_rejected": tokens.roll(-1),
    }
    return loss, {name: (figure * pair).sum() for name, figure in figures.items()}


def by_document(values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The sum of values [T] over each document, [N]: always in one order, and nothing waits."""
    return torch.segment_reduce(values, "sum", offsets=batch.cu_seqlens.long(), unsafe=True)


# ---- from a row of data to a document


class PairEncoder:
    """An encoder, as lacuna/data/tokenize.py has one: each answer is read as a prompt and a completion are in SFT."""

    def __init__(self, tokenizer, config: Config):
        if config.data.overlong == "truncate":
            raise ConfigError('data.overlong: a pair is not cut: "drop" it')
        read_keys(config)  # refused before data is read
        self.chats = ChatEncoder(tokenizer, config)
        self.questions = {}  # of each source: columns that may be a prompt, where none is
        self.eos = self.chats.eos
        self.adapt = self.chats.adapt

    def columns(self, columns, source):
        if not set(ANSWERS) <= set(columns):
            raise ConfigError(f"data.sources {source.path} has {', '.join(columns)}: of a pair, {ANSWERS} are needed")
        read = [name for name in columns if name in ANSWERS + PROMPTS + ["system", "tools"]]
        self.questions[repr(source)] = [name for name in QUESTIONS if name in columns]
        unread = ", ".join(sorted(set(columns) - set(read))) or "nothing"
        log.info("%s: preference pairs; not read: %s", source.path, unread)
        return read

    def documents(self, rows, source, numbers):
        documents = []
        for number, row in zip(numbers, rows, strict=True):
            with blame(f"data.sources {source.path}, row {number}, read as a preference pair"):
                given = {key: row[key] for key in row if row[key] is not None or key in EXTRAS}
                documents.append(self.document(given, source))
        return documents

    def document(self, row: dict, source: Source) -> Tokens:
        if not all(row.get(name) for name in ANSWERS):
            return Tokens(note="dropped: an empty answer")
        questions = self.questions.get(repr(source))
        asked = any(row.get(name) for name in PROMPTS)  # answers that are whole conversations need none
        if questions and not asked and isinstance(row["chosen"], str) and not TURNS.match(row["chosen"]):
            cure = f'fields = {{prompt = "{questions[0]}"}} makes one of it (join several columns first)'
            raise ValueError(f"there is no prompt beside {', '.join(questions)}: {cure}")
        answers = as_completions(row, source.roles)
        chosen, rejected = [self.chats.document(answer, "prompt and completion", source) for answer in answers]
        if chosen.note or rejected.note:
            return Tokens(note=chosen.note or rejected.note)
        if np.array_equal(chosen.ids, rejected.ids):
            return Tokens(note="dropped: both answers are the same")
        first, first_trained = reveal(chosen.ids)
        second, second_trained = reveal(rejected.ids)
        trained = np.concatenate([first_trained, second_trained])
        trained[[0, len(first)]] = False  # or the last token of the answer before would predict them
        return self.chats.fit(np.concatenate([first, second + SECOND]), trained)

    def fingerprint(self):
        return digest(self.chats.fingerprint(), Path(__file__).read_text())


def make_encoder(config: Config, tokenizer) -> PairEncoder:
    return PairEncoder(tokenizer, config)


def as_completions(row: dict, roles: dict[str, str]) -> list[dict]:
    """The answers of a pair, each as a row of prompt and completion.

    Where no prompt is given, or answers are whole conversations, the prompt is what both begin with.
    """
    given = [name for name in PROMPTS if row.get(name)]
    empty = "" if row.get("prompt") == "" else None  # a prompt, if there is none
    prompt = row[given[0]] if given else empty
    answers = [[row[name]] if isinstance(row[name], dict) else row[name] for name in ANSWERS]
    if all(isinstance(answer, str) and TURNS.match(answer) for answer in answers):
        parsed = list(map(json.loads, answers))
        # beside a prompt that is text, an answer that is JSON is text, too
        if not isinstance(prompt, str) or read_turn(dict(parsed[0][0]), roles)["role"] != "assistant":
            answers = parsed
    texts = all(isinstance(answer, str) for answer in answers)
    if isinstance(prompt, str) and TURNS.match(prompt):
        prompt = json.loads(prompt)
    if not texts:
        answers = [as_turns(answer, "assistant") for answer in answers]
    begins = [] if texts else [read_turn(dict(answer[0]), roles)["role"] for answer in answers]
    whole = bool(begins) and begins[0] != "assistant"
    if len(given) > 1 and not whole:
        raise ValueError(f"{' and '.join(given)} are both the prompt: take one out")
    # of a few words it may be said again
    long = isinstance(prompt, str) and len(prompt.split()) > 4
    if texts and long and all(answer.startswith(prompt) for answer in answers):
        raise ValueError("chosen and rejected begin with the prompt: take it out of them, or out of the row")
    if "assistant" in begins and whole:
        raise ValueError("of chosen and rejected, one is a whole conversation, and the other an answer")
    if isinstance(prompt, list) and not whole and said(prompt, roles)[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an answer already: let it end with the question")
    if prompt is None or whole:
        compared = answers if texts else [said(answer, roles) for answer in answers]
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(*compared, strict=False))
        common = len(list(same))
        if texts:  # the word in which they part belongs to both answers, with the space before it
            common = max(0, *(answers[0].rfind(space, 0, common) for space in " \n\t"))
            if "\n" not in answers[0][:common].strip("\n"):  # two answers may well begin alike
                raise ValueError("there is no prompt, and no line that both begin with: fields may name its column")
        if isinstance(prompt, list) and said(prompt, roles) != said(answers[0][: len(prompt)], roles):
            raise ValueError("chosen and rejected are whole conversations, which do not begin with the prompt")
        if isinstance(prompt, str) and not is_in(prompt, compared[0][:common]):
            raise ValueError("chosen and rejected are whole conversations, and no turn before they part has the prompt")
        if not (whole or answers[0][:common]):
            raise ValueError(f"there is none of {', '.join(PROMPTS)}, and both answers begin with nothing in common")
        prompt = answers[0][:common]
        answers = [answer[common:] for answer in answers]
    rest = {name: row[name] for name in ("system", "tools") if name in row}
    return [rest | {"prompt": prompt, "completion": answer} for answer in answers]


def said(turns: list[dict], roles: dict[str, str]) -> list[dict]:
    """Who says what, in whichever words it is written; without what nobody says, such as an id or a time."""
    messages = [read_turn(copy.deepcopy(turn), roles) for turn in turns]
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", [])]
        message["tool_calls"] = [(call.get("name"), call["arguments"]) for call in calls]
    return [{key: message.get(key) for key in ("role", *TEXTS)} for message in messages]


def is_in(prompt: str, turns: list[dict]) -> bool:
    """Whether a turn says the prompt, or the prompt quotes one, as Anthropic's HH does; whatever the white space."""
    prompt = " ".join(prompt.split())
    contents = [" ".join(turn["content"].split()) for turn in turns]
    return any(prompt in content or (content and f" {content} " in f" {prompt} ") for content in contents)
