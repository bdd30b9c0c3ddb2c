"""How much of the quality that a student had lost against its teacher came back: a share, where there is something to share.

The share is (before - after) / (before - teacher), both differences paired by image. Its interval is Fieller's (Fieller, "Some
problems in interval estimation", J. R. Stat. Soc. B 16, 1954): it is finite just where the loss before is outside its own
interval, it holds 0 just where before and after do not differ measurably, and 1 just where after and teacher do not.
"""

import math
from typing import Literal, NamedTuple

from ..core.intervals import Interval, spread, t_95
from ..core.measurement import SHARE, Measurement, difference, paired
from .distill_schema import DistillReport

Lost = Literal["lost", "unclear", "ahead", "unknown"]


class Trio(NamedTuple):
    """One metric of three models; None where a model was not measured with it."""

    teacher: Measurement | None
    before: Measurement | None
    after: Measurement | None

    @property
    def known(self) -> Measurement:
        found = self.before or self.after or self.teacher
        assert found is not None  # `trios` makes none of nothing
        return found


class Share(NamedTuple):
    """Of the loss before training: 1 is all of it, below 0 it grew."""

    value: float
    low: float
    high: float


def trios(report: DistillReport) -> list[Trio]:
    """The metrics in the order in which they were measured."""
    found = {scored.name: {(m.metric, m.label): m for m in scored.measurements} for scored in report.scored}
    teacher, before, after = (found.get(name, {}) for name in ("teacher", "before", "after"))
    return [Trio(teacher.get(key), before.get(key), after.get(key)) for key in {**before, **after, **teacher}]


def lost(trio: Trio) -> Lost:
    """What the student was before training, against its teacher: measurably worse, not measurably other, or ahead."""
    if trio.teacher is None or trio.before is None:
        return "unknown"
    gap, interval = difference(trio.before, trio.teacher)
    if interval is None:
        return "unknown"
    if interval[0] <= 0 <= interval[1]:
        return "unclear"
    return "lost" if (gap > 0) == (trio.before.direction == "lower") else "ahead"


def recovered(trio: Trio) -> Share | None:
    """The share that came back; None where nothing was measurably lost before, or an interval is missing."""
    teacher, before, after = trio
    if lost(trio) != "lost" or teacher is None or before is None or after is None:
        return None
    back, within = difference(before, after)
    gone, at_most = difference(before, teacher)
    if within is None or at_most is None:
        return None
    if before.unit == SHARE or not _together(teacher, before, after):
        low, high = _corners(within, at_most)
    else:
        low, high = _fieller(teacher, before, after)
    return Share(back / gone, low, high)


def _together(teacher: Measurement, before: Measurement, after: Measurement) -> bool:
    """Whether the half-samples of all three hold the same images."""
    same = paired(before, after) and paired(before, teacher)
    return same and len(teacher.replicates) == len(before.replicates) == len(after.replicates) > 1


def _fieller(teacher: Measurement, before: Measurement, after: Measurement) -> Interval:
    """All s whose before - after - s (before - teacher) is not measurably other than 0: the roots of a parabola."""
    back, gone = before.value - after.value, before.value - teacher.value
    backs = [b - a for b, a in zip(before.replicates, after.replicates, strict=True)]
    gones = [b - t for b, t in zip(before.replicates, teacher.replicates, strict=True)]
    far = t_95(min(teacher.n, before.n, after.n)) ** 2
    both, apart = (
        _variance([x + y for x, y in zip(backs, gones, strict=True)]),
        _variance([x - y for x, y in zip(backs, gones, strict=True)]),
    )
    square = gone**2 - far * _variance(gones)  # above 0: `lost` has seen to it
    middle = back * gone - far * (both - apart) / 4
    rest = back**2 - far * _variance(backs)
    root = math.sqrt(max(0.0, middle**2 - square * rest))
    return (middle - root) / square, (middle + root) / square


def _variance(values: list[float]) -> float:
    return (spread(values) or 0.0) ** 2


def _corners(back: Interval, gone: Interval) -> Interval:
    """Wider than need be, for shares of images and for other seeds, whose differences have intervals of their own kinds."""
    found = [x / y for x in back for y in gone]
    return min(found), max(found)
