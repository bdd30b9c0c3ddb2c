"""`lissom evaluate MODEL`: score a model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import _options as o

Plan = Annotated[Path | None, typer.Option("--plan", help="A plan.json, or the folder of a finished search.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the stock schedule where there is no plan.")]


def evaluate(
    ctx: typer.Context,
    model: o.Model,
    plan: Plan = None,
    steps: Steps = None,
    metrics: o.Metrics = "fid,clip_score",
    samples: Annotated[int, typer.Option("--samples", min=4, help="Images.")] = 1024,
    reference: o.Reference = None,
    features: o.Features = None,
    seed: o.Seed = 0,
    prompts: o.Prompts = None,
    call: o.Call = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result to this JSON file.")] = None,
    dry_run: o.DryRun = False,
    json_: o.Json = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    offload: o.Offload = "none",
    chunk: o.Chunk = 64,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Score a model on unseen seeds, with 95 % intervals.

    Example: lissom evaluate zoo:fashion --steps 4 --samples 1024 --metrics fid,clip_score,accuracy
    """
    import tempfile

    from ..core.artifact import read_plan
    from ..core.files import check_target
    from ..workflow import evaluate as work
    from ..workflow.context import Context
    from ._progress import watch

    o.remember(ctx, verbose)
    if out is not None:
        check_target(out)
    if plan is not None and steps is not None:
        raise typer.BadParameter("give --plan or --steps, not both.", param_hint="--steps")
    settings = {"reference": reference, "features": features, "metrics": o.words(metrics), "samples": samples}
    recipe = work.lone(model, seed=seed, prompts=str(prompts) if prompts else None, call=o.pairs(call), evaluate=settings)
    followed = read_plan(plan) if plan else None
    machine = o.options(device, dtype, offload, trust_remote_code, chunk)
    with watch(quiet) as progress, tempfile.TemporaryDirectory() as scratch:
        context = Context(recipe, Path.cwd(), machine, progress)
        if dry_run:
            cost = work.estimate(model, followed, steps, samples, context, scored=True)
            print(json.dumps(cost | {"metrics": recipe.evaluate.metrics}) if json_ else work.say(cost))
            return
        result = work.evaluate(model, followed, steps, context, Path(scratch))
    if out is not None:
        work.write(result, out)
    print(json.dumps(result, indent=2) if json_ else work.table(result))
