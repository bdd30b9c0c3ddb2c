"""What the report says, whatever it is drawn in: the verdict, values with their intervals, rows of tables."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from ..core.candidate import SamplingPlan
from ..core.measurement import Measurement
from .schema import Ratio, Row, Scored, SearchReport

Outcome = Literal["better", "unclear", "worse", "unmeasured"]
NOT_MEASURED = "not measured"
EQUAL = 0.001  # MACs ratios closer than this are called equal


class Verdict(NamedTuple):
    outcome: Outcome
    sentence: str


def verdict(report: SearchReport) -> Verdict:
    """The whole result in one sentence. Only an interval that lies wholly above 1 counts as a gain."""
    best, winner = best_fixed(report), report.winner
    outcome = _outcome(report)
    relative = winner.macs_ratio / best.macs_ratio
    dearer = "costlier " if relative > 1 + EQUAL else ""  # said up front: it may not hide in a table
    measured = find(winner, report.objective)
    images = f", on {measured.n:,} unseen images" if measured else ""
    figures = (
        f"{dearer}searched {len(winner.plan.steps)}-step plan: {report.objective_label} {quoted(measured)} against "
        f"{quoted(find(best, report.objective))} of the best fixed schedule ({best.name}), "
        f"{ratio_words(report.ratio)}{images}, {_cost(relative)}."
    )
    lead = {
        "better": "",
        "unclear": "The search did not beat the best fixed schedule (the interval of the ratio includes 1); ",
        "worse": "The search did not beat the best fixed schedule, it is worse; ",
        "unmeasured": "Whether the search beat the best fixed schedule is not known (the ratio has no interval); ",
    }[outcome]
    sentence = lead + figures
    return Verdict(outcome, sentence[0].upper() + sentence[1:])


def direction(report: SearchReport) -> Literal["lower", "higher"]:
    """Which way the objective is better."""
    measured = find(report.winner, report.objective)
    return measured.direction if measured else "lower"


def best_fixed(report: SearchReport) -> Scored:
    """The baseline that the winner is compared with. Raises ValueError when report.json names none of its baselines."""
    found = next((b for b in report.baselines if b.name == report.best_fixed), None)
    if found is None:
        names = ", ".join(b.name for b in report.baselines) or "none"
        raise ValueError(f"report.json: best_fixed is {report.best_fixed!r}, which is not one of its baselines ({names})")
    return found


def find(scored: Scored, metric: str) -> Measurement | None:
    return next((m for m in scored.measurements if m.metric == metric), None)


def metrics(report: SearchReport) -> list[Measurement]:
    """One measurement per metric, the objective first: the columns of the table of results."""
    rows = (report.winner, *report.baselines)
    seen = {m.metric: m for scored in reversed(rows) for m in scored.measurements}
    return sorted(seen.values(), key=lambda m: m.metric != report.objective)


def heading(measured: Measurement) -> str:
    unit = f" [{measured.unit}]" if measured.unit else ""
    return f"{measured.label}{unit} ({measured.direction} is better)"


def quoted(measured: Measurement | None) -> str:
    """A value with its 95 % interval: '12.3 [11.9, 12.8]'."""
    if measured is None:
        return NOT_MEASURED
    return bracketed(measured.value, measured.interval())


def bracketed(value: float, interval: tuple[float, float] | None) -> str:
    """Rounded to what the interval supports: its half-width keeps one or two digits.

    >>> bracketed(12.3456, (11.9, 12.8)), bracketed(1.6329, (1.55, 1.71)), bracketed(20.123456, None), bracketed(988.02, (988.02,) * 2)
    ('12.3 [11.9, 12.8]', '1.63 [1.55, 1.71]', '20.12 (no interval)', '988.0 [988.0, 988.0]')
    """
    if interval is None:
        return f"{short(value)} (no interval)"
    low, high = interval
    half = (high - low) / 2
    scale = math.floor(math.log10(abs(value))) if value else 0
    digits = min(6, max(0, math.ceil(-math.log10(half / 2)) if half > 0 else 3 - scale))
    return f"{value:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"  # z: no minus before a zero


def short(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "–" if value is None else f"{value:.4g}"


def ratio_words(ratio: Ratio | None) -> str:
    """'ratio 1.63 [1.55, 1.71]': above 1 the searched plan is better, whichever way the metric points."""
    if ratio is None:
        return f"ratio {NOT_MEASURED}"
    interval = None if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)
    return f"ratio {bracketed(ratio.value, interval)}"


def candidates(report: SearchReport) -> list[Row]:
    """What the search proposed: the rows without the fixed schedules, which are scored beside them."""
    fixed = [baseline.plan for baseline in report.baselines]
    return [row for row in report.candidates if row.plan not in fixed]


def ranked(report: SearchReport) -> list[Row]:
    """Complete candidates, best objective first, on the search's own seeds."""
    sign = 1 if direction(report) == "lower" else -1
    scored = [(sign * row.value, row.number, row) for row in candidates(report) if row.value is not None]
    return [row for *_, row in sorted(scored, key=lambda entry: entry[:2])]


