"""Builds that were killed, interrupted or shared out among processes end where an undisturbed one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate import _features, _workers
from lissom.evaluate._statistics import Statistics
from lissom.tests.evaluate.judge import Means
from lissom.tests.evaluate.test_images import fill
from lissom.tests.workflow import slow
from lissom.tests.workflow.builds import Notes, alike, built, pictures

# Runs `build` in a process of its own, with the extractor that takes its time.
SCRIPT = """
import sys
from pathlib import Path
from lissom.evaluate import _features
from lissom.tests.workflow import slow
from lissom.workflow.stats import Build, build
if __name__ == "__main__":
    _features.load = slow.load
    sources = (Path(sys.argv[1]),)
    build(Build(sources, Path(sys.argv[2]), "slow", workers=int(sys.argv[3]), resume=True, device="cpu", every=10))
"""


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "load", slow.load)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


def killed(folder: Path, out: Path, workers: int) -> None:
    """Begin or go on with a build, and kill -9 it (and it alone) soon after it has left something new."""
    before = {p.name: p.stat().st_mtime_ns for p in out.parent.glob(f"{out.name}.partial*")}
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script, folder, out, str(workers)])
    try:
        for _ in range(600):
            now = {p.name: p.stat().st_mtime_ns for p in out.parent.glob(f"{out.name}.partial*")}
            if len(now) == workers and all(now[name] != before.get(name) for name in now):
                break
            assert process.poll() is None, "ended by itself"
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        others = [int(pid) for pid in children.read_text().split()] if children.is_file() else []
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    for _ in range(200):  # workers end with their parent
        if not any(Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text() for pid in others):
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker outlived its parent")


def test_a_killed_build_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed" / "s.safetensors"
    out.parent.mkdir()
    for _ in range(2):
        killed(folder, out, 1)
    with pytest.raises(UserError, match=r"s.safetensors.partial: an unfinished build of s.safetensors. Go on with --resume"):
        built(out, folder)
    notes = Notes()
    made = built(out, folder, resume=True, progress=notes)
    built(tmp_path / "whole.safetensors", folder)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not made["finished_already"] and made["skipped"] == ["003-torn.png", "041-torn.png"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["s.safetensors", "script.py"]
    assert built(out, folder, resume=True)["finished_already"]


def test_killed_workers_go_on_and_equal_one_build(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed" / "s.safetensors"
    out.parent.mkdir()
    killed(folder, out, 2)
    for workers, says in ((1, "with --workers 2"), (3, "with --workers 2")):
        with pytest.raises(UserError, match=f"s.safetensors.partial-1-of-2: an unfinished build {says}. Go on with as many"):
            built(out, folder, workers=workers, resume=True)
    notes = Notes()
    built(out, folder, workers=2, resume=True, progress=notes)
    built(tmp_path / "whole.safetensors", folder)
    found, whole = Statistics.load(out), Statistics.load(tmp_path / "whole.safetensors")
    found.describe(skipped=tuple(sorted(found.provenance.skipped)))
    assert alike(found, whole, 1e-6) and found.build == whole.build
    assert sorted(p.name for p in out.parent.iterdir()) == ["s.safetensors", "script.py"]
    assert built(out, folder, workers=3, resume=True)["finished_already"]  # how many made it does not matter


@pytest.mark.parametrize(
    ("load", "error", "says"),
    [
        (slow.absent, UserError, "no such features here"),
        (slow.broken, RuntimeError, "ZeroDivisionError in a worker: Traceback"),
        (slow.deadly, UserError, "worker 1 of 1 ended with code 7 before its work was done .* Go on with --resume"),
    ],
    ids=["absent", "broken", "deadly"],
)
def test_what_becomes_of_a_worker_is_said(folder: Path, tmp_path: Path, load: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        _workers.run(_workers.Job((folder,), "means", load=load), [tmp_path / "a"], "cpu", lambda files, fresh: None)
    assert not (tmp_path / "a").exists()


def test_workers_share_out_the_graphics_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _workers.devices("cpu", 3) == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    for device in ("auto", "cuda"):
        assert _workers.devices(device, 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert _workers.devices("cuda:1", 2) == ["cuda:1"] * 2 and _workers.devices("auto") == ["cuda"]
    assert _workers.Job((), "x", shard=(2, 3)).part(2, 4).shard == (5, 12)


def interrupted(folder: Path, out: Path, **settings: Any) -> None:
    """A build that stopped in its middle."""

    class Stops(Means):
        left = 6

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_features, "load", lambda name, device="cpu": Stops())
        built(out, folder, every=10, **settings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("touch", r"other images \(files were added, removed or changed\)"),
        ("add", r"other images \(files were added, removed or changed\)"),
        ("features", "other features"),
        ({"keep": 7}, "other --keep-features; then 10000, now 7"),
        ({"shard": (1, 2)}, "other --shard or --workers; then 1/1, now 1/2"),
        ({"limit": 9}, "other --limit; then None, now 9"),
    ],
    ids=str,
)
def test_a_build_goes_on_only_as_it_was_begun(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, says: str
) -> None:
    out = tmp_path / "s.safetensors"
    interrupted(folder, out)
    partial = tmp_path / "s.safetensors.partial"
    state, settings = partial.read_bytes(), change if isinstance(change, dict) else {}
    if change == "touch":
        os.utime(folder / "010.png", ns=(1, 1))
    elif change == "add":
        (folder / "new.png").write_bytes((folder / "010.png").read_bytes())
    elif change == "features":
        monkeypatch.setattr(Means, "hash", "0" * 64)
    with pytest.raises(UserError, match=f"s.safetensors.partial: was begun with {says}. Go on as it was begun, or remove it"):
        built(out, folder, resume=True, **settings)
    assert partial.read_bytes() == state and not out.exists()


def test_a_finished_build_is_not_taken_for_another(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    built(out, folder)
    content = out.read_bytes()
    for settings, says in (({"keep": 5}, "--keep-features; then 10000, now 5"), ({"limit": 9}, "--limit; then None, now 9")):
        with pytest.raises(UserError, match=f"s.safetensors: was made with other {says}. Name another --out"):
            built(out, folder, resume=True, **settings)
    (folder / "new.png").write_bytes((folder / "010.png").read_bytes())
    with pytest.raises(UserError, match=r"s.safetensors: was made with other images \(files were added"):
        built(out, folder, resume=True)
    assert out.read_bytes() == content


def test_progress_counts_what_was_done_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.workflow.stats.BLOCK", 8)
    folder, notes = fill(tmp_path / "images", n=45), Notes()
    interrupted(folder, tmp_path / "s.safetensors")
    built(tmp_path / "s.safetensors", folder, resume=True, progress=notes)
    assert notes.steps == [False] * 3 + [True] * 3 and notes.total == 6  # 30 of 45 were kept
