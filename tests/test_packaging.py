"""A clone without the tools of its developers has all that lacuna imports."""

import ast
import importlib.metadata
import itertools
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]


def closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that come with these requirements, of those installed here."""
    todo, done, names = [Requirement(text) for text in requirements], set(), set()
    while todo:
        wanted = todo.pop()
        known = (wanted.name, frozenset(wanted.extras))
        if known in done:
            continue
        done.add(known)
        try:
            distribution = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        names.add(distribution.name)
        for requirement in map(Requirement, distribution.requires or []):
            extras = wanted.extras | {""}
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(requirement)
    return names


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports, in whatever function."""
    packages = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            packages.add(node.module.partition(".")[0])
    return packages


def test_what_is_imported_is_a_dependency_or_an_extra_and_not_only_of_developers():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    required = closure(project["dependencies"])
    of_extras = itertools.chain(*project["optional-dependencies"].values())
    extras = {canonicalize_name(Requirement(text).name) for text in of_extras}
    owners = importlib.metadata.packages_distributions()
    for file in [*(REPO / "src" / "lacuna").rglob("*.py"), *(REPO / "examples").glob("*.py")]:
        for package in imported(file) - {"lacuna", *sys.stdlib_module_names}:
            names = set(owners.get(package, [])) or {package}
            optional = extras & set(map(canonicalize_name, names))
            optional |= {package} & {"flash_attn", "torchao", "wandb", "trackio"}
            assert names & required or optional, f"{file.name} imports {package}, which no dependency brings"
