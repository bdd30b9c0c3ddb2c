"""Commands, run in this process."""

from pathlib import Path
from typing import Any

from lissom.cli.app import app
from typer.testing import CliRunner, Result

SMALL = ("--steps", "2", "--trials", "3", "--samples", "4", "--report-samples", "4", "--metrics", "fid,accuracy")
TINY = (*SMALL, "--set", "rescore=1", "--set", "rescore_samples=4", "--device", "cpu")


def lissom(*arguments: Any) -> Result:
    wide = {"NO_COLOR": "1", "TERMINAL_WIDTH": "200", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    return CliRunner(env=wide).invoke(app, [str(a) for a in arguments])


def refused(*arguments: Any, code: int = 2) -> str:
    """The one sentence (or one line per mistake) that a command is refused with."""
    ended = lissom(*arguments)
    assert ended.exit_code == code, ended.output
    assert ended.stdout == "" and "Traceback" not in ended.stderr and "internal error" not in ended.stderr
    return ended.stderr


def nothing_left(here: Path, *but: str) -> bool:
    return sorted(p.name for p in here.iterdir()) == sorted(but)
