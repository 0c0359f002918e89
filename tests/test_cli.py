"""The command: lines are counted honestly, threads are set, and several GPUs become torchrun only when they should."""

import json
import os
import runpy
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from conftest import EXAMPLES, REPO
from transformers import PreTrainedModel

import count_lines
from lacuna import cli
from lacuna.config import ConfigError, blame

VARIABLES = [
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "RAYON_NUM_THREADS"),
    *(name for name in os.environ if name.startswith("SLURM_")),
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """os.environ without anything that decides about ranks and threads; changes end with the test."""
    copy = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    monkeypatch.setattr(os, "environ", copy)
    return copy


# count_lines


def count(package: Path, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        count_lines.main(package)
    return int(end.value.code or 0), capsys.readouterr().out


def test_count_lines_counts_code_comments_docstrings_and_blanks_of_every_file(tmp_path, capsys):
    (tmp_path / "cli.py").write_text('"""Two\nlines."""\n\n# comment\n\nx = 1  # code\n')
    (tmp_path / "no_newline_at_end.py").write_text("a = 1\nb = 2")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "inner.py").write_text("\n" * 1234)
    (tmp_path / "notes.md").write_text("not\ncounted\n")
    code, out = count(tmp_path, capsys)
    rows = {line.split()[-1]: line.split()[0] for line in out.splitlines()[:-1]}
    assert code == 0
    assert rows == {"cli.py": "6", "no_newline_at_end.py": "2", "empty.py": "0", "data/deep/inner.py": "1,234"}
    assert out.splitlines()[-1].split()[0] == "1,242"


@pytest.mark.parametrize(("lines", "code"), [(2999, 0), (3000, 1), (3001, 1)])
def test_count_lines_fails_from_3000_on(tmp_path, capsys, lines, code):
    (tmp_path / "cli.py").write_text("\n" * 1000)
    (tmp_path / "other.py").write_text("# comment\n" * (lines - 1000))
    assert count(tmp_path, capsys)[0] == code


def test_lacuna_itself_stays_below_3000_lines():
    package = Path(cli.__file__).parent
    lines = sum(len(file.read_bytes().split(b"\n")) - 1 for file in package.rglob("*.py"))
    result = subprocess.run(
        [sys.executable, "-c", "import count_lines; count_lines.main()"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1].split()[0] == f"{lines:,}"
    assert lines < 3000


# Threads


@pytest.fixture
def cores(monkeypatch):
    def cores(cpus):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cpus))

    return cores


@pytest.mark.parametrize(
    ("cpus", "processes", "threads"),
    [(range(16), 1, 16), (range(16), 3, 5), (range(16), 16, 1), (range(16), 32, 1), ([0, 2, 4, 6], 2, 2)],
)
def test_threads_are_cores_of_the_affinity_over_processes(environment, cores, cpus, processes, threads):
    cores(cpus)
    environment |= {"RANK": "0", "LOCAL_WORLD_SIZE": str(processes)}
    cli.launch()
    assert environment["OMP_NUM_THREADS"] == str(threads)
    assert environment["RAYON_NUM_THREADS"] == str(threads)


