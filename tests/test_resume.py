"""A run that is killed, moved to other hardware and started again is the run that nobody disturbed."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, REPO, model_config
from processes import checkpoints, finish, last_step, lines, tensors, train_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow  # minutes: left out of the second set of versions in CI

STEPS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small model, an empty config, and data of less than twenty steps: an epoch ends on the way."""
    place = tmp_path_factory.mktemp("resume")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(model_config("smollm2"), dtype=torch.float32).save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(EXAMPLES / "tiny").save_pretrained(place / "model")
    (place / "empty.toml").write_text("")
    text = (EXAMPLES / "moby_dick" / "train.jsonl").read_text().splitlines()
    chapters = [json.loads(line)["text"] for line in text[:8]]
    sizes = (30, 200, 700, 90, 1500)
    documents = [c[i * 700 : i * 700 + size] for c in chapters for i, size in enumerate(sizes)]
    (place / "map.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[:25]))
    words = " ".join(json.loads(line)["text"] for line in text[8:20]).split()
    (place / "shards").mkdir()
    for shard in range(2):  # more documents than are read at a time (128): a kill comes in the middle of a shard
        few = [" ".join(words[(shard * 200 + i) * 8 :][: 3 + i % 9]) for i in range(200)]
        lines_of_shard = "".join(json.dumps({"text": d}) + "\n" for d in few)
        (place / "shards" / f"{shard}.jsonl").write_text(lines_of_shard)
    return place


def sources(place: Path, kind: str) -> list[dict]:
    mapped = {"path": str(place / "map.jsonl")}
    streamed = {"path": str(place / "shards" / "*.jsonl"), "streaming": True}
    return {"map": [mapped], "stream": [streamed], "mixture": [mapped | {"weight": 0.5}, streamed | {"weight": 0.5}]}[
        kind
    ]


def words(place: Path, kind: str, name: str, *more: str) -> list[str]:
    fixed = {
        "--name": name,
        "--model.name": str(place / "model"),
        "--data.sources": json.dumps(sources(place, kind)),
        "--data.cache": str(place / "cache"),
        "--out": str(place / "runs"),
        "--train.seq_len": "64",
        "--train.micro_batch_size": "2",
        "--train.global_batch_size": "8",
        "--train.steps": str(STEPS),
        "--optim.lr": "1e-3",
        "--optim.warmup_steps": "5",
        "--checkpoint.every": "2",
        "--log.every": "1",
        "--eval.sources": json.dumps([{"path": str(place / "map.jsonl")}]),
        "--eval.rows": "6",
        "--eval.every": "5",
    }
    fixed |= dict(zip(more[::2], more[1::2], strict=True))
    return ["pt", str(place / "empty.toml"), *(word for pair in fixed.items() for word in pair)]


@pytest.fixture(scope="module")
def straight(place):
    """A function: the folder of an undisturbed run over a kind of data, made once."""
    done = {}

    def make(kind: str) -> Path:
        if kind not in done:
            run = finish(place, *words(place, kind, f"straight_{kind}"))
            assert run.status == 0, run.output
            done[kind] = place / "runs" / f"straight_{kind}"
        return done[kind]

    return make


def assert_same_run(run: Path, wanted: Path, tolerance: float = 0):
    """Every step and evaluation is there once, in order, with the same rows and the same losses."""
    got, want = lines(run), lines(wanted)
    assert [(m["step"], sorted(m)) for m in got] == [(m["step"], sorted(m)) for m in want]
    for a, b in zip(got, want, strict=True):
        exact = ["batch_checksum", "tokens", "trained_tokens", "lr", "eval_tokens"]
        exact += [] if tolerance else ["epoch"]  # rank 0 names its own
        for key in [key for key in exact if key in b]:
            assert a[key] == b[key], (b["step"], key)
        for key in {"loss", "grad_norm", "eval_loss", "eval_bits_per_byte"} & set(b):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=0), (b["step"], key)


def assert_same_weights(folder: Path, wanted: Path):
    got, want = tensors(folder), tensors(wanted)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", ["map", "stream", "mixture"])
def test_a_run_killed_after_7_steps_and_stopped_after_13_is_bit_identical_to_a_straight_one(kind, place, straight):
    wanted = straight(kind)
    assert train_lines(wanted)[-1]["epoch"] > 1 or kind == "mixture"
    command = words(place, kind, f"{kind}_killed")
    run = place / "runs" / f"{kind}_killed"

    killed = finish(place, *command, faults={"signal_at": (7, signal.SIGKILL)})
    assert killed.status == -signal.SIGKILL
    assert checkpoints(run) and max(checkpoints(run)) <= 6

    stopped = finish(place, *command, faults={"signal_at": (13, signal.SIGTERM)})
    assert stopped.status == 75, stopped.output
    assert f"Going on after step {4 if 'after step 4,' in stopped.output else 6}," in stopped.output
    assert max(checkpoints(run)) in (13, 14) and last_step(run) == max(checkpoints(run))

    last = finish(place, *command)
    assert last.status == 0, last.output
    assert_same_run(run, wanted)
    assert_same_weights(run / "hf", wanted / "hf")
    assert_same_weights(run / "checkpoints" / f"step_{STEPS}", wanted / "checkpoints" / f"step_{STEPS}")


