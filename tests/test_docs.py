"""What the documents name is there: files, headings, keys of the config."""

import re
import runpy
from pathlib import Path

import pytest
from conftest import REPO

from lacuna.config import Config, Source

DOCUMENTS = [*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("examples/*.md"), *REPO.glob("benchmarks/*.md")]
# of RESULTS.md and NOTES.md the commands are those of their day
NO_KEYS = {"model.tie_weights", "optim.name"}  # a method; a key that a reader adds
OF_TODAY = [file for file in DOCUMENTS if file.parent.name != "benchmarks"]


def name(file: Path) -> str:
    return str(file.relative_to(REPO))


def headings(file: Path) -> set[str]:
    """The anchors of a document, as GitHub makes them."""
    anchors = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", file.read_text()):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(plain.replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("file", DOCUMENTS, ids=name)
def test_every_link_to_a_file_or_a_heading_leads_somewhere(file):
    text = file.read_text()
    pictures = re.findall(r'\bsrc(?:set)?="([^"]+)"', text)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + pictures:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{name(file)}: {link}"
        if anchor:
            assert anchor in headings(target), f"{name(file)}: {link}"


@pytest.mark.parametrize("file", OF_TODAY, ids=name)
def test_every_key_that_is_named_is_one(file):
    sections = {section: field.annotation for section, field in Config.model_fields.items()}
    sections = {section: kind.model_fields for section, kind in sections.items() if hasattr(kind, "model_fields")}
    section = rf"(?:`|--)({'|'.join(sections)})"
    named = re.findall(rf"{section}\.(?!py\b|txt\b|json\b|safetensors\b)([a-z_]+)", file.read_text())
    for section, key in named:
        assert key in sections[section] or f"{section}.{key}" in NO_KEYS, f"{name(file)}: {section}.{key}"
    for key in re.findall(r"`(?:data|eval)\.sources\.([a-z_]+)", file.read_text()):
        assert key in Source.model_fields, f"{name(file)}: sources.{key}"


def test_every_command_names_files_that_are_there():
    for file in OF_TODAY:
        for path in re.findall(r"(?:configs|examples|benchmarks)/[\w./-]+\.(?:toml|py|sh|md|jsonl)", file.read_text()):
            assert (REPO / path).exists() or (file.parent / path).exists(), f"{name(file)}: {path}"


def test_the_page_of_all_keys_is_what_its_script_makes_now():
    made = runpy.run_path(str(REPO / "docs/keys.py"))["page"]()
    assert (REPO / "docs/keys.md").read_text() == made, "uv run python docs/keys.py > docs/keys.md"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_what_its_script_draws_now(theme):
    script = runpy.run_path(str(REPO / "docs/way.py"))
    drawn = script["draw"](script["THEMES"][theme])
    assert (REPO / f"docs/way-{theme}.svg").read_text() == drawn, "uv run python docs/way.py"


def test_every_change_that_is_shown_fits_one_file_as_it_is_now():
    code = [file.read_text() for file in REPO.glob("src/lacuna/**/*.py")]
    for diff in re.findall(r"(?s)```diff\n(.*?)```", (REPO / "docs/changing.md").read_text()):
        lines = [line for line in diff.splitlines() if line[:1] in "- " and not line.startswith(" # ")]
        before = "\n".join(line[1:] for line in lines)
        if before.strip():
            assert [text.count(before) for text in code if before in text] == [1], diff
