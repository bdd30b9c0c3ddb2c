"""What a finished or refused run leaves behind is enough to run it again, and one run does not disturb another."""

import json
import re
import shlex
import shutil
from pathlib import Path

import lissom as package
import pytest
from lissom.core import artifact
from lissom.tests.cli.commands import TINY, lissom, refused
from lissom.tests.core import tiny
from lissom.tests.workflow import small
from lissom.workflow._evaluator import Evaluator

ROOT = Path(package.__file__).parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Evaluator, "score", small.pretended)
    return tmp_path


@pytest.mark.parametrize("layout", ["stages in folders of their own", "one stage"])
def test_the_reports_command_makes_the_run_again(here: Path, layout: str) -> None:
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "r.yaml").write_text(small.text())
    started = ("run", "elsewhere/r.yaml") if "folders" in layout else ("search", "random_search", "zoo:fashion", *TINY[:-2])
    assert lissom(*started, "--out", "runs/first", "--chunk", 4, "--device", "cpu").exit_code == 0
    first = artifact.finished(here / "runs" / "first")
    words = shlex.split(small.report(first)["command"])
    assert words[:2] == ["lissom", "run"] and words[-2:] == ["--chunk", "4"]
    ended = lissom(*words[1:])
    assert ended.exit_code == 0, ended.stderr
    again = artifact.finished(here / "runs" / "first-again")
    assert (again / "plan.json").read_bytes() == (first / "plan.json").read_bytes()


def test_the_options_of_a_refused_resume_do_not_stick(here: Path) -> None:
    (here / "r.yaml").write_text(small.text())
    assert lissom("run", "r.yaml", "--out", "x", "--chunk", 4, "--device", "cpu", "--max-time", 0).exit_code == 2
    kept = (here / "x" / "environment.json").read_bytes()
    assert "chunk is 4, this one's is 8" in refused("run", "r.yaml", "--out", "x", "--resume", "--chunk", 8, "--device", "cpu")
    assert (here / "x" / "environment.json").read_bytes() == kept
    assert lissom("run", "x").exit_code == 0


def test_runs_of_one_name_share_a_database_without_meeting(here: Path) -> None:
    url = f"sqlite:///{here}/trials.db"
    for folder, seed in (("a/run", 0), ("b/run", 1)):
        started = ("search", "random_search", "zoo:fashion", *TINY, "--storage", url, "--seed", seed)
        ended = lissom(*started, "--out", folder)
        assert ended.exit_code == 0, ended.stderr
    assert lissom("report", "a/run").exit_code == 0
    plans = [(here / f / "plan.json").read_text() for f in ("a/run", "b/run")]
    assert plans[0] != plans[1]


def test_a_pipeline_without_captions_is_searched_by_one_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.ddim().save_pretrained(tmp_path / "ddim")
    options = [w if w != "fid,accuracy" else "fid" for w in TINY]
    ended = lissom(
        "search", "random_search", "ddim", *options, "--features", "zoo:judge", "--reference", "teacher", "--out", "x"
    )
    assert ended.exit_code == 0, ended.stderr
    assert "--metrics" not in ended.stderr and (tmp_path / "x" / "plan.json").is_file()


def test_a_recipes_paths_start_from_the_recipe(here: Path) -> None:
    (here / "team").mkdir()
    shutil.copytree(ROOT / "zoo" / "judge", here / "team" / "clip")
    (here / "team" / "p.jsonl").write_text('{"prompt": "a photo of a bag", "label": 8}\n')
    recipe = json.loads(small.text(evaluate={"features": "local-dir:./clip", "reference": "zoo:fashion/test"}))
    recipe["prompts"] = "p.jsonl"
    # The embedded statistics were made by these very weights under another name: they are refused by name, not as missing.
    (here / "team" / "r.yaml").write_text(json.dumps(recipe))
    assert "clip" in refused("run", "team/r.yaml", "--out", "x", "--device", "cpu")
    recipe["evaluate"] |= {"features": "zoo:judge", "reference": "zoo:fashion"}
    (here / "team" / "r.yaml").write_text(json.dumps(recipe))
    assert lissom("run", "team/r.yaml", "--out", "x", "--device", "cpu").exit_code == 0
    (here / "p.jsonl").write_text((here / "team" / "p.jsonl").read_text())
    (here / "team" / "p.jsonl").unlink()
    assert "team" in refused("run", "team/r.yaml", "--out", "y", "--device", "cpu")  # not the one that lies here by chance


def test_the_python_of_the_documents_runs(here: Path, finished: Path) -> None:
    (here / "runs").mkdir()
    shutil.copytree(finished, here / "runs" / "demo")
    for page in ("README.md", "docs/design.md"):
        (block,) = re.findall(r"```python\n(import lissom\n.*?)```", (ROOT / page).read_text(), re.DOTALL)
        names: dict[str, object] = {}
        exec(block, names)  # noqa: S102  our own documents
        assert getattr(names["image"], "size", None) == (32, 32)
