"""The plots of a comparison as inline SVG: every limit with the interval that decides it, and every value on both sides.

Metrics have different units, so each row has an axis of its own. Sizes are in SVG units: 360 across is a phone.
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from ..core.measurement import Measurement
from . import compare_marks as marks
from . import compare_numbers as numbers
from . import compare_words as words
from .compare_schema import CompareReport, Row
from .compare_words import Asked

ACROSS = 360.0
EDGE = 6.0  # left free on both sides
LIMIT = 222.0  # where every limit stands: what is allowed lies to its left, whichever way the metric points
STRIP = 16.0  # height of the strip on which an interval lies
PER_LIMIT, PER_VALUE = 52.0, 58.0  # height of a row
FIGURES = 132.0  # room for a value and its interval
TINY = 1e-300  # a distance that no axis can be drawn for
NAME, FIGURE, SMALL = 10.5, 10.0, 9.0  # sizes of letters


def limits(report: CompareReport) -> str | None:
    """Each limit as a vertical line, the same for all rows, and the interval of what it is about. None without limits."""
    every = words.asked(report)
    if not every:
        return None
    body = [*_legend()]
    for place, one in enumerate(every):
        body += ["<g>", f"<title>{escape(words.explained(one))}</title>", *_limit(one, 26 + place * PER_LIMIT), "</g>"]
    label = f"{len(every)} limits and the intervals that decide them"
    return marks.drawing("limits", label, body, ACROSS, 26 + len(every) * PER_LIMIT - 6)


def values(report: CompareReport) -> str | None:
    """Baseline and candidate of every metric with their intervals. None where nothing was measured."""
    rows = [line.row for line in words.lines(report)]
    if not rows:
        return None
    body = [
        marks.dot(EDGE + 4, 8, marks.BASE),
        marks.text(EDGE + 12, 11, "baseline", FIGURE, fill=marks.MUTED),
        marks.diamond(EDGE + 72, 8, marks.CANDIDATE),
        marks.text(EDGE + 80, 11, "candidate", FIGURE, fill=marks.MUTED),
    ]
    for place, row in enumerate(rows):
        body += _values(row, 26 + place * PER_VALUE)
    return marks.drawing("values", f"{len(rows)} values on both sides", body, ACROSS, 26 + len(rows) * PER_VALUE - 6)


def _legend() -> list[str]:
    return [
        marks.text(LIMIT - 6, 10, "← allowed", FIGURE, "end", marks.MUTED),
        marks.text(LIMIT + 6, 10, "not allowed →", FIGURE, fill=marks.MUTED),
        marks.stroke(f"M{LIMIT:g} 2v14", marks.INK, 1.4),
        marks.stroke(f"M{EDGE + 2:g} 2v12", marks.MUTED, 1, "2 2"),
        marks.text(EDGE + 8, 10, "no change", FIGURE, fill=marks.MUTED),
    ]


def _limit(one: Asked, y: float) -> list[str]:
    """Two lines: what is asked and what was found, then the strip with the limit, the interval and 'no change'."""
    row, check = one
    figures = words.quantity(one)
    room = ACROSS - 2 * EDGE - 24 - marks.width(figures, FIGURE)
    name = f"{check.label}, {words.QUANTITY[check.rule]}"
    top = y + 15
    out = [
        marks.sign(check.verdict, EDGE, y, 11),
        marks.text(EDGE + 16, y + 9, marks.fitted(name, room, NAME), NAME, weight=600),
        marks.text(ACROSS - EDGE, y + 9, figures, FIGURE, "end"),
        f'<path d="M{EDGE:g} {top:.1f}H{LIMIT:g}v{STRIP:g}H{EDGE:g}Z" fill="{marks.SOFT}"/>',
        f'<path d="M{LIMIT:g} {top:.1f}H{ACROSS - EDGE:g}v{STRIP:g}H{LIMIT:g}Z" fill="{marks.COLORS["REGRESSION"]}" opacity=".13"/>',
    ]
    if check.value is None:
        why = numbers.meaning(row) if check.verdict == "INCOMPARABLE" else "no ratio"
        return [*out, marks.text(EDGE + 8, top + 11.5, why, FIGURE, fill=marks.MUTED), _limit_line(top)]
    return [*out, *_strip(one, check.value, top)]


def _strip(one: Asked, value: float, top: float) -> list[str]:
    """The limit, where the baseline lies, the value with its interval, and the numbers below."""
    row, check = one
    color, middle = marks.COLORS[check.verdict], top + STRIP / 2
    ends = numbers.interval(check)
    still = _no_change(one)
    scale = _scale(one, [value, still, *(ends or ())])
    out = [
        marks.stroke(f"M{scale.place(still):.1f} {top - 2:.1f}v{STRIP + 4:g}", marks.MUTED, 1, "2 2"),
        _limit_line(top),
    ]
    if ends is not None and ends[0] < ends[1]:
        low, high = sorted(map(scale.place, ends))
        out.append(marks.bar(low, high, middle, color))
    shape = marks.diamond if numbers.exact(row) else marks.dot
    shown = numbers.plain_number(check.limit)
    out += [shape(scale.place(value), middle, color), marks.text(LIMIT, top + STRIP + 11, shown, SMALL, "middle")]
    as_before = numbers.plain_number(float(f"{still:.4g}"))
    half = marks.width(as_before, SMALL) / 2
    if abs(scale.place(still) - LIMIT) > half + marks.width(shown, SMALL) / 2 + 4:  # else they would lie on each other
        x = min(max(scale.place(still), EDGE + half), ACROSS - EDGE - half)
        out.append(marks.text(x, top + STRIP + 11, as_before, SMALL, "middle", marks.MUTED))
    return out


def _limit_line(top: float) -> str:
    return marks.stroke(f"M{LIMIT:g} {top - 3:.1f}v{STRIP + 6:g}", marks.INK, 1.6)


def _no_change(one: Asked) -> float:
    """Where the value would lie if candidate and baseline were the same."""
    if one.check.rule in ("min", "max"):
        return one.row.base.value if one.row.base is not None else one.check.limit
    return 1.0 if one.check.rule == "max_ratio" else 0.0


def _scale(one: Asked, shown: Sequence[float]) -> marks.Scale:
    """Puts the limit on its line and everything that is shown onto the strip."""
    sign = -1 if one.check.rule == "min" else 1
    offsets = [sign * (value - one.check.limit) for value in shown]
    room = [(LIMIT - EDGE - 10, -min(offsets)), (ACROSS - EDGE - LIMIT - 10, max(offsets))]
    return marks.Scale(one.check.limit, LIMIT, min((space / most for space, most in room if most > TINY), default=1.0), sign)


def _values(row: Row, y: float) -> list[str]:
    unit = f" [{row.unit}]" if row.unit else ""
    better = f"{row.direction} is better"
    name = marks.fitted(row.label + unit, ACROSS - 2 * EDGE - marks.width(better, SMALL) - 10, NAME)
    out = [
        marks.text(EDGE, y + 9, name, NAME, weight=600),
        marks.text(ACROSS - EDGE, y + 9, better, SMALL, "end", marks.MUTED),
    ]
    top, right = y + 15, ACROSS - EDGE - FIGURES
    sides = [(row.base, marks.BASE, marks.dot), (row.candidate, marks.CANDIDATE, marks.diamond)]
    for place, (measured, color, _) in enumerate(sides):
        out.append(marks.text(ACROSS - EDGE, top + 9 + 12 * place, _short(measured), FIGURE, "end", color))
    known = [end for one, _, _ in sides if one for end in (one.value, *(one.interval() or ()))]
    comparable = not row.incomparable and row.base is not None and row.candidate is not None
    out.append(f'<path d="M{EDGE:g} {top:.1f}H{right:g}v24H{EDGE:g}Z" fill="{marks.SOFT}"/>')
    if not comparable:  # on one axis they would look as if they were
        return [*out, marks.text(EDGE + 8, top + 15, numbers.meaning(row), FIGURE, fill=marks.MUTED)]
    low, high = min(known), max(known)
    scale = marks.Scale((low + high) / 2, (EDGE + right) / 2, (right - EDGE - 24) / (high - low) if high - low > TINY else 1.0)
    for x, shown in _ticks(scale, low, high):
        out.append(marks.stroke(f"M{x:.1f} {top:.1f}v24", marks.LINE))
        out.append(marks.text(x, top + 34, shown, SMALL, "middle", marks.MUTED))
    for place, (measured, color, shape) in enumerate(sides):
        if measured is None:
            continue
        at, lane = scale.place(measured.value), top + 7 + 10 * place
        if (ends := measured.interval()) and ends[0] < ends[1]:
            out.append(marks.bar(scale.place(ends[0]), scale.place(ends[1]), lane, color))
        out.append(shape(at, lane, color))
    return out


def _ticks(scale: marks.Scale, low: float, high: float) -> list[tuple[float, str]]:
    """Places and numbers of an axis, as many as have room beside each other."""
    for most in (4, 3, 2, 1):
        found = [(scale.place(tick), numbers.plain_number(tick)) for tick in marks.ticks(low, high, most)]
        if all(b - a > marks.width(max(one, two, key=len), SMALL) + 6 for (a, one), (b, two) in pairwise(found)):
            return found
    return []


def _short(measured: Measurement | None) -> str:
    """A value with its interval where there is room for both."""
    said = numbers.value(measured)
    return said if marks.width(said, FIGURE) <= FIGURES else said.partition(" [")[0]
