"""Losses of preferences (examples/dpo.py), packed, beside a float64 loop over pairs: each answer alone, unpacked."""

import json
import math
import runpy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, SMALL, vocabulary
from test_lora import LORA, move_away
from test_model import needs_compiler
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from lacuna.config import load_config
from lacuna.data.batch import SECOND, PackedBatch, assemble, collate, hide
from lacuna.model import Trainee, build_model
from lacuna.optim import trained
from lacuna.parallel import Ranks

RECIPE = str(EXAMPLES / "dpo.py")
ONE = Ranks(0, 1, torch.device("cpu"), None)
SEQ_LEN = 96
FACTS = ["reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "tokens_chosen", "tokens_rejected"]
BETA = {"dpo": 0.1, "dpo_norm": 0.5, "ipo": 0.3, "simpo": 2.0, "orpo": 0.4}
MARGIN = 0.7


class Answer(NamedTuple):
    """A prompt and what is answered."""

    ids: list[int]
    trained: list[bool]  # of each id


class Pair(NamedTuple):
    chosen: Answer
    rejected: Answer


# ---- pairs, and rows of them


def make_pair(prompt: int, chosen: int, rejected: int, hole: int = 0) -> Pair:
    """Random ids of these lengths; of the chosen answer `hole` tokens in its middle are another's turn."""
    generator = torch.Generator().manual_seed(10_000 * prompt + 100 * chosen + rejected)
    asked = torch.randint(0, 4096, (prompt,), generator=generator).tolist()
    answers = []
    for length, untrained in ((chosen, hole), (rejected, 0)):
        said = torch.randint(0, 4096, (length,), generator=generator).tolist()
        middle = range((length - untrained) // 2, (length + untrained) // 2)
        mask = [False] * prompt + [i not in middle for i in range(length)]
        answers.append(Answer(asked + said, mask))
    return Pair(*answers)


ROWS = [
    [make_pair(5, 20, 12), make_pair(1, 2, 30), make_pair(3, 7, 7)],  # 96 tokens: nothing is left over
    [make_pair(4, 21, 3, hole=6), make_pair(9, 5, 14)],
    [make_pair(2, 70, 1)],
    [],  # as past the end of the data
]
PAIRS = [pair for row in ROWS for pair in row]


def text_pair(tokenizer, row: dict) -> Pair:
    """A row of plain text `prompt`, `chosen`, `rejected`, with ChatML's stop token behind each answer."""
    asked = row["prompt"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = []
    for said in (row["chosen"], row["rejected"]):
        whole = tokenizer(asked + said, return_offsets_mapping=True)
        mask = [end > len(asked) for _, end in whole["offset_mapping"]]
        answers.append(Answer([*whole["input_ids"], stop], [*mask, True]))
    return Pair(*answers)


def document(pair: Pair) -> np.ndarray:
    """The pair as the encoder gives it to the packer."""
    chosen = hide(np.asarray(pair.chosen.ids, dtype=np.int32), np.asarray(pair.chosen.trained))
    rejected = np.asarray(pair.rejected.ids, dtype=np.int32) | np.int32(SECOND)
    return np.concatenate([chosen, hide(rejected, np.asarray(pair.rejected.trained))])


def batch_of(*rows: list[Pair]) -> PackedBatch:
    made = []
    for place, row in enumerate(rows):
        documents = [document(pair) for pair in row]
        pieces = [(ids, 0, len(ids)) for ids in documents]
        made.append(assemble(pieces, SEQ_LEN, filler=0, mask_boundary=True, place=place))
    return collate(made)


# ---- lacuna's side


def build(folder, loss: str, *more: str) -> Trainee:
    keys = {"loss": loss, "beta": BETA[loss]} | ({"margin": MARGIN} if loss == "simpo" else {})
    words = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", str(folder)]
    words += ["--train.seq_len", str(SEQ_LEN), "--optim.lr", "1", "--recipe", json.dumps(keys)]
    config = load_config(None, [*words, *more], RECIPE)
    tokenizer = vocabulary(4096)
    trainee = build_model(config, ONE, tokenizer)
    trainee.objective = runpy.run_path(RECIPE)["make_objective"](config, ONE, tokenizer)
    return trainee


def leave_the_reference(trainee: Trainee):
    """As if it had been trained: every parameter away from where it began."""
    with torch.no_grad():
        for number, parameter in enumerate(trained(trainee.model).values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.02 * noise)


def gradients(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trained(trainee.model).items()}


def step(trainee: Trainee, *batches: PackedBatch) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Sums over the pairs of all micro-batches: loss, facts, gradients."""
    trainee.zero_grad()
    total = 0.0
    sums = dict.fromkeys(FACTS, 0.0)
    for batch in batches:
        loss, facts = trainee(batch)
        loss.backward()
        total += loss.item()
        assert set(facts) == set(FACTS)
        for name, fact in facts.items():
            sums[name] += float(fact)
    return total, sums, gradients(trainee)


# ---- the reference: nothing of lacuna's, no packing


def log_probability(forward, answer: Answer) -> tuple[torch.Tensor, int]:
    """Sum over what is trained of an answer, and its number of tokens."""
    ids = torch.tensor([answer.ids])
    logps = forward(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    mask = torch.tensor(answer.trained[1:])
    return logps[mask].sum(), int(mask.sum())


def dpo(c, r, c0, r0, nc, nr, beta):
    """Rafailov et al. 2023 (arXiv 2305.18290), equation 7."""
    return -torch.log(torch.sigmoid(beta * (c - c0) - beta * (r - r0)))


def dpo_norm(c, r, c0, r0, nc, nr, beta):
    """Lambert et al. 2024 (arXiv 2411.15124), equation 6."""
    return -torch.log(torch.sigmoid(beta * (c - c0) / nc - beta * (r - r0) / nr))


def ipo(c, r, c0, r0, nc, nr, beta):
    """Azar et al. 2023 (arXiv 2310.12036), equation 17, of means over tokens, as its authors told TRL."""
    return ((c - c0) / nc - (r - r0) / nr - 1 / (2 * beta)) ** 2


def simpo(c, r, c0, r0, nc, nr, beta):
    """Meng et al. 2024 (arXiv 2405.14734), equation 6."""
    return -torch.log(torch.sigmoid(beta / nc * c - beta / nr * r - MARGIN))


def orpo(c, r, c0, r0, nc, nr, beta):
    """Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7: probabilities are geometric means over tokens."""
    p_chosen, p_rejected = torch.exp(c / nc), torch.exp(r / nr)
    ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
    return -c / nc - beta * torch.log(torch.sigmoid(torch.log(ratio)))


LOSSES = {"dpo": dpo, "dpo_norm": dpo_norm, "ipo": ipo, "simpo": simpo, "orpo": orpo}


def reference(policy, base, pairs: list[Pair], loss: str) -> tuple[torch.Tensor, dict[str, float]]:
    """Sums over pairs of loss and facts; policy and base: token ids [1, n] -> logits [1, n, V], float64."""
    beta = BETA[loss]
    total = 0.0
    sums = dict.fromkeys(FACTS, 0.0)
    for pair in pairs:
        c, nc = log_probability(policy, pair.chosen)
        r, nr = log_probability(policy, pair.rejected)
        with torch.no_grad():
            c0, _ = log_probability(base, pair.chosen)
            r0, _ = log_probability(base, pair.rejected)
        total = total + LOSSES[loss](c, r, c0, r0, nc, nr, beta)
        against_base = loss in ("dpo", "dpo_norm", "ipo")
        chosen = beta * (c - c0 if against_base else c / nc).item()
        rejected = beta * (r - r0 if against_base else r / nr).item()
        sums["reward_chosen"] += chosen
        sums["reward_rejected"] += rejected
        sums["reward_margin"] += chosen - rejected
        sums["reward_accuracy"] += chosen > rejected
        sums["tokens_chosen"] += nc
        sums["tokens_rejected"] += nr
    return total, sums


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def expected(folder, trainee: Trainee, pairs: list[Pair], loss: str) -> tuple[float, dict, dict]:
    """Loss, facts and gradients of the trainee's weights as they are, against the folder's as the reference."""
    base = plain(folder)
    leaves = {name: p.detach().double().requires_grad_() for name, p in trained(trainee.model).items()}
    weights = dict(base.named_parameters())
    for name, leaf in leaves.items():
        if "lora_" not in name:
            weights[name] = leaf
        elif name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            product = leaves[f"{layer}.lora_B.weight"] @ leaf
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + 6 / 4 * product  # alpha / rank of LORA

    def policy(ids):
        return functional_call(base, weights, (ids,)).logits

    def frozen(ids):
        return base(ids).logits

    total, facts = reference(policy, frozen, pairs, loss)
    total.backward()
    return total.item(), facts, {name: leaf.grad for name, leaf in leaves.items()}


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-5):
    assert set(got) == set(want)
    for name in got:
        error = (got[name] - want[name]).norm() / want[name].norm()
        assert error < tolerance, f"{name}: relative error {error}"


def assert_equals_the_loop(folder, loss: str, *more: str):
    trainee = build(folder, loss, *more)
    if "--lora.rank" in more:
        move_away(trainee.model)
    else:
        leave_the_reference(trainee)
    got_loss, got_facts, got = step(trainee, batch_of(*ROWS))
    want_loss, want_facts, want = expected(folder, trainee, PAIRS, loss)
    assert got_loss == pytest.approx(want_loss, rel=1e-5)
    for name in FACTS:
        assert got_facts[name] == pytest.approx(want_facts[name], rel=1e-5, abs=1e-4), name  # of sums of 600 nats
    assert 0 < want_facts["reward_accuracy"] < len(PAIRS), "a test of pairs that agree would see less"
    assert_close(got, want)


# ---- loss, facts and every gradient


@pytest.mark.parametrize("loss", LOSSES)
def test_packed_pairs_have_the_loss_facts_and_gradients_of_a_float64_loop_over_pairs(loss, model_folder):
    assert_equals_the_loop(model_folder("qwen3"), loss)


# a head of its own; a window shorter than the answers; logits that are divided; logits that are soft-capped
@pytest.mark.parametrize("name", ["llama", "mistral", "granite", "gemma2"])
def test_so_they_have_in_other_architectures(name, model_folder):
    assert_equals_the_loop(model_folder(name), "dpo")


@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_with_lora_the_reference_is_the_base_without_adapters(how, model_folder):
    """Also where layers are computed again in the backward pass: with adapters then."""
    assert_equals_the_loop(model_folder("qwen2"), "dpo", *LORA, "--train.activation_checkpointing", how)


@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_in_bfloat16_too_the_reference_is_where_training_began(more, model_folder):
    """On one device layers run through copies of theirs, with adapters of their own to be switched off."""
    folder = model_folder("qwen2")
    trainee = build(folder, "dpo", *more, "--model.dtype", "bfloat16")
    if more:
        move_away(trainee.model)
    else:
        leave_the_reference(trainee)
    _, facts, _ = step(trainee, batch_of(*ROWS))
    _, want, _ = expected(folder, trainee, PAIRS, "dpo")
    for name in ("reward_chosen", "reward_rejected"):
        assert facts[name] == pytest.approx(want[name], rel=0.1, abs=0.1), name


@pytest.mark.parametrize("loss", ["ipo", "orpo"])
def test_other_losses_train_adapters_too(loss, model_folder):
    assert_equals_the_loop(model_folder("qwen2"), loss, *LORA)


def test_recomputed_layers_give_the_same_gradients(model_folder):
    assert_equals_the_loop(model_folder("qwen3"), "ipo", "--train.activation_checkpointing", "full")


@needs_compiler
@pytest.mark.slow
def test_compiled_it_is_the_same(model_folder):
    assert_equals_the_loop(model_folder("qwen3"), "dpo", "--train.compile", "true")


# ---- no split and no packing changes anything


def test_one_micro_batch_of_four_rows_is_two_of_two_rows_and_four_of_one(model_folder):
    trainee = build(model_folder("qwen3"), "dpo")
    leave_the_reference(trainee)
    one_loss, one_facts, one = step(trainee, batch_of(*ROWS))
    for size in (2, 1):
        batches = [batch_of(*ROWS[i : i + size]) for i in range(0, 4, size)]
        loss, facts, found = step(trainee, *batches)
        assert sum(batch.counts["units"] for batch in batches) == len(PAIRS)
        assert loss == pytest.approx(one_loss, rel=1e-6)
        assert facts == pytest.approx(one_facts, rel=1e-5, abs=1e-6)
        assert_close(found, one)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_alone_is_the_same_pair_packed(loss, model_folder):
    trainee = build(model_folder("qwen3"), loss)
    leave_the_reference(trainee)
    packed_loss, packed_facts, packed = step(trainee, batch_of(ROWS[0]))
    loss, facts, alone = step(trainee, *[batch_of([pair]) for pair in ROWS[0]])
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert packed_facts == pytest.approx(facts, rel=1e-5, abs=1e-6)
    assert_close(packed, alone)


# ---- where training begins: the policy is the reference


@pytest.mark.parametrize("more", [(), LORA, ("--model.dtype", "bfloat16")], ids=["full", "lora", "bfloat16"])
def test_at_first_the_loss_is_ln_2_and_rewards_are_exactly_0(more, model_folder):
    trainee = build(model_folder("qwen3"), "dpo", *more)
    loss, facts, _ = step(trainee, batch_of(*ROWS))
    assert loss / len(PAIRS) == pytest.approx(math.log(2), abs=1e-6)
    assert [facts[name] for name in FACTS[:4]] == [0.0, 0.0, 0.0, 0.0]  # ties are no hits
    assert facts["tokens_chosen"] == sum(sum(pair.chosen.trained) for pair in PAIRS)
    assert facts["tokens_rejected"] == sum(sum(pair.rejected.trained) for pair in PAIRS)


@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_dropout_is_off(more, tmp_path):
    """It would be another one in each pass: rewards at first would be noise."""
    dropout = {"residual_dropout": 0.1, "embedding_dropout": 0.1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("starcoder2", **SMALL, **dropout)).save_pretrained(tmp_path)
    trainee = build(tmp_path, "dpo", *more)
    assert trainee.training
    _, facts, _ = step(trainee, batch_of(*ROWS))
    assert [facts[name] for name in FACTS[:3]] == [0.0, 0.0, 0.0]


def test_the_first_loss_is_ln_2_however_many_pairs_and_far_from_even(model_folder):
    """No rounding of sums of hundreds of nats is in it."""
    trainee = build(model_folder("qwen3"), "dpo")
    batch = batch_of(*[[make_pair(2, 90 - n, 1)] for n in range(24)])
    loss, _ = trainee(batch)
    assert loss.item() / 24 == pytest.approx(math.log(2), abs=1e-7)


def test_chosen_and_rejected_swapped_negate_the_first_gradient(model_folder):
    trainee = build(model_folder("qwen3"), "dpo")
    _, _, found = step(trainee, batch_of(*ROWS))
    swapped = [[Pair(pair.rejected, pair.chosen) for pair in row] for row in ROWS]
    _, _, negated = step(trainee, batch_of(*swapped))
    assert_close({name: -gradient for name, gradient in negated.items()}, found)


def test_training_moves_the_policy_and_never_the_reference(model_folder):
    trainee = build(model_folder("qwen3"), "dpo")
    parameters = trained(trainee.model)
    begin = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(3):
        step(trainee, batch_of(*ROWS))
        optimizer.step()
    _, facts, _ = step(trainee, batch_of(*ROWS))
    assert facts["reward_margin"] > 0
    with torch.no_grad():  # back to where it began
        for name, parameter in parameters.items():
            parameter.copy_(begin[name])
    _, facts, _ = step(trainee, batch_of(*ROWS))
    assert [facts[name] for name in FACTS[:3]] == [0.0, 0.0, 0.0]
    frozen = [parameter for parameter in trainee.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


# ---- rows without pairs, and the ends of documents


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_without_any_pair_give_zeros_and_no_nan(loss, model_folder):
    trainee = build(model_folder("qwen3"), loss)
    batch = batch_of([], [])
    assert batch.counts["units"] == 0
    total, facts, found = step(trainee, batch)
    assert total == 0.0
    assert set(facts.values()) == {0.0}
    assert not any(gradient.any() for gradient in found.values())


def test_what_is_left_over_gives_orpo_no_nan(model_folder):
    """log(1 - exp(0)) of a document without a trained token is infinite."""
    trainee = build(model_folder("qwen3"), "orpo")
    total, _, found = step(trainee, batch_of(ROWS[1], []))
    assert math.isfinite(total)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_pair_is_two_documents_side_by_side():
    batch = batch_of(*ROWS)
    ends = []
    for number, row in enumerate(ROWS):
        at = SEQ_LEN * number
        for pair in row:
            ends += [at, at + len(pair.chosen.ids)]
            at += len(pair.chosen.ids) + len(pair.rejected.ids)
        ends += [at] if at < SEQ_LEN * (number + 1) else []
    assert batch.cu_seqlens.tolist() == [*ends, SEQ_LEN * len(ROWS)]
    assert batch.counts["units"] == len(PAIRS)
    assert batch.counts["tokens"] == sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in PAIRS)
    assert batch.input_ids.max() < 4096 and batch.labels.max() < 4096
    first = ROWS[0][0]
    whole = first.chosen.ids + first.rejected.ids
    assert batch.input_ids[: len(whole)].tolist() == whole
    assert batch.position_ids[: len(whole)].tolist() == [*range(len(first.chosen.ids)), *range(len(first.rejected.ids))]


@pytest.mark.parametrize("log_p", [0.0, -2e-8, -1e-7, -1e-4])
def test_odds_of_an_answer_that_is_certain_have_a_derivative(log_p):
    recipe = runpy.run_path(RECIPE)
    keys = recipe["Keys"](loss="orpo", beta=0.1)
    for sides in ([log_p, -2.0], [-2.0, log_p]):
        scores = torch.tensor(sides, requires_grad=True)
        loss = recipe["orpo"](*scores, keys)
        loss.backward()
        assert loss.isfinite() and scores.grad.isfinite().all()
        if log_p == -1e-4:
            exact = torch.tensor(sides, dtype=torch.float64, requires_grad=True)
            odds = exact - torch.log1p(-exact.exp())
            want = -exact[0] - 0.1 * torch.log(torch.sigmoid(odds[0] - odds[1]))
            want.backward()
            assert loss.item() == pytest.approx(want.item(), rel=1e-4)
            assert scores.grad.tolist() == pytest.approx(exact.grad.tolist(), rel=1e-3)