def timesteps(plan: SamplingPlan) -> str:
    return " ".join(f"{t:g}" for t in plan.timesteps)


def skips(plan: SamplingPlan) -> str:
    """Layers skipped at each step, counted: '0 0 2 1', or a dash where none is."""
    counts = [len(step.skip) for step in plan.steps]
    return " ".join(map(str, counts)) if any(counts) else "–"


def training_steps(plans: Iterable[SamplingPlan]) -> int:
    """N of the noise schedule, the length of the time axis."""
    return max(int(plan.scheduler.config.get("num_train_timesteps", 1000)) for plan in plans)


def duration(seconds: float) -> str:
    """
    >>> duration(48.3), duration(125), duration(3 * 3600 + 62)
    ('48 s', '2 min 5 s', '3 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def spent(report: SearchReport) -> list[tuple[str, str]]:
    """What the run cost, in words."""
    cost, proposed = report.spent, candidates(report)
    failed = sum(row.state == "failed" for row in proposed)
    saved = f" ({1 - cost.calls / cost.plain_calls:.0%} saved by shared leading steps)" if cost.plain_calls else ""
    return [
        ("candidates", f"{len(proposed):,} of {report.trials:,} asked" + (f", {failed:,} failed" if failed else "")),
        ("evaluations", f"{cost.evaluations:,} (images really made)"),
        ("denoiser calls", f"{cost.calls:,} executed; the plain loop takes {cost.plain_calls:,}{saved}"),
        ("time", f"{duration(cost.seconds)} over all sessions"),
    ]


def conditions(report: SearchReport) -> list[tuple[str, str]]:
    """Under what the numbers hold: a figure without these cannot be compared with another."""
    measured = find(report.winner, report.objective) or next(iter(report.winner.measurements), None)
    rows = [
        ("model", report.model),
        ("weights hash", report.model_hash),
        ("pipeline", f"{report.pipeline}, denoiser of {report.denoiser_parameters:,} parameters"),
        ("solver", f"{report.winner.plan.scheduler.name}, {report.steps} steps asked"),
        ("method", report.method + "".join(f", {key}={value}" for key, value in report.settings.items())),
        ("paper", report.paper),
        ("objective", report.objective_label),
        ("budget", ", ".join(f"{key} <= {value:g}" for key, value in report.budget.items())),
        ("images", f"{report.samples:,} per candidate in the search, {report.report_samples:,} in this report"),
        ("seeds of the report", seed_block(measured)),
        ("seeds of the re-scoring", seed_block(report.winner.rescored)),
        *((f"reference ({role})", text) for role, text in report.reference.items()),
    ]
    if measured:
        rows += measured_under(measured)
    versions = {"lissom": report.lissom, **(measured.versions if measured else {}), **report.environment}
    rows += [("environment", ", ".join(f"{key} {value}" for key, value in versions.items()))]
    rows += [("intervals", "95 %, from half-samples of the images; they do not cover the choice of the search's seed")]
    return [(name, text) for name, text in rows if text]


def measured_under(measured: Measurement) -> list[tuple[str, str]]:
    """What a value depends on besides the model and the images; some texts may be empty."""
    return [
        ("reference hash", measured.reference or ""),
        ("features", measured.features or ""),
        ("resize", measured.resize or ""),
        ("prompts hash", measured.prompts or ""),
        ("device, dtype", f"{measured.device}, {measured.dtype}"),
    ]


def seed_block(measured: Measurement | None) -> str:
    """Which images a value comes from, empty where that is not recorded."""
    if measured is None or measured.seeds is None:
        return ""
    seeds = measured.seeds
    return f"role {seeds.role}, base {seeds.base}, images {seeds.start:,} to {seeds.start + seeds.count - 1:,}"


def warnings(report: SearchReport) -> list[str]:
    """The run's own warnings and those that follow from the figures."""
    found = list(report.warnings)
    if not any(m.metric != report.objective for m in report.winner.measurements):
        found.append("Only the metric that the search optimised was measured: a gain in it alone may be overfitting.")
    failed = Counter(row.error or "no reason recorded" for row in report.candidates if row.state == "failed")
    found += [
        f"{count} of {len(report.candidates)} scorings of the search failed: {error}" for error, count in failed.most_common(3)
    ]
    return found


def _outcome(report: SearchReport) -> Outcome:
    ratio = report.ratio
    if ratio is None or ratio.low is None or ratio.high is None:
        return "unmeasured"
    return "better" if ratio.low > 1 else "worse" if ratio.high < 1 else "unclear"


def _cost(relative: float) -> str:
    if abs(relative - 1) <= EQUAL:
        return "at equal MACs"
    return f"at {relative:.2f} {'of' if relative < 1 else 'times'} the fixed schedule's MACs"
