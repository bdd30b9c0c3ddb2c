"""What the numbers of an evaluation can tell: how many images show a difference, and what a reader must be warned of."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..core import methods
from ..core.errors import UserError
from ..core.measurement import Measurement, images_needed
from ..report.evaluation import Power
from ._subject import Subject

if TYPE_CHECKING:
    from ..evaluate._scorer import Scorer


def check_power(wanted: Mapping[str, float], scorer: "Scorer") -> None:
    """UserError for a metric of which no difference could be shown by more images."""
    from ..evaluate._scorer import PAINTED

    painted = {part: bool(module.needs & PAINTED) for module in scorer.modules.values() for part in module.parts}
    for metric in wanted:
        if metric not in painted:
            near = methods.suggest(metric, painted)
            raise UserError(
                f"--power {metric}: {metric} is not measured here, only {', '.join(painted)}. Add it to --metrics.{near}"
            )
        if not painted[metric]:
            raise UserError(f"--power {metric}: no number of images makes {metric} more certain. Leave it out.")


def power(wanted: Mapping[str, float], measurements: tuple[Measurement, ...]) -> tuple[Power, ...]:
    known = {m.metric: images_needed(m, wanted[m.metric]) for m in measurements if m.metric in wanted}
    return tuple(
        Power(metric=metric, difference=gap, images=images)
        for metric, gap in wanted.items()
        if (images := known.get(metric)) is not None
    )


def warnings(measurements: tuple[Measurement, ...], scorer: "Scorer", subject: Subject) -> Iterator[str]:
    """What a reader of the numbers must know."""
    from ..evaluate import fid

    for m in measurements:
        view = scorer.views.get(m.metric)
        if m.metric == "fid" and view is not None and m.n <= view.features.dim:
            least = fid.bias(m.value, m.replicates)
            size = f", by {least:.2g} or more" if least is not None and least > 0 else ""
            yield (
                f"{m.label}: {m.n} images for {view.features.dim} features: the value is biased upward{size}. Compare it at equal "
                "numbers of images only, or measure kid, which has no such bias."
            )
    view = scorer.views.get("clip_score")
    if view is not None and "captions" in scorer.needs:
        captions = [c for i in range(len(subject.conditions)) if (c := subject.conditions.caption(i)) is not None]
        if (cut := view.features.truncated(captions)) > 0:
            yield f"clip_score: {cut} of {len(captions)} captions are longer than {view.features.name} can read; their ends do not count."
