"""docs/ci.md does what it says: every shell step of its workflows is run, as its CI system would, on a repository with a remote."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lissom
import pytest
import yaml

PAGE = Path(lissom.__file__).parent / "docs" / "ci.md"
SAMPLES = "24"
SHORT = '"$SAMPLES"'  # as the page's commands name it


def blocks() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def workflow(name: str) -> dict[str, Any]:
    """The workflow whose first line names this file."""
    text = next(block for block in blocks() if block.startswith(f"# {name}"))
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def steps(name: str) -> list[str]:
    (job,) = workflow(name)["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


class Repository:
    """A checkout with a remote, and a shell in it as a CI runner gives one."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        scripts = str(Path(sys.executable).parent)
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        self.env = (
            {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)} | quiet | env | {"SAMPLES": SAMPLES}
        )
        remote = folder.parent / "remote.git"
        self.shell(f"git init -q --bare -b main {remote} && git init -q -b main . && git remote add origin {remote}")

    def shell(self, script: str) -> "subprocess.CompletedProcess[str]":
        """bash -e -o pipefail, as GitHub runs a step; what installs lissom is left out."""
        script = "\n".join(line for line in script.splitlines() if not line.startswith("pip install"))
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """With the page's own gates and the baseline that its own workflow measures."""
    folder = tmp_path_factory.mktemp("ci") / "checkout"
    folder.mkdir()
    found = Repository(folder, workflow(".github/workflows/baseline.yml")["env"])
    gates = next(block for block in blocks() if block.startswith("# gates.yaml"))
    changed = {"params": "params: {max_ratio: 1.0}", "accuracy": "accuracy: {min: 0.1}"}  # nothing was pruned; few images
    kept = [changed.get(line.partition(":")[0], line) for line in gates.splitlines()]
    measured = [line for line in kept if not line.startswith(("recall", "latency"))]  # the page's workflows measure neither
    (folder / "gates.yaml").write_text("\n".join(measured))
    for script in steps(".github/workflows/baseline.yml"):
        ended = found.shell(script)
        assert ended.returncode == 0, ended.stderr
    assert found.shell("git show origin/main:baselines/model.json").returncode == 0
    return found


def test_the_gates_on_the_page_are_gates(tmp_path: Path) -> None:
    from lissom.core.recipe import read_gates

    (tmp_path / "gates.yaml").write_text(next(block for block in blocks() if block.startswith("# gates.yaml")))
    assert set(read_gates(tmp_path / "gates.yaml")) == {"fid", "clip_score", "recall", "latency", "params", "accuracy"}


def test_the_github_workflow_passes_an_unchanged_model(repository: Repository) -> None:
    summary = repository.folder / "summary.md"
    runner = {"GITHUB_ACTIONS": "true", "GITHUB_BASE_REF": "main", "RUNNER_TEMP": str(repository.folder.parent)}
    repository.env |= runner | {"GITHUB_STEP_SUMMARY": str(summary)}
    for script in steps(".github/workflows/model.yml"):
        ended = repository.shell(script)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert summary.read_text().startswith("# PASS") and (repository.folder / "report" / "report.html").is_file()
    (soft,) = [block for block in blocks() if "undecided is no failure" in block]
    assert repository.shell(yaml.safe_load(soft)[0]["run"]).returncode == 0


def test_a_worse_model_fails_and_an_undecided_one_is_told_apart(repository: Repository) -> None:
    measure, compare = steps(".github/workflows/model.yml")[1:]
    repository.env |= {"GITHUB_BASE_REF": "main", "RUNNER_TEMP": str(repository.folder.parent)}
    worse = measure.replace("--steps 4", "--steps 1").replace("candidate.json", "worse.json")
    assert repository.shell(worse).returncode == 0
    ended = repository.shell(compare.replace("candidate.json", "worse.json").replace("--out report", "--out report-worse"))
    assert ended.returncode == 3 and "REGRESSION" in ended.stdout
    other = measure.replace("--out candidate.json", "--seed 1 --out other.json")
    assert repository.shell(other).returncode == 0
    (soft,) = [block for block in blocks() if "undecided is no failure" in block]
    undecided = yaml.safe_load(soft)[0]["run"].replace("candidate.json", "other.json").replace("report-soft", "report-other")
    assert repository.shell(undecided.replace("--allow-inconclusive", "")).returncode == 4
    assert repository.shell(undecided).returncode == 0
    fewer = measure.replace(SHORT, "16").replace("candidate.json", "fewer.json")
    assert repository.shell(fewer).returncode == 0  # another suite is never let through
    assert (
        repository.shell(undecided.replace("other.json", "fewer.json").replace("report-other", "report-fewer")).returncode == 4
    )


def test_the_gitlab_job_does_the_same(repository: Repository) -> None:
    job = workflow(".gitlab-ci.yml")["model"]
    repository.env |= job["variables"] | {"CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main", "SAMPLES": SAMPLES}
    assert repository.shell("rm -rf report candidate.json candidate.images").returncode == 0
    ended = repository.shell("\n".join(job["script"]))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (repository.folder / job["artifacts"]["reports"]["junit"]).is_file()
