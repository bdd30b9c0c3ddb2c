"""`lissom report RUN_DIR`: write a run's reports again from its stored trials."""

from pathlib import Path
from typing import Annotated

import typer

from . import _options as o


def report(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
    json_: o.Json = False,
    storage: o.Storage = None,
    verbose: o.Verbose = False,
) -> None:
    """Rebuild report.json, report.md and report.html. Nothing is measured."""
    from ..workflow.run import rebuild

    o.remember(ctx, verbose)
    written = rebuild(folder, storage)
    if json_:  # as `lissom run --json`: what the last stage made
        print((written[-1].parent / "report.json").read_text(encoding="utf-8"), end="")
        return
    for page in written:
        print(f"report: {page}")
