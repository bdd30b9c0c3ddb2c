"""The tree keeps its shape: who imports whom, what every method offers, how long a file may be."""

import ast
import doctest
import importlib
import json
import subprocess
from pathlib import Path

import lissom
import pytest
from lissom.core.recipe import json_schema, read
from lissom.workflow.describe import RECIPES, names

ROOT = Path(lissom.__file__).parent
VERBS = {"search", "prune", "distill", "evaluate", "report"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    **{verb: {"core"} for verb in VERBS},
    "workflow": {"core", *VERBS},
    "cli": {"core", "workflow"},
    "zoo": {"core", "evaluate"},
    "benchmarks": {"core", "workflow", "evaluate", "prune", "search", "report"},
}
MODULES = sorted(p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in MODULES]


def dotted(path: Path) -> str:
    return ".".join(("lissom", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_downward(path):
    parts = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        up = parts[: len(parts) - node.level]
        if up:  # the import stays inside its own folder
            assert up[0] == parts[0]
            continue
        targets = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        for target in targets:
            if target != "__version__":
                assert target in MAY_IMPORT[parts[0]] | {parts[0]}, f"{parts[0]}/ may not import {target}/"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_docstring_examples(path):
    module = importlib.import_module(dotted(path))
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_no_file_is_longer_than_400_lines():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, check=True, stdout=-1).stdout.split()
    long = {f: n for f in tracked if (n := len((ROOT / f).read_text().splitlines())) > 400}
    assert not long


def test_the_folders_are_no_packages():
    """Else a checkout on sys.path would hide PyPI's `evaluate`."""
    assert not [f for f in MAY_IMPORT if (ROOT / f / "__init__.py").exists()]


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_introduces_itself_and_is_valid(name):
    path = RECIPES / f"{name}.yaml"
    recipe, text = read(path)
    assert recipe.lissom == 1
    head = text.split("lissom: 1")[0]
    assert "Paper: https://" in head or "Paper: " in head
    assert f"lissom run {name}" in head or f"copy {name}" in head


def test_the_schema_knows_every_method_and_is_json():
    schema = json.loads(json.dumps(json_schema()))
    titles = [s["title"] for s in schema["properties"]["stages"]["items"]["anyOf"]]
    assert {"search: autodiffusion", "search: random_search", "prune: laptop", "prune: slim_unet"} <= set(titles)


def test_documents_link_to_files_that_exist():
    import re

    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
