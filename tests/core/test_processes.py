"""How a process of several ends: nothing of its groups is left for the interpreter, which their threads would abort."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lissom.cli import _run
from lissom.core import processes
from lissom.core.artifact import Artifact
from lissom.core.errors import UserError
from lissom.workflow import distill
from lissom.workflow import run as workflow_run
from lissom.workflow.context import Options

PROGRAM = """
import os, sys, weakref
import torch
from lissom.core import processes

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
torch.distributed.init_process_group("gloo")

class Spread:  # what holds a group and itself, as weights that are spread do
    def __init__(self):
        self.me, self.group = self, torch.distributed.group.WORLD

left = weakref.ref(Spread())
assert left() is not None
processes.end()
assert left() is None and not torch.distributed.is_initialized()
processes.end()  # and again, where nothing is left
print("ended")
"""


def test_groups_end_with_what_holds_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "ended" and done.returncode == 0, done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_of_several_ends_them_when_its_work_is_done(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it fails: on graphics cards it would then wait for the others."""
    ended, fails = list[str](), False

    def works(*args: Any, **kwargs: Any) -> Any:
        if fails:
            raise UserError("made up")
        return Artifact(ref=".")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(workflow_run, "run", works)
    monkeypatch.setattr(distill, "follow", works)
    monkeypatch.setattr(processes, "end", lambda: ended.append(rank))
    text = '{"lissom": 1, "model": "zoo:fashion", "stages": [{"distill": "bk"}]}'
    given = ("r", Path(), Path("run"), Options(device="cpu"))
    said = {"resume": False, "dry_run": False, "as_json": True, "quiet": True, "single": True}
    for fails in (True, False):
        with pytest.raises(UserError, match="made up") if fails else suppress(FileNotFoundError):  # there is no report to print
            _run.execute(text, *given, **said)
        assert ended == [rank] * (not fails)