def test_threads_chosen_by_the_user_stay(environment, cores):
    cores(range(16))
    environment |= {"OMP_NUM_THREADS": "3", "RAYON_NUM_THREADS": "5", "RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    cli.launch()
    assert [environment[k] for k in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")] == ["3", "5"]


def test_the_single_thread_that_torchrun_sets_is_replaced(environment, cores):
    cores(range(16))
    environment |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    cli.launch()
    assert environment["OMP_NUM_THREADS"] == "8"


# The end


def test_a_good_end_runs_what_a_patch_has_left_for_it(tmp_path):
    code = f"""
import atexit
from lacuna import cli
file = open({str(tmp_path / "written")!r}, "w")
file.write("all of it")
atexit.register(lambda: print("at exit"))
cli.leave(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "at exit\n"
    assert (tmp_path / "written").read_text() == "all of it"


def test_help_is_shown_where_stderr_is_closed():
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m lacuna --help 2>&-"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: lacuna pt")


# Launch


@pytest.fixture
def launch(environment, monkeypatch, cores):
    """Launch in this environment, on 8 cores and with this many GPUs; the command that it became, if any."""
    cores(range(8))
    monkeypatch.setattr(cli, "leave", sys.exit)
    monkeypatch.setattr(sys, "argv", ["lacuna", "pt", "my.toml", "--train.steps", "3"])

    def launch(devices: int = 0, **variables) -> list[str] | None:
        environment.update(variables)
        became = []
        nodes = [f"/dev/nvidia{i}" for i in range(devices)]
        monkeypatch.setattr(cli, "glob", lambda pattern: nodes if pattern.startswith("/dev/nvidia[0-9]") else [])
        monkeypatch.setattr("torch.distributed.run.main", became.append)
        try:
            cli.launch()
        except SystemExit as end:
            assert not end.code, "the ranks have ended well"
        return became[0] if became else None

    return launch


@pytest.mark.parametrize(
    ("devices", "variables", "processes"),
    [
        (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        (8, {"CUDA_VISIBLE_DEVICES": "4,5,6"}, 3),
        (4, {}, 4),
        (0, {"CUDA_VISIBLE_DEVICES": "GPU-1b2c,GPU-3d4e"}, 2),
        (4, {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}, 4),
    ],
)
def test_several_gpus_become_torchrun_over_all_of_them(launch, environment, devices, variables, processes):
    command = launch(devices, **variables)
    assert "--standalone" in command
    assert command[command.index("--nproc-per-node") + 1] == str(processes)
    assert command[-6:] == ["-m", "lacuna", "pt", "my.toml", "--train.steps", "3"]
    assert environment["OMP_NUM_THREADS"] == str(8 // processes), "set before a worker starts"


@pytest.mark.parametrize("library", ["signal", "random", "json", "tomllib"])
def test_nothing_is_imported_of_the_folder_where_one_stands(library, tmp_path):
    """Python itself would, of `-m`, as torchrun starts its ranks and people may start lacuna."""
    (tmp_path / f"{library}.py").write_text("raise SystemExit('somebody else')")
    command = [sys.executable, "-m", "lacuna", "pt", "nowhere.toml"]
    environ = os.environ | {"PYTHONPATH": str(REPO / "src")}
    environ.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stderr == "lacuna: no config nowhere.toml here: name one, or run in a clone of lacuna\n"


@pytest.mark.parametrize(
    ("devices", "variables", "threads"),
    [
        (0, {}, 8),
        (1, {}, 8),
        (4, {"CUDA_VISIBLE_DEVICES": "2"}, 8),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, 8),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, 8),
        (4, {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, 2),
        (4, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2),
        (4, {"RANK": "1", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, 4),
    ],
    ids=[
        "no GPU",
        "one",
        "one visible",
        "none visible",
        "none by -1",
        "torchrun",
        "torchrun 2 nodes",
        "Slurm",
    ],
)
def test_one_gpu_or_a_process_started_by_torchrun_or_slurm_stays_itself(
    launch, environment, devices, variables, threads
):
    assert launch(devices, **variables) is None
    assert environment["OMP_NUM_THREADS"] == str(threads)


def test_a_task_of_srun_that_is_not_told_its_rank_is_refused(launch):
    """Each would be a run of its own, and all would write into the same folder."""
    with pytest.raises(ConfigError, match=r"without RANK.*configs/slurm\.sh"):
        launch(4, SLURM_STEP_ID="0", SLURM_NTASKS="4", SLURM_PROCID="1")


@pytest.mark.parametrize("tasks", [{"SLURM_NTASKS": "1"}, {}])
def test_one_task_of_srun_is_a_run(launch, tasks):
    assert "--standalone" in launch(4, SLURM_STEP_ID="0", **tasks)


def test_a_batch_script_that_srun_did_not_start_is_no_task(launch):
    """Slurm sets SLURM_NTASKS there too, but no other task will ever come."""
    assert "--standalone" in launch(4, SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0")


# What is said on the command line


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with a config of its own and those that are used without one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("my", "configs/pt", "configs/sft"):
        file = tmp_path / f"{name}.toml"
        file.write_text(f'name = "{file.stem}"\n[train]\nsteps = 3\n[[data.sources]]\npath = "x"\n')


@pytest.mark.parametrize(
    ("argv", "task", "name", "devices"),
    [
        ("pt my.toml --seed 7", "pt", "my", None),
        ("sft my.toml --seed 7", "sft", "my", None),
        ("pt --seed 7", "pt", "pt", "0"),
    ],
)
def test_a_task_its_config_and_one_gpu_where_none_is_given(clone, environment, argv, task, name, devices):
    command, *words = argv.split()
    config = cli.parse(command, words)
    assert (config.task, config.name, config.seed) == (task, name, 7)
    assert environment.get("CUDA_VISIBLE_DEVICES") == devices


def test_the_users_own_devices_stay_without_a_config(clone, environment):
    environment["CUDA_VISIBLE_DEVICES"] = "2,3"
    cli.parse("pt", [])
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"


def lacuna(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lacuna", *words], capture_output=True, text=True)


@pytest.mark.skipif(not list(distributions(name="lacuna")), reason="lacuna is on the path alone, not installed")
def test_the_version_is_that_of_lacuna_and_of_what_decides_its_numbers():
    done = lacuna("--version")
    versions = [f"{name} {version(name)}" for name in ("lacuna", "torch", "transformers")]
    assert (done.returncode, done.stdout) == (0, ", ".join(versions) + "\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "lacuna export: error: the following arguments are required: checkpoint, folder"),
        ("a", "lacuna export: error: the following arguments are required: folder"),
        ("a b c", "lacuna export: error: unrecognized arguments: c"),
        ("a b --dtype int8", "lacuna export: error: argument --dtype: invalid choice: 'int8' (choose from "),
        ("nowhere out", "lacuna: nowhere is no whole checkpoint of this version, such as runs/x/checkpoints/step_N"),
    ],
)
def test_an_export_that_cannot_be_is_a_sentence(words, sentence):
    done = lacuna("export", *words.split())
    assert done.returncode > 0 and done.stderr.splitlines()[-1].startswith(sentence)


def test_export_says_what_it_takes():
    done = lacuna("export", "--help")
    assert done.returncode == 0 and "checkpoint folder" in done.stdout and "--dtype" in done.stdout


@pytest.mark.parametrize("argv", ["chat x", "explain pt", "slurm pt", "pretrain"])
def test_what_is_no_command_shows_the_usage(argv):
    command, *words = argv.split()
    with pytest.raises(ConfigError, match=f"(?s)^unknown command {argv}\n.*usage: lacuna pt"):
        cli.parse(command, words)


# chat


def test_chat_runs_no_kernel_and_no_code_that_a_models_config_names(model_folder, monkeypatch):
    """transformers takes `owner/name` for a kernel of the Hub, and asks whether to run a model's code."""
    chat = runpy.run_path(EXAMPLES / "chat.py")["chat"]
    folder = model_folder("llama")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"attn_implementation": "stranger/kernel"}))
    asked = []
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def spy(self, implementation, *arguments, **options):
        asked.append(implementation)
        return check(self, implementation, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", spy)
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    with suppress(SystemExit):  # it has no chat template
        chat(str(folder))
    assert set(asked) == {"sdpa"}

    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')")
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(fields | code))
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(SystemExit, match="contains custom code"):
        chat(str(folder))
    assert not (folder / "pwned").exists()


def test_a_pipe_is_no_config(tmp_path):
    """Nobody may ever write to it; and of several ranks only one could read it."""
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match=r"no config .*pipe\.toml"):
        cli.parse("pt", [str(tmp_path / "pipe.toml")])


def test_a_path_with_a_librarys_name_is_not_blamed_on_it(tmp_path):
    """The cures are chosen by what an error says; what it says may hold a path."""
    for cause in (FileNotFoundError("no file gloomhaven.jsonl"), ValueError("igloo.parquet")):
        with pytest.raises(ConfigError) as caught, blame("data.sources"):
            raise cause
        assert "rank" not in str(caught.value)
    with pytest.raises(ConfigError, match="Another rank has ended"), blame("it"):
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:525] Read timeout [127.0.0.1]:7")
