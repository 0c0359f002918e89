"""Checkpoints: what is in them, which are kept, what a run goes on from, and what else they are good for."""

import ctypes
import errno
import gc
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, model_config
from processes import checkpoints, finish, lines, tensors, train_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lacuna import train as train_module
from lacuna.checkpoint import FREE, Checkpoints, export, find_checkpoint, flat
from lacuna.config import ConfigError, Preempted, load_config
from lacuna.metrics import Report
from lacuna.train import run
from lacuna.weights import seal, weight_folder


@pytest.fixture(autouse=True)
def own_signals():
    """A run in this process takes over signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def options(model_folder, tmp_path):
    """A function: the options of a run of 6 steps, saved after each second one, with changes."""
    lines = (EXAMPLES / "moby_dick" / "heldout.jsonl").read_text().splitlines()[:2]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    folder = model_folder("smollm2")

    def make(**changes) -> list[str]:
        fixed = {
            "model.name": str(folder),
            "data.sources": json.dumps([{"path": str(tmp_path / "text.jsonl")}]),
            "data.cache": str(tmp_path / "cache"),
            "out": str(tmp_path / "runs"),
            "train.seq_len": "64",
            "train.micro_batch_size": "2",
            "train.global_batch_size": "4",
            "train.steps": "6",
            "optim.lr": "1e-3",
            "log.every": "1",
            "checkpoint.every": "2",
        }
        fixed |= {key.replace("__", "."): value for key, value in changes.items()}
        return [word for key, value in fixed.items() for word in (f"--{key}", str(value))]

    return make


@pytest.fixture
def stop_after(monkeypatch):
    """A function: run with these options, until a SIGTERM while this step is reported; the run's folder."""

    def stop(step: int, argv: list[str]) -> Path:
        def write(self, metrics, real=Report.write):
            real(self, metrics)
            if metrics["step"] == step and "loss" in metrics:
                os.kill(os.getpid(), signal.SIGTERM)

        config = load_config(None, argv)
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            patch.setattr(Report, "write", write)
            run(config)
        return Path(config.out) / config.name

    return stop


def losses(folder: Path) -> list[tuple]:
    return [(m["step"], m["loss"], m["batch_checksum"]) for m in train_lines(folder)]


# ---- what is in it


