"""benchmarks/choices.py: every arm takes back what it says and nothing else, and what is measured is each document."""

import json
import shutil
import sys
import types
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, REPO, model_config, pack, random_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

import lacuna.data.loader
import lacuna.model
import lacuna.train
from lacuna.config import Config, OptimConfig
from lacuna.data.loader import RowDataset
from lacuna.data.sources import Cursor
from lacuna.data.tokenize import TextEncoder
from lacuna.loss import head_loss
from lacuna.model import build_model
from lacuna.optim import AdamW
from lacuna.parallel import Ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import choices
import choices_arms as arms
import choices_table as table

RANKS = Ranks(0, 1, torch.device("cpu"), None)
REPLACED = [
    (lacuna.data.loader, "collate"),
    (lacuna.data.loader, "split_documents"),
    (lacuna.data.loader, "best_fit"),
    (lacuna.model, "head_loss"),
    (lacuna.train, "accumulate_gradients"),
    (AdamW, "__init__"),
    (AdamW, "step"),
]


@pytest.fixture(autouse=True)
def lacuna_as_it_is(monkeypatch):
    """Put back after each test what an arm has replaced."""
    for owner, name in REPLACED:
        monkeypatch.setattr(owner, name, getattr(owner, name))


def config_of(folder: Path, tmp_path: Path, **train) -> Config:
    keys = {"model": {"name": str(folder)}, "data": {"sources": [{"path": "none"}], "cache": str(tmp_path / "cache")}}
    return Config.model_validate(keys | {"train": {"seq_len": 32, "steps": 1, **train}})


def trainee_of(folder, tmp_path):
    return build_model(config_of(folder, tmp_path), RANKS, AutoTokenizer.from_pretrained(folder))


def test_across_documents_the_second_one_sees_the_first(model_folder, tmp_path):
    trainee = trainee_of(model_folder("llama"), tmp_path)

    def second_document(first: int):
        """The losses of a row's second document, whose first one is this token again and again."""
        ids = np.asarray([first] * 12 + list(range(50, 62)), dtype=np.int32)
        rows = [lacuna.data.batch.Row(ids, np.roll(ids, -1), np.asarray([0, 12]), 24, 0, 0)] * 2
        batch = lacuna.data.loader.collate(rows)
        assert len(batch.position_ids) == 48
        return batch, trainee.head(batch)()[1].view(2, 24)[:, 12:-1]

    batch, losses = second_document(7)
    assert torch.equal(losses, second_document(8)[1])
    arms.attend_across()
    batch, losses = second_document(7)
    assert batch.position_ids.tolist() == [*range(24), *range(24)]
    assert batch.cu_seqlens.tolist() == [0, 24, 48]
    assert (losses - second_document(8)[1]).abs().min() > 0
    assert torch.equal(losses[0], losses[1])  # rows still do not see one another


def test_concatenated_and_cut_rows_are_the_documents_end_to_end(tmp_path, tokenizer):
    with open(tmp_path / "texts.jsonl", "w") as file:
        for length in (5, 90, 1, 31, 32, 33, 2, 64, 7, 15):
            file.write(json.dumps({"text": " whale" * length}) + "\n")
    config = config_of(EXAMPLES / "tiny", tmp_path)
    config.data.sources[0].path = str(tmp_path / "texts.jsonl")
    arms.concatenate_and_cut()
    dataset = RowDataset(config, config.data.sources, TextEncoder(tokenizer), rank=0, ranks=1, epochs=1)
    [source] = dataset.sources
    documents = list(islice(source.read(0, 1, Cursor()), len(source.documents)))  # an epoch is a window
    order = np.random.default_rng([config.seed, 0, 0]).permutation(len(documents))  # as a window is shuffled
    drawn = [documents[i].key for i in order]
    wanted = [(document, at) for document in drawn for at in range(source.lengths[document])]

    rows = [plan.pieces for plan in dataset.plan_stream(0)]
    laid = [[(document.key, at) for _, document, begin, end in row for at in range(begin, end)] for row in rows]
    # rows are shuffled: each is one of those that plain slices of the whole give
    slices = [wanted[begin : begin + 32] for begin in range(0, len(wanted), 32)]
    assert sorted(laid) == sorted(slices)
    assert sum(len(row) == 32 for row in laid) == len(wanted) // 32


