"""`lissom search METHOD MODEL`: find a sampling plan, and cuts to go with it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as o
from ._method import given, helper, run_one, short_name


def search(
    ctx: typer.Context,
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD", help="A file in search/: autodiffusion, bayes, nsga2, cmaes, t_stitch, random_search."
        ),
    ],
    model: o.Model,
    steps: Annotated[int, typer.Option("--steps", help="K: solver steps of the plan.")] = 4,
    trials: Annotated[int, typer.Option("--trials", help="Candidates scored, baselines and re-scores excluded.")] = 120,
    samples: Annotated[int, typer.Option("--samples", help="Images per candidate.")] = 256,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective", help="What to improve: a metric, or a cost (macs, latency, params). Repeatable. [default: fid]"
        ),
    ] = None,
    metrics: o.Metrics = "fid,clip_score",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", metavar="macs=0.8", help="macs, latency or params at most, as a share of the uncut K-step run."
        ),
    ] = None,
    space: Annotated[
        str, typer.Option("--space", help="Comma-separated: timesteps, skips, reuse, models, cuts, slim, masks, depth.")
    ] = "timesteps,skips",
    models: o.Models = None,
    pick: Annotated[int | None, typer.Option("--pick", min=1, help="Which member of the front, or elite, is exported.")] = None,
    warm_start: Annotated[
        str | None, typer.Option("--warm-start", metavar="RUN", help="Open with the best plans of another search.")
    ] = None,
    learned: Annotated[
        list[str] | None,
        typer.Option("--learned", metavar="RUN", help="Run whose scores masks and depth in --space start from. Repeatable."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="A diffusers scheduler class instead of the model's own.")
    ] = None,
    reference: o.Reference = None,
    features: o.Features = None,
    report_samples: Annotated[int, typer.Option("--report-samples", help="Images behind each reported number.")] = 2048,
    seed: o.Seed = 0,
    prompts: o.Prompts = None,
    call: o.Call = None,
    out: o.Out = None,
    resume: o.Resume = False,
    set_: o.Set = None,
    dry_run: o.DryRun = False,
    json_: o.Json = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    offload: o.Offload = "none",
    chunk: o.Chunk = 64,
    memo: o.Memo = 512,
    memo_dir: o.MemoDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    max_time: o.MaxTime = None,
    storage: o.Storage = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    help_: Annotated[
        bool, typer.Option("--help", is_eager=True, callback=helper("search"), help="Show this, with METHOD its settings too.")
    ] = False,
) -> None:
    """Search a sampling plan: timesteps, per-step layer skips and cuts of the model that beat every fixed schedule.

    Example: lissom search autodiffusion zoo:fashion --steps 4
    """
    options: dict[str, Any] = {
        "search": method,
        "steps": steps,
        "trials": trials,
        "samples": samples,
        "objective": objective if objective is None or len(objective) > 1 else objective[0],
        "budget": o.shares(budget),
        "space": o.words(space),
        "learned": [str(Path(run).resolve()) for run in learned] if learned else None,
        "scheduler": scheduler,
        "pick": pick,
        "warm_start": str(Path(warm_start).resolve()) if warm_start else None,
    }
    run_one(
        ctx,
        "search",
        given(options, set_),
        name=f"{method.rpartition('.')[2]}-{short_name(model)}-{steps}-steps",
        model=model,
        seed=seed,
        prompts=prompts,
        call=call,
        evaluate={"reference": reference, "features": features, "metrics": o.words(metrics), "samples": report_samples},
        models=o.others(models),
        machine=o.options(device, dtype, offload, trust_remote_code, chunk, storage, max_time, memo, memo_dir),
        out=out,
        resume=resume,
        dry_run=dry_run,
        as_json=json_,
        quiet=quiet,
        verbose=verbose,
    )