def test_a_checkpoint_is_plain_safetensors_with_weights_and_both_moments_of_every_parameter(options, monkeypatch):
    kept = []
    monkeypatch.setattr(train_module, "AdamW", lambda *a, real=train_module.AdamW: kept.append(real(*a)) or kept[0])
    folder = run(load_config(None, options())) / "checkpoints" / "step_6"
    assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}
    stored = load_file(folder / "rank_00000.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder.parents[1] / "hf", dtype=torch.float32)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in stored if not name.startswith("optimizer.")} == names
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
    for kind in ("exp_avg", "exp_avg_sq"):
        of_kind = {name for name in stored if name.startswith(f"optimizer.{kind}.")}
        assert of_kind == {f"optimizer.{kind}.{name}" for name in names}
    assert stored["optimizer.step"].item() == 6
    for which, key in enumerate(("exp_avg", "exp_avg_sq")):
        got = sorted(t.double().sum().item() for name, t in stored.items() if name.startswith(f"optimizer.{key}."))
        assert got == sorted(both[which].double().sum().item() for both in kept[0].moments.values()) and any(got)


def test_training_that_runs_ahead_of_the_writing_does_not_get_into_a_checkpoint(options, monkeypatch):
    """What step 2 has saved is what a run of the same schedule that ended after step 2 had."""
    import time

    real = Checkpoints.write_safetensors
    argv = options(checkpoint__keep=9)
    prompt = run(load_config(None, [*argv, "--name", "prompt"]))
    monkeypatch.setattr(Checkpoints, "write_safetensors", lambda self, file: time.sleep(0.3) or real(self, file))
    late = run(load_config(None, [*argv, "--name", "late"]))
    for step in (2, 4, 6):
        a, b = (load_file(f / "checkpoints" / f"step_{step}" / "rank_00000.safetensors") for f in (prompt, late))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert a["optimizer.step"].item() == step
    assert losses(prompt) == losses(late)


# ---- which are kept


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_k_are_kept_whatever_their_names_sort_like(keep, options):
    folder = run(load_config(None, options(train__steps=12, checkpoint__keep=keep)))
    assert checkpoints(folder) == [10, 12][-keep:]
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_disk_that_is_full_stops_the_run_and_leaves_the_last_checkpoint(options, monkeypatch):
    real = Checkpoints.write_safetensors

    def write(self, file):
        if "step_4" in str(file):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(self, file)

    monkeypatch.setattr(Checkpoints, "write_safetensors", write)
    config = load_config(None, options(checkpoint__keep=1))
    with pytest.raises(ConfigError, match=r"no checkpoint of step 4: .*No space left.*make room, and the same"):
        run(config)
    folder = Path(config.out) / config.name
    assert checkpoints(folder) == [2]
    monkeypatch.undo()
    gc.collect()  # the error's frames, which hold the lock of the run's folder
    run(config)
    assert losses(folder) == losses(run(load_config(None, options(name="straight"))))


@pytest.mark.slow
def test_killed_at_any_moment_of_keeping_one_there_is_a_whole_one(options, tmp_path):
    """kill -9 before, between and after the renames of a new and an old one, and in a removal; checkpoint.keep = 1."""
    (tmp_path / "empty.toml").touch()
    command = ["pt", str(tmp_path / "empty.toml"), *options(checkpoint__keep=1, checkpoint__every=1)]
    moments = [
        ("rename", 1, True),
        ("rename", 2, False),
        ("rename", 2, True),
        ("rename", 3, True),
        ("rmtree", 1, False),
    ]
    for i, moment in enumerate(moments):
        folder = tmp_path / "runs" / f"run{i}"
        done = finish(tmp_path, *command, "--name", folder.name, faults={"killed_at": moment})
        assert done.status == -signal.SIGKILL, done.output
        assert checkpoints(folder), moment
        for step in checkpoints(folder):
            place = folder / "checkpoints" / f"step_{step}"
            assert tensors(place)["optimizer.step"].item() == step
            assert json.loads((place / "state.json").read_text())["step"] == step
    assert finish(tmp_path, *command, "--name", folder.name).status == 0
    assert checkpoints(folder) == [6] and not list((folder / "checkpoints").glob(".*"))


# ---- what a run goes on from


def test_what_a_killed_save_left_is_never_taken_and_is_removed_but_nothing_else_is(options, stop_after, tmp_path):
    folder = stop_after(2, options())
    assert checkpoints(folder) == [2, 3]
    half = folder / "checkpoints" / ".step_5"
    half.mkdir()
    state = json.loads((folder / "checkpoints" / "step_3" / "state.json").read_text())
    (half / "state.json").write_text(json.dumps(state | {"step": 5}))
    (half / "rank_00000.safetensors").write_bytes(b"half")
    others = [folder / "checkpoints" / name for name in (".nfs0001", "._step_3", ".best_step_3/state.json")]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("somebody else's, as macOS, NFS and people put them there")
    run(load_config(None, options()))
    assert not half.exists() and all(other.exists() for other in others)
    assert losses(folder) == losses(run(load_config(None, options(name="straight"))))


def test_to_go_back_later_checkpoints_are_removed_by_hand_and_never_by_a_run(options, stop_after, tmp_path):
    argv = options(checkpoint__keep=9)
    folder = run(load_config(None, argv))
    wanted = losses(folder)
    back = folder / "checkpoints" / "step_2"
    run(load_config(None, [*argv, "--checkpoint.resume", str(back)]))  # it has later ones of its own, and is finished
    assert checkpoints(folder) == [2, 4, 6]
    with pytest.raises(ConfigError, match="is no whole checkpoint"):
        run(load_config(None, [*options(name="new"), "--checkpoint.resume", str(tmp_path / "nothing")]))
    for later in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step_{later}")
    stop_after(4, [*argv, "--checkpoint.resume", str(back)])
    assert checkpoints(folder) == [2, 4, 5] and losses(folder) == wanted[:5]
    run(load_config(None, argv))
    assert checkpoints(folder) == [2, 4, 5, 6] and losses(folder) == wanted


def test_a_run_of_another_name_goes_on_exactly_from_a_given_checkpoint(options, stop_after):
    folder = stop_after(3, options())
    newest = checkpoints(folder)[-1]
    given = str(folder / "checkpoints" / f"step_{newest}")
    other = run(load_config(None, options(name="other", checkpoint__resume=given)))
    assert losses(other) == losses(run(load_config(None, options(name="straight"))))[newest:]


def test_a_run_that_began_elsewhere_goes_on_from_its_own_newest(options, stop_after):
    """As when torchrun or Slurm start the same command again."""
    folder = stop_after(4, options(checkpoint__keep=9))
    first = str(folder / "checkpoints" / "step_2")
    config = load_config(None, options(checkpoint__keep=9, checkpoint__resume=first))
    for place, path, step in ((folder, folder / "checkpoints" / "step_5", 5), (folder / "new", Path(first), 2)):
        checkpoint, state = find_checkpoint(config, place, 0)
        assert (checkpoint, state["step"]) == (path, step)


REFUSED = {
    "seed": "1",
    "optim.lr": "2e-3",
    "train.steps": "7",
    "train.global_batch_size": "8",
    "train.seq_len": "128",
    "data.mask_boundary": "false",
    "model.overrides": '{"rope_theta": 5000.0}',
}


def test_a_config_that_changes_rows_or_losses_is_refused_by_the_names_of_all_keys(options, stop_after):
    folder = stop_after(3, options())
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "log.txt"}
    for key, value in REFUSED.items():
        with pytest.raises(ConfigError, match=key):
            run(load_config(None, options(**{key: value})))
    everything = {key: value for key, value in REFUSED.items() if key not in ("model.overrides",)}
    with pytest.raises(ConfigError) as refusal:
        run(load_config(None, options(**everything)))
    assert all(f"{key} (was " in str(refusal.value) for key in everything)
    assert "resume_changed" in str(refusal.value)
    now = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "log.txt"}
    assert now == before, "a run that is refused changes nothing"


