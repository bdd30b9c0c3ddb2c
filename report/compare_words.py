"""What a comparison says, whatever it is drawn in: the verdict in one sentence, every limit, the rows of its table, warnings.

Numbers are written by compare_numbers.py; the words about the two sides (conditions, measurements) are in compare_sides.py.
"""

import re
from typing import Any, NamedTuple

from ..core.gates import Check, Rule, Verdict
from . import compare_sides
from .compare_numbers import Meaning, amount, difference, exact, meaning, plain_number, ratio, share, unpaired, value
from .compare_schema import CompareReport, Row
from .prune_words import counted
from .schema import Ratio

COLUMNS = ("Metric", "Baseline", "Candidate", "Difference (95 % interval)", "Ratio", "Limit", "Status")
MARKS: dict[Verdict, str] = {"PASS": "✓", "REGRESSION": "✗", "INCONCLUSIVE": "?", "INCOMPARABLE": "≠"}
QUANTITY: dict[Rule, str] = {
    "max_increase": "increase", "max_decrease": "decrease", "max_ratio": "ratio", "min": "value", "max": "value"
}  # fmt: skip
WORST_FIRST: tuple[Verdict, ...] = ("REGRESSION", "INCOMPARABLE", "INCONCLUSIVE", "PASS")
CHANGE = "Change: root mean squared difference of the pixels, 0 (equal) to 1 (black against white)."
ONE_SIDED = 0.025  # chance that a 95 % interval lies wholly on the wrong side of the truth
# Terminal codes, what XML forbids, and marks that turn the direction of the text around them: 0.5 would be read as 5.0.
UNREADABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]"
)
MANY = 10  # limits of no change from which on that chance is worth a warning


class Asked(NamedTuple):
    """One limit and the number that it is about."""

    row: Row
    check: Check


class Line(NamedTuple):
    """One number of both sides, in words."""

    row: Row
    name: str
    base: str
    candidate: str
    difference: str
    meaning: Meaning
    paired: str  # "unpaired", or nothing
    ratio: str
    checks: tuple[Check, ...]  # worst first


def readable(report: CompareReport) -> CompareReport:
    """The report without characters that are not seen but change what is: every renderer begins with it."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return UNREADABLE.sub("", value)
        if isinstance(value, dict):
            return {clean(key): clean(one) for key, one in value.items()}
        return [clean(one) for one in value] if isinstance(value, list | tuple) else value

    return CompareReport.model_validate(clean(report.model_dump()))


def asked(report: CompareReport) -> list[Asked]:
    """Every limit, the worst first: broken ones, then what cannot be told, then what is kept."""
    every = [Asked(row, check) for row in report.rows for check in row.checks]
    return sorted(every, key=lambda one: (WORST_FIRST.index(one.check.verdict), -_excess(one)))


def headline(report: CompareReport) -> str:
    """The whole result in one line: what was decided, and by what. The worst is named, the others are counted."""
    return UNREADABLE.sub("", " ".join(f"{report.verdict}: {_decided(report)}".split()))


def _decided(report: CompareReport) -> str:
    every = asked(report)
    deciding = [one for one in every if one.check.verdict == report.verdict]
    if report.verdict == "PASS":
        return _passed(report, every)
    if not deciding:
        return "nothing that both evaluations measured can be compared"
    sentence = explained(deciding[0]).rstrip(".")
    if len(every) > 1:
        how = {"REGRESSION": "broken", "INCONCLUSIVE": "undecided", "INCOMPARABLE": "not comparable"}[report.verdict]
        sentence += f"; {len(deciding)} of {len(every)} limits {'is' if len(deciding) == 1 else 'are'} {how}"
    return sentence + (" (allowed: the exit code is 0)" if report.verdict == "INCONCLUSIVE" and not report.exit_code else "")


def explained(one: Asked) -> str:
    """A limit and what the measurements say of it: 'FD[zoo:judge] rose by 1.21 [0.98, 1.44], allowed is at most 0.5.'"""
    return " ".join(_explained(one).split())


def _explained(one: Asked) -> str:
    row, check = one
    if check.verdict == "INCOMPARABLE" or check.value is None or check.low is None:
        return f"{check.label}: {check.reason}"
    sentence = f"{check.label} {_moved(one)}, {_allowed(one)}"
    if check.verdict != "INCONCLUSIVE":
        return sentence + "."
    if check.images is None:
        return f"{sentence}: the interval holds the limit. More {_repeats(row)} make it narrower."
    return f"{sentence}: the interval holds the limit; about {check.images:,} images would decide it if the value stays."


def quantity(one: Asked) -> str:
    """The quantity that a limit is about, with its interval: '1.21 [0.98, 1.44]'."""
    row, check = one
    if check.value is None:
        return "–"
    figures = Ratio(value=check.value, low=check.low, high=check.high)
    return amount(row, figures) if check.rule != "max_ratio" else share(row, figures)


def limit(check: Check) -> str:
    """'increase at most 0.5', 'no decrease', 'ratio at most 1.05', 'at least 0.8'."""
    number = plain_number(check.limit)
    if check.rule in ("min", "max"):
        return f"at {'least' if check.rule == 'min' else 'most'} {number}"
    return f"no {QUANTITY[check.rule]}" if check.limit == 0 else f"{QUANTITY[check.rule]} at most {number}"


def status(check: Check) -> str:
    """The verdict behind a mark that shows without colour."""
    return f"{MARKS[check.verdict]} {check.verdict}"


def lines(report: CompareReport) -> list[Line]:
    """The rows of the table: those with a limit first, the worst on top, then those of which nothing is asked."""
    places: dict[str, int] = {}
    for place, one in enumerate(asked(report)):
        places.setdefault(one.row.metric, place)
    rows = sorted(report.rows, key=lambda row: places.get(row.metric, len(places) + len(report.checks)))
    return [_line(row) for row in rows]


def unpaired_note(report: CompareReport) -> str:
    """What it means that other seeds were used; empty where all is paired."""
    labels = [row.label for row in report.rows if unpaired(row)]
    if not labels:
        return ""
    return (
        f"Other seeds: unpaired, wider intervals ({named(labels)}). The spread of the images themselves is in the difference; "
        "with the same seeds on both sides most of it would cancel, and smaller changes could be told from noise."
    )


def table_note(report: CompareReport) -> str:
    """How the numbers of the table are to be read."""
    counts = [row.label for row in report.rows if exact(row)]
    text = "Values with 95 % intervals. Difference is candidate minus baseline, ratio candidate / baseline"
    text += ", both paired by image where the seeds are the same." if any(row.paired for row in report.rows) else "."
    return text + (f" Counted, not sampled, hence without interval: {named(counts)}." if counts else "")


def warnings(report: CompareReport) -> list[str]:
    """What follows from the figures, then the run's own warnings."""
    found = []
    every = asked(report)
    gated = [row for row in report.rows if row.checks]
    if not every:
        found.append("No limit was asked for: nothing is decided, and this PASS says nothing.")
    if note := unpaired_note(report):
        found.append(note)
    found += compare_sides.warnings(report)
    worse = [row.label for row in report.rows if not row.checks and meaning(row) == "worse"]
    if worse:
        found.append(f"Measurably worse, but nothing is asked of it: {named(worse)}.")
    if len(gated) == 1 and report.gates:
        found.append(f"Only {gated[0].label} has a limit: what this number cannot see passes.")
    if gated and all(map(exact, gated)):
        found.append("Only counted numbers have a limit: the images may be anything.")
    tight = sum(not exact(one.row) and one.check.value is not None and _no_change(one.check) for one in every)
    if tight >= MANY:
        chance = f"{1 - (1 - ONE_SIDED) ** tight:.0%}".replace("%", " %")
        found.append(
            f"{tight} limits allow no change, each decided at 95 %: where nothing has changed, the chance that at least one is "
            f"called a regression is up to {chance}. Limits above zero make such alarms rare."
        )
    return [*found, *report.warnings]


