"""What the report of a distilled model says, whatever it is drawn in: the verdict, what came back, losses, checks, warnings."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..core.measurement import Measurement
from . import prune_words
from ._words import NOT_MEASURED, bracketed, counted, heading, listed, measured_under, quoted, seed_block, short
from .distill_recovered import Share, Trio, lost, recovered, trios
from .distill_schema import Check, DistillReport, Line
from .prune_words import PLAIN, SAME_OUTPUT, UNKNOWN, not_plain, reloaded
from .prune_words import share as percent

QUALITY = ("metric", "change", "teacher", "before", "after", "ratio", "difference")  # headings of the rows below
LOSSES = ("loss", "weight", "before training", "share of the sum", "at the end")
CHECKS = ("iteration", "value")
SAME = "no measurable change"
OUTCOMES: dict[str, Literal["better", "unclear", "worse", "unmeasured"]] = {
    "better": "better",
    "worse": "worse",
    SAME: "unclear",
    UNKNOWN: "unclear",
    NOT_MEASURED: "unmeasured",
}
LEADS = {
    "better": "Better",
    "worse": "WORSE",
    SAME: "No measurable change",
    UNKNOWN: "Not known whether better or worse",  # no intervals
    NOT_MEASURED: "Change not measured",
}
PICTURES = 6  # of the checks at most
MOST = 12  # checks in the Markdown table


class Verdict(NamedTuple):
    outcome: Literal["better", "unclear", "worse", "unmeasured"]
    sentence: str


def verdict(report: DistillReport) -> Verdict:
    """The whole result in one sentence, about the first metric. One that became WORSE is said first, whichever it is."""
    found = trios(report)
    opens = "opens in plain diffusers." if report.opens_plain else f"{prune_words.NOT_PLAIN}."
    if not found:
        done = f"{counted(report.iterations, 'iteration')} of {report.preset} were done, whether they helped is not known"
        return Verdict("unmeasured", f"Quality not measured: {done}; {opens}")
    first, *others = found
    meaning, worse = change(first), [trio for trio in others if change(trio) == "worse"]
    lead, outcome = f"{LEADS[meaning]}: {_named(first)} ", OUTCOMES[meaning]
    if worse and outcome != "worse":
        spoiled = "; ".join(f"{trio.known.label} {_moved(trio)}" for trio in worse)
        lead = f"WORSE in {spoiled}; {LEADS[meaning][0].lower()}{LEADS[meaning][1:]}: {_named(first)} "
        outcome, worse = "worse", []
    parts = [
        f"{lead}{_moved(first)} on {counted(first.known.n, 'image')}",
        *([f"also worse: {listed([trio.known.label for trio in worse])}"] if worse else []),
        f"the teacher {'was not measured' if first.teacher is None else f'has {quoted(first.teacher)}'}",
        *([said] if (said := came_back(first)) else []),
        opens,
    ]
    return Verdict(outcome, "; ".join(parts))


def change(trio: Trio) -> str:
    """better, worse, or why neither."""
    return _compared(trio)[2]


def came_back(trio: Trio) -> str:
    """How much of the loss against the teacher came back, in words; empty where the teacher was not measured."""
    if (found := recovered(trio)) is not None:
        figure = share(found)
        if found.high < 0:
            return f"what was lost against the teacher grew by {share(Share(-found.value, -found.high, -found.low))}"
        if found.low <= 0:
            return f"no measurable part of what was lost against the teacher came back ({figure})"
        more = ", so that it is ahead of the teacher" if found.low > 1 else ""
        return f"{figure} of what was lost against the teacher came back{more}"
    reasons = {
        "lost": "",  # the result was not measured
        "unclear": "nothing was measurably lost against the teacher before training",
        "ahead": "the student was ahead of its teacher before training",
        "unknown": "",
    }
    return reasons[lost(trio)]


def share(found: Share) -> str:
    """
    >>> share(Share(0.674, 0.602, 0.744)), share(Share(-0.3, -0.4, -0.2))
    ('67 % [60, 74]', '-30 % [-40, -20]')
    """
    figure, _, interval = bracketed(100 * found.value, (100 * found.low, 100 * found.high)).partition(" ")
    return f"{figure} % {interval}"


def recoveries(report: DistillReport) -> list[str]:
    """What came back, metric by metric."""
    return [f"{trio.known.label}: {said}." for trio in trios(report) if (said := came_back(trio))]


def quality_rows(report: DistillReport) -> list[tuple[str, ...]]:
    """Rows under QUALITY."""
    rows = []
    for trio in trios(report):
        relative, gap, meaning = _compared(trio)
        rows.append((heading(trio.known), meaning, *map(quoted, trio), relative, gap))
    return rows


def loss_rows(report: DistillReport) -> list[tuple[str, ...]]:
    """Rows under LOSSES: each term, then their weighted sum."""
    start, last = start_total(report), ending(report)
    rows = []
    for name, weight in report.losses.items():
        first = report.scales.get(name)
        of_sum = "–" if first is None or not start else percent(weight * first, start)
        rows.append((name, f"{weight:g}", short(first), of_sum, short(last.get(name))))
    return [*rows, ("weighted sum", "", short(start), "", short(last.get("total")))] if rows else []


def start_total(report: DistillReport) -> float | None:
    """The weighted sum before the first iteration; None where a term is not known."""
    if not report.losses or not report.losses.keys() <= report.scales.keys():
        return None
    return sum(weight * report.scales[name] for name, weight in report.losses.items())


def ending(report: DistillReport) -> dict[str, float]:
    """Each loss, and "total", averaged over the last tenth of the curve: single batches swing too much to be read."""
    tail = _tail(report)
    if not tail:
        return {}
    found = {name: [line.terms[name] for line in tail if name in line.terms] for name in report.losses}
    found["total"] = [line.total for line in tail]
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def averaged(report: DistillReport) -> str:
    """What the last column of LOSSES is; empty without a curve."""
    tail = _tail(report)
    end = f"at the end: mean of the last {counted(len(tail), 'line')} of the log" if tail else ""
    start = "before training: on the first few samples, hence rough" if report.scales else ""
    return f"Losses before their weights; {'; '.join(filter(None, (start, end)))}." if start or end else ""


def pictured(report: DistillReport) -> list[Check]:
    """The checks whose samples are shown: the first, one in the middle, the last few."""
    drawn = [check for check in report.checks if check.sheet]
    n = len(drawn)
    return drawn if n <= PICTURES else [drawn[i] for i in (0, n // 2, *range(n - PICTURES + 2, n))]


def check_rows(checks: Sequence[Check], most: int | None = None) -> list[tuple[str, str]]:
    """Rows under CHECKS; of more than `most` an even choice with both ends."""
    n = len(checks)
    if most is not None and n > most:
        checks = [checks[round(i * (n - 1) / (most - 1))] for i in range(most)]
    return [(f"{check.iteration:,}", short(check.value)) for check in checks]


def course(report: DistillReport) -> str:
    """The best and the last check, and what they may not be compared with; empty where there are none."""
    if not report.checks:
        return ""
    best, last = min(report.checks, key=lambda check: check.value), report.checks[-1]
    at = f"The best of {counted(len(report.checks), 'check')} is {short(best.value)} at iteration {best.iteration:,}"
    end = (
        ", the last one."
        if best is last
        else f"; the last is {short(last.value)} at iteration {last.iteration:,}, and the last weights were saved."
    )
    return (
        f"{at}{end} Lower is better. Checks are made on other samples than the result is reported on: their course means "
        "something, their values do not compare with the table of quality."
    )


def opening(report: DistillReport) -> list[str]:
    """How the result is opened and how well that was checked."""
    return [not_plain(report) or PLAIN, reloaded(report.reload_difference)]


def conditions(report: DistillReport) -> list[tuple[str, str]]:
    """Under what the numbers hold: a figure without these cannot be compared with another."""
    measured = _measured(report)
    of_teacher = f" ({percent(report.params, report.teacher_params)})" if report.teacher_params else ""
    told = {name: value for name, value in report.stage.items() if name not in ("distill", "teacher", "losses")}
    rows = [
        ("student", report.model),
        ("weights hash", report.model_hash),
        ("teacher", report.teacher),
        ("teacher's weights hash", report.teacher_hash),
        ("pipeline", f"{report.pipeline}, denoiser {report.denoiser}"),
        ("parameters", f"{report.params:,} of the teacher's {report.teacher_params:,}{of_teacher}"),
        ("preset", report.preset),
        ("losses", ", ".join(f"{name} x {weight:g}" for name, weight in report.losses.items())),
        ("paper", report.paper),
        ("stage", ", ".join(f"{name}={value}" for name, value in told.items())),
        ("seed", str(report.seed)),
        *((f"data: {name.replace('_', ' ')}", str(value)) for name, value in report.data.items()),
        ("images", f"{report.samples:,} behind each value" if report.samples else ""),
        ("solver steps", str(report.steps) if report.steps and measured else ""),
        ("seeds", seed_block(measured)),
        ("reference", report.reference),
        *(measured_under(measured) if measured else ()),
    ]
    versions = {"lissom": report.lissom, **(measured.versions if measured else {}), **report.environment}
    rows += [("environment", ", ".join(f"{name} {value}" for name, value in versions.items()))]
    if measured:
        rows += [("intervals of quality", "95 %, from half-samples of the images, paired where the seeds are the same")]
        rows += [("interval of what came back", "95 % (Fieller's), of the ratio of two paired differences")]
    return [(name, text) for name, text in rows if text]


def warnings(report: DistillReport) -> list[str]:
    """What follows from the figures, then the run's own warnings. `not_plain` is shown apart: it may not drown in a list."""
    found, measured = [], trios(report)
    worse = [trio.known.label for trio in measured if change(trio) == "worse"]
    if worse:
        found.append(
            f"Training made the student worse in {listed(worse)}: the model before this stage is the better one there."
        )
    if not measured:
        found.append("No images were scored: whether training gave any quality back is not known.")
    if report.stopped_early:
        found.append(f"Training stopped early, after {_of_asked(report)}: the checks no longer improved.")
    elif report.iterations < report.asked:
        found.append(f"Only {_of_asked(report)} were done.")
    if report.restarts:
        often = "once" if report.restarts == 1 else f"{report.restarts:,} times"
        found.append(
            f"The loss became NaN or infinite {often}: training went back to an earlier state and on with other noise."
        )
    if report.frozen:
        of_all = f" ({percent(report.frozen, report.params)})" if report.params else ""
        found.append(f"No loss reaches {counted(report.frozen, 'parameter')}{of_all}: they stayed as they were.")
    end = ending(report).get("total")
    if end is not None and len(report.curve) > 1 and end >= report.curve[0].total:
        start = short(report.curve[0].total)
        found.append(f"The weighted sum of the losses did not fall: {start} in the first iterations, {short(end)} at the end.")
    if report.reload_difference > SAME_OUTPUT:
        found.append(f"After reloading, outputs differ by {report.reload_difference:.2g} of their largest value.")
    return [*found, *report.warnings]


def seconds(report: DistillReport) -> float | None:
    """The time that this session spent on training."""
    return next((value for name, value in report.spent.items() if "second" in name), None)


def _named(trio: Trio) -> str:
    return f"{trio.known.label} ({trio.known.direction} is better)"


def _moved(trio: Trio) -> str:
    """'from 14.1 [13.9, 14.3] to 12.9 [12.7, 13.1], ratio 0.915 [0.903, 0.927]'."""
    relative, gap, _ = _compared(trio)
    how = ""
    if trio.before is not None and trio.after is not None:
        how = f", difference {gap}" if relative == "–" else f", ratio {relative}"  # a metric below 0 has no ratio
    return f"from {quoted(trio.before)} to {quoted(trio.after)}{how}"


def _compared(trio: Trio) -> tuple[str, str, str]:
    return prune_words.compared(prune_words.Quality(trio.before, trio.after))


def _measured(report: DistillReport) -> Measurement | None:
    found = trios(report)
    return found[0].known if found else None


def _tail(report: DistillReport) -> Sequence[Line]:
    return report.curve[-max(1, len(report.curve) // 10) :]


def _of_asked(report: DistillReport) -> str:
    return f"{report.iterations:,} of {counted(report.asked, 'iteration')}"