def test_on_1_2_4_and_1_ranks_with_other_batches_and_meshes_it_reads_the_same_rows(place, straight):
    wanted = straight("mixture")
    run = place / "runs" / "ranks"
    stages = [
        (1, 4, signal.SIGKILL, ()),
        (2, 6, signal.SIGTERM, ("--dist.dp_replicate", "2")),
        (2, 9, signal.SIGTERM, ()),
        (4, 12, signal.SIGTERM, ("--train.micro_batch_size", "1")),
        (4, 15, signal.SIGTERM, ("--dist.dp_replicate", "2")),
        (1, None, None, ("--train.micro_batch_size", "8")),
    ]
    for ranks, step, number, more in stages:
        faults = {0: {"signal_at": (step, number)}} if step else None
        done = finish(place, *words(place, "mixture", "ranks", *more), ranks=ranks, faults=faults, timeout=150)
        assert done.status == (0 if step is None else 75 if number == signal.SIGTERM else -number), done.output
        newest = run / "checkpoints" / f"step_{max(checkpoints(run))}"
        if number == signal.SIGTERM:
            assert len(list(newest.glob("*.safetensors"))) == ranks and tensors(newest)
    assert_same_run(run, wanted, tolerance=1e-5)
    got, want = tensors(run / "hf"), tensors(wanted / "hf")
    assert all((got[k] - want[k]).norm() <= 1e-4 * want[k].norm() for k in want)


def test_a_checkpoint_of_two_ranks_holds_the_step_it_names_even_if_training_runs_ahead_of_its_writing(place, straight):
    late = finish(
        place,
        *words(place, "map", "late", "--train.steps", "4", "--optim.warmup_steps", "1"),
        ranks=2,
        faults={"late_write": (0.5,)},
    )
    assert late.status == 0, late.output
    prompt = finish(place, *words(place, "map", "prompt", "--train.steps", "4", "--optim.warmup_steps", "1"), ranks=2)
    assert prompt.status == 0, prompt.output
    for step in (2, 4):
        folders = [place / "runs" / name / "checkpoints" / f"step_{step}" for name in ("late", "prompt")]
        assert_same_weights(*folders)
    steps = [tensors(place / "runs" / "late" / "checkpoints" / f"step_{step}") for step in (2, 4)]
    assert not torch.equal(*(t["model.norm.weight"] for t in steps))


def test_checkpoints_hold_no_pickle(place, straight):
    files = [file for file in (straight("map") / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    assert len(files) >= 10


def test_a_finished_run_started_again_ends_at_once_with_the_same_model(place, straight):
    run = straight("map")
    before = [dict(m) for m in lines(run)]
    model = {file.name: file.read_bytes() for file in (run / "hf").iterdir()}
    times = {file: file.stat().st_mtime_ns for file in (run / "checkpoints").rglob("*")}
    # whoever trains a step now dies of it
    again = finish(place, *words(place, "map", run.name), faults={"slow_first_step": (1000, str(place / "trained"))})
    assert again.status == 0, again.output
    assert not (place / "trained").exists()
    assert lines(run) == before
    assert {file.name: file.read_bytes() for file in (run / "hf").iterdir()} == model
    assert {file: file.stat().st_mtime_ns for file in (run / "checkpoints").rglob("*")} == times


def test_a_process_killed_while_it_opens_its_metrics_again_keeps_every_line(place, straight):
    """The lines before a resume are on disk at every moment, not only once they are written again."""
    command = words(place, "map", "lines")
    run = place / "runs" / "lines"
    assert finish(place, *command, faults={"signal_at": (7, signal.SIGKILL)}).status == -signal.SIGKILL
    first = max(checkpoints(run))
    assert finish(place, *command, faults={"killed_in_writelines": ()}).status == -signal.SIGKILL
    got = lines(run)  # all whole
    assert [m["step"] for m in got if "loss" in m][:first] == list(range(1, first + 1))


def test_a_small_soak_of_kills_at_random_moments_changes_nothing(tmp_path):
    sys.path.insert(0, str(REPO / "benchmarks"))
    from soak import soak

    summary = soak(tmp_path, kills=6, seed=1, steps=60)
    assert summary["kills"] == 6
    assert summary["problems"] == []
