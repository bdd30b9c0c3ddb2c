"""What the report says, whatever it is drawn in: values with their intervals, rows of tables, conditions, warnings.

The verdict is in search_verdict.py, what can be picked in search_front.py, parts and cuts in search_parts.py.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from ..core.candidate import SamplingPlan, Step
from ..core.measurement import Measurement
from .schema import Ratio, Row, Scored, SearchReport

NOT_MEASURED = "not measured"
COSTS = {"macs": "MACs", "latency": "latency (predicted)", "params": "parameters"}  # as they are printed, in this order
RATIOS = {"macs": "MACs ratio", "latency": "latency ratio (predicted)", "params": "parameters ratio"}  # heading tables
DROPPED = "dropped after fewer images"
EQUAL = 0.001  # MACs ratios closer than this are called equal


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
    """One measurement per metric, the objectives first: the columns of the table of results."""
    rows = (report.winner, *report.baselines)
    seen = {m.metric: m for scored in reversed(rows) for m in scored.measurements}
    order = {name: place for place, name in enumerate(report.objectives or (report.objective,))}
    return sorted(seen.values(), key=lambda m: order.get(m.metric, len(order)))


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
    fixed = [(baseline.plan, baseline.cuts) for baseline in report.baselines]
    return [row for row in report.candidates if (row.plan, row.cuts) not in fixed]


def dropped(row: Row, report: SearchReport) -> bool:
    """Whether the candidate was dropped after fewer images than the others: its value does not compare with theirs."""
    return row.state == "complete" and 0 < row.samples < report.samples


def ranked(report: SearchReport) -> list[Row]:
    """Candidates with a value of all images, best objective first, on the search's own seeds."""
    sign = 1 if direction(report) == "lower" else -1
    whole = [row for row in candidates(report) if not dropped(row, report)]
    scored = [(sign * row.value, row.number, row) for row in whole if row.value is not None]
    return [row for *_, row in sorted(scored, key=lambda entry: entry[:2])]


def timesteps(plan: SamplingPlan) -> str:
    return " ".join(f"{t:g}" for t in plan.timesteps)


def skips(plan: SamplingPlan) -> str:
    """Layers skipped at each step, counted: '0 0 2 1', or a dash where none is."""
    counts = [len(step.skip) for step in plan.steps]
    return " ".join(map(str, counts)) if any(counts) else "–"


def reuses(plan: SamplingPlan) -> str:
    """Layers reused at each step, counted as `skips` are."""
    counts = [len(step.reuse) for step in plan.steps]
    return " ".join(map(str, counts)) if any(counts) else "–"


