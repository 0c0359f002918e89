"""benchmarks/report.py: the page holds what metrics.jsonl and config.toml of the runs hold, and no more."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import tomli_w
from conftest import REPO

pytest.importorskip("plotly")

SCRIPT = REPO / "benchmarks" / "report.py"


def step(number, **figures):
    """A line as a run writes one, about 100 tokens a step."""
    line = {
        "step": number,
        "loss": 8 - number / 7,
        "grad_norm": 1 / number,
        "lr": 1e-3 * number,
        "tokens": 100 * number,
    }
    line |= {"trained_tokens": 90 * number, "epoch": 0.1, "packing_efficiency": 0.98, "tokens_per_second": 500.5}
    line |= {"tokens_per_second_per_device": 500.5, "mfu": None, "step_seconds": 360.0, "data_seconds": 0.01}
    return line | {"peak_memory_gib": 1.25, "batch_checksum": "000000007ffce07d"} | figures


def evaluation(number, loss, **figures):
    return {"step": number, "eval_loss": loss, "eval_bits_per_byte": loss / 2, "eval_tokens": 17} | figures


@pytest.fixture
def make_run(tmp_path):
    def make_run(name, lines, **config):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "config.toml").write_text(tomli_w.dumps({"name": name, **config}))
        return folder

    return make_run


@pytest.fixture
def report(tmp_path):
    def report(*runs):
        """The page of these runs, and the data in it."""
        out = tmp_path / "page.html"
        command = [sys.executable, SCRIPT, *runs, "-o", out]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        page = out.read_text()
        [data] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
        return page, json.loads(data)

    return report


def curves(data):
    """(panel, run, held out): curve."""
    return {
        (panel["key"], curve["run"], curve["held_out"]): curve for panel in data["panels"] for curve in panel["curves"]
    }


def cells(data):
    return {row["title"]: row["cells"] for row in data["rows"]}


def test_values_are_those_of_the_runs(make_run, report):
    first = [evaluation(0, 9.0), *[step(number) for number in range(1, 41)], evaluation(40, 2.5)]
    second = [step(1), step(2, loss=1.5), step(6, loss=1.25)]
    _, data = report(make_run("a", first), make_run("b", second))
    assert data["names"] == ["a", "b"]
    found = curves(data)
    for run, lines in enumerate([first, second]):
        trained = [line for line in lines if "loss" in line]
        for key in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gib"):
            curve = found.pop((key, run, False))
            assert curve["value"] == [line[key] for line in trained]
            assert curve["step"] == [line["step"] for line in trained]
            assert curve["tokens"] == [line["tokens"] for line in trained]
    for key, values in (("eval_loss", [9.0, 2.5]), ("eval_bits_per_byte", [4.5, 1.25])):
        curve = found.pop((key, 0, True))
        assert [curve["step"], curve["tokens"], curve["value"]] == [[0, 40], [0, 4000], values]
    assert not found
    table = cells(data)
    assert table["last step"] == ["40", "6"]
    assert table["tokens"] == ["4,000", "600"]
    assert table["last loss"] == [f"{8 - 40 / 7:.4f}", "1.2500"]
    assert table["last loss, held out"] == ["2.5000", None]
    assert table["hours of steps"] == ["4", "0.6"]


def test_the_mean_is_over_a_tenth_of_the_points_and_beside_them(make_run, report):
    _, data = report(make_run("a", [step(number, loss=float(number % 7)) for number in range(1, 41)]))
    found = curves(data)
    curve = found["loss", 0, False]
    for index in range(40):
        around = curve["value"][max(index - 2, 0) : index + 3]
        assert curve["mean"][index] == pytest.approx(sum(around) / len(around))
    assert "mean" not in found["lr", 0, False]


def test_a_recipes_figures_have_panels_of_their_own(make_run, report):
    lines = [step(1, reward_margin=0.5), step(2, reward_margin=0.75), evaluation(2, 0.6, eval_reward_margin=0.25)]
    _, data = report(make_run("a", lines))
    [panel] = [panel for panel in data["panels"] if "reward" in panel["key"]]
    assert panel["title"] == "reward margin"
    assert [curve["value"] for curve in panel["curves"] if curve["held_out"]] == [[0.25]]
    assert [curve["value"] for curve in panel["curves"] if not curve["held_out"]] == [[0.5, 0.75]]


def test_a_line_cut_off_is_left_out(make_run, report):
    started = make_run("started", [])
    folder = make_run("going-on", [step(1), step(2), step(3)])
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    _, data = report(folder, started)
    assert curves(data)["loss", 0, False]["step"] == [1, 2]
    assert cells(data)["last step"] == ["2", "0"]


def test_what_is_not_finite_is_no_point(make_run, report):
    _, data = report(make_run("a", [step(1), evaluation(1, float("nan")), step(2), evaluation(2, 3.0)]))
    assert curves(data)["eval_loss", 0, True]["step"] == [2]


def test_only_keys_that_differ_and_no_secrets(make_run, report):
    def config(lr, secret, **recipe):
        path = f"https://user:{secret}@host/{lr}.parquet?token={secret}"
        sources = [{"path": path, "split": "train"}, {"path": "s3://bucket/x", "weight": lr}]
        recipe = {"api_key": secret, "hub": {"token": secret}} | recipe
        return {"optim": {"lr": lr, "betas": [0.9, 0.95]}, "data": {"sources": sources}, "recipe": recipe}

    one = make_run("one", [step(1)], **config(0.1, "hunter2"))
    two = make_run("two", [step(1)], **config(0.2, "hunter3", beta=[1, 2]))
    page, data = report(one, two)
    assert cells(data).keys() - cells(report(one)[1]).keys() == {
        "optim.lr",
        "data.sources.0.path",
        "data.sources.1.weight",
        "recipe.beta",
    }
    assert cells(data)["optim.lr"] == ["0.1", "0.2"]
    assert cells(data)["recipe.beta"] == [None, "[1, 2]"]
    assert cells(data)["data.sources.0.path"] == ["https://host/0.1.parquet", "https://host/0.2.parquet"]
    assert "hunter" not in page


def tags(page):
    parser = HTMLParser()
    found = []
    parser.handle_starttag = lambda tag, attributes: found.append((tag, attributes))
    parser.feed(page)
    return found


def test_hostile_names_stay_text(make_run, report):
    evil = "<script>alert(1)<!--"
    config = {"recipe": {"loss": "</script><script>alert(2)", "<img src=x>": "$title"}}
    page, data = report(
        make_run(evil, [step(1, **{"</script><img src=x onerror=alert(3)>": 1.5})], **config),
        make_run("two", [step(1)]),
    )
    plain, _ = report(make_run("three", [step(1)]))
    assert tags(page) == tags(plain)
    assert len(tags(page)) > 20
    assert f"<title>{html.escape(evil)}, two</title>" in page
    assert data["names"] == [evil, "two"]
    assert cells(data)["recipe.loss"] == ["</script><script>alert(2)", None]
    assert cells(data)["recipe.<img src=x>"] == ["$title", None]


def test_the_page_loads_nothing(make_run, report):
    page, _ = report(make_run("a", [step(1)]))
    assert not [dict(attributes) for _, attributes in tags(page) if {"src", "href"} & dict(attributes).keys()]
    own = page.partition('<script id="data"')[0] + page[page.rindex("<script>") :]
    assert "//" not in own.replace(" // ", " ").replace("\n// ", "\n")


def test_runs_of_one_name_are_told_apart(make_run, report):
    one = make_run("first/run", [step(1)])
    two = make_run("second/run", [step(1)])
    assert report(one, two)[1]["names"] == [str(one), str(two)]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.toml"])
def test_what_is_missing_is_named_in_a_sentence(make_run, tmp_path, missing):
    folder = make_run("a", [step(1)])
    (folder / missing).unlink()
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"There is no {folder / missing}: name the folder of a run, such as runs/moby-dick\n"


def test_a_run_without_a_step_is_said_so(make_run, tmp_path):
    folder = make_run("a", [])
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"No step is reported yet in {folder / 'metrics.jsonl'}\n"
