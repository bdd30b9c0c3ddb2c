"""What `lissom search`, `lissom prune` and `lissom run` share: run a recipe's text, or say what it would cost, and print the outcome."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

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
    """Run; afterwards the verdict stands on stdout, or with as_json the last stage's report.json.

    A recipe with gates ends with their verdict's exit code.
    """
    from ..core import processes
    from ..core.recipe import parse
    from ..workflow import describe
    from ..workflow._gates import FOLDER as GATES
    from ..workflow._gates import judge
    from ..workflow.compare import announce, headline
    from ..workflow.context import Context
    from ..workflow.distill import follow
    from ..workflow.run import run

    recipe = parse(text, where)
    if processes.rank():  # of several that train together the first says what there is to say
        if not dry_run:
            follow(Context(recipe, base, machine))
            processes.end()
        return
    with watch(quiet) as progress:
        context = Context(recipe, base, machine, progress)
        if dry_run:
            estimates = describe.estimate(recipe, context)
            print(json.dumps(estimates, indent=2) if as_json else describe.say(estimates))
            return
        result = run(recipe, text, folder, context, resume=resume, single=single)
        verdict = judge(recipe, result, folder, context) if recipe.gates else None
    if processes.count() > 1:
        processes.end()
    last = Path(result.ref)
    if as_json:
        print((last / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print((last / "report.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        print(f"report: {last / 'report.html'}")
    if verdict is not None:
        said = [
            f"gates: {headline(verdict)}",
            f"report: {folder / GATES / 'report' / 'report.html'}",
            *announce(verdict),
        ]
        print("\n".join(said), file=sys.stderr if as_json else sys.stdout)
        raise typer.Exit(verdict.exit_code)
