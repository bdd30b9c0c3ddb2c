"""What a prune stage would make, without making it: of a structure without weights (`config:sdxl`) or of a loaded model."""

from typing import Any

from ..core import blueprints, export
from ..core.stages import PruneStage
from ._gauge import Gauge
from ._prune_job import Job, choose, gauge_of, job_of, trajectory_steps
from ._subject import Subject, default_steps
from .context import Context

LEVELS = 1000  # noise levels that nearly all models are trained at
FULL = 4.0  # bytes of a parameter where there is no file to look at


def estimate(stage: PruneStage, ref: str, context: Context) -> dict[str, Any]:
    """Parameters, MACs per image and call, and bytes of weight files, before and after.

    Methods that measure losses first are not run: for them `after` holds bounds (`at_most`), and how much would be measured.
    """
    if ref.startswith("config:"):
        import diffusers

        blueprint = blueprints.load(ref.removeprefix("config:"))
        gauge = Gauge(blueprint.denoiser, latent=blueprint.latent, text_tokens=blueprint.text_tokens)
        others, bytes_each, steps = 0, FULL, default_steps(getattr(diffusers, blueprint.pipeline))
        job = job_of(stage, gauge, others, ref, "cpu", None)
    else:
        subject = Subject.load(ref, context, painting=False)
        model, gauge, steps = subject.model, gauge_of(subject), subject.default_steps
        others = model.parameters - gauge.params
        bytes_each = export.disk_size(model.folder / model.denoiser_name) / gauge.params
        job = job_of(stage, gauge, others, model.ref, model.device, None)
    before = {"parameters": gauge.params + others, "macs": gauge.macs, "disk": round(gauge.params * bytes_each)}
    if stage.save_dtype:
        bytes_each = 4.0 if stage.save_dtype == "float32" else 2.0
    found: dict[str, Any] = {"stage": f"prune: {stage.method}", "model": ref, "before": before}
    if job.module.calibrated:
        return found | _bounds(stage, job, others, bytes_each) | _work(stage, job, steps)
    result = choose(job, None, context.recipe.seed, context.progress)
    plan = export.structure(gauge.denoiser, result.cuts, plain_only=stage.require_plain_load)
    after = {"parameters": plan.params + others, "macs": gauge.after(result.cuts)[1], "disk": round(plan.params * bytes_each)}
    return found | {"after": after, "cuts": [cut.plain() for cut in result.cuts], "opens": plan.opens, "because": plan.reason}


def _bounds(stage: PruneStage, job: Job, others: int, bytes_each: float) -> dict[str, Any]:
    """Where the losses decide what goes: the target holds, of the rest we know that it does not grow."""
    gauge, left = job.gauge, job.total - job.need
    params = round(left) if stage.of == "params" else gauge.params + others
    return {
        "after": {
            "at_most": True,
            "parameters": params,
            "macs": round(left) if stage.of == "macs" else gauge.macs,
            "disk": round((params - others) * bytes_each),
        },
    }


def _work(stage: PruneStage, job: Job, default: int) -> dict[str, Any]:
    """How much is measured. default: steps of the pipeline's own trajectories."""
    scored = {o.cuts for space in job.spaces for site in (*space.sites, (space.base,)) for o in site if o.cuts}
    if job.module.calibrated == "gradients":
        return _passes(stage, job, default)
    if job.module.calibrated in ("learned", "trajectories"):
        return _learned(stage, job, default)
    if job.module.calibrated != "latents":
        return {"scored": len(scored), "denoiser_calls": len(scored) * min(stage.times, stage.calibration)}
    steps = trajectory_steps(job) or default
    forwards = stage.calibration * steps * (len(scored) + 1)  # the whole model samples too
    return {"scored": len(scored), "solver_steps": steps, "denoiser_forwards": forwards}


def _passes(stage: PruneStage, job: Job, default: int) -> dict[str, Any]:
    """Of gradients, if every noise level counts: a forward and a backward of each image at each, and what makes the images."""
    visited = -(-LEVELS // int(getattr(job.config, "stride", 1)))
    made = stage.calibration * (trajectory_steps(job) or default) if stage.data in (None, "teacher") else 0
    passes = stage.calibration * visited
    return {"scored": len(job.widths), "visited": visited, "denoiser_forwards": made + passes, "denoiser_backwards": passes}


def _learned(stage: PruneStage, job: Job, default: int) -> dict[str, Any]:
    """Of samples or trajectories that are learned from: forwards and backwards of one image, and what makes the images."""
    config, found = job.config, {"scored": len(job.widths or job.layers), "learning_steps": job.config.iterations}
    if job.module.calibrated == "trajectories":  # every denoiser call is computed twice, for it is not kept
        if config.gates is not None:
            return {"scored": found["scored"]}
        steps = trajectory_steps(job) or default
        passes = config.iterations * config.batch * steps
        found |= {"trajectories_in_a_step": config.batch, "solver_steps": steps}
        return {
            **found,
            "denoiser_forwards": config.images * steps + (3 if config.by_block else 2) * passes,
            "denoiser_backwards": passes,
        }
    made = config.images * (config.data_steps or default) if stage.data in (None, "teacher") else 0
    passes = config.iterations * config.batch
    found |= {"samples_in_a_step": config.batch}
    again = getattr(config, "by_block", False)
    return {**found, "denoiser_forwards": made + (2 if again else 1) * passes, "denoiser_backwards": passes}


def say(found: dict[str, Any]) -> str:
    """The estimate for people."""
    before, after = found["before"], found["after"]
    bound = "at most " if after.get("at_most") else ""
    parts = [f"{before[key]:,} -> {bound}{after[key]:,} {unit}" for key, unit in UNITS.items()]
    text = f"{found['stage']} on {found['model']}: " + "; ".join(parts)
    if "trajectories_in_a_step" in found:
        return text + (
            f". {found['learning_steps']:,} steps of {found['trajectories_in_a_step']} trajectories of {found['solver_steps']} solver steps learn what "
            f"stays of {found['scored']} layers: {found['denoiser_forwards']:,} forwards and {found['denoiser_backwards']:,} backward passes of one image"
        )
    if "learning_steps" in found:
        return text + (
            f". {found['learning_steps']:,} steps of {found['samples_in_a_step']} samples learn which of {found['scored']} layers stay: "
            f"{found['denoiser_forwards']:,} forwards and {found['denoiser_backwards']:,} backward passes of one image"
        )
    if "denoiser_backwards" in found:
        return text + (
            f". Gradients at no more than {found['visited']} noise levels decide what goes from {found['scored']} layers: "
            f"up to {found['denoiser_forwards']:,} forwards and {found['denoiser_backwards']:,} backward passes of one image"
        )
    if "denoiser_forwards" in found:
        return text + (
            f". The latents of whole trajectories with each of {found['scored']} cuts decide what goes: "
            f"{found['denoiser_forwards']:,} denoiser forwards of one image, at {found['solver_steps']} solver steps, and "
            "again of what is left for every rescoring"
        )
    if after.get("at_most"):
        return text + (
            f". The losses of {found['scored']} cuts decide what goes: {found['denoiser_calls']:,} denoiser calls, each of about "
            "half the work of a whole one"
        )
    return text + f"; {len(found['cuts'])} cuts, opens {HOW[found['opens']]}"


UNITS = {"parameters": "parameters", "macs": "MACs per image and call", "disk": "bytes of denoiser weights"}
HOW = {"stock": "in plain diffusers", "remote_code": "with trust_remote_code=True only"}
