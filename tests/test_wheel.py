"""The wheel holds every module, recipe, template and embedded model of the tree, and nothing outside lissom/."""

import subprocess
import sys
import zipfile
from pathlib import Path

import lissom
import pytest

ROOT = Path(lissom.__file__).parent
SHIPPED = ["*.py", "recipes/**.yaml", "report/*.jinja", "zoo/**.safetensors", "zoo/**.json", "zoo/**.jsonl", "zoo/**.md"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from what git tracks, so that a forgotten `git add` shows."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    archive = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=-1).stdout
    subprocess.run(["tar", "--null", "-T", "-", "-cf", source / "tree.tar"], cwd=ROOT, input=archive, check=True)
    subprocess.run(["tar", "-xf", "tree.tar"], cwd=source, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_wheel_is_complete(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert all(n.startswith("lissom/") for n in names)
    tracked = subprocess.run(["git", "ls-files", *SHIPPED], cwd=ROOT, text=True, check=True, stdout=-1).stdout.split()
    left_at_home = ("tests/", "docs/", "benchmarks/", ".")
    expected = {f for f in tracked if not f.startswith(left_at_home)}
    assert {n.removeprefix("lissom/") for n in names} - {"py.typed"} == expected


def test_wheel_holds_the_zoo_and_is_small(wheel):
    members = {i.filename: i.file_size for i in zipfile.ZipFile(wheel).infolist()}
    weights = {n: s for n, s in members.items() if n.startswith("lissom/zoo/") and n.endswith(".safetensors")}
    for part in ("fashion/unet", "fashion/vae", "fashion/text_encoder", "fashion-dit/transformer", "judge", "statistics"):
        assert any(f"zoo/{part}/" in name for name in weights), part
    assert sum(weights.values()) < 30e6


def test_the_installed_wheel_finds_its_models_and_recipes(wheel, tmp_path):
    """From site-packages, not from the checkout."""
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    code = (
        "import lissom, pathlib; from lissom.core import models; from lissom.workflow.describe import names; "
        f"assert pathlib.Path(lissom.__file__).is_relative_to({str(tmp_path)!r}), lissom.__file__; "
        "assert models.zoo() == ['fashion', 'fashion-dit'], models.zoo(); "
        "[models.check_folder(models.ZOO / n) for n in models.zoo()]; assert 'zoo/demo' in names()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, check=True)
