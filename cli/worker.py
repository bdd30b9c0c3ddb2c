"""`lissom worker`: take waiting trials of a running search, on any machine."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import _options as o
from ._progress import watch


def worker(
    ctx: typer.Context,
    storage: Annotated[
        str,
        typer.Option("--storage", metavar="URL|FILE", envvar=o.STORAGE, help="The search's database, or its journal file."),
    ],
    study: Annotated[
        str | None,
        typer.Option("--study", metavar="NAME", help="The search, as its run names it [default: the one that is running]."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Where the search's model is on this machine, if elsewhere.")
    ] = None,
    models: o.Models = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="DIR", help="Where the recipe's relative paths start on this machine, if elsewhere."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Of the search's kind, e.g. cuda:1 [default: the search's kind].")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="The search's; another one is refused.")] = None,
    offload: o.Offload = "none",
    memo: o.Memo = 512,
    memo_dir: o.MemoDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    lease: Annotated[
        str, typer.Option("--lease", metavar="60s", help="Without a sign of life for so long, others take its candidate over.")
    ] = "60s",
    idle: Annotated[
        str | None,
        typer.Option(
            "--idle", metavar="10m", help="End after this time without anything to do [10m]; given, wait for a search to begin."
        ),
    ] = None,
    max_time: o.MaxTime = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Take waiting candidates of a running search. Any number of workers may, on any machine that reaches its storage.

    Example: lissom worker --storage runs/autodiffusion-fashion-4-steps/trials.journal
    """
    from ..core.storages import bare, named
    from ..workflow.context import Options
    from ..workflow.worker import Terms, work

    where = named(storage)
    words = ["lissom", "worker", "--storage", bare(where), *(["--study", study] if study else [])]
    o.remember(ctx, verbose, shlex.join(words))
    lasts = o.seconds(lease, "--lease") or 0.0
    if lasts < 1:
        raise typer.BadParameter(f"{lease!r}: must be at least 1s.", param_hint="--lease")
    options = Options(
        offload=offload,
        trust_remote_code=trust_remote_code,
        memo_mib=memo,
        memo_dir=str(memo_dir.resolve()) if memo_dir else None,
        max_time=o.seconds(max_time),
    )
    terms = Terms(options, device, dtype, model, base, lasts, o.seconds(idle, "--idle"), models=o.others(models) or {})
    with watch(quiet) as progress:
        outcome = work(where, study, terms, progress)
    print(json.dumps(asdict(outcome)) if json_ else outcome.said)
