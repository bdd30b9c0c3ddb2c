"""The prune stage: the method's choice, the saved and verified model, and what was lost and won."""

import gc
import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..core import artifact, methods
from ..core.artifact import Artifact
from ..core.candidate import Seeds, canonical
from ..core.errors import UserError
from ..core.stages import PruneStage
from ._gradients import FILE, Gradients
from ._latents import Latents
from ._lesson import STATE, Lessons
from ._losses import Losses
from ._prune_job import Job, choose, cuttable, gauge_of, job_of, trajectory_steps
from ._stage import stage_hash
from ._subject import Subject
from ._trajectories import FILE as WHOLE
from ._trajectories import Trajectories
from .context import Context, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.calibration import Inputs
    from ._pruned_model import Made


def run_stage(stage: PruneStage, artifact_in: Artifact, folder: Path, context: Context) -> Artifact:
    """Prune, and leave model/, reports and samples in `folder`. Goes on with what is in the folder already."""
    from . import _prune_report, _pruned_model

    made = _make(stage, artifact_in, folder, context)
    report = made.report
    if made.quality.paints:
        gc.collect()  # two models of full size need not fit into memory together
        pruned = Subject.load(str(made.folder.resolve()), context, painting=False)
        report = report.model_copy(
            update={"scored": (*report.scored, made.quality.of("after", pruned, made.plan and made.plan.without("model")))}
        )
        context.progress.advance()
    _prune_report.write(folder, report)
    finished = _pruned_model.finish(folder, report, made, stage_hash(stage, artifact_in, context))
    for name in (FILE, STATE, WHOLE):
        (folder / name).unlink(missing_ok=True)  # as large as the denoiser, and of no more use
    return finished


def _make(stage: PruneStage, artifact_in: Artifact, folder: Path, context: Context) -> "Made":
    from ..core import export
    from . import _before_after, _prune_report, _pruned_model

    module = methods.load("prune", stage.method)
    subject = Subject.load(artifact_in.ref, context, painting=bool(module.calibrated))
    model, progress = subject.model, context.progress
    export.check(model, folder / artifact.MODEL)
    gauge = gauge_of(subject)
    job = job_of(stage, gauge, model.parameters - gauge.params, model.ref, model.device, folder, model.fingerprint)
    plan = artifact_in.plan or (model.plan if stage.steps is None else None)  # a finished search brings its own
    seen = plan and plan.without("model")  # of steps that another model makes the images would say nothing of this one
    quality = _before_after.Quality(subject, stage, folder)
    losses = losses_of(stage, job, subject, folder)
    result = choose(job, losses, context.recipe.seed, progress)
    joint = losses([result.cuts])[0] if losses is not None and result.cuts else None
    progress.say(f"{len(result.cuts)} cuts; saving, and opening the result in a fresh process")
    saved = _pruned_model.save(
        model,
        result.cuts,
        gauge.probe(),
        folder,
        {**stage.plain(), "seed": context.recipe.seed},
        plain_only=stage.require_plain_load,
        dtype=stage.save_dtype,
        variant=stage.variant,
        shard=stage.shard_size,
    )
    progress.say("timing denoiser calls before and after, in turns")
    measured = _prune_report.Measured(
        *_prune_report.sizes(model, gauge, result.cuts, saved),
        layers=job.layers or tuple(cuttable(stage, gauge, model.ref)),
        loss=joint,
        latency=_before_after.latency(stage, gauge, result.cuts, subject, folder),
    )
    report = _prune_report.build(stage, job, subject, result, saved, measured, losses, folder)
    if quality.paints:
        progress.phase("images before and after", 2)
        report = report.model_copy(update={"scored": (quality.of("before", subject, seen),)})
        progress.advance()
    if quality.scores:
        steps = len(plan.steps) if plan else stage.steps or subject.default_steps
        known = {"samples": quality.evaluate.samples, "steps": steps, "reference": subject.reference}
        report = report.model_copy(update=known)
    moved = plan and _pruned_model.moved_plan(plan, saved.structure.names)
    return _pruned_model.Made(saved.folder, report, quality, moved, _pruned_model.license_of(model.folder), model.origin)


