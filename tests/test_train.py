"""Whole runs: invariants 2, 3, 5 and 6 of the design, on one and on several (gloo) ranks."""

import json
import math
import re
import time
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, pack, random_documents, vocabulary
from processes import finish
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lacuna import train as train_module
from lacuna.config import ConfigError, load_config
from lacuna.metrics import Report, flop, open_metrics
from lacuna.model import build_model
from lacuna.parallel import Ranks, gradient_norm
from lacuna.train import accumulate_gradients, run

ONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture
def texts(tmp_path) -> Path:
    """Documents of very different lengths; some longer than a row."""
    chapters = [
        json.loads(line)["text"] for line in (EXAMPLES / "moby_dick" / "train.jsonl").read_text().splitlines()[:6]
    ]
    documents = [c[i * 700 : i * 700 + size] for c in chapters for i, size in enumerate((30, 200, 700, 90))] + chapters[
        :1
    ]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return file


def options(folder, texts, tmp_path, *more: str) -> list[str]:
    fixed = {
        "--model.name": str(folder),
        "--data.sources": json.dumps([{"path": str(texts)}]),
        "--data.cache": str(tmp_path / "cache"),
        "--out": str(tmp_path / "runs"),
        "--train.seq_len": "64",
        "--train.micro_batch_size": "2",
        "--train.global_batch_size": "8",
        "--optim.lr": "1e-3",
        "--log.every": "1",
    }
    return [word for pair in fixed.items() for word in pair] + list(more)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def train_lines(path: Path) -> list[dict]:
    return [line for line in lines(path) if "loss" in line]


# ---- invariant 2: the gradient of a global batch is the same for every split


def uneven_rows():
    """Eight rows, of which one trains every token, others few, and one none at all."""
    shares = [1, 0, 2, 30, 3, 60, 5, 11]  # every n-th position is trained; 0: none
    for i, share in enumerate(shares):
        documents = random_documents([20 + i, 7, 30 - i], seed=i)
        yield documents, lambda document, position, share=share: share > 0 and position % share == 0


def batch_of(rows):
    rows = list(rows)
    singles = [pack([documents], 64, trained) for documents, trained in rows]
    starts = [s.cu_seqlens[:-1] + 64 * i for i, s in enumerate(singles)]
    boundaries = torch.cat([*starts, torch.tensor([64 * len(rows)])]).int()
    joined = {k: torch.cat([getattr(s, k) for s in singles]) for k in ("input_ids", "labels", "position_ids")}
    counts = {"trained_tokens": sum(s.counts["trained_tokens"] for s in singles)}
    return singles[0]._replace(**joined, cu_seqlens=boundaries, counts=counts)


