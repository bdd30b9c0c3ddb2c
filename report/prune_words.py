"""What the report of a pruned model says, whatever it is drawn in: the verdict, sizes, times, quality, warnings.

The words about single layers and cuts are in prune_layers.py.
"""

from typing import Literal, NamedTuple

from ..core.measurement import Measurement, difference, ratio
from ._words import NOT_MEASURED, bracketed, counted, duration, heading, listed, measured_under, quoted, seed_block, short
from .distill_schema import DistillReport
from .prune_schema import Additivity, Latency, PruneReport

Pace = Literal["faster", "unclear", "slower"]
PACES: tuple[Pace, ...] = ("faster", "unclear", "slower")  # from best to worst
NOT_PLAIN = "NOT PLAIN DIFFUSERS: it opens only with trust_remote_code=True"
PLAIN = "DiffusionPipeline.from_pretrained opens it without trust_remote_code and without lissom."
SAME_OUTPUT = 1e-3  # relative difference after a reload; float32 gives about 1e-6, half precision about 1e-3
UNKNOWN = "not known"  # which way a metric went: there is no interval
SIZES = ("", "before", "after", "share")  # headings of the rows below
TIMES = ("batch", "latency ratio", "speed", "before [ms]", "after [ms]")
QUALITY = ("metric", "change", "before", "after", "ratio", "difference")
MISSED = 2.0  # real loss / predicted loss (or its inverse) beyond which the prediction is called off


class Verdict(NamedTuple):
    outcome: Literal["faster", "unclear", "slower", "unmeasured"]
    sentence: str


class Quality(NamedTuple):
    """One metric before and after; None where that model was not measured with it."""

    before: Measurement | None
    after: Measurement | None

    @property
    def known(self) -> Measurement:
        found = self.before or self.after
        assert found is not None  # `quality` makes no pair of nothing
        return found


def verdict(report: PruneReport) -> Verdict:
    """The whole result in one sentence. Slower at any measured batch size is SLOWER, and is said first."""
    slowest = worst(report)
    outcome = pace(slowest) if slowest else "unmeasured"
    kept = f"keeps {share(report.after.params, report.before.params)} of the parameters"
    kept += f" and {share(report.after.macs, report.before.macs)} of the MACs ({counted(len(report.cuts), 'cut')})"
    parts = [_speed(report), kept, _first_quality(report)]
    if report.opens_plain:
        return Verdict(outcome, "; ".join([*parts, "opens in plain diffusers."]))
    return Verdict(outcome, "; ".join(parts) + f". {NOT_PLAIN}.")


def not_plain(report: PruneReport | DistillReport) -> str:
    """The loud sentence about a result that stock diffusers does not open; empty for one that it does."""
    if report.opens_plain:
        return ""
    reason = report.not_plain_because.strip().rstrip(".") or "no stock config describes its cuts"
    return f"{NOT_PLAIN}. Why: {reason}."


def pace(latency: Latency) -> Pace:
    """What the ratio supports: an interval that lies wholly on one side of 1. Without one, no gain is claimed."""
    value, low, high = latency.ratio.value, latency.ratio.low, latency.ratio.high
    if low is None or high is None:
        return "slower" if value > 1 else "unclear"
    return "slower" if low > 1 else "faster" if high < 1 else "unclear"


def worst(report: PruneReport) -> Latency | None:
    """The batch size that gained least: one that is slower comes before one that is only unclear, whatever their ratios."""
    return max(report.latency, key=lambda one: (PACES.index(pace(one)), one.ratio.value), default=None)


def latency_ratio(latency: Latency) -> str:
    """'0.78 [0.77, 0.80]': below 1 the pruned model is faster."""
    found = latency.ratio
    return bracketed(found.value, None if found.low is None or found.high is None else (found.low, found.high))


def share(after: float, before: float) -> str:
    """
    >>> share(7, 10), share(3, 0)
    ('70.0 %', '–')
    """
    return f"{100 * after / before:.1f} %" if before else "–"


def scaled(number: float, unit: str = "") -> str:
    """A large number with a decimal prefix.

    >>> scaled(401_234_567_890), scaled(3_438_167_540, "B"), scaled(812)
    ('401.2 G', '3.438 GB', '812')
    """
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {prefix}{unit}"
    return f"{number:.4g} {unit}".strip()