def losses_of(
    stage: PruneStage, job: Job, subject: Subject, folder: Path
) -> Losses | Latents | Gradients | Lessons | Trajectories | None:
    """What tells the method how much cuts lose, as it asks for it.

    On recorded calls, on whole trajectories, by gradients of the training loss, by learning, or not at all.
    """
    progress = subject.context.progress
    if job.module.calibrated == "gradients":
        steps = trajectory_steps(job)
        if steps is not None:
            subject.check_steps(steps, "solver_steps")
        settings = [stage.method, job.config.model_dump(mode="json")]
        identity = losses_identity(
            stage.model_copy(update={"data": None}), subject, settings
        )  # of the data they know themselves
        return Gradients(stage, subject, [width.address for width in job.widths], steps, folder, identity)
    if job.module.calibrated in ("learned", "trajectories"):
        kind = Lessons if job.module.calibrated == "learned" else Trajectories
        settings = [
            stage.method,
            job.config.model_dump(mode="json", exclude={"by_block"}),
            [layer.address for layer in job.layers],
        ]
        # What only memory depends on is left out: a run that was killed for lack of it goes on with less.
        identity = losses_identity(stage.model_copy(update={"data": None}), subject, [*settings, job.need], chunked=False)
        return kind(stage, subject, job.config, folder, identity)
    if job.module.calibrated != "latents":
        if not job.module.calibrated:
            return None
        calls, identity = calibration_calls(stage, subject), losses_identity(stage, subject)
        return Losses(subject.model.pipe, calls, folder / "scores.jsonl", identity, progress)
    if not hasattr(job.module, "measure"):
        raise UserError(f'{stage.method}: says `calibrated = "latents"`, but has no function measure(original, modified).')
    steps = trajectory_steps(job)
    if steps is not None:
        subject.check_steps(steps, "solver_steps")
    seeds = Seeds(role="calibrate", base=subject.context.recipe.seed, count=stage.calibration)
    identity = losses_identity(stage, subject, [stage.method, steps])
    with subject.asking():
        return Latents(subject.sampler, seeds, steps, job.module.measure, folder, identity, progress)


def calibration_calls(stage: PruneStage, subject: Subject) -> "list[Inputs]":
    """The calls that losses are measured on: of the model's own trajectories, or made from images."""
    from ..core import calibration

    progress, source = subject.context.progress, stage.data
    pixels = [] if source in (None, "teacher") else _pixels(subject.context.path(str(source)), stage.calibration, progress)
    progress.say(f"recording denoiser calls of {stage.calibration} images at {stage.times} noise levels")
    seed = subject.context.recipe.seed
    with subject.asking():
        if pixels:
            return calibration.from_images(subject.sampler, pixels, stage.calibration, stage.times, seed)
        return calibration.record(subject.sampler, stage.calibration, stage.times, seed)


def _pixels(source: str, count: int, progress: Progress) -> "list[Tensor]":
    """The first images of a folder or zip that can be read: uint8 (H, W, 3) each."""
    from ..evaluate._images import Images

    images = Images(Path(source))
    pixels = [one[0] for one in islice(images, count)]
    if images.skipped:
        progress.warn(f"{source}: {len(images.skipped)} files cannot be read, e.g. {images.skipped[0]}")
    return pixels


def losses_identity(stage: PruneStage, subject: Subject, more: Sequence[object] = (), *, chunked: bool = True) -> str:
    """Of everything that losses depend on, beside call and cuts. more: that only some of them depend on. chunked: by the last
    bits of what is computed at once, too."""
    from ..core.candidate import Scheduler
    from ..evaluate._images import Images

    model, options = subject.model, subject.context.options
    given = stage.data not in (None, "teacher")
    parts = [
        __version__, model.fingerprint, Scheduler.of(model.pipe.scheduler).plain(), subject.conditions.hash, subject.call,
        subject.context.recipe.seed, stage.calibration, stage.times, model.dtype, model.device.partition(":")[0],
        options.chunk if chunked else None,
        Images(Path(subject.context.path(str(stage.data)))).signature() if given else None, *more,
    ]  # fmt: skip
    return hashlib.sha256(canonical(parts).encode()).hexdigest()