def packed_by_looking(sizes: list[int], order: list[int]) -> list[list[int]]:
    """The pieces of rows of 64 slots: in this order, each into the first of the fullest rows that have room."""

    def used(row: list[int]) -> int:
        return sum(sizes[piece] for piece in row)

    rows = []
    for piece in order:
        fitting = [row for row in rows if used(row) + sizes[piece] <= 64]
        if fitting:
            max(fitting, key=used).append(piece)
        else:
            rows.append([piece])
    return rows


def test_the_two_other_best_fits_sort_nothing_or_everything():
    sizes = np.random.default_rng(0).integers(1, 65, 200)
    drawn = list(range(200))
    longest_first = sorted(drawn, key=lambda piece: -sizes[piece])
    found = []
    for replace in (lambda: None, arms.pack_as_drawn, arms.pack_sorted):
        replace()
        found.append(lacuna.data.loader.best_fit(sizes, 64))
    as_it_is, as_drawn, in_order = found
    assert as_drawn == packed_by_looking(sizes.tolist(), drawn)
    assert in_order == packed_by_looking(sizes.tolist(), longest_first)
    assert as_it_is not in (as_drawn, in_order)


def test_the_heads_gradient_is_rounded_to_bf16_after_every_chunk(monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(512, 16).bfloat16()
    weight = torch.randn(100, 16) * 0.3
    labels = torch.randint(0, 100, (512,))
    labels[::5] = -100
    batch = types.SimpleNamespace(labels=labels, counts={"trained_tokens": int((labels >= 0).sum())})
    double = weight.bfloat16().double().requires_grad_()
    exact = F.cross_entropy(hidden.double() @ double.T, labels, reduction="sum")
    exact.backward()

    def error(head) -> float:
        """Of the weight's gradient, relative."""
        leaf = weight.clone().requires_grad_()
        loss, losses = head(hidden, leaf, batch, False)
        loss.backward()
        assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
        assert losses.sum().item() == pytest.approx(exact.item(), rel=2e-3)
        in_bf16 = torch.equal(leaf.grad, leaf.grad.bfloat16().float())
        assert in_bf16 == (head is arms.bf16_head_loss)
        return ((leaf.grad - double.grad).norm() / double.grad.norm()).item()

    monkeypatch.setattr(arms, "HEAD_CHUNK", 512)
    one_chunk = error(arms.bf16_head_loss)
    monkeypatch.setattr(arms, "HEAD_CHUNK", 8)
    many_chunks = error(arms.bf16_head_loss)
    assert error(head_loss) < one_chunk < many_chunks / 2 < 0.02


def stepped(weight_decay: float, gradient: float) -> tuple[dict, AdamW]:
    """The parameters of a small model after one step, all gradients alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("qwen2"), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer = AdamW(model, model.get_decoder().layers, OptimConfig(lr=1e-2, weight_decay=weight_decay), False)
    optimizer.step(1e-2, torch.tensor(1.0), torch.tensor(False))
    return dict(model.named_parameters()), optimizer


def test_weights_are_rounded_to_bf16_and_moments_are_not():
    before, optimizer = stepped(0.0, 1e-3)
    arms.weights_in_bf16()
    after, rounded = stepped(0.0, 1e-3)
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name].bfloat16().float()), name
        assert not torch.equal(parameter, before[name]), name
        for moment, rounded_moment in zip(optimizer.moments[before[name]], rounded.moments[parameter], strict=True):
            assert torch.equal(moment, rounded_moment)


def test_everything_decays_embeddings_norms_and_biases_too():
    start, _ = stepped(0.0, 0.0)
    exceptions, _ = stepped(0.5, 0.0)
    arms.decay_everything()
    decayed, _ = stepped(0.5, 0.0)
    kept = [name for name in start if torch.equal(start[name], exceptions[name])]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(kept)
    assert len(kept) < len(start)
    for name, parameter in decayed.items():
        torch.testing.assert_close(parameter, start[name] * (1 - 1e-2 * 0.5))


def test_a_mean_of_means_is_the_mean_of_each_micro_batchs_own_gradient(model_folder, tmp_path):
    trainee = trainee_of(model_folder("llama"), tmp_path)
    few, many = random_documents([30, 30])
    rows = [pack([[few]], 32, trained=lambda _, position: position > 27), pack([[many]], 32)]
    assert [batch.counts["units"] for batch in rows] == [2, 29]

    def gradient(batches) -> tuple[torch.Tensor, torch.Tensor]:
        """All gradients as one vector, and the loss."""
        trainee.zero_grad()
        units = torch.tensor(float(sum(batch.counts["units"] for batch in batches)))
        parts = lacuna.train.accumulate_gradients(trainee, batches, units, RANKS)
        grads = torch.cat([parameter.grad.flatten() for parameter in trainee.parameters()])
        return grads, sum(part["loss"] for part in parts)

    alone = [gradient([batch]) for batch in rows]
    tokens, _ = gradient(rows)
    arms.mean_of_means()
    means, loss_by_means = gradient(rows)
    torch.testing.assert_close(means, (alone[0][0] + alone[1][0]) / 2)
    torch.testing.assert_close(loss_by_means, (alone[0][1] + alone[1][1]) / 2)
    torch.testing.assert_close(tokens, (2 * alone[0][0] + 29 * alone[1][0]) / 31)
    assert abs(means.norm() / tokens.norm() - 1) > 0.05


def test_what_is_measured_is_each_sequence_alone_and_only_what_counts(monkeypatch):
    monkeypatch.setattr(choices, "MEASURED", 100)  # several batches
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("llama"), dtype=torch.float32)
    documents = [np.asarray(document, dtype=np.int32) for document in random_documents([3, 40, 17, 60, 1, 25])]
    groups = choices.text_groups(documents, eos=9, seq_len=32)
    eos_alone = torch.tensor([[9]])
    wanted = dict.fromkeys(groups, 0.0)
    counts = dict.fromkeys(groups, 0)
    for i, document in enumerate(documents):
        ids = torch.from_numpy(document).long()
        before = torch.from_numpy(documents[i - 1]).long()[-16:]
        joined = torch.cat([before, ids[:16]])
        places = {
            "first, alone": (torch.cat([eos_alone[0], ids[:1]]), 1, 2),
            "others, alone": (ids[:32], 1, 32),
            "first, behind another": (joined, len(before), len(before) + 1),
            "others, behind another": (joined, len(before) + 1, 32),
        }
        for name, (sequence, begin, end) in places.items():
            log_p = model(sequence[None]).logits[0].log_softmax(1)
            for at in range(begin, min(end, len(sequence))):
                wanted[name] -= log_p[at - 1, sequence[at]].item()
                counts[name] += 1
    for name, sequences in groups.items():
        total, count = choices.measure(model, sequences)
        assert count == counts[name], name
        assert total == pytest.approx(wanted[name], rel=1e-5), name


def test_a_run_from_its_config_to_its_line_and_chats_on_top_of_it(tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(EXAMPLES / "tiny", data / "model")
    text = (EXAMPLES / "moby_dick" / "heldout.jsonl").read_text()
    chat = (EXAMPLES / "chat" / "heldout.jsonl").read_text()
    for split in ("train", "held_out"):
        (data / f"long_{split}.jsonl").write_text(text)
        (data / f"chat_{split}.jsonl").write_text(chat)
    out = tmp_path / "out"
    for name in ("long", "chat", "chat-means"):
        choices.run_arm(name, 1, choices.TINY, 2000, data, out)
    results = choices.read_results(out)
    assert [(result["arm"], result["seed"]) for result in results] == [("long", 1), ("chat", 1), ("chat-means", 1)]
    assert [path.name for path in (out / "runs").iterdir() if path.name[0] != "."] == ["long-1"]
    assert not (out / "runs" / "long-1" / "checkpoints").exists()
    # random weights know nothing yet, and an arm is no copy of lacuna
    nats, tokens = results[0]["losses"]["others, alone"]
    assert nats / tokens == pytest.approx(np.log(4096), rel=0.03)
    assert tokens > 200
    assert results[1]["grad_norm"] != results[2]["grad_norm"]
    assert results[1]["losses"]["long answers"][1] > results[1]["losses"]["short answers"][1] > 0


def test_seeds_come_one_after_another_and_chats_wait_for_what_they_begin_with(tmp_path):
    assert choices.chosen_arms(["means"]) == ["long", "chat", "chat-means"]
    assert choices.chosen_arms(None) == list(arms.ARMS)
    for experiment in arms.EXPERIMENTS.values():
        for ours, theirs in experiment.pairs:
            assert arms.ARMS[ours].data == arms.ARMS[theirs].data
    waiting = [("chat", 0), ("chat-means", 0), ("short", 0)]
    assert choices.next_task(waiting, tmp_path) == ("short", 0)
    (tmp_path / "results.jsonl").write_text(json.dumps({"arm": "long", "seed": 1}) + "\n")
    assert choices.next_task(waiting, tmp_path) == ("short", 0)
    (tmp_path / "results.jsonl").write_text(json.dumps({"arm": "long", "seed": 0}) + "\n")
    assert choices.next_task(waiting, tmp_path) == ("chat", 0)
    assert choices.next_task(waiting[:0], tmp_path) is None


def test_the_pool_runs_what_has_no_result_and_stops_at_the_budget(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(
        "import json, sys, time\n"
        "words = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "time.sleep(60 if words['--arm'] == 'long-head' else 0)\n"
        "line = json.dumps({'arm': words['--arm'], 'seed': int(words['--seed'])})\n"
        "open(words['--out'] + '/results.jsonl', 'a').write(line + '\\n')\n"
    )
    monkeypatch.setattr(choices, "__file__", str(child))
    out = tmp_path / "out"
    common = {"data": tmp_path, "out": out, "tokens": 1, "tiny": False, "gpus": 1, "jobs": 2, "seeds": 1}
    arguments = types.SimpleNamespace(**common, only=["cut"], budget=60.0)
    assert choices.run_all(arguments) == 0
    assert choices.run_all(arguments) == 0  # nothing is run again
    arguments = types.SimpleNamespace(**common, only=["cut", "head"], budget=1.0)
    assert choices.run_all(arguments) == 1
    arguments = types.SimpleNamespace(**common, only=["boundary"], budget=0.0)
    assert choices.run_all(arguments) == 2
    assert not (out / "logs" / "long-boundary-0.txt").exists()  # it did not even begin
    done = sorted(result["arm"] for result in choices.read_results(out))
    assert done == ["long", "long-cut", "short", "short-cut"]


def made_up(arm: str, seed: int, first: float, others: float) -> dict:
    losses = {"first, alone": [first * 10, 10], "others, alone": [others * 90, 90]}
    losses |= {"first, behind another": [first * 10, 10], "others, behind another": [others * 90, 90]}
    more = {"steps": 3, "train_loss": 1.0, "grad_norm": 1.0, "train_seconds": 1.0, "measure_seconds": 1.0}
    return {"arm": arm, "seed": seed, "losses": losses, **more}


def test_differences_are_taken_seed_by_seed_and_the_verdict_is_students(capsys):
    results = []
    for seed in range(5):
        # seeds differ much more than arms do
        results.append(made_up("long", seed, 5.0 + seed, 3.0 + seed))
        results.append(made_up("long-head", seed, 5.0 + seed, 3.01 + seed + 0.001 * (seed % 2)))
    results.append(made_up("long", 5, 1.0, 1.0))  # its other arm has not run
    rows = {row.measure: row for row in table.differences(results, "head")}
    assert rows["other tokens, alone"].values == pytest.approx([0.01, 0.011, 0.01, 0.011, 0.01])
    assert rows["all tokens, alone"].values == pytest.approx([0.009, 0.0099, 0.009, 0.0099, 0.009])
    assert rows["all tokens, alone"].tokens == 100
    assert rows["other tokens, alone"].verdict == "supported"
    assert rows["first tokens, alone"].verdict == "no difference seen"
    against = [result | {"arm": {"long": "long-head", "long-head": "long"}[result["arm"]]} for result in results]
    assert {row.measure: row for row in table.differences(against, "head")}["all tokens, alone"].verdict == "against"
    # of 5 values with mean 1 and deviation 1 the half interval is 2.776 / sqrt(5) = 1.24
    unclear = table.Difference(("long", "long-head"), "", 1, [0.0] * 5, [0.0, 0.0, 1.0, 2.0, 2.0])
    assert unclear.spread == pytest.approx(1.0)
    assert unclear.verdict == "no difference seen"
    table.print_tables(results)
    printed = capsys.readouterr().out
    assert (
        "| long / long-head | all tokens, alone | 100 | 5.2000 | 5.2094 | +0.0094 ± 0.0005 | 5 | supported |" in printed
    )


def test_every_row_in_the_docs_is_what_the_script_prints_now(capsys):
    for folder, count in (("choices", 103), ("choices/packer", 56)):
        results = choices.read_results(REPO / "docs" / folder)
        assert len(results) == count
        table.print_tables(results)
    printed = capsys.readouterr().out.splitlines()
    page = (REPO / "docs" / "choices.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| short", "| long", "| chat"))]
    assert len(rows) > 10
    for row in rows:
        assert row in printed, row
