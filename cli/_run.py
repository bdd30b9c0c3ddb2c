"""What `lissom search`, `lissom prune` and `lissom run` share: run a recipe's text, or say what it would cost, and print the outcome."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ._progress import watch

if TYPE_CHECKING:
    from ..workflow.context import Options


def execute(
    text: str,
    where: str,
    base: Path,
    folder: Path,
    machine: "Options",
    *,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    single: bool,
) -> None:
    """Run; afterwards the verdict stands on stdout, or with as_json the last stage's report.json."""
    from ..core.recipe import parse
    from ..workflow import describe
    from ..workflow.context import Context
    from ..workflow.run import run

    recipe = parse(text, where)
    with watch(quiet) as progress:
        context = Context(recipe, base, machine, progress)
        if dry_run:
            estimates = describe.estimate(recipe, context)
            print(json.dumps(estimates, indent=2) if as_json else describe.say(estimates))
            return
        result = run(recipe, text, folder, context, resume=resume, single=single)
    last = Path(result.ref)
    if as_json:
        print((last / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print((last / "report.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        print(f"report: {last / 'report.html'}")
