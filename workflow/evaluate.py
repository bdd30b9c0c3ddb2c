"""Score one model, with a plan or with its stock schedule; make a sheet of samples."""

import json
import math
import time
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.candidate import SamplingPlan, Seeds
from ..core.files import disk_errors, write_text
from ..core.recipe import Recipe
from ._subject import Subject
from .context import Context


def evaluate(ref: str, plan: SamplingPlan | None, steps: int | None, context: Context, cache: Path) -> dict[str, Any]:
    """Measurements on the report's seeds and reference, as a JSON-ready report.

    plan: to follow; steps: of the stock schedule where there is none (None: the pipeline's default).
    """
    subject, plan = _ready(ref, plan, steps, context)
    evaluator = subject.evaluator("report", cache)
    seeds = Seeds(role="report", base=context.recipe.seed, count=context.recipe.evaluate.samples)
    context.progress.say(f"{seeds.count} images of {subject.model.ref}, {described(plan, steps)}")
    with subject.asking():
        score = evaluator.score(plan, seeds, steps=steps, replicates=True)
    return {
        "schema_version": 1,
        "kind": "evaluation",
        "lissom": __version__,
        "model": subject.model.ref,
        "model_hash": subject.model.fingerprint,
        "pipeline": type(subject.model.pipe).__name__,
        "plan": plan.plain() if plan else None,
        "steps": len(plan.steps) if plan else steps,
        "measurements": [m.model_dump(mode="json", exclude_defaults=True) | {"label": m.label} for m in score.measurements],
        "denoiser_calls": score.calls,
        "seconds": round(score.seconds, 2),
    }


def table(report: dict[str, Any]) -> str:
    """The evaluation for people: each metric with its 95 % interval."""
    from ..core.measurement import Measurement

    lines = []
    for raw in report["measurements"]:
        m = Measurement.model_validate({k: v for k, v in raw.items() if k != "label"})
        interval = m.interval()
        spread = f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
        lines.append(f"{m.label:24} {m.value:.4g}{spread}  {m.direction} is better, {m.n} images")
    return "\n".join(lines)


def sample(ref: str, plan: SamplingPlan | None, steps: int | None, images: int, context: Context, out: Path) -> Path:
    """Write a contact sheet of `images` samples."""
    import numpy as np

    from ..report.sheets import sheet

    subject, plan = _ready(ref, plan, steps, context)
    seeds = Seeds(role="report", base=context.recipe.seed, count=images)
    context.progress.say(f"{images} images of {subject.model.ref}, {described(plan, steps)}")
    with subject.asking():
        made = [b.pixels.numpy() for b in subject.sampler.images(plan, seeds, steps=steps) if b.pixels is not None]
    with disk_errors(out):
        sheet(np.concatenate(made), out)
    return out


def estimate(
    ref: str, plan: SamplingPlan | None, steps: int | None, images: int, context: Context, *, scored: bool
) -> dict[str, Any]:
    """What making (and scoring) images would take: denoiser calls, and seconds by timing runs of one and of two steps here."""
    subject, plan = _ready(ref, plan, steps, context)
    size = min(images, context.options.chunk)
    few = Seeds(role="calibrate", base=0, count=size)

    def timed(count: int) -> tuple[int, float]:
        calls, began = subject.sampler.calls, time.monotonic()
        for batch in subject.sampler.images(None, few, steps=count):
            if scored and batch.pixels is not None:
                subject.features.extract(batch.pixels)
        return subject.sampler.calls - calls, time.monotonic() - began

    with subject.asking():
        timed(1)  # warm up
        (calls, seconds), (more_calls, more_seconds) = timed(1), timed(2)
    wanted = [(math.ceil(images / size), len(plan.steps) if plan else steps or subject.default_steps)]
    if scored and subject.reference == "teacher":
        wanted.append((math.ceil(context.recipe.evaluate.samples / size), context.recipe.evaluate.teacher_steps))
    return {
        "model": subject.model.ref,
        "images": images,
        "with": described(plan, steps),
        "denoiser_calls": sum(n * (calls + (more_calls - calls) * (count - 1)) for n, count in wanted),
        "seconds": round(sum(n * (seconds + max(more_seconds - seconds, 0) * (count - 1)) for n, count in wanted), 1),
    }


def say(estimated: dict[str, Any]) -> str:
    """The estimate for people."""
    return (
        f"{estimated['images']:,} images of {estimated['model']} with {estimated['with']}: nothing was run. "
        f"{estimated['denoiser_calls']:,} denoiser calls, about {estimated['seconds'] / 60:.1f} minutes here"
    )


def _ready(ref: str, plan: SamplingPlan | None, steps: int | None, context: Context) -> tuple[Subject, SamplingPlan | None]:
    """The model and the plan to follow: the given one, else an artifact's own, else none. Refused before any image is made."""
    from ..core import driving

    subject = Subject.load(ref, context)
    plan = plan or (subject.model.plan if steps is None else None)
    if plan is not None:
        driving.check(subject.model.pipe, plan)
    elif steps is not None:
        subject.check_steps(steps)
    return subject, plan


def described(plan: SamplingPlan | None, steps: int | None) -> str:
    if plan is None:
        return f"stock schedule of {steps} steps" if steps else "the pipeline's default schedule"
    skips = sum(len(s.skip) for s in plan.steps)
    times = ", ".join(f"{t:g}" for t in plan.timesteps)
    return f"a plan of {len(plan.steps)} steps ({times}){f', {skips} layers skipped' if skips else ''}"


def lone(ref: str, **fields: Any) -> Recipe:
    """A recipe for a command that has no stages of its own: carries seed, prompts and evaluation settings."""
    from ..core.recipe import build

    evaluate = {k: v for k, v in fields.pop("evaluate", {}).items() if v is not None}
    data = {"lissom": 1, "model": ref, "evaluate": evaluate, "stages": [{"search": "random_search"}], **fields}
    return build({k: v for k, v in data.items() if v is not None}, "lissom")


def write(report: dict[str, Any], out: Path) -> None:
    write_text(out, json.dumps(report, indent=2) + "\n")
