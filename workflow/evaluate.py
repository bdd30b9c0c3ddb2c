"""What `lissom evaluate` and `lissom sample` print, estimate and write."""

import math
import time
from pathlib import Path
from typing import Any

from ..core.candidate import SamplingPlan, Seeds
from ..core.files import disk_errors
from ..core.recipe import Recipe
from ..report.evaluation import Evaluation
from ._evaluation import metric_needs, ready
from ._identity import said
from .context import Context


def table(found: Evaluation) -> str:
    """The evaluation for people: each metric with its 95 % interval, then what was asked of their resolution."""
    from ..report._words import quoted

    width = max((len(m.label) for m in found.measurements), default=0) + 2
    lines = []
    for m in found.measurements:
        value = (
            f"{m.value:,.0f} {m.unit}"
            if m.exact
            else quoted(m) + (f" {m.unit}" if m.unit not in ("", "cosine", "share") else "")
        )
        over = "counted" if m.exact else f"{m.n:,} {'images' if m.seeds else 'repetitions'}"
        lines.append(f"{m.label:{width}}{value}  {m.direction} is better, {over}")
    for p in found.power:
        label = next(m.label for m in found.measurements if m.metric == p.metric)
        lines.append(
            f"a difference of {p.difference:g} in {label} takes {p.images:,} images a side (other seeds; 95 % interval, 80 % power); "
            "with the same seeds fewer"
        )
    return "\n".join(lines)


def sample(ref: str, plan: SamplingPlan | None, steps: int | None, images: int, context: Context, out: Path) -> Path:
    """Write a contact sheet of `images` samples."""
    import numpy as np

    from ..report.sheets import sheet

    subject, plan = ready(ref, plan, steps, context)
    seeds = Seeds(role="report", base=context.recipe.seed, count=images)
    context.progress.say(f"{images} images of {subject.model.ref}, {said(plan, steps)}")
    with subject.asking():
        made = [b.pixels.numpy() for b in subject.sampler.images(plan, seeds, steps=steps) if b.pixels is not None]
    with disk_errors(out):
        sheet(np.concatenate(made), out)
    return out


def estimate(
    ref: str, plan: SamplingPlan | None, steps: int | None, images: int, context: Context, *, scored: bool
) -> dict[str, Any]:
    """What making (and scoring) images would take: denoiser calls, and seconds by timing runs of one and of two steps here.

    Timings and what they take are left out.
    """
    subject, plan = ready(ref, plan, steps, context)
    needs = metric_needs(context) if scored else frozenset()
    extractors = subject.extractors if scored else []
    images = images if extractors or not scored else 0
    size = max(1, min(images, context.options.chunk))
    few = Seeds(role="calibrate", base=0, count=size)

    def timed(count: int) -> tuple[int, float]:
        calls, began = subject.sampler.calls, time.monotonic()
        for batch in subject.sampler.images(None, few, steps=count):
            for features in extractors:
                if batch.pixels is not None:
                    features.extract(batch.pixels)
        return subject.sampler.calls - calls, time.monotonic() - began

    with subject.asking():
        timed(1)  # warm up
        (calls, seconds), (more_calls, more_seconds) = timed(1), timed(2)
    count = len(plan.steps) if plan else steps or subject.default_steps
    wanted = [(math.ceil(images / size), count)] * (2 if "base" in needs else 1)
    if scored and subject.has_teacher:
        wanted.append((math.ceil(context.recipe.evaluate.samples / size), context.recipe.evaluate.teacher_steps))
    return {
        "model": subject.model.ref,
        "images": images,
        "with": said(plan, steps),
        "denoiser_calls": sum(n * (calls + (more_calls - calls) * (count - 1)) for n, count in wanted),
        "seconds": round(sum(n * (seconds + max(more_seconds - seconds, 0) * (count - 1)) for n, count in wanted), 1),
    }


def say(estimated: dict[str, Any]) -> str:
    """The estimate for people."""
    return (
        f"{estimated['images']:,} images of {estimated['model']} with {estimated['with']}: nothing was run. "
        f"{estimated['denoiser_calls']:,} denoiser calls, about {estimated['seconds'] / 60:.1f} minutes here"
    )


def lone(ref: str, **fields: Any) -> Recipe:
    """A recipe for a command that has no stages of its own: carries seed, prompts and evaluation settings."""
    from ..core.recipe import build

    evaluate = {k: v for k, v in fields.pop("evaluate", {}).items() if v is not None}
    data = {"lissom": 1, "model": ref, "evaluate": evaluate, "stages": [{"search": "random_search"}], **fields}
    return build({k: v for k, v in data.items() if v is not None}, "lissom")