def sizes(report: PruneReport) -> list[tuple[str, str, str, str]]:
    """Rows under SIZES: the share is what stays."""
    before, after = report.before, report.after
    return [
        ("parameters", f"{before.params:,}", f"{after.params:,}", share(after.params, before.params)),
        ("MACs per image and call", scaled(before.macs), scaled(after.macs), share(after.macs, before.macs)),
        ("weight files on disk", scaled(before.disk, "B"), scaled(after.disk, "B"), share(after.disk, before.disk)),
    ]


def times(report: PruneReport) -> list[tuple[str, str, str, str, str]]:
    """Rows under TIMES."""
    speed = {"faster": "faster", "unclear": "not measurably faster", "slower": "SLOWER"}
    return [
        (str(one.batch), latency_ratio(one), speed[pace(one)], short(one.before), short(one.after)) for one in report.latency
    ]


def quality(report: PruneReport) -> list[Quality]:
    """The metrics in the order in which they were measured, each before and after."""
    found = {scored.name: {(m.metric, m.label): m for m in scored.measurements} for scored in report.scored}
    before, after = found.get("before", {}), found.get("after", {})
    return [Quality(before.get(key), after.get(key)) for key in {**before, **after}]


def compared(pair: Quality) -> tuple[str, str, str]:
    """(ratio after / before, difference after - before, what that means), paired where the seeds are the same."""
    before, after = pair
    if before is None or after is None:
        return "–", "–", NOT_MEASURED
    gap, interval = difference(after, before)
    relative = bracketed(*ratio(after, before)) if before.value > 0 and after.value > 0 else "–"
    if interval is None:
        meaning = UNKNOWN
    elif interval[0] <= 0 <= interval[1]:
        meaning = "no measurable change"
    else:
        meaning = "worse" if (gap > 0) == (before.direction == "lower") else "better"
    return relative, bracketed(gap, interval), meaning


def quality_rows(report: PruneReport) -> list[tuple[str, str, str, str, str, str]]:
    """Rows under QUALITY."""
    rows = []
    for pair in quality(report):
        relative, gap, meaning = compared(pair)
        rows.append((heading(pair.known), meaning, quoted(pair.before), quoted(pair.after), relative, gap))
    return rows


def additive(found: Additivity) -> str:
    """Whether adding up single scores was justified, in words."""
    rank = found.rank_correlation
    trust = (
        "The sum ranks sets of cuts well: choosing them by their single scores is sound here."
        if rank >= 0.9
        else "The sum ranks sets of cuts roughly: a choice by single scores may miss better sets."
        if rank >= 0.6
        else "The sum hardly ranks sets of cuts: a choice by single scores is little better than a guess."
    )
    together = (
        "about what their scores say" if 0.8 <= found.ratio <= 1.25 else
        "more than their scores say" if found.ratio > 1 else "less than their scores say"
    )  # fmt: skip
    return (
        f"Every score is of one cut alone. Over {counted(len(found.sums), 'random set')} of cuts made together, the sum of the "
        f"scores and the real loss have a rank correlation (Spearman) of {rank:.3f}; the real loss is {found.ratio:.3g} times "
        f"the sum (median): together, cuts cost {together}. {trust}"
    )


def losses(report: PruneReport) -> str:
    """The real loss of all cuts beside the predicted one; empty when neither is known."""
    if report.loss is None and report.predicted_loss is None:
        return ""
    real = NOT_MEASURED if report.loss is None else short(report.loss)
    text = f"Loss of all cuts together, {report.loss_is}: {real}"
    if report.predicted_loss is not None:
        text += f"; the sum of the scores of what was cut predicted {short(report.predicted_loss)}"
    return text + "."


def opening(report: PruneReport) -> list[str]:
    """How the result is opened and how well that was checked."""
    how = not_plain(report) or PLAIN
    names = f"{counted(report.renamed, 'module')} changed names; lissom.json has the map." if report.renamed else ""
    return [text for text in (how, names, reloaded(report.reload_difference)) if text]


def reloaded(gap: float) -> str:
    """What the check in a fresh process found."""
    same = (
        "the output is the same to the last bit" if gap == 0 else f"outputs differ by at most {gap:.2g} of their largest value"
    )
    return f"Reload check, in a fresh process against the model in memory: {same}."