def test_data_that_has_changed_under_its_name_is_refused(options, stop_after, tmp_path):
    folder = stop_after(3, options())
    with open(tmp_path / "text.jsonl", "a") as file:
        file.write("\n" + json.dumps({"text": "one more document"}))
    with pytest.raises(ConfigError, match=r"was \['2 documents of \d+ tokens'\], now \['3 documents"):
        run(load_config(None, options()))
    assert run(load_config(None, options(checkpoint__resume_changed="true"))) == folder


def test_a_model_whose_config_was_changed_meanwhile_goes_on_as_it_began(options, stop_after):
    """Its folder may have been edited, or have another revision on the Hub: the run became another model's."""
    words = options()
    straight = losses(run(load_config(None, options(name="straight"))))
    folder = stop_after(3, words)
    config = Path(words[words.index("--model.name") + 1]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "relu", "rope_theta": 500.0}))
    run(load_config(None, words))
    assert losses(folder) == straight
    assert json.loads((folder / "hf" / "config.json").read_text())["hidden_act"] == "silu"


def test_overrides_are_laid_over_a_models_own_config_once(options, stop_after):
    """A checkpoint's config has them: laid over it again, rope_scaling took the base frequency away."""
    words = options(model__overrides='{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}')
    config = Path(words[words.index("--model.name") + 1]) / "config.json"
    fields = json.loads(config.read_text())
    fields.pop("rope_parameters", None)
    config.write_text(json.dumps(fields | {"rope_theta": 500000.0}))  # as configs were before
    straight = run(load_config(None, [*words, "--name", "straight"]))
    folder = stop_after(3, words)
    run(load_config(None, words))
    assert losses(folder) == losses(straight)
    assert (folder / "hf" / "config.json").read_text() == (straight / "hf" / "config.json").read_text()


def test_resume_changed_goes_on_all_the_same(options, stop_after):
    folder = stop_after(3, options())
    run(load_config(None, options(optim__lr=1e-4, checkpoint__resume_changed="true")))
    straight = losses(run(load_config(None, options(name="straight"))))
    assert losses(folder)[:5] == straight[:5] and losses(folder)[5] != straight[5]
    assert [m["lr"] for m in train_lines(folder)][3] > 2 * [m["lr"] for m in train_lines(folder)][4]


def test_an_evaluation_that_is_not_done_again_keeps_its_line(options, tmp_path):
    held_out = json.dumps([{"path": str(tmp_path / "text.jsonl")}])
    words = ["--eval.sources", held_out, "--eval.rows", "2"]
    for more in (["--train.steps", "2"], ["--train.steps", "4", "--checkpoint.resume_changed", "true"]):
        folder = run(load_config(None, [*options(), *words, *more]))
    assert [m["step"] for m in lines(folder) if "eval_loss" in m] == [0, 2, 4]
    # a finished run is evaluated again: in the place of the line before
    run(load_config(None, [*options(), *words, *more]))
    assert [m["step"] for m in lines(folder) if "eval_loss" in m] == [0, 2, 4]


