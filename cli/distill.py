"""`lissom distill PRESET STUDENT`: quality back for a smaller model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as o
from ._method import given, helper, run_one, short_name


def distill(
    ctx: typer.Context,
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="A paper's sum of losses: bk, laptop, koala, tinyfusion.")],
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="The smaller model: the folder of a prune run, or any other.")
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="What it learns from; `previous` for the model before its last pruning [default: what it was pruned from at first].",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Updates of the weights.")] = 500,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples behind each update, over all processes.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of AdamW.")] = 5e-5,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SRC", help="Image folder or zip, or zoo:fashion [default: the teacher's own trajectories]."
        ),
    ] = None,
    check_every: Annotated[
        int, typer.Option("--check-every", min=0, help="Iterations between looks at the averaged weights; 0 for none.")
    ] = 0,
    patience: Annotated[int, typer.Option("--patience", min=0, help="Looks without improvement that end the training.")] = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Solver steps of the images that are scored [default: the pipeline's].")
    ] = None,
    report_samples: Annotated[int, typer.Option("--report-samples", min=4, help="Images of teacher, before and after.")] = 1024,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Make and score images before and after.")] = True,
    save_dtype: Annotated[
        str | None,
        typer.Option("--save-dtype", help="Of the saved weights: float32, float16, bfloat16 [default: the student's]."),
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
        typer.Option("--help", is_eager=True, callback=helper("distill"), help="Show this, with PRESET its losses too."),
    ] = False,
) -> None:
    """Teach a smaller model what the larger one knows. The result, OUT/model, is saved and verified like a pruned model.

    Example: lissom distill laptop runs/pruned --iterations 500
    """
    from dataclasses import replace

    options: dict[str, Any] = {
        "distill": preset,
        "teacher": str(Path(teacher).expanduser().resolve()) if teacher and Path(teacher).expanduser().is_dir() else teacher,
        "iterations": iterations,
        "batch": None if batch == 64 else batch,
        "learning_rate": None if learning_rate == 5e-5 else learning_rate,
        "data": str(Path(data).expanduser().resolve()) if data and Path(data).expanduser().exists() else data,
        "check_every": check_every or None,
        "patience": patience or None,
        "steps": steps,
        "measure": None if measure else False,
        "save_dtype": save_dtype,
        "variant": variant,
    }
    machine = replace(o.options(device, dtype, offload, trust_remote_code, chunk), push_to_hub=push_to_hub)
    run_one(
        ctx,
        "distill",
        given(options, set_),
        name=f"{preset}-{short_name(student)}",
        model=student,
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
