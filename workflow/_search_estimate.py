"""What a search would take: images, denoiser calls, and seconds by timing one batch on this machine."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

from ..core.candidate import Seeds
from ..core.stages import SearchStage
from . import _opening
from ._plans import check_objectives, plans_of
from ._screen import SCREENED
from ._subject import Subject
from .context import Context


def estimate(stage: SearchStage, ref: str, context: Context) -> dict[str, Any]:
    """At most, without shared prefixes."""
    chunk, evaluate = context.options.chunk, context.recipe.evaluate
    subject = Subject.load(ref, context, stage.scheduler)
    check_objectives(stage, context, subject.conditions)
    if subject.reference != "teacher":
        with tempfile.TemporaryDirectory() as scratch:
            subject.evaluator("report", Path(scratch))  # what cannot be scored is refused here too
    plans = plans_of(subject, stage)
    with tempfile.TemporaryDirectory() as scratch:
        _opening.warm(stage, context, plans.space, Path(scratch))  # refuses what is no finished search
    fixed = len(plans.fixed)
    work = [  # (evaluations, images each)
        (fixed, stage.samples),
        *_candidates(stage),
        (stage.rescore + 1, stage.rescore_samples),
        (
            stage.rescore + 1 + len(stage.space) + fixed,
            evaluate.samples,
        ),  # what can be picked, the winner's parts, the fixed schedules
    ]
    images = sum(count * n for count, n in work)
    batches = sum(count * math.ceil(n / chunk) for count, n in work)
    plan = next(iter(plans.fixed.values()))
    few = Seeds(role="calibrate", base=0, count=chunk)
    list(subject.sampler.images(plan, few))  # warm up
    before, began = subject.sampler.calls, time.monotonic()
    for batch in subject.sampler.images(plan, few.model_copy(update={"start": chunk})):
        if batch.pixels is not None:
            subject.features.extract(batch.pixels)
    seconds, calls = time.monotonic() - began, subject.sampler.calls - before
    if subject.reference == "teacher":
        teacher = 2 * math.ceil(evaluate.samples / chunk)
        images += 2 * evaluate.samples
        batches += teacher * evaluate.teacher_steps // stage.steps
    return {
        "stage": f"search: {stage.method}",
        "model": subject.model.ref,
        "steps": stage.steps,
        "trials": stage.trials,
        "skippable_layers": len(plans.space.layers),
        "cut_sites": len(plans.space.sites),
        "images": images,
        "denoiser_calls": batches * calls,
        "seconds": round(batches * seconds),
    }


def _candidates(stage: SearchStage) -> list[tuple[int, int]]:
    """(evaluations, images each) of the candidates: screened, and rung by rung, where the stage says so."""
    left, work = float(stage.trials), []
    if stage.screen is not None:
        work.append((stage.trials, SCREENED))
        left *= stage.screen
    rungs = stage.fidelity or (stage.samples,)
    for n, following in zip(rungs, (*rungs[1:], rungs[-1]), strict=True):
        work.append((math.ceil(left), n))
        left *= n / following
    return work


def say(found: dict[str, Any]) -> str:
    """The estimate for people."""
    cuts = f", {found['cut_sites']} places to cut" if found["cut_sites"] else ""
    return (
        f"{found['stage']} on {found['model']}, {found['steps']} steps, {found['trials']} candidates, "
        f"{found['skippable_layers']} layers that a step may leave out{cuts}: at most {found['images']:,} images and {found['denoiser_calls']:,} "
        f"denoiser calls, without shared prefixes about {found['seconds'] / 60:.1f} minutes here"
    )
