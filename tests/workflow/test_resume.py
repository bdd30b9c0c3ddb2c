"""Killed at any moment, a search goes on: the same plan byte for byte, and nothing complete is evaluated again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lissom.cli.app import app
from lissom.core.errors import UserError
from lissom.tests.workflow import small
from lissom.workflow import _searched
from lissom.workflow import search as stage
from lissom.workflow._evaluator import Evaluator
from typer.testing import CliRunner

SEARCHED, RESCORED = small.FIXED + small.STAGE["trials"], 3  # evaluations of the first and second study


class Killed(BaseException):
    """As sudden as SIGKILL: nothing in lissom catches it."""


def dies(at: int, method: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
    """The method, which kills the process at its call number `at`, before or after doing its work."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise Killed
        made = method(*args, **kwargs)
        if calls == at:
            raise Killed
        return made

    return wrapped


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretended") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "score", small.pretended)
        small.search(folder)
    return folder


@pytest.fixture
def pretended(uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an uninterrupted search whose values are pretended, as they are in the test that asks for this."""
    monkeypatch.setattr(Evaluator, "score", small.pretended)
    return uninterrupted


def same(folder: Path, whole: Path) -> None:
    """What DESIGN promises of a run that was interrupted and finished."""
    assert (folder / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert set(small.evaluated(folder).values()) == {1}
    assert small.evaluated(folder).keys() == small.evaluated(whole).keys()
    ours, theirs = small.report(folder), small.report(whole)
    assert ours["spent"]["evaluations"] == theirs["spent"]["evaluations"]
    assert ours["winner"]["measurements"] == theirs["winner"]["measurements"] and ours["ratio"] == theirs["ratio"]


@pytest.mark.parametrize(
    "at", [2, SEARCHED - 3, SEARCHED + 2, SEARCHED + RESCORED + 2], ids=["fixed", "search", "rescore", "report"]
)
def test_killed_in_an_evaluation_of_any_phase(
    tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Evaluator, "score", dies(at, Evaluator.score))
        small.search(out)
    assert small.results(out) == at - 1 and not (out / "plan.json").exists()
    with (out / "trials.journal").open("ab") as f:
        f.write(b'{"op_code":4,"worker_id":"')  # and in the middle of a line
    small.search(out, resume=True)
    same(out, pretended)


MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "a result is written, not told": (stage.TrialStore.tell.__globals__, "_finish", False),
    "proposed, not claimed": (stage.TrialStore, "claim", False),
    "claimed, not evaluated": (stage.TrialStore, "claim", True),
    "half of a batch is proposed": (stage.TrialStore, "propose", True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_between_two_writes(tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    out = tmp_path / "run"
    owner, name, after = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        set_in = patch.setitem if isinstance(owner, dict) else patch.setattr
        method = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        set_in(owner, name, dies(7, method, after))
        small.search(out)
    small.search(out, resume=True)
    same(out, pretended)


def test_killed_between_the_plan_and_the_manifest(tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(_searched.artifact, "save", dies(1, _searched.artifact.save))
        small.search(out)
    for name in ("plan.json", "report.html", "samples/searched.png"):
        (out / name).unlink(missing_ok=True)
    small.search(out, resume=True)
    same(out, pretended)
    assert (out / "samples" / "searched.png").is_file() and (out / "report.html").is_file()


def test_a_finished_run_is_not_run_again(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in pretended.rglob("*") if p.name in ("plan.json", "report.json", "trials.journal")}
    monkeypatch.setattr(Evaluator, "score", lambda *a, **k: pytest.fail("evaluated"))
    watched = small.Watched()
    small.search(pretended, resume=True, progress=watched)
    assert watched.said == ["whole: finished already"]
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_after_max_time_a_resumed_run_goes_on_to_the_end(
    tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(stage.Clock, "over", lambda self: self.seconds is not None and small.results(out) >= SEARCHED - 2)
        small.search(out, options=small.Options(device="cpu", max_time=1.0))
    stopped = small.report(out)
    assert len([t for t in small.studies(out)["search"] if t.state.name == "COMPLETE"]) == SEARCHED - 2
    assert any("--max-time after 4 of 6" in w for w in stopped["warnings"])
    small.search(out, resume=True)
    assert (out / "plan.json").read_bytes() == (pretended / "plan.json").read_bytes()
    assert set(small.evaluated(out).values()) == {1} and not small.report(out)["warnings"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path, pretended: Path) -> None:
    from filelock import FileLock

    with FileLock(pretended / ".lock"), pytest.raises(UserError, match="another lissom process is working in it"):
        small.search(pretended, resume=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"trials": 9}, '"trials": 9'), ({"steps": 4}, '"steps": 4'), ({"model": "zoo:fashion-dit"}, "zoo:fashion-dit")],
)
def test_the_folder_of_another_search_is_refused_by_what_differs(pretended: Path, changes: dict[str, Any], says: str) -> None:
    before = (pretended / "trials.journal").read_bytes()
    with pytest.raises(UserError, match=f"holds the run of another recipe .*{says}"):
        small.search(pretended, small.text(**changes), resume=True)
    assert (pretended / "trials.journal").read_bytes() == before


def test_another_way_of_measuring_is_refused_by_what_differs(
    tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Evaluator, "score", dies(2, Evaluator.score))
        small.search(tmp_path / "run")
    with pytest.raises(UserError, match=r"belongs to another search: its chunk is 64, this one's is 32"):
        small.search(tmp_path / "run", resume=True, options=small.Options(device="cpu", chunk=32))


def lissom(*arguments: str, until: Callable[[], bool], sends: signal.Signals, where: Path) -> tuple[int, str]:
    """Run the real command, send it a signal at a moment; exit status and stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lissom", *arguments],
        cwd=where,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not until() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sends)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_real_signals_one_after_the_other(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "chain"
    recipe.write_text(small.text())
    folder = out / "01-search-autodiffusion"
    start = ("run", "r.yaml", "--out", "chain", "--device", "cpu")
    status, _ = lissom(*start, until=lambda: small.results(folder) >= 5, sends=signal.SIGKILL, where=tmp_path)
    assert status == -signal.SIGKILL and small.results(folder) >= 5
    status, said = lissom("run", "chain", until=lambda: small.results(folder) >= 8, sends=signal.SIGTERM, where=tmp_path)
    assert status == 130 and "Traceback" not in said, said
    assert "interrupted; everything that was complete is kept. Go on with: lissom run chain" in said
    last = SEARCHED + RESCORED + 1
    status, _ = lissom("run", "chain", until=lambda: small.results(folder) >= last, sends=signal.SIGKILL, where=tmp_path)
    assert status == -signal.SIGKILL and not (folder / "lissom.json").exists()
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["run", "chain", "-q"])
    assert ended.exit_code == 0, ended.output
    same(folder, finished)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Evaluator, "score", interrupted)
    (tmp_path / "r.yaml").write_text(small.text())
    ended = CliRunner().invoke(app, ["run", "r.yaml", "--out", "my run", "--trust-remote-code", "-q"])
    assert ended.exit_code == 130 and ended.stdout == ""
    assert ended.stderr.endswith("Go on with: lissom run 'my run' --trust-remote-code\n")
