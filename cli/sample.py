"""`lissom sample MODEL`: look at what a model paints."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import _options as o
from .evaluate import Plan, Steps


def sample(
    ctx: typer.Context,
    model: o.Model,
    plan: Plan = None,
    steps: Steps = None,
    models: o.Models = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A text to paint. Repeatable.")] = None,
    images: Annotated[int | None, typer.Option("--images", min=1, help="How many [default: 32, or one per --prompt].")] = None,
    seed: o.Seed = 0,
    prompts: o.Prompts = None,
    call: o.Call = None,
    out: Annotated[Path, typer.Option("--out", help="PNG file.")] = Path("samples.png"),
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
    """Write a sheet of samples as PNG.

    Example: lissom sample zoo:fashion --plan runs/demo --prompt "a photo of an ankle boot"
    """
    import tempfile

    from ..core.artifact import models_of, read_plan
    from ..core.files import check_target
    from ..workflow import evaluate as work
    from ..workflow.context import Context
    from ._progress import watch

    o.remember(ctx, verbose)
    check_target(out)
    if plan is not None and steps is not None:
        raise typer.BadParameter("give --plan or --steps, not both.", param_hint="--steps")
    if prompt and prompts:
        raise typer.BadParameter("give --prompt or --prompts, not both.", param_hint="--prompt")
    followed = read_plan(plan) if plan else None
    count = images or (len(prompt) if prompt else 32)
    with watch(quiet) as progress, tempfile.TemporaryDirectory() as scratch:
        if prompt:
            prompts = Path(scratch) / "prompts.txt"
            prompts.write_text("\n".join(" ".join(p.split()) for p in prompt), encoding="utf-8")
        lent = o.others(models)
        recipe = work.lone(model, seed=seed, prompts=str(prompts) if prompts else None, call=o.pairs(call), models=lent)
        machine = o.options(device, dtype, offload, trust_remote_code, chunk)
        context = Context(recipe, Path.cwd(), machine, progress, others=models_of(plan))
        if dry_run:
            cost = work.estimate(model, followed, steps, count, context, scored=False)
            print(json.dumps(cost | {"file": str(out)}) if json_ else work.say(cost))
            return
        path = work.sample(model, followed, steps, count, context, out)
    print(json.dumps({"images": count, "file": str(path)}) if json_ else f"{count} images: {path}")
