"""`lissom compare BASE.json CAND.json`: a verdict, with an exit code."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import _options as o


def compare(
    ctx: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="[BASE.json] CAND.json", help="Results of `lissom evaluate --out`; CAND alone with --base-git."),
    ],
    gates: Annotated[
        Path | None,
        typer.Option("--gates", metavar="FILE", help="YAML of limits, as under gates: in a recipe [default: zero tolerance]."),
    ] = None,
    base_git: Annotated[
        str | None, typer.Option("--base-git", metavar="REV:PATH", help="The baseline, from a revision of this repository.")
    ] = None,
    allow_inconclusive: Annotated[
        bool, typer.Option("--allow-inconclusive", help="Exit 0 where the images are too few to tell.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the reports [default: runs/compare].")] = None,
    json_: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """PASS, REGRESSION (exit 3), INCONCLUSIVE or INCOMPARABLE (exit 4): does the candidate keep the limits?

    Equal seeds are compared image by image, others with the wider intervals of independent sets.

    Example: lissom compare base.json candidate.json --gates gates.yaml --out report
    """
    from ..core.recipe import read_gates
    from ..workflow import compare as work
    from ..workflow._source import Source

    o.remember(ctx, verbose)
    if len(files) != (1 if base_git else 2):
        wanted = "the candidate alone, as the baseline comes from --base-git" if base_git else "the baseline and the candidate"
        raise typer.BadParameter(f"got {len(files)} files, give {wanted}.", param_hint="[BASE.json] CAND.json")
    base = Source.git(base_git) if base_git else Source(str(files[0]))
    candidate = Source(str(files[-1]))
    limits = read_gates(gates) if gates is not None else None
    folder = out or o.free_folder("compare")
    again = work.command_of(base, candidate, gates, allow_inconclusive, folder)
    report = work.compare(base, candidate, limits, str(gates), allow_inconclusive=allow_inconclusive, command=again)
    report = work.write(report, base, candidate, folder)
    lines = work.announce(report)
    if json_:
        print(report.model_dump_json(indent=2))
    else:
        print(work.say(report))
        print(f"report: {folder / 'report.html'}")
    for line in lines:  # GitHub reads them off either stream
        print(line, file=sys.stderr if json_ else sys.stdout)
    raise typer.Exit(report.exit_code)