def reference_gradients(folder) -> tuple[float, dict]:
    """Mean loss over all trained tokens in float64, each document alone in plain transformers."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
    nats, count = 0.0, 0
    for documents, trained in uneven_rows():
        for n, document in enumerate(documents):
            ids = torch.tensor([document])
            labels = torch.tensor([t if trained(n, i) else -100 for i, t in enumerate(document)])
            logits = model(input_ids=ids).logits[0]
            nats += F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] >= 0).sum())
    (nats / count).backward()
    return (nats / count).item(), {name: p.grad for name, p in model.named_parameters()}


MANY = [pytest.param(split, marks=pytest.mark.slow) for split in ("1x4 ranks x2", "2x2 ranks x2", "4x1 ranks x2")]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("split", ["8x1", "2x4", *MANY])
def test_the_gradient_of_a_global_batch_is_the_same_for_every_split(split, name, model_folder, tmp_path):
    folder = model_folder(name)
    if "ranks" in split:
        singles = [pack([documents], 64, trained) for documents, trained in uneven_rows()]
        torch.save([tuple(single) for single in singles], tmp_path / "batches.pt")
        files = [str(folder), str(tmp_path / "batches.pt"), str(tmp_path / "out.pt"), split[0]]  # copies x shards
        done = finish(tmp_path, *files, module="gradients", ranks=4)
        assert done.status == 0, done.output[-3000:]
        got = torch.load(tmp_path / "out.pt", weights_only=True)
    else:
        argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", str(folder)]
        trainee = build_model(load_config(None, argv), ONE, vocabulary(4096))
        rows = list(uneven_rows())
        batches = [batch_of(rows)] if split == "8x1" else [batch_of(rows[i : i + 2]) for i in range(0, 8, 2)]
        trained = torch.tensor(sum(batch.counts["trained_tokens"] for batch in batches))
        loss = sum(part["loss"] for part in accumulate_gradients(trainee, batches, trained, ONE))
        norm = gradient_norm(list(trainee.parameters()), None)
        gradients = {name: p.grad for name, p in trainee.model.named_parameters()}
        got = {"loss": loss.item(), "norm": norm.item(), "gradients": gradients}
    want_loss, want = reference_gradients(folder)
    assert got["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert got["norm"] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in want.values())), rel=1e-5)
    for name, gradient in got["gradients"].items():
        assert (gradient - want[name]).norm() / want[name].norm() < 1e-5, name


# ---- invariant 3 and the order of data: the same run, whatever the hardware


def test_two_runs_of_one_config_are_bit_identical_and_another_seed_is_not(model_folder, texts, tmp_path):
    argv = options(model_folder("smollm2"), texts, tmp_path, "--train.steps", "6")
    runs = [
        run(load_config(None, [*argv, *more]))
        for more in (["--name", "a"], ["--name", "b"], ["--name", "c", "--seed", "1"])
    ]
    a, b, c = ([(m["loss"], m["grad_norm"], m["batch_checksum"]) for m in train_lines(path)] for path in runs)
    assert len(a) == 6 and a == b
    assert all(x[2] != y[2] for x, y in zip(a, c, strict=True))


@pytest.mark.slow
def test_one_two_and_four_ranks_read_the_same_batches_and_lose_the_same(model_folder, texts, tmp_path):
    held_out = json.dumps([{"path": str(texts)}])
    # four ranks, but fewer rows to evaluate on than they take at once: nobody may wait for ever
    more = ["--train.steps", "4", "--eval.sources", held_out, "--eval.rows", "5", "--eval.every", "2"]
    argv = options(model_folder("llama"), texts, tmp_path, *more)
    path = run(load_config(None, [*argv, "--name", "ranks1"]))
    for ranks, copies in ((2, 1), (2, 2), (4, 1)):
        words = ["--name", f"ranks{ranks}x{copies}", "--dist.dp_replicate", str(copies)]
        done = finish(tmp_path, "pt", *no_config(tmp_path), *argv, *words, ranks=ranks)
        assert done.status == 0, done.output[-3000:]
        for one, many in zip(lines(path), lines(tmp_path / "runs" / words[1]), strict=True):
            assert one.get("batch_checksum") == many.get("batch_checksum")
            for key in {"loss", "grad_norm", "eval_loss", "eval_bits_per_byte"} & set(one):
                assert one[key] == pytest.approx(many[key], rel=1e-5), (ranks, key)
            assert one.get("tokens") == many.get("tokens") and one.get("eval_tokens") == many.get("eval_tokens")


def no_config(tmp_path) -> list[str]:
    file = tmp_path / "empty.toml"
    file.write_text("")
    return [str(file)]


# ---- invariant 5: what was saved loads in plain transformers


def test_the_exported_folder_gives_the_same_logits_in_plain_transformers(model_folder, texts, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(train_module, "build_model", lambda *a, real=build_model: kept.append(real(*a)) or kept[0])
    folder = model_folder("qwen2")
    path = run(load_config(None, options(folder, texts, tmp_path, "--train.steps", "3", "--optim.lr", "1e-2")))
    plain = AutoModelForCausalLM.from_pretrained(path / "hf", attn_implementation="eager")
    document = random_documents([50])[0]
    with torch.no_grad():
        want = plain(input_ids=torch.tensor([document])).logits[0]
        trainee = kept[0]
        got = trainee.hidden(pack([[document]], 64))[:50] @ trainee.model.get_output_embeddings().weight.T
        before = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([document])).logits[0]
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(before, want, atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(path / "hf")
    generated = plain.generate(**tokenizer("Call me", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > 2


# ---- evaluation


def test_evaluation_is_weighted_by_tokens_and_equals_plain_transformers(model_folder, texts, tmp_path):
    folder = model_folder("llama")
    short = tmp_path / "short.jsonl"
    documents = [json.loads(line)["text"][:150] for line in texts.read_text().splitlines()]
    short.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    more = ["--train.steps", "1", "--eval.sources", json.dumps([{"path": str(short)}])]
    first = lines(run(load_config(None, options(folder, texts, tmp_path, *more))))[0]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nats, tokens, size = 0.0, 0, 0
    for text in documents:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        assert ids.shape[1] <= 64
        with torch.no_grad():
            nats += F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        size += len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode())  # the first token is not predicted
    assert first["eval_tokens"] == tokens
    assert first["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert first["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_evaluation_reads_every_stream_to_its_end(model_folder, texts, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    documents = [json.loads(line)["text"][:150] for line in texts.read_text().splitlines()]
    for name, part in (("a", documents[:2]), ("b", documents[2:])):
        (shards / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in part))
    sources = json.dumps([{"path": str(shards / "*.jsonl"), "streaming": True}])
    more = ["--train.steps", "1", "--train.micro_batch_size", "1", "--eval.sources", sources]
    first = lines(run(load_config(None, options(model_folder("llama"), texts, tmp_path, *more))))[0]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny")
    assert first["eval_tokens"] == sum(len(tokenizer(d)["input_ids"]) for d in documents)


# ---- numbers


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(model_folder, texts, tmp_path, monkeypatch):
    folder = model_folder("llama")
    kept, states = [], []
    monkeypatch.setattr(train_module, "build_model", lambda *a, real=build_model: kept.append(real(*a)) or kept[0])
    calls = iter(range(100))

    def poisoned(trainee, batches, trained, ranks):
        parts = accumulate_gradients(trainee, batches, trained, ranks)
        if next(calls) == 2:
            states.append({k: v.clone() for k, v in trainee.state_dict().items()})
            trainee.model.model.layers[1].mlp.up_proj.weight.grad[3, 5] = float("inf")
        return parts

    monkeypatch.setattr(train_module, "accumulate_gradients", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 3: loss \d.*, gradient norm (inf|nan): not finite"):
        run(load_config(None, options(folder, texts, tmp_path, "--train.steps", "6")))
    assert all(torch.equal(v, states[0][k]) for k, v in kept[0].state_dict().items())
    assert [m["step"] for m in train_lines(tmp_path / "runs" / "run")] == [1, 2]
    monkeypatch.setattr(
        train_module, "accumulate_gradients", lambda *a: [{"loss": float("nan")} for _ in accumulate_gradients(*a)]
    )
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan, .*not finite"):
        run(load_config(None, options(folder, texts, tmp_path, "--train.steps", "6")))


def test_the_command_says_in_one_line_which_step_was_not_finite(model_folder, texts, tmp_path):
    folder = model_folder("llama")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    argv = options(folder, texts, tmp_path, "--train.steps", "2")
    done = finish(tmp_path, "pt", *no_config(tmp_path), *argv)
    assert done.status == 1 and "Traceback" not in done.output
    assert "lacuna: step 1: loss nan" in done.output.splitlines()[-1]


def test_norm_weights_move_at_a_learning_rate_of_1e_5(model_folder, texts, tmp_path):
    folder = model_folder("llama")
    more = ["--train.steps", "1", "--optim.lr", "1e-5", "--model.dtype", "bfloat16"]
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "build_model", lambda *a, real=build_model: kept.append(real(*a)) or kept[0])
        run(load_config(None, options(folder, texts, tmp_path, *more)))
    before = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
    moved = (kept[0].model.model.norm.weight - before).abs().detach()
    assert moved.max().item() == pytest.approx(1e-5, rel=0.05) and (moved > 0).float().mean() > 0.9


def test_an_epoch_trains_every_token_once_with_a_last_batch_that_is_not_full(model_folder, texts, tmp_path):
    folder = model_folder("llama")
    metrics = train_lines(
        run(
            load_config(
                None, options(folder, texts, tmp_path, "--train.epochs", "2", "--train.global_batch_size", "10")
            )
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    lengths = [len(tokenizer(d)["input_ids"]) + 1 for d in documents]
    assert metrics[-1]["tokens"] == 2 * sum(lengths)
    assert metrics[-1]["trained_tokens"] == 2 * sum(n - 1 for n in lengths)
    assert metrics[-1]["packing_efficiency"] < metrics[0]["packing_efficiency"]
    rows = sum(lengths) / 64
    assert math.ceil(2 * rows / 10) <= metrics[-1]["step"] <= math.ceil(2 * rows / 10) + 1


KEYS = (
    "step loss grad_norm lr tokens trained_tokens epoch packing_efficiency tokens_per_second mfu step_seconds "
    "tokens_per_second_per_device data_seconds peak_memory_gib batch_checksum"
)


def test_the_run_folder_is_complete_and_its_config_repeats_the_run(model_folder, texts, tmp_path):
    argv = options(model_folder("llama"), texts, tmp_path, "--train.steps", "3", "--optim.warmup_steps", "2")
    path = run(load_config(None, argv))
    assert set(KEYS.split()) <= set(train_lines(path)[0])
    assert "step 3/3" in (path / "log.txt").read_text()
    again = run(load_config(str(path / "config.toml"), ["--name", "again"]))
    assert [m["loss"] for m in train_lines(again)] == [m["loss"] for m in train_lines(path)]


def test_a_line_has_the_mean_loss_since_the_last_one_and_fits_80_columns(model_folder, texts, tmp_path):
    argv = options(model_folder("llama"), texts, tmp_path, "--train.steps", "7")
    single = [m["loss"] for m in train_lines(run(load_config(None, argv)))]
    path = run(load_config(None, [*argv, "--name", "means", "--log.every", "3"]))
    lines = {m["step"]: m["loss"] for m in train_lines(path)}
    assert lines == pytest.approx({1: single[0], 3: sum(single[1:3]) / 2, 6: sum(single[3:6]) / 3, 7: single[6]})
    # a save ends an interval, so that a run that goes on from it has the same lines
    saved = run(load_config(None, [*argv, "--name", "saved", "--log.every", "3", "--checkpoint.every", "5"]))
    after_save = {m["step"]: m["loss"] for m in train_lines(saved)}
    assert after_save == pytest.approx(lines | {5: sum(single[3:5]) / 2, 6: single[5]})
    said = [line for line in (path / "log.txt").read_text().splitlines() if re.search(r"step \d+/7 ", line)]
    assert len(said) == 4 and max(map(len, said)) <= 80
    assert f"loss {lines[6]:.4f}" in said[2]


def test_the_time_that_is_left_follows_from_the_median_pace_so_far(model_folder, texts, tmp_path, monkeypatch):
    clock = accumulate(range(1, 10**6))  # every look at it takes a second longer than the one before
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    path = run(load_config(None, options(model_folder("llama"), texts, tmp_path, "--train.steps", "4")))
    said = re.findall(r"step \d/4 .*  (.*)", (path / "log.txt").read_text())
    paces = [m["step_seconds"] for m in train_lines(path)]
    assert len(set(paces)) == 4
    medians = [sorted(paces[:step])[(step - 1) // 2] for step in range(1, 5)]
    assert said == [str(timedelta(seconds=round((4 - step) * median))) for step, median in enumerate(medians, 1)]


def test_the_last_lines_count_figures_of_zero(tmp_path, caplog):
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate([0.0, -1.0, 0.0])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    caplog.set_level("INFO", "lacuna")
    totals = {"tokens": 9000, "trained_tokens": 0}
    now = time.monotonic()
    report = SimpleNamespace(totals=totals, made=now - 55.0, in_steps=3.6)
    Report.close(report, tmp_path, now - 65.0)
    assert "time: 0:01:05, 10 s to start, 4 in steps\n" in caplog.text
    assert "tokens: 9,000 in all, 0 of them trained" in caplog.text
    assert "loss: first 0.0000, last 0.0000, highest 0.0000" in caplog.text


def test_the_last_lines_say_what_metrics_has_and_what_to_do(model_folder, texts, tmp_path):
    held_out = ["--eval.sources", json.dumps([{"path": str(texts)}]), "--eval.rows", "4"]
    path = run(load_config(None, options(model_folder("llama"), texts, tmp_path, "--train.steps", "3", *held_out)))
    losses = [m["loss"] for m in train_lines(path)]
    evaluated = [m["eval_loss"] for m in lines(path) if "eval_loss" in m]
    assert len(losses) == 3 and len(evaluated) == 2
    said = (path / "log.txt").read_text().splitlines()[-8:]
    last = train_lines(path)[-1]
    assert re.fullmatch(r"[\d:]+ time: 0:0[01]:\d\d, \d+ s to start, \d+ in steps", said.pop(0))
    assert said[0].endswith(f" tokens: {last['tokens']:,} in all, {last['trained_tokens']:,} of them trained")
    for line, name, figures in ((said[1], "loss", losses), (said[2], "eval_loss", evaluated)):
        first, last, highest = figures[0], figures[-1], max(figures)
        assert line.endswith(f" {name}: first {first:.4f}, last {last:.4f}, highest {highest:.4f}")
    assert said[4].startswith("uv run ") and said[4].endswith(f" benchmarks/report.py {path}")
    assert said[6] == f"uv run python examples/chat.py {path}"


@pytest.mark.parametrize(
    ("stored", "keys", "expected"),
    [
        ("bfloat16", {}, "BF16"),
        ("bfloat16", {"--model.dtype": "float32"}, "F32"),
        ("float32", {"--model.dtype": "bfloat16"}, "BF16"),
        ("bfloat16", {"--model.from_scratch": "true"}, "F32"),  # as it was computed, here on a CPU
        (None, {}, "F32"),
    ],
)
def test_hf_keeps_the_dtype_of_the_model_that_came_in(model_folder, texts, tmp_path, stored, keys, expected):
    folder = model_folder("llama")
    described = json.loads((folder / "config.json").read_text()) | {"dtype": stored}
    (folder / "config.json").write_text(json.dumps(described))
    words = [word for pair in keys.items() for word in pair]
    path = run(load_config(None, options(folder, texts, tmp_path, "--train.steps", "1", *words)))
    with safe_open(path / "hf" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {expected}  # noqa: SIM118
    with safe_open(path / "checkpoints" / "step_1" / "rank_00000.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


@pytest.mark.parametrize("stray", [{"logit_scale": 0.25}, {"logits_scaling": 4.0}, {"final_logit_softcapping": 5.0}])
def test_a_key_that_the_models_class_does_not_know_changes_nothing(model_folder, texts, tmp_path, stray):
    folder = model_folder("llama")
    argv = options(folder, texts, tmp_path, "--train.steps", "1")
    plain = train_lines(run(load_config(None, argv)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | stray))
    again = train_lines(run(load_config(None, [*argv, "--name", "stray"])))
    assert [m["loss"] for m in again] == [m["loss"] for m in plain]


def test_mfu_counts_weights_and_attention_inside_documents(model_folder):
    argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", str(model_folder("qwen3"))]
    trainee = build_model(load_config(None, argv), ONE, vocabulary(4096))
    per_token, per_pair = flop(trainee.model)
    # an independent count: torch's own, of one document through the plain model, forward and backward
    from torch.utils.flop_counter import FlopCounterMode

    plain = AutoModelForCausalLM.from_config(trainee.model.config, attn_implementation="eager")
    n = 128
    with FlopCounterMode(display=False) as counter:
        plain(input_ids=torch.arange(n)[None]).logits.sum().backward()
    norms = sum(p.numel() for p in plain.parameters() if p.ndim == 1)
    layers, heads, head_dim = 2, 4, 32
    half_attention = 6 * layers * heads * head_dim * n * n  # the plain model computes the masked half too
    expected = counter.get_total_flops() - half_attention + 6 * norms * n
    assert n * per_token + n * n * per_pair == pytest.approx(expected, rel=0.02)


# ---- the command


def test_a_batch_that_does_not_divide_over_the_ranks_names_what_does(model_folder, texts, tmp_path):
    argv = options(model_folder("llama"), texts, tmp_path, "--train.steps", "1", "--train.global_batch_size", "6")
    done = finish(tmp_path, "pt", *no_config(tmp_path), *argv, ranks=2)
    assert done.status == 1
    assert "train.global_batch_size is no multiple of micro_batch_size x ranks, 4" in done.output


def test_a_warmup_as_long_as_the_run_is_refused_before_it_begins(model_folder, texts, tmp_path):
    argv = options(model_folder("llama"), texts, tmp_path, "--optim.warmup_steps", "30")
    for length in (["--train.steps", "30"], ["--train.epochs", "1"]):
        with pytest.raises(ConfigError, match=r"optim.warmup_steps must be below the \d+ steps"):
            run(load_config(None, [*argv, *length]))


@pytest.mark.parametrize("damage", [b'{"step": 3, "lo', b"\0" * 50, b"\0" * 50 + b"\n", b"\n"])
def test_a_last_line_of_metrics_that_is_damaged_is_dropped(damage, tmp_path):
    whole = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + damage)
    open_metrics(tmp_path, 2, again=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_start_that_fails_at_the_metrics_adds_nothing_to_the_runs_log(model_folder, texts, tmp_path):
    argv = options(model_folder("llama"), texts, tmp_path, "--train.steps", "2")
    path = run(load_config(None, argv))
    (path / "metrics.jsonl").write_text("{broken}\n" + (path / "metrics.jsonl").read_text())
    before = (path / "log.txt").read_bytes()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        run(load_config(None, [*argv, "--train.steps", "4", "--checkpoint.resume_changed", "true"]))
    assert (path / "log.txt").read_bytes() == before
