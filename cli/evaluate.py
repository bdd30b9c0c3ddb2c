"""`lissom evaluate MODEL`: score a model."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import _options as o

Plan = Annotated[Path | None, typer.Option("--plan", help="A plan.json, or the folder of a finished search.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the stock schedule where there is no plan.")]
References = Annotated[
    list[str] | None,
    typer.Option(
        "--reference",
        metavar="[METRIC=]SRC",
        help="Image folder, zip, statistics file, zoo:NAME or teacher; METRIC=SRC for one metric. Repeatable.",
    ),
]
Extractors = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        metavar="[METRIC=]NAME",
        help="inception, clip:ViT-B-32/openai, dinov2:vitl14, zoo:judge, a file, …; METRIC=NAME for one metric. Repeatable.",
    ),
]


def evaluate(
    ctx: typer.Context,
    model: o.Model,
    plan: Plan = None,
    steps: Steps = None,
    models: o.Models = None,
    metrics: o.Metrics = "fid,clip_score",
    samples: Annotated[int, typer.Option("--samples", min=4, help="Images.")] = 1024,
    reference: References = None,
    features: Extractors = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Uncut model for fidelity [default: what MODEL was pruned from]."),
    ] = None,
    power: Annotated[
        list[str] | None,
        typer.Option("--power", metavar="METRIC=DIFFERENCE", help="Say how many images show such a difference. Repeatable."),
    ] = None,
    seed: o.Seed = 0,
    prompts: o.Prompts = None,
    call: o.Call = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METRIC.KEY=VALUE", help="Setting of a metric, e.g. latency.batches=[1,8]. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Result as FILE.json; pictures and unfinished work go to FILE.images/.")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=0, help="Images kept as PNG beside --out.")] = 64,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the evaluation in --out; starts where there is none.")
    ] = False,
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

    Example: lissom evaluate zoo:fashion --steps 4 --samples 1024 --metrics fid,clip_score,accuracy --out base.json
    """
    import json
    import tempfile

    from ..core.artifact import models_of, read_plan
    from ..core.files import check_target
    from ..workflow import evaluate as work
    from ..workflow._evaluation import Asked, folder_of
    from ..workflow._evaluation import evaluate as measure
    from ..workflow.context import Context
    from ._progress import watch

    again = shlex.join(["lissom", "evaluate", *sys.argv[2:]]) if sys.argv[1:2] == ["evaluate"] else ""
    o.remember(ctx, verbose, f"{again}{'' if resume else ' --resume'}" if again and out is not None and not dry_run else None)
    if out is not None:
        check_target(out)
        if out.suffix != ".json":
            raise typer.BadParameter(f"{out}: name a .json file.", param_hint="--out")
    if plan is not None and steps is not None:
        raise typer.BadParameter("give --plan or --steps, not both.", param_hint="--steps")
    settings = {
        "reference": o.choices(reference),
        "features": o.choices(features),
        "metrics": o.words(metrics),
        "samples": samples,
    }
    lent = o.others(models)
    recipe = work.lone(
        model, seed=seed, prompts=str(prompts) if prompts else None, call=o.pairs(call), evaluate=settings, models=lent
    )
    followed = read_plan(plan) if plan else None
    wanted = o.numbers(power, "--power")
    machine = o.options(device, dtype, offload, trust_remote_code, chunk)
    with watch(quiet) as progress, tempfile.TemporaryDirectory() as scratch:
        context = Context(recipe, Path.cwd(), machine, progress, others=models_of(plan))
        if dry_run:
            cost = work.estimate(model, followed, steps, samples, context, scored=True)
            print(json.dumps(cost | {"metrics": recipe.evaluate.metrics}) if json_ else work.say(cost))
            return
        asked = Asked(
            ref=model,
            plan=followed,
            steps=steps,
            settings=o.pairs(set_),
            base=base,
            power=wanted,
            out=out,
            pictures=pictures,
            resume=resume,
            command=again,
        )
        found = measure(asked, context, folder_of(out) if out is not None else Path(scratch))
    print(found.text() if json_ else work.table(found), end="" if json_ else "\n")
