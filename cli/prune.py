"""`lissom prune METHOD MODEL`: a smaller model that opens in diffusers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as o
from ._method import given, helper, run_one, short_name

METHODS = (
    "A file in prune/: laptop, ld_pruner, slim_unet, magnitude, random_cuts cut layers; "
    "tinyfusion learns which blocks stay, hand_map, random_depth, min_loss, median_loss, shortgpt, sensitivity choose them; "
    "masks learns which heads and units stay, diff_pruning, magnitude_widths, random_widths choose them."
)


def prune(
    ctx: typer.Context,
    method: Annotated[str, typer.Argument(metavar="METHOD", help=METHODS)],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="As everywhere, or, with --dry-run, the structure of a well-known model: config:sd15, config:sdxl, …",
        ),
    ],
    keep: Annotated[
        float | None,
        typer.Option("--keep", metavar="R", help="Share of all denoiser parameters that is left at most [default: 0.7]."),
    ] = None,
    of: Annotated[str, typer.Option("--of", help="What R is a share of: params, macs, latency.")] = "params",
    calibration: Annotated[int, typer.Option("--calibration", min=1, help="Images that losses are measured on.")] = 64,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SRC", help="Image folder or zip for them [default: the model's own trajectories]."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Only layers such as 'up_blocks.*' may go. Repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="These layers may not go. Repeatable.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--require-plain-load", help="Only cuts that a stock config expresses: no trust_remote_code, ever.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Solver steps of the images before and after [default: the pipeline's]."),
    ] = None,
    report_samples: Annotated[int, typer.Option("--report-samples", min=4, help="Images before and after.")] = 1024,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Make and score images before and after.")] = True,
    save_dtype: Annotated[
        str | None,
        typer.Option("--save-dtype", help="Of the saved weights: float32, float16, bfloat16 [default: the parent's]."),
    ] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="In the names of the weight files, e.g. fp16.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the finished model, as a private repository.")
    ] = None,
    metrics: o.Metrics = "fid,clip_score",
    reference: o.Reference = None,
    features: o.Features = None,
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
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    help_: Annotated[
        bool,
        typer.Option("--help", is_eager=True, callback=helper("prune"), help="Show this, with METHOD its settings too."),
    ] = False,
) -> None:
    """Cut layers out of a model. The result, OUT/model, is a diffusers folder, opened and compared in a fresh process.

    Example: lissom prune laptop zoo:fashion --keep 0.7 --steps 10
    """
    from dataclasses import replace

    options: dict[str, Any] = {
        "prune": method,
        "keep": keep,
        "of": None if of == "params" else of,
        "calibration": None if calibration == 64 else calibration,
        "data": str(Path(data).expanduser().resolve()) if data and Path(data).expanduser().exists() else data,
        "include": include,
        "exclude": exclude,
        "require_plain_load": plain or None,
        "steps": steps,
        "measure": None if measure else False,
        "save_dtype": save_dtype,
        "variant": variant,
    }
    machine = replace(o.options(device, dtype, offload, trust_remote_code, chunk), push_to_hub=push_to_hub)
    share = f"-keep-{keep:g}" if keep is not None else ""
    run_one(
        ctx,
        "prune",
        given(options, set_),
        name=f"{method.rpartition('.')[2]}-{short_name(model)}{share}",
        model=model,
        seed=seed,
        prompts=prompts,
        call=call,
        evaluate={"reference": reference, "features": features, "metrics": o.words(metrics), "samples": report_samples},
        machine=machine,
        out=out,
        resume=resume,
        dry_run=dry_run,
        as_json=json_,
        quiet=quiet,
        verbose=verbose,
    )