@pytest.mark.parametrize("batch", ["2", "4", "8"])
def test_an_epoch_that_goes_on_with_another_batch_ends_where_the_data_does(batch, options, stop_after):
    words = options()
    words[words.index("--train.steps")] = "--train.epochs"
    words[words.index("--train.epochs") + 1] = "1"
    straight = train_lines(run(load_config(None, [*words, "--name", "straight"])))
    folder = stop_after(len(straight) // 2, words)
    more = ["--train.global_batch_size", batch, "--train.micro_batch_size", "2", "--checkpoint.resume_changed", "true"]
    run(load_config(None, [*words, *more]))
    lines = train_lines(folder)
    assert lines[-1]["tokens"] == straight[-1]["tokens"]
    assert min(line["packing_efficiency"] for line in lines) > 0, "a step without a token"


def test_what_may_change_does_not_refuse_and_changes_no_row(options, stop_after, tmp_path):
    folder = stop_after(3, options())
    held_out = json.dumps([{"path": str(tmp_path / "text.jsonl")}])
    changed = {
        "checkpoint.every": 3, "checkpoint.keep": 5, "data.cache": tmp_path / "other",
        "train.micro_batch_size": 4, "train.activation_checkpointing": "full",
        "train.deterministic": "true", "eval.sources": held_out, "eval.every": 2,
        "eval.rows": 4, "dist.timeout": 300,
    }  # fmt: skip
    assert {key for key in changed if key.startswith(FREE)} == set(changed)
    moved = folder.parents[1] / "elsewhere" / "moved"
    moved.parent.mkdir()
    folder.rename(moved)
    try:
        run(load_config(None, options(name="moved", out=str(moved.parent), **changed)))
    finally:
        torch.use_deterministic_algorithms(False)
    straight = train_lines(run(load_config(None, options(name="straight"))))
    for a, b in zip(train_lines(moved), straight, strict=True):
        assert a["batch_checksum"] == b["batch_checksum"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_flat_names_every_key_of_the_config():
    config = load_config(None, ["--data.sources", '[{"path": "x"}]', "--train.steps", "1"])
    keys = flat(config.model_dump(mode="json"))
    assert {"seed", "task", "optim.lr", "data.sources", "train.steps", "model.overrides"} <= keys.keys()
    # of a recipe's keys lacuna knows nothing: they are compared as one
    assert [key for key in keys if isinstance(config.model_dump().get(key), dict)] == ["recipe"]


# ---- a checkpoint is what was saved


def empty(file: Path):
    file.write_bytes(b"")


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def change(file: Path):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    file.write_bytes(content)


def of_another_step(file: Path):
    shutil.copy(file.parents[1] / "step_2" / file.name, file)


DAMAGES = [
    *(("rank_00000.safetensors", damage) for damage in (Path.unlink, cut, change, of_another_step)),
    *(("state.json", damage) for damage in (Path.unlink, cut, change, empty)),
    *(("config.json", damage) for damage in (Path.unlink, cut)),
    ("tokenizer.json", cut),
    ("seals.json", cut),
    ("generation_config.json", change),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The words of a run of six steps, and the folder that it left after the fourth, with the checkpoints 2 and 4."""
    place = tmp_path_factory.mktemp("saved")
    (place / "empty.toml").touch()
    source = json.dumps([{"path": str(EXAMPLES / "moby_dick" / "heldout.jsonl")}])
    words = ["--model.name", EXAMPLES / "tiny", "--data.sources", source, "--data.cache", place / "cache"]
    words += ["--model.from_scratch", "true", "--train.seq_len", 64, "--train.micro_batch_size", 1]
    words += ["--train.global_batch_size", 1, "--train.steps", 4, "--checkpoint.every", 2, "--optim.lr", 1e-3]
    words = list(map(str, words))
    folder = run(load_config(None, [*words, "--out", str(place), "--name", "run"]))
    return [*words, "--checkpoint.resume_changed", "true", "--train.steps", "5"], folder


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{name}-{damage.__name__}" for name, damage in DAMAGES])
def test_a_damaged_checkpoint_is_refused_and_without_it_the_run_goes_on_from_the_one_before(
    saved, name, damage, tmp_path
):
    words, folder = saved
    shutil.copytree(folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_4"
    damage(newest / name)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    sentence = rf"step_4.*{name}"
    if not (newest / name).exists() and name in ("state.json", "seals.json"):
        sentence = "step_4 is no whole checkpoint"
    with pytest.raises(ConfigError, match=sentence):
        export(newest, tmp_path / "out")
    with pytest.raises(ConfigError, match=sentence):
        run(load_config(None, [*words, "--out", str(tmp_path)]))
    with pytest.raises(ConfigError, match=rf"step_4.*{name}"):
        weight_folder(str(newest))  # as model.name
    now = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert now == before, "a start that fails changes nothing"
    shutil.rmtree(newest)
    run(load_config(None, [*words, "--out", str(tmp_path)]))
    assert "Going on after step 2" in (tmp_path / "run" / "log.txt").read_text()
    assert checkpoints(tmp_path / "run") == [4, 5]


def test_a_folder_that_does_not_hold_the_step_it_names_is_refused(saved, tmp_path):
    """Else the run would end with its weights, and remove those that it has trained, whose number is lower."""
    words, folder = saved
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(folder / "checkpoints" / "step_2", tmp_path / "run" / "checkpoints" / "step_40")
    with pytest.raises(ConfigError, match="step_40 holds step_2: rename it, or take it away"):
        run(load_config(None, [*words, "--out", str(tmp_path)]))
    assert checkpoints(tmp_path / "run") == [2, 4, 40]
    for name in ("best", "epoch10", "step_4_best"):  # whoever names one by hand may call it as he likes
        shutil.copytree(folder / "checkpoints" / "step_4", tmp_path / "kept" / name)
        resumed = ["--checkpoint.resume", str(tmp_path / "kept" / name), "--out", str(tmp_path), "--name", name]
        run(load_config(None, [*words, *resumed]))
        assert "Going on after step 4" in (tmp_path / name / "log.txt").read_text()


def test_a_checkpoint_without_its_seals_is_refused_whatever_else_it_holds(saved, tmp_path):
    words, folder = saved
    shutil.copytree(folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_4"
    (newest / "seals.json").unlink()
    shutil.copy(newest.with_name("step_2") / "rank_00000.safetensors", newest)  # of another step: it was taken
    with pytest.raises(ConfigError, match="step_4 is no whole checkpoint"):
        run(load_config(None, [*words, "--out", str(tmp_path)]))


def test_other_roles_are_other_data(saved, tmp_path):
    words, folder = saved
    shutil.copytree(folder, tmp_path / "run")
    words = words[:-4]  # as it was run
    with pytest.raises(ConfigError, match=r"another data\.sources"):
        sources = json.dumps([{"path": str(EXAMPLES / "moby_dick" / "heldout.jsonl"), "roles": {"x": "user"}}])
        run(load_config(None, [*words, "--data.sources", sources, "--out", str(tmp_path)]))


def test_files_that_people_put_into_a_checkpoint_change_nothing(saved, tmp_path):
    words, folder = saved
    shutil.copytree(folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_4"
    (newest / "notes.txt").write_text("mine")
    (newest / "model.safetensors").write_bytes(b"of an export")
    run(load_config(None, [*words, "--out", str(tmp_path)]))
    assert "Going on after step 4" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("left", ["hf/model.safetensors", "checkpoints/step_backup/state.json", ""])
def test_a_run_whose_checkpoints_are_gone_is_not_trained_over(left, saved, tmp_path):
    """With a finished model, with checkpoints of another name, or without the folder; at first it is there, empty."""
    words, folder = saved
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "hf"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    if left:
        (tmp_path / "run" / "checkpoints").mkdir()
        (tmp_path / "run" / left).parent.mkdir(parents=True)
        (tmp_path / "run" / left).write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match="has lost its checkpoints: set another name"):
        run(load_config(None, [*words, "--out", str(tmp_path)]))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_disk_without_room_for_a_checkpoint_is_known_before_the_first_step(saved, tmp_path, monkeypatch):
    words, folder = saved
    size = (folder / "checkpoints" / "step_4" / "rank_00000.safetensors").stat().st_size
    for free, fits in ((size - 100_000, False), (size, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(10**15, 0, free))
        config = load_config(None, [*words, "--out", str(tmp_path), "--name", f"run{free}"])
        if fits:
            run(config)
            continue
        with pytest.raises(
            ConfigError, match=rf"out: {tmp_path} has 0\.01\d GiB of space and needs 0\.01\d: make room"
        ):
            run(config)
        assert not (tmp_path / config.name).exists()


def test_a_file_where_checkpoints_should_be_is_known_before_the_first_step(saved, tmp_path):
    words, folder = saved
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "hf"))
    (tmp_path / "run" / "checkpoints").write_text("somebody's")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"out: .*checkpoints"):
        run(load_config(None, [*words, "--out", str(tmp_path)]))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_config_that_transformers_refuses_to_write_is_known_before_the_first_step(options, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.name's config.*output_attentions"):
        run(load_config(None, options(model__overrides='{"output_attentions": true}')))
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


# ---- a step that is not finite


def test_a_loss_that_is_not_finite_does_not_cost_the_save_under_way(options, tmp_path):
    (tmp_path / "empty.toml").touch()
    command = ["pt", str(tmp_path / "empty.toml"), *options()]
    for ranks in (1, 2):
        faults = {"not_finite_at": (3,), "slow_save": (1.0, str(tmp_path / "saving"))}
        if ranks == 2:
            faults = {rank: faults for rank in range(2)}
        done = finish(tmp_path, *command, "--name", f"bad{ranks}", ranks=ranks, faults=faults)
        assert done.status == 1 and "step 3: loss nan" in done.output, done.output
        assert checkpoints(tmp_path / "runs" / f"bad{ranks}") == [2]


def test_a_checkpoint_of_another_format_is_refused_with_what_to_do(options, stop_after):
    folder = stop_after(3, options())
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    state = json.loads((newest / "state.json").read_text())
    for other in ({}, {"format": 1}):  # the first ones had no number
        kept = {key: value for key, value in state.items() if key != "format"}
        (newest / "state.json").write_text(json.dumps(kept | other))
        (newest / "seals.json").write_text(json.dumps(seal([newest / "state.json"])))
        with pytest.raises(ConfigError, match=f"{newest} .*another version of lacuna.*model.name"):
            run(load_config(None, options()))


# ---- what else it is good for: a warm start, an export


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Folders of a pt and an sft run, each made by two ranks, and the words for more such runs."""
    place = tmp_path_factory.mktemp("two_ranks")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(model_config("smollm2"), dtype=torch.float32).save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(EXAMPLES / "tiny").save_pretrained(place / "model")
    GenerationConfig(eos_token_id=[0, 3], temperature=0.3, do_sample=True).save_pretrained(place / "model")
    (place / "empty.toml").touch()
    chats = [json.loads(line) for line in (EXAMPLES / "chat" / "heldout.jsonl").read_text().splitlines()]
    chats = sorted(chats, key=lambda line: len(json.dumps(line)))[:20]
    (place / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chats))

    def words(task: str, name: str, *more: str) -> list[str]:
        file = place / "chats.jsonl" if task == "sft" else EXAMPLES / "moby_dick" / "heldout.jsonl"
        sources = json.dumps([{"path": str(file)}])
        fixed = ["--model.name", place / "model", "--data.sources", sources, "--data.cache", place / "cache"]
        fixed += ["--eval.sources", sources, "--eval.rows", 2, "--out", place / "runs", "--name", name]
        fixed += ["--train.seq_len", 512 if task == "sft" else 64, "--train.micro_batch_size", 1]
        fixed += ["--train.global_batch_size", 2, "--train.steps", 4, "--optim.lr", 1e-3, "--optim.warmup_steps", 2]
        fixed += ["--log.every", 1]
        return [task, str(place / "empty.toml"), *map(str, fixed), *more]

    for task in ("pt", "sft"):
        done = finish(place, *words(task, task), ranks=2)
        assert done.status == 0, done.output
    return place, words


@pytest.mark.parametrize("task", ["pt", "sft"])
def test_a_checkpoint_of_two_ranks_is_exported_as_the_run_exports_its_model(task, two_ranks, tmp_path):
    place, _ = two_ranks
    checkpoint, hf = place / "runs" / task / "checkpoints" / "step_4", place / "runs" / task / "hf"
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    done = finish(place, "export", str(checkpoint), str(tmp_path / "out"))
    assert done.status == 0, done.output
    assert not list((tmp_path / "out").glob("rank*")) and not (tmp_path / "out" / "state.json").exists()
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (tmp_path / "out", hf))
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    # by hand from the two files, and not what training began with
    parts = tensors(checkpoint)
    start = AutoModelForCausalLM.from_pretrained(place / "model").state_dict()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, parts[name]) and not torch.equal(parameter, start[name]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    end = "<|im_end|>" if task == "sft" else "<|endoftext|>"
    assert tokenizer.eos_token == end and ours.config.eos_token_id == tokenizer.eos_token_id
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.temperature == 0.3 and settings.eos_token_id[0] == tokenizer.eos_token_id
    assert set(settings.eos_token_id) == {tokenizer.eos_token_id, 0, 3}
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(hf).chat_template != None  # noqa: E711
    whole = ours.generation_config.to_dict(), theirs.generation_config.to_dict()
    assert whole[0] == whole[1] and ours.config.to_dict().keys() == theirs.config.to_dict().keys()


def test_a_new_run_from_a_checkpoint_has_its_weights_and_fresh_data_schedule_and_optimizer(two_ranks):
    place, words = two_ranks
    checkpoint = place / "runs" / "pt" / "checkpoints" / "step_4"
    for name, folder in {"warm": checkpoint, "reference": place / "runs" / "pt" / "hf"}.items():
        done = finish(place, *words("pt", name, "--model.name", str(folder)))
        assert done.status == 0, done.output
    first, warm, reference = (lines(place / "runs" / name) for name in ("pt", "warm", "reference"))
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "batch_checksum", "eval_loss")
    assert [[m.get(k) for k in keys] for m in warm] == [[m.get(k) for k in keys] for m in reference]
    for key in ("step", "lr", "tokens", "batch_checksum"):  # data and schedule of a run that begins
        assert [m.get(key) for m in warm] == [m.get(key) for m in first]
    evaluated = [m["eval_loss"] for m in first if "eval_loss" in m], [m["eval_loss"] for m in warm if "eval_loss" in m]
    assert evaluated[1][0] == pytest.approx(evaluated[0][-1], rel=1e-5) != evaluated[0][0]
    assert tensors(place / "runs" / "warm" / "checkpoints" / "step_4")["optimizer.step"] == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_in_another_dtype_is_rounded_once(saved, dtype, tmp_path):
    _, folder = saved
    done = finish(tmp_path, "export", str(folder / "checkpoints/step_4"), str(tmp_path / "out"), "--dtype", dtype)
    assert done.status == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    stored = tensors(folder / "checkpoints" / "step_4")
    assert model.dtype == getattr(torch, dtype)
    assert all(torch.equal(p, stored[name].to(model.dtype)) for name, p in model.named_parameters())