def spent(report: PruneReport | DistillReport) -> list[tuple[str, str]]:
    """What the run cost. Keys that speak of seconds are printed as durations."""
    return [
        (key.replace("_", " "), duration(value) if "second" in key else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
        for key, value in report.spent.items()
    ]


def conditions(report: PruneReport) -> list[tuple[str, str]]:
    """Under what the numbers hold: a figure without these cannot be compared with another."""
    pairs = quality(report)
    measured = pairs[0].known if pairs else None
    asked = "" if report.keep is None else f"{report.keep:.4g} of the {_share_of(report)}"
    rows = [
        ("model", report.model),
        ("weights hash", report.model_hash),
        ("pipeline", f"{report.pipeline}, denoiser {report.denoiser}"),
        ("method", report.method + "".join(f", {key}={value}" for key, value in report.settings.items())),
        ("paper", report.paper),
        ("asked to keep", asked),
        *((f"calibration: {key.replace('_', ' ')}", str(value)) for key, value in report.calibration.items()),
        ("images", f"{report.samples:,} behind each value" if report.samples else ""),
        ("solver steps", str(report.steps) if report.steps and measured else ""),
        ("seeds", seed_block(measured)),
        ("reference", report.reference),
        *(measured_under(measured) if measured else ()),
    ]
    versions = {"lissom": report.lissom, **(measured.versions if measured else {}), **report.environment}
    rows += [("environment", ", ".join(f"{key} {value}" for key, value in versions.items()))]
    if measured:
        rows += [("intervals of quality", "95 %, from half-samples of the images, paired where the seeds are the same")]
    if report.latency:
        rows += [("intervals of latency", "over the repetitions, before and after in turns, in one process on this machine")]
    return [(name, text) for name, text in rows if text]


def warnings(report: PruneReport) -> list[str]:
    """What follows from the figures, then the run's own warnings. `not_plain` is shown apart: it may not drown in a list."""
    found = []
    slow = [f"batch {one.batch} ({latency_ratio(one)})" for one in report.latency if pace(one) == "slower"]
    if slow:
        found.append(f"The pruned model is slower than its parent at {listed(slow)}: MACs and parameters are no seconds.")
    if not report.latency:
        found.append("No latency was measured: that the model is smaller does not make it faster.")
    if not quality(report):
        found.append("No images were scored: what the cuts cost in quality is not known.")
    if report.reload_difference > SAME_OUTPUT:
        found.append(f"After reloading, outputs differ by {report.reload_difference:.2g} of their largest value.")
    if report.loss and report.predicted_loss and not 1 / MISSED <= report.loss / report.predicted_loss <= MISSED:
        times_ = f"{report.loss / report.predicted_loss:.3g} times"
        found.append(f"All cuts together cost {times_} what the sum of their scores predicted.")
    got = _kept(report)
    if report.keep is not None and got is not None and got > report.keep + 5e-4:
        found.append(f"{report.keep:.1%} of the {_share_of(report)} were asked for, {got:.1%} are left.".replace("%", " %"))
    return [*found, *report.warnings]


def _speed(report: PruneReport) -> str:
    slowest = worst(report)
    if slowest is None:
        return "Speed not measured"
    paces = [pace(one) for one in report.latency]
    words = {"faster": " (faster)", "unclear": " (no measurable difference)", "slower": " (slower)"}
    mixed = len(set(paces)) > 1  # then every batch size says which it is
    each = [
        f"{latency_ratio(one)} times as long at batch {one.batch}{words[how] if mixed else ''}"
        for one, how in zip(report.latency, paces, strict=True)
    ]
    lead = {"slower": "SLOWER", "unclear": "Not measurably faster", "faster": "Faster"}[pace(slowest)]
    return f"{lead}: a denoiser call takes {listed(each)}"


def _first_quality(report: PruneReport) -> str:
    pairs = quality(report)
    if not pairs:
        return "quality not measured"
    first = pairs[0]
    relative, gap, meaning = compared(first)
    how = ""
    if first.before is not None and first.after is not None:
        how = f", difference {gap}" if relative == "–" else f", ratio {relative}"  # a metric below 0 has no ratio
        how += "" if meaning == UNKNOWN else f" ({meaning})"
    return (
        f"{first.known.label} ({first.known.direction} is better) from {quoted(first.before)} to {quoted(first.after)}{how} "
        f"on {counted(first.known.n, 'image')}"
    )


def _kept(report: PruneReport) -> float | None:
    """The share that `keep` speaks of, as it came out."""
    if report.of == "latency":
        return report.latency[0].ratio.value if report.latency else None
    before, after = getattr(report.before, report.of), getattr(report.after, report.of)
    return after / before if before else None


def _share_of(report: PruneReport) -> str:
    return {"params": "parameters", "macs": "MACs", "latency": "latency"}[report.of]