def makers(plan: SamplingPlan) -> str:
    """Which steps, counted from 1, other models make: 'small 1-3, tiny 4', or a dash."""
    found = []
    for name, group in itertools.groupby(enumerate(plan.steps, 1), key=lambda entry: entry[1].model):
        numbers = [i for i, _ in group]
        if name is not None:
            found.append(f"{name} {numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else ""))
    return ", ".join(found) or "–"


def left_out(plan: SamplingPlan) -> str:
    """Skips, then reuse and other models' steps where there are any: '0 0 2 1, reused 0 3 1 1', 'small 1-2'."""
    skipped, reused, others = skips(plan), reuses(plan), makers(plan)
    parts = [skipped] * (skipped != "–") + [f"reused {reused}"] * (reused != "–") + [others] * (others != "–")
    return ", ".join(parts) or "–"


def left_out_head(report: SearchReport) -> str:
    """The title of a column of `left_out`."""
    head = "skips, reuse per step" if reusing(report) else "skips per step"
    return f"{head}, other models' steps" if stitching(report) else head


def uncut(report: SearchReport) -> str:
    """What shares of cost are of."""
    return "the dearest model's uncut run" if "models" in report.space else "the uncut run"


def reusing(report: SearchReport) -> bool:
    """Whether any schedule reuses layers."""
    return any(step.reuse for step in _steps(report))


def stitching(report: SearchReport) -> bool:
    """Whether another model makes any step."""
    return any(step.model for step in _steps(report))


def _steps(report: SearchReport) -> Iterator[Step]:
    everyone: list[Scored | Row] = [report.winner, *report.front, *report.baselines, *report.candidates]
    return (step for one in everyone for step in one.plan.steps)


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
    early = sum(dropped(row, report) for row in proposed)
    saved = f" ({1 - cost.calls / cost.plain_calls:.0%} saved by shared leading steps)" if cost.plain_calls else ""
    return [
        ("candidates", f"{len(proposed):,} of {report.trials:,} asked" + _some(failed, "failed") + _some(early, DROPPED)),
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
        ("varied", ", ".join(report.space)),
        ("objective", report.objective_label if len(report.objectives) < 2 else ""),
        ("objectives", optimised(report) if len(report.objectives) > 1 else ""),
        ("budget", ", ".join(f"{key} <= {value:g}" for key, value in report.budget.items())),
        ("images", f"{report.samples:,} per candidate in the search{_rungs(report)}, {report.report_samples:,} in this report"),
        ("seeds of the report", seed_block(measured)),
        ("seeds of the re-scoring", seed_block(report.winner.rescored)),
        *((f"reference ({role})", text) for role, text in report.reference.items()),
    ]
    rows += report.conditions.items()
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
    searched = [m for m in report.winner.measurements if m.metric in (report.objective, *report.objectives)]
    if len(searched) == len(report.winner.measurements):
        which = "the metric that the search optimised was" if len(searched) < 2 else "metrics that the search optimised were"
        found.append(f"Only {which} measured: a gain in {'it' if len(searched) < 2 else 'them'} alone may be overfitting.")
    failed = Counter(row.error or "no reason recorded" for row in report.candidates if row.state == "failed")
    found += [
        f"{count} of {len(report.candidates)} scorings of the search failed: {error}" for error, count in failed.most_common(3)
    ]
    return found


def cost(one: Scored | Row, name: str) -> float | None:
    """A cost as a share of the uncut run."""
    return one.macs_ratio if name == "macs" else one.costs.get(name)


def priced(report: SearchReport) -> list[str]:
    """The costs besides MACs that have something to say: asked for, or not the same for all."""
    everyone: list[Scored | Row] = [report.winner, *report.front, *report.baselines, *report.candidates]
    found = []
    for name in ("latency", "params"):
        shares = [share for one in everyone if (share := cost(one, name)) is not None]
        asked = name in report.objectives or name in report.budget
        if shares and (asked or any(abs(share - 1) > EQUAL for share in shares)):
            found.append(name)
    return found


def share(one: Scored | Row, name: str) -> str:
    """A cost as it stands in a table."""
    found = cost(one, name)
    return "–" if found is None else f"{found:.3f}"


def objective_name(report: SearchReport, name: str) -> str:
    """An objective as it is printed: the label of a metric, the words for a cost."""
    if name == report.objective:
        return report.objective_label
    everywhere = (report.winner, *report.front, *report.baselines)
    found = next((m for scored in everywhere if (m := find(scored, name))), None)
    return found.label if found else COSTS.get(name, name)


def optimised(report: SearchReport) -> str:
    """What the search optimised, in words: 'FD[zoo:judge] and latency (predicted)'."""
    return listed([objective_name(report, name) for name in report.objectives or (report.objective,)])


def listed(parts: Sequence[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(parts) if len(parts) < 3 else ", ".join(parts[:-1]) + " and " + parts[-1]


def counted(n: int, noun: str) -> str:
    """
    >>> counted(1, "cut"), counted(1200, "cut")
    ('1 cut', '1,200 cuts')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _some(number: int, what: str) -> str:
    return f", {number:,} {what}" if number else ""


def _rungs(report: SearchReport) -> str:
    """The smaller numbers of images after which candidates were dropped."""
    rungs = sorted({row.samples for row in report.candidates if dropped(row, report)})
    return f" (those dropped earlier: {listed([f'{n:,}' for n in rungs])})" if rungs else ""
