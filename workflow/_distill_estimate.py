"""What a distillation would take, without training: samples, images, seconds by one update on this machine, memory of the weights."""

import time
from typing import Any

from ..core.artifact import Artifact
from ..core.stages import DistillStage
from ._teaching import GIB, STATES, student_of, teacher_of, teacher_ref
from .context import Context


def estimate(stage: DistillStage, ref: str, context: Context) -> dict[str, Any]:
    """A student that is not made yet is weighed as the recipe's own model: later stages of a chain get smaller."""
    from ..core import opening

    student = student_of(Artifact(ref=ref), context)
    made = opening.builds_on(student.model.folder) is not None
    told = stage if made or stage.teacher not in (None, "previous") else stage.model_copy(update={"teacher": ref})
    teacher = teacher_of(told, student)
    images = stage.images if stage.data in (None, "teacher") else 0
    steps = stage.data_steps or teacher.default_steps
    ours = STATES * 4 * student.model.parameters
    theirs = teacher.model.parameters * (4 if teacher.model.dtype == "float32" else 2)
    seconds = _forward(student, context.options.chunk)
    samples = stage.iterations * stage.batch
    # Backward takes about twice the forward; the teacher runs forward only.
    updates = samples * (3 + stage.checkpointing + 1) * seconds
    return {
        "stage": f"distill: {stage.distill}",
        "model": student.model.ref,
        "teacher": teacher_ref(told, student),
        "samples": samples,
        "teacher_images": images,
        "images": 3 * context.recipe.evaluate.samples if stage.measure else 0,
        "weights_bytes": ours + theirs,
        "seconds": round(updates + images * steps * seconds),
    }


def _forward(student: Any, chunk: int) -> float:
    """Seconds of one forward for one sample."""
    from ..core import calibration

    with student.asking():
        call = calibration.first(student.sampler, student.context.recipe.seed, min(8, chunk))
    call(student.model.denoiser)  # warm up
    began = time.monotonic()
    call(student.model.denoiser)
    return (time.monotonic() - began) / call.rows


def say(found: dict[str, Any]) -> str:
    """The estimate for people."""
    data = f"{found['teacher_images']:,} images of {found['teacher']} and " if found["teacher_images"] else ""
    return (
        f"{found['stage']} on {found['model']}, taught by {found['teacher']}: {data}{found['samples']:,} noised samples, about "
        f"{found['seconds'] / 60:.1f} minutes here, the {found['images']:,} images of the report apart; weights, gradients and "
        f"optimiser take {found['weights_bytes'] / GIB:.2f} GiB"
    )
