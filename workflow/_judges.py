"""Who scores the requests of each of a search's studies: the same in the process that proposes and in workers elsewhere."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import Seeds
from ..core.errors import SamplingError, UserError
from ..core.stages import SearchStage
from ._evaluator import Evaluator, Score
from ._screen import SCREENED, Screen
from ._subject import Subject
from ._teacher import Teacher

if TYPE_CHECKING:
    from ..core.sampling import Sampler


@dataclass(frozen=True)
class Judge:
    """Scores the candidates of one study. Values depend on candidate, seeds and `id` alone."""

    id: str
    sampler: "Sampler"  # counts the denoiser calls
    score: Callable[..., Score]  # (plan, seeds, *, cuts, …)


def judges(stage: SearchStage, subject: Subject, folder: Path) -> dict[str, Judge]:
    """By study. folder: keeps reference statistics that have to be made.

    All are made at once, so that a reference unfit for the report is refused before any work.
    """
    search, last = subject.evaluator("search", folder), subject.evaluator("report", folder)
    # Control variates need to know how the values of half-samples go together; that costs no images.
    found = {
        "search": _judge(search, replicates=stage.control),
        "rescore": _judge(search),
        "report": _judge(last, replicates=True),
    }
    if stage.screen is not None:
        found["screen"] = _screen(stage, subject, folder)
    return found


def _screen(stage: SearchStage, subject: Subject, folder: Path) -> Judge:
    """Made with the model's own images, so that a pipeline which shows no latents is refused before any work."""
    context = subject.context
    teacher = Teacher(subject.model, subject.conditions, subject.sampler, context)
    screen = Screen(teacher, context.recipe.evaluate.teacher_steps, folder)
    try:
        screen.latents(Seeds(role="search", base=context.recipe.seed, count=min(SCREENED, stage.samples)))
    except SamplingError as e:
        raise UserError(f"screen: the model's own images of {screen.steps} steps cannot be had: {e} Leave screen out.") from e
    return Judge(screen.id, subject.sampler, screen.score)


def _judge(evaluator: Evaluator, **always: Any) -> Judge:
    return Judge(evaluator.id, evaluator.sampler, functools.partial(evaluator.score, **always))
