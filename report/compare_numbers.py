"""The numbers of a comparison as they are written: values, differences, ratios, and what became of each."""

from typing import Literal

from ..core.gates import ROUNDING, Check
from ..core.measurement import Measurement
from ._words import NOT_MEASURED, bracketed, quoted
from .compare_schema import Row
from .prune_words import scaled
from .schema import Ratio

Meaning = Literal["better", "worse", "no measurable change", "the same", "not known", "not comparable", "not measured"]


def meaning(row: Row) -> Meaning:
    """What became of a number. Better or worse only where the whole interval is on one side of zero."""
    if row.base is None or row.candidate is None:
        return "not measured"
    if row.incomparable:
        return "not comparable"
    found = row.difference
    if found is None or found.low is None or found.high is None:
        return "not known"
    rounding = (
        0.0 if exact(row) else ROUNDING * max(abs(row.base.value), abs(row.candidate.value))
    )  # of counts nothing was rounded
    if max(abs(found.low), abs(found.high)) <= rounding:
        return "the same"
    if found.low <= 0 <= found.high:
        return "no measurable change"
    return "worse" if (found.value > 0) == (row.direction == "lower") else "better"


def exact(row: Row) -> bool:
    """Whether both values are counted: they have no interval."""
    return row.base is not None and row.candidate is not None and row.base.exact and row.candidate.exact


def unpaired(row: Row) -> bool:
    """Whether images of other seeds are compared. What is counted or timed has no seeds to pair."""
    comparable = row.base is not None and row.candidate is not None and not row.incomparable
    return comparable and not row.paired and not exact(row) and bool(row.base and row.base.seeds)


def value(measured: Measurement | None) -> str:
    """A value with its interval; in full or with a decimal prefix where it was counted."""
    if measured is None:
        return NOT_MEASURED
    return plain_number(measured.value) if measured.exact else quoted(measured)


def difference(row: Row) -> str:
    """candidate - baseline: '+1.21 [0.98, 1.44]', '-257.9 M'."""
    found = row.difference
    if found is None:
        return "–"
    if meaning(row) == "the same":
        return "0"
    text = amount(row, found)
    zero = not text.strip("-+").split()[0].strip("0.")
    return f"+{text}" if found.value > 0 and not zero else text


def ratio(row: Row) -> str:
    """candidate / baseline, or a dash where a share of what is not positive would say nothing."""
    found = row.ratio
    if found is None or row.base is None or row.candidate is None or row.base.value <= 0 or row.candidate.value < 0:
        return "–"
    return "1" if meaning(row) == "the same" else share(row, found)


def amount(row: Row, found: Ratio) -> str:
    """A difference or a value of a row with its interval, without one where it was counted."""
    return plain_number(found.value) if exact(row) else bracketed(found.value, interval(found))


def share(row: Row, found: Ratio) -> str:
    """A ratio of a row, likewise."""
    return f"{found.value:.4g}" if exact(row) else bracketed(found.value, interval(found))


def plain_number(number: float) -> str:
    """A number that has no interval to round it by.

    >>> plain_number(0.5), plain_number(1_234_567), plain_number(859_520_964), plain_number(-1e-7)
    ('0.5', '1,234,567', '859.5 M', '-1e-07')
    """
    if number != int(number):
        return f"{number:g}" if abs(number) < 1e7 else scaled(number)
    return f"{number:,.0f}" if abs(number) < 1e7 else scaled(number)


def interval(found: Ratio | Check) -> tuple[float, float] | None:
    """Both ends, or None."""
    return None if found.low is None or found.high is None else (found.low, found.high)
