"""The distill stage: a student learns from its teacher, is saved like any pruned model, and says how much came back."""

import gc
import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import processes
from ..core.artifact import MODEL, Artifact
from ..core.candidate import Scheduler, Seeds, canonical
from ..core.errors import UserError
from ..core.stages import DistillStage
from ._evaluator import Evaluator, draw_sheet
from ._prune_job import gauge_of
from ._stage import stage_hash
from ._subject import Subject
from ._teaching import pairing_of, ready, student_of, teacher_of, terms_of
from .context import Context

if TYPE_CHECKING:
    from ..distill._loop import Outcome, Samples, Trainer
    from ._training_data import Folder, Taught

HELD_OUT = 4  # batches under other noise that the loss is measured on, where images cannot be scored

LOSS = "weighted loss under other noise"


@dataclass
class Lesson:
    """Everything that training needs; the same in every process."""

    stage: DistillStage
    student: Subject
    teacher: Subject
    data: "Taught | Folder"
    trainer: "Trainer"
    scales: dict[str, float]
    held_out: "Samples"
    watched: str = LOSS  # what a check looks at; lower is better


def run_stage(stage: DistillStage, artifact_in: Artifact, folder: Path, context: Context) -> Artifact:
    """Train, and leave model/, reports and samples in `folder`. Goes on with what is in the folder already."""
    from ..core import export
    from . import _before_after, _distill_report, _pruned_model

    team = processes.team(context.options.device)
    context = replace(context, options=replace(context.options, device=team.device)) if processes.count() > 1 else context
    student = student_of(artifact_in, context)
    export.check(student.model, folder / MODEL)
    teacher = teacher_of(stage, student)
    quality = _before_after.Quality(teacher, stage, folder)
    lesson = _lesson(stage, student, teacher, folder, context)  # what does not fit is refused before anything is made
    plan = artifact_in.plan or (student.model.plan if stage.steps is None else None)
    seen = plan and plan.without("model")  # of steps that another model makes the images would say nothing of these
    scored = []
    if quality.paints:
        context.progress.phase("images of teacher, student before and after", 3)
        scored.append(quality.of("teacher", teacher, seen))
        context.progress.advance()
        scored.append(quality.of("before", student, seen))
        context.progress.advance()
    lesson.data.make()
    team.tell({"folder": str(folder.absolute()), "student": artifact_in.ref})
    began = time.monotonic()
    outcome = _train(lesson, folder, context)
    seconds = time.monotonic() - began
    with lesson.trainer.averaged():
        context.progress.say("saving, and opening the result in a fresh process")
        student.model.denoiser.requires_grad_(False)
        saved = _pruned_model.save(
            student.model,
            (),
            gauge_of(student).probe(),
            folder,
            {**stage.plain(), "seed": context.recipe.seed},
            dtype=stage.save_dtype,
            variant=stage.variant,
            shard=stage.shard_size,
            trained=True,
        )
    report = _distill_report.build(lesson, outcome, saved, quality, seconds, folder)
    origin, license_ = student.model.origin, _pruned_model.license_of(student.model.folder)
    if quality.paints:
        del lesson, student, teacher
        gc.collect()  # three models of full size need not fit into memory together
        scored.append(quality.of("after", Subject.load(str(saved.folder.resolve()), context, painting=False), seen))
        context.progress.advance()
    report = report.model_copy(update={"scored": tuple(scored)})
    _distill_report.write(folder, report)
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # the size of several models, and of no more use
    return _distill_report.finish(folder, report, saved.folder, plan, license_, origin, stage_hash(stage, artifact_in, context))


def follow(context: Context) -> None:
    """What processes other than the first do: wait, and train along whenever it is time."""
    team = processes.team(context.options.device)
    context = replace(context, options=replace(context.options, device=team.device))
    while (words := team.hear()) is not None:
        folder = Path(words["folder"])
        number = int(folder.name[:2]) - 1 if folder.name[:2].isdigit() and len(context.recipe.stages) > 1 else 0
        stage = context.recipe.stages[number]
        assert isinstance(stage, DistillStage)
        student = student_of(Artifact(ref=words["student"]), context)
        teacher = teacher_of(stage, student)
        lesson = _lesson(stage, student, teacher, folder, context)
        lesson.data.make()
        _train(lesson, folder, context)
        with lesson.trainer.averaged():  # of weights that are spread, the first process cannot save the shares of others
            pass


def _data(stage: DistillStage, teacher: Subject, folder: Path) -> "Taught | Folder":
    """What is trained on, refused where it does not fit the pipeline."""
    from ._training_data import Folder, Taught, source_of

    if stage.data in (None, "teacher"):
        return Taught(stage, teacher, folder)
    return Folder(stage, source_of(str(stage.data), teacher.context), teacher)