def test_a_bfloat16_run_exports_bfloat16_and_its_checkpoint_keeps_float32(options, tmp_path):
    folder = run(load_config(None, options(model__dtype="bfloat16")))
    stored = tensors(folder / "checkpoints" / "step_6")
    export(folder / "checkpoints" / "step_6", tmp_path / "out")
    for place in (folder / "hf", tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
        assert model.dtype == torch.bfloat16
        assert {tensor.dtype for tensor in load_file(place / "model.safetensors").values()} == {torch.bfloat16}
        assert all(torch.equal(p, stored[name].bfloat16()) for name, p in model.named_parameters())
    assert not torch.equal(stored["model.norm.weight"], stored["model.norm.weight"].bfloat16().float())


@pytest.mark.gpu
def test_pinned_host_memory_is_given_back_with_the_run(options, monkeypatch):
    places = []

    def noting(self, *arguments, real=Checkpoints.__init__):
        real(self, *arguments)
        places.extend((place.data_ptr(), place.is_pinned()) for place in self.places)

    monkeypatch.setattr(Checkpoints, "__init__", noting)
    run(load_config(None, options()))
    gc.collect()
    assert len(places) > 30 and all(pinned for _, pinned in places)
    for place, _ in places:
        now = torch.frombuffer((ctypes.c_char * 4).from_address(place), dtype=torch.uint8)
        assert not now.is_pinned()


def test_a_checkpoint_that_cannot_get_its_name_is_one_sentence(options, monkeypatch):
    """Somebody has put another folder there, or has removed the one of all checkpoints."""
    rename = Path.rename

    def refuse(path, target):
        if path.name == ".step_4":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 4: OSError: .*not empty") as caught:
        run(load_config(None, options()))
    assert "\n" not in str(caught.value)