def named(labels: list[str], most: int = 6) -> str:
    """
    >>> named(["a", "b"]), named(["a", "b", "c"], most=1)
    ('a, b', 'a and 2 more')
    """
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def _line(row: Row) -> Line:
    unit = f" [{row.unit}]" if row.unit else ""
    return Line(
        row=row,
        name=f"{row.label}{unit} ({row.direction} is better)",
        base=value(row.base),
        candidate=value(row.candidate),
        difference=difference(row),
        meaning=meaning(row),
        paired="unpaired" if unpaired(row) else "",
        ratio=ratio(row),
        checks=tuple(sorted(row.checks, key=lambda check: WORST_FIRST.index(check.verdict))),
    )


def _passed(report: CompareReport, every: list[Asked]) -> str:
    if not every:
        return "no limit was asked for, so nothing was decided"
    worse = [row.label for row in report.rows if row.checks and meaning(row) == "worse"]
    kept = f"{counted(len(every), 'limit')} kept"
    return kept + (f"; measurably worse, within what is allowed: {named(worse, 3)}" if worse else "")


def _moved(one: Asked) -> str:
    """'rose by 1.21 [0.98, 1.44]': of the candidate against the baseline, whichever way the rule counts."""
    row, check = one
    assert check.value is not None  # the caller has looked
    found = Ratio(value=check.value, low=check.low, high=check.high)
    if check.rule in ("min", "max"):
        return f"is {amount(row, found)}"
    if check.rule == "max_ratio":
        return f"is {share(row, found)} times the baseline's"
    if meaning(row) == "the same":
        return "did not change"
    rose = (check.rule == "max_increase") == (found.value >= 0)
    return f"{'rose' if rose else 'fell'} by {amount(row, found if found.value >= 0 else _negative(found))}"


def _allowed(one: Asked) -> str:
    check, number = one.check, plain_number(one.check.limit)
    if check.rule in ("min", "max"):
        return f"asked is at {'least' if check.rule == 'min' else 'most'} {number}"
    if check.rule == "max_ratio":
        return f"allowed is at most {number}"
    noun = "rise" if check.rule == "max_increase" else "fall"
    if check.limit == 0:
        return f"no {noun} is allowed"
    return f"allowed is at most {number}" if (check.value or 0) > 0 else f"a {noun} of at most {number} is allowed"


def _negative(found: Ratio) -> Ratio:
    low, high = found.low, found.high
    return Ratio(value=-found.value, low=None if high is None else -high, high=None if low is None else -low)


def _excess(one: Asked) -> float:
    """How far a value is beyond its limit, as a share of the baseline: so that metrics of other units can be ranked."""
    row, check = one
    if check.value is None:
        return 0.0
    over = check.limit - check.value if check.rule == "min" else check.value - check.limit
    scale = abs(row.base.value) if row.base is not None and check.rule != "max_ratio" else 1.0
    return over / (scale or abs(check.limit) or 1.0)


def _no_change(check: Check) -> bool:
    return check.limit == (1 if check.rule == "max_ratio" else 0) and check.rule not in ("min", "max")


def _repeats(row: Row) -> str:
    return "images" if row.candidate is not None and row.candidate.seeds is not None else "repetitions"