def _lesson(stage: DistillStage, student: Subject, teacher: Subject, folder: Path, context: Context) -> Lesson:
    """Everything put together, and checked; no image is made yet."""
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState

    from ..core.denoiser_calls import Calls
    from ..core.noising import Noising
    from ..core.sampling import Sampler
    from ..distill._loop import Settings, Trainer
    from ..distill._samples import Noised

    pairing = pairing_of(student, teacher)
    ready(pairing.student, stage)
    terms = terms_of(stage, pairing)
    data = _data(stage, teacher, folder)
    conditions = getattr(data, "rows", teacher.conditions)
    sampler = Sampler(teacher.model.pipe, conditions, chunk=context.options.chunk, call=teacher.call)
    with teacher.asking():
        calls = Calls(sampler, context.recipe.seed)
    data.like = calls.shape
    noising = Noising.of(teacher.model.pipe.scheduler)
    device = "cpu" if context.options.device == "cpu" else teacher.model.device
    samples = Noised(data, data.conditions, calls, noising, context.recipe.seed, device)
    held_out = Noised(data, data.conditions, calls, noising, context.recipe.seed + 1, device)
    if processes.count() > len(data.conditions):
        raise UserError(
            f"{processes.count()} processes for {len(data.conditions)} images: some would have nothing to learn from. Start fewer, "
            "or give more images."
        )
    AcceleratorState._reset_state()  # else a second stage of this process could not have another precision
    accelerator = Accelerator(
        mixed_precision=stage.precision,
        cpu=device == "cpu",
        log_with=_trackers(stage),
        project_dir=str(folder / "trackers") if stage.trackers else None,
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"{accelerator.distributed_type.value}: training is not shared this way here. Launch with --multi_gpu, or with "
            "--use_fsdp --fsdp_version 2 where the student, with its gradients and optimiser, does not fit on each device."
        )
    settings = Settings(**{name: getattr(stage, name) for name in Settings.__dataclass_fields__ if hasattr(stage, name)})
    trainer = Trainer(
        pairing,
        terms,
        samples,
        settings,
        accelerator,
        folder,
        _identity(stage, student, teacher, data),
        spread=processes.spread(),
        say=context.progress.say,
    )
    return Lesson(stage, student, teacher, data, trainer, {}, held_out)


def _train(lesson: Lesson, folder: Path, context: Context) -> "Outcome":
    """The training itself, in all processes."""
    stage, trainer, progress = lesson.stage, lesson.trainer, context.progress
    lesson.scales = trainer.scales()
    total = sum(term.weight * lesson.scales[term.name] for term in trainer.terms)
    shares = ", ".join(
        f"{t.name} {lesson.scales[t.name]:.3g} x {t.weight:g} ({t.weight * lesson.scales[t.name] / max(total, 1e-30):.0%})"
        for t in trainer.terms
    )
    progress.say(f"losses at the start: {shares}")
    progress.phase(f"{stage.iterations} iterations of {stage.batch} samples", stage.iterations)
    if stage.trackers:
        trainer.accelerator.init_trackers("lissom", config={k: str(v) for k, v in stage.plain().items()})
    outcome = trainer.run(_looking(lesson, folder), progress.advance)
    if stage.trackers:
        trainer.accelerator.end_training()
    return outcome


def _looking(lesson: Lesson, folder: Path) -> Any:
    """What is done at every check: images scored where they can be, else the loss on samples that are not trained on."""
    stage, student, evaluate = lesson.stage, lesson.student, lesson.student.context.recipe.evaluate
    if not stage.check_every:
        return None
    paints = stage.measure and student.conditions.source != "stand-in"
    scores = paints and (evaluate.features is not None or student.model.origin.startswith("zoo:"))
    seeds = Seeds(role="search", base=student.context.recipe.seed, count=stage.check_samples)
    evaluator = None
    if scores:
        views = lesson.teacher.views("search", folder)
        evaluator = Evaluator(student.model, student.sampler, student.conditions, views, student.call)

    def look(at: int) -> float:
        sheet = folder / "samples" / f"iteration-{at:06}.png"
        if evaluator is None:
            if paints:
                draw_sheet(student.sampler, None, seeds, sheet, stage.steps)
            return lesson.trainer.loss_on(lesson.held_out, HELD_OUT)
        first = evaluator.score(None, seeds, steps=stage.steps, sheet=sheet).measurements[0]
        lesson.watched = first.label if first.direction == "lower" else f"minus {first.label}"
        return first.value if first.direction == "lower" else -first.value

    return look


def _identity(stage: DistillStage, student: Subject, teacher: Subject, data: "Taught | Folder") -> str:
    """Of everything that decides the training."""
    scheduler = Scheduler.of(teacher.model.pipe.scheduler).plain()
    told = {
        k: v
        for k, v in stage.plain().items()
        if k not in ("measure", "steps", "save_dtype", "variant", "shard_size", "trackers")
    }
    parts = [
        __version__, told, student.model.fingerprint, teacher.model.fingerprint, scheduler, student.context.recipe.seed,
        repr(teacher.call), data.signature, student.model.device.partition(":")[0],
    ]  # fmt: skip
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def _trackers(stage: DistillStage) -> list[str] | None:
    """UserError for one that is not installed."""
    from accelerate.tracking import get_available_trackers

    there = [str(getattr(one, "value", one)) for one in get_available_trackers()]
    for name in stage.trackers:
        if name not in there:
            raise UserError(f"trackers: {name} is not installed here. Install it (pip install {name}), or leave it out.")
    return list(stage.trackers) or None
