"""What a prune stage would make, without making it: of a structure without weights (`config:sdxl`) or of a loaded model."""

from typing import Any

from ..core import blueprints, export
from ..core.stages import PruneStage
from ._gauge import Gauge
from ._prune_job import Job, choose, gauge_of, job_of
from ._subject import Subject
from .context import Context

FULL = 4.0  # bytes of a parameter where there is no file to look at


def estimate(stage: PruneStage, ref: str, context: Context) -> dict[str, Any]:
    """Parameters, MACs per image and call, and bytes of weight files, before and after.

    Methods that measure losses first are not run: for them `after` holds bounds (`at_most`), and how much would be measured.
    """
    if ref.startswith("config:"):
        blueprint = blueprints.load(ref.removeprefix("config:"))
        gauge = Gauge(blueprint.denoiser, latent=blueprint.latent, text_tokens=blueprint.text_tokens)
        others, bytes_each = 0, FULL
        job = job_of(stage, gauge, others, ref, "cpu", None)
    else:
        subject = Subject.load(ref, context, painting=False)
        model, gauge = subject.model, gauge_of(subject)
        others = model.parameters - gauge.params
        bytes_each = export.disk_size(model.folder / model.denoiser_name) / gauge.params
        job = job_of(stage, gauge, others, model.ref, model.device, None)
    before = {"parameters": gauge.params + others, "macs": gauge.macs, "disk": round(gauge.params * bytes_each)}
    if stage.save_dtype:
        bytes_each = 4.0 if stage.save_dtype == "float32" else 2.0
    found: dict[str, Any] = {"stage": f"prune: {stage.method}", "model": ref, "before": before}
    if job.module.calibrated:
        return found | _bounds(stage, job, others, bytes_each)
    result = choose(job, None, context.recipe.seed, context.progress)
    plan = export.structure(gauge.denoiser, result.cuts, plain_only=stage.require_plain_load)
    after = {"parameters": plan.params + others, "macs": gauge.after(result.cuts)[1], "disk": round(plan.params * bytes_each)}
    return found | {"after": after, "cuts": [cut.plain() for cut in result.cuts], "opens": plan.opens, "because": plan.reason}


def _bounds(stage: PruneStage, job: Job, others: int, bytes_each: float) -> dict[str, Any]:
    """Where the losses decide what goes: the target holds, of the rest we know that it does not grow."""
    gauge, left = job.gauge, job.total - job.need
    scored = {o.cuts for space in job.spaces for site in (*space.sites, (space.base,)) for o in site if o.cuts}
    params = round(left) if stage.of == "params" else gauge.params + others
    return {
        "after": {
            "at_most": True,
            "parameters": params,
            "macs": round(left) if stage.of == "macs" else gauge.macs,
            "disk": round((params - others) * bytes_each),
        },
        "scored": len(scored),
        "denoiser_calls": len(scored) * min(stage.times, stage.calibration),
    }


def say(found: dict[str, Any]) -> str:
    """The estimate for people."""
    before, after = found["before"], found["after"]
    bound = "at most " if after.get("at_most") else ""
    parts = [f"{before[key]:,} -> {bound}{after[key]:,} {unit}" for key, unit in UNITS.items()]
    text = f"{found['stage']} on {found['model']}: " + "; ".join(parts)
    if after.get("at_most"):
        return text + (
            f". The losses of {found['scored']} cuts decide what goes: {found['denoiser_calls']:,} denoiser calls, each of about "
            "half the work of a whole one"
        )
    return text + f"; {len(found['cuts'])} cuts, opens {HOW[found['opens']]}"


UNITS = {"parameters": "parameters", "macs": "MACs per image and call", "disk": "bytes of denoiser weights"}
HOW = {"stock": "in plain diffusers", "remote_code": "with trust_remote_code=True only"}
