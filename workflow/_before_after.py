"""What a pruned model gained and lost: time of a denoiser call in turns, images on unseen seeds. Measured once, then kept."""

import functools
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core import memory
from ..core.candidate import Cut, SamplingPlan, Scheduler, Seeds
from ..core.stages import DistillStage, PruneStage
from ..report.prune_schema import Latency, Scored
from ..report.schema import Ratio
from ._evaluator import Evaluator, draw_sheet
from ._gauge import LIMIT, Gauge, times
from ._kept import kept
from ._subject import Subject

if TYPE_CHECKING:
    from ..evaluate._scorer import View

CONFIDENCE = 0.95  # of the interval of a median


class Quality:
    """Scores the parent and what is made of it alike: same seeds, same reference, same metrics. Holds neither of them."""

    def __init__(self, parent: Subject, stage: PruneStage | DistillStage, folder: Path) -> None:
        """Refuses now what could not be scored later. folder: of the stage; keeps what was measured."""
        self.stage, self.folder, self.evaluate = stage, folder, parent.context.recipe.evaluate
        self.paints = stage.measure and parent.conditions.source != "stand-in"
        self.scores = self.paints and (self.evaluate.features is not None or parent.model.origin.startswith("zoo:"))
        if stage.steps is not None:
            parent.check_steps(stage.steps)
        self.views: dict[str, View | None] = {}
        if self.scores:
            self.views = parent.views("report", folder)  # compared with the parent's own images, where there are no others
            self._evaluator(parent)

    def of(self, name: Literal["teacher", "before", "after"], subject: Subject, plan: SamplingPlan | None) -> Scored:
        """Measurements and a sheet of samples; only the sheet where nothing says what to compare images by.

        Not for models that nobody tells what to paint (`paints`). plan: to follow instead of the pipeline's own schedule.
        """
        sheet = self.folder / "samples" / f"{name}.png"
        seeds = Seeds(role="report", base=subject.context.recipe.seed, count=self.evaluate.samples)
        steps = None if plan else self.stage.steps
        relative = sheet.relative_to(self.folder).as_posix()
        if not self.scores:
            self._sheet(subject, plan, seeds, steps, sheet)
            return Scored(name=name, measurements=(), sheet=relative)
        evaluator = self._evaluator(subject)

        def make() -> list[Any]:
            with subject.asking():
                score = evaluator.score(plan, seeds, steps=steps, replicates=True, sheet=sheet)
            return [m.plain() for m in score.measurements]

        own = Scheduler.of(subject.model.pipe.scheduler).plain()  # not in the fingerprint: a plan would hold it
        identity = [evaluator.id, plan.plain() if plan else own, seeds.plain(), steps]
        found = kept(self.folder / f"quality-{name}.json", identity, make)
        if not sheet.is_file():
            self._sheet(subject, plan, seeds, steps, sheet)
        return Scored.model_validate({"name": name, "measurements": found, "sheet": relative})

    def _sheet(self, subject: Subject, plan: SamplingPlan | None, seeds: Seeds, steps: int | None, path: Path) -> None:
        with subject.asking():
            draw_sheet(subject.sampler, plan, seeds, path, steps)

    def _evaluator(self, subject: Subject) -> Evaluator:
        return Evaluator(subject.model, subject.sampler, subject.conditions, self.views, subject.call)


def latency(stage: PruneStage, gauge: Gauge, cuts: tuple[Cut, ...], subject: Subject, folder: Path) -> tuple[Latency, ...]:
    """Time of one denoiser call, whole and cut, in turns; batches that would take too long or too much memory are left out.

    Cut in memory: the model that was saved computes the same, and a second one need not fit beside the first.
    """
    from ..core import surgery

    first, device, progress = next(gauge.denoiser.parameters()), subject.model.device, subject.context.progress

    def make() -> list[Any]:
        found: list[Any] = []
        per_image = 0.0
        for batch in sorted(stage.latency_batches):
            if batch * per_image > 1000 * LIMIT:  # at least four calls of it: a warm-up and three turns
                progress.warn(f"batch {batch} is not timed: one call would take about {batch * per_image / 1000:.0f} s here.")
                continue
            try:
                inputs = gauge.example(batch, first.device, first.dtype)
                call = functools.partial(gauge.denoiser, **inputs)
                before, after = times([call, call], device, [nullcontext, lambda: surgery.applied(gauge.denoiser, cuts)])
            except RuntimeError as e:
                if not memory.ran_out(e):
                    raise
                progress.warn(f"batch {batch} is not timed: it does not fit into memory.")
                continue
            per_image = statistics.median(before) / batch
            ratios = [a / b for a, b in zip(after, before, strict=True)]
            low, high = median_interval(ratios)
            ratio = Ratio(value=statistics.median(ratios), low=low, high=high)
            found.append(
                Latency(batch=batch, before=statistics.median(before), after=statistics.median(after), ratio=ratio).plain()
            )
        return found

    if not gauge.sized or not stage.latency_batches:  # a recorded call has one batch size
        return ()
    model = subject.model
    identity = [model.fingerprint, [c.plain() for c in cuts], stage.latency_batches, model.device, model.dtype]
    return tuple(Latency.model_validate(one) for one in kept(folder / "latency-ratio.json", identity, make))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median that holds for any distribution: between two order statistics, by the binomial law.

    Fewer than six values give their whole range, which covers less often.

    >>> median_interval([9, 1, 2, 3, 4, 5, 6, 7, 8])
    (2, 8)
    """
    ordered, n = sorted(values), len(values)
    below, out = 0, 0.0  # out: the chance that the median lies below the (below + 1)-th smallest value
    while (out := out + math.comb(n, below) / 2**n) <= (1 - CONFIDENCE) / 2:
        below += 1
    at = max(0, below - 1)
    return ordered[at], ordered[n - 1 - at]
