"""`lissom search METHOD MODEL`: find a sampling plan."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import _options as o


class MethodCommand(TyperCommand):
    """A command whose --help also shows the settings of the METHOD that stands on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["lissom.words"] = [a for a in args if not a.startswith("-")]
        return super().parse_args(ctx, args)


def _help(ctx: typer.Context, asked: bool) -> None:
    if not asked:
        return
    print(ctx.get_help())
    from ..core import methods

    known = methods.names("search")
    words = ctx.meta["lissom.words"]
    if method := next((w for w in words if w in known), words[0] if words else None):
        _print_settings(method)
    raise typer.Exit()


def _print_settings(method: str) -> None:
    """The method's own settings, each with the comment that stands beside it in its file."""
    from ..core import methods

    module = methods.load("search", method)
    print(f"Settings of {method} (--set KEY=VALUE), {module.Config.paper}")
    comments = methods.comments(module)
    for name, field in module.Config.model_fields.items():
        print(f"  {f'{name} = {field.default!r}':20}  {comments.get(name, '')}")


def search(
    ctx: typer.Context,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A file in search/: autodiffusion, random_search.")],
    model: o.Model,
    steps: Annotated[int, typer.Option("--steps", help="K: solver steps of the plan.")] = 4,
    trials: Annotated[int, typer.Option("--trials", help="Candidates scored, baselines and re-scores excluded.")] = 120,
    samples: Annotated[int, typer.Option("--samples", help="Images per candidate.")] = 256,
    objective: Annotated[str, typer.Option("--objective", help="The metric to improve.")] = "fid",
    metrics: o.Metrics = "fid,clip_score",
    budget: Annotated[
        list[str] | None, typer.Option("--budget", metavar="macs=0.8", help="Cost at most, as a share of the uncut K-step run.")
    ] = None,
    space: Annotated[str, typer.Option("--space", help="Comma-separated: timesteps, skips.")] = "timesteps,skips",
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
    trust_remote_code: o.TrustRemoteCode = False,
    max_time: o.MaxTime = None,
    storage: o.Storage = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    help_: Annotated[
        bool, typer.Option("--help", is_eager=True, callback=_help, help="Show this, with METHOD its settings too.")
    ] = False,
) -> None:
    """Search a sampling plan: timesteps and per-step layer skips that beat every fixed schedule.

    Example: lissom search autodiffusion zoo:fashion --steps 4
    """
    from ..core.errors import UserError
    from ..core.recipe import build, settings
    from ..workflow.describe import recipe_text
    from ._run import execute

    stage: dict[str, Any] = {
        "search": method,
        "steps": steps,
        "trials": trials,
        "samples": samples,
        "objective": objective,
        "budget": o.shares(budget),
        "space": o.words(space),
        "scheduler": scheduler,
        **o.pairs(set_),
    }
    known = {k: v for k, v in stage.items() if v not in (None, {}, [])}
    settings("search", method, {})  # an unknown method is named before anything else
    evaluate = {"reference": reference, "features": features, "metrics": o.words(metrics), "samples": report_samples}
    data: dict[str, Any] = {
        "lissom": 1,
        "name": f"{method.rpartition('.')[2]}-{Path(model.replace('zoo:', '')).name.partition('@')[0]}-{steps}-steps",
        "model": model,
        "seed": seed,
        "prompts": str(prompts.resolve()) if prompts else None,
        "call": o.pairs(call),
        "evaluate": {k: v for k, v in evaluate.items() if v is not None},
        "stages": [known],
    }
    data = {k: v for k, v in data.items() if v not in (None, {})}
    try:
        build(data, "options")  # every mistake in the options, before the model is touched
    except UserError as e:
        raise UserError(str(e).replace("stages.0.", "")) from e
    text = recipe_text(data)
    machine = o.options(device, dtype, offload, trust_remote_code, chunk, storage, max_time, memo)
    folder = out or o.free_folder(data["name"])
    o.remember(ctx, verbose, None if dry_run else o.go_on(folder, trust_remote_code))
    execute(
        text,
        "options",
        Path.cwd(),
        folder,
        machine,
        resume=resume,
        dry_run=dry_run,
        as_json=json_,
        quiet=quiet,
        single=True,
    )
