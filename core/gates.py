"""Gates: what a candidate may cost against a baseline, each decided by its 95 % interval, never by a bare value."""

import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from . import methods
from .candidate import Data
from .errors import UserError
from .measurement import Measurement, difference, ratio

Verdict = Literal["PASS", "REGRESSION", "INCONCLUSIVE", "INCOMPARABLE"]
Rule = Literal["max_increase", "max_decrease", "max_ratio", "min", "max"]
ROUNDING = 1e-6  # of the larger value: equal images scored by two builds of torch differ by about this much
MOST = 10**7  # images: an estimate above this only says that the limit is where the candidate is


class Gate(Data):
    """Limits of one metric. Increase, decrease and ratio are of the candidate against the baseline."""

    max_increase: float | None = Field(default=None, ge=0)  # candidate - baseline, at most
    max_decrease: float | None = Field(default=None, ge=0)  # baseline - candidate, at most
    max_ratio: float | None = Field(default=None, gt=0)  # candidate / baseline, at most
    min: float | None = None  # the candidate's own value, at least
    max: float | None = None  # the candidate's own value, at most

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.rules():
            raise ValueError("a gate holds at least one of max_increase, max_decrease, max_ratio, min and max")
        return self

    def rules(self) -> list[tuple[Rule, float]]:
        """The limits that are given, in a fixed order."""
        every: list[tuple[Rule, float | None]] = [
            ("max_increase", self.max_increase),
            ("max_decrease", self.max_decrease),
            ("max_ratio", self.max_ratio),
            ("min", self.min),
            ("max", self.max),
        ]
        return [(rule, limit) for rule, limit in every if limit is not None]


class Check(Data):
    """One limit, and what the measurements say of it."""

    metric: str
    label: str  # FD[zoo:judge], …
    rule: Rule
    limit: float
    verdict: Verdict
    value: float | None = None  # what the rule is about: the increase, the ratio, the candidate's value, …
    low: float | None = None  # its 95 % interval
    high: float | None = None
    images: int | None = None  # that would decide an undecided one, if the value stays what it is
    reason: str  # one sentence


def zero_tolerance(measured: Measurement) -> Gate:
    """No change for the worse at all. Only what is equal or measurably better passes."""
    return Gate(max_increase=0) if measured.direction == "lower" else Gate(max_decrease=0)


def check(metric: str, rule: Rule, limit: float, base: Measurement | None, candidate: Measurement | None) -> Check:
    """Decide one limit: PASS where the whole interval keeps it, REGRESSION where the whole interval breaks it."""
    one = candidate or base
    label = one.label if one is not None else metric
    alone = rule in ("min", "max")  # says nothing of the baseline, which may be measured otherwise or not at all
    if candidate is None or (base is None and not alone):
        sides = (("the candidate", candidate),) if alone else (("the baseline", base), ("the candidate", candidate))
        missing = " and ".join(side for side, m in sides if m is None)
        return Check(
            metric=metric, label=label, rule=rule, limit=limit, verdict="INCOMPARABLE",
            reason=f"{metric} was not measured of {missing}: add it to --metrics.",
        )  # fmt: skip
    base = candidate if base is None or alone else base
    if why := incomparable(base, candidate):
        return Check(metric=metric, label=label, rule=rule, limit=limit, verdict="INCOMPARABLE", reason=why)
    value, interval = _quantity(rule, base, candidate)
    counted = base.exact and candidate.exact  # nothing was rounded
    scale = 1.0 if rule == "max_ratio" else max(abs(base.value), abs(candidate.value))
    slack = 0.0 if alone or counted else ROUNDING * scale
    low, high = interval if interval is not None else (None, None)
    verdict, images, reason = _decide(rule, limit, value, interval, slack, candidate)
    return Check(
        metric=metric, label=label, rule=rule, limit=limit, verdict=verdict,
        value=value if math.isfinite(value) else None, low=low, high=high, images=images, reason=reason,
    )  # fmt: skip


def incomparable(base: Measurement, candidate: Measurement) -> str | None:
    """Why two values may not be compared at all, or None. Other seeds are no reason: they are compared unpaired."""
    facts = [
        ("images" if base.seeds is not None else "repetitions", base.n, candidate.n),
        ("prompt list", _short(base.prompts), _short(candidate.prompts)),
        ("features", base.features, candidate.features),
        ("weights of the features", base.versions.get("features"), candidate.versions.get("features")),
        ("resizing", base.resize, candidate.resize),
        ("reference", _short(base.reference), _short(candidate.reference)),
        ("settings of the metric", base.settings or None, candidate.settings or None),
        ("unit", base.unit, candidate.unit),
        ("version of the evaluation", base.versions.get("evaluation"), candidate.versions.get("evaluation")),
        *((key, base.conditions.get(key), candidate.conditions.get(key)) for key in sorted({*base.conditions, *candidate.conditions})),
    ]  # fmt: skip
    found = [f"{name} ({_said(a)} against {_said(b)})" for name, a, b in facts if a != b]
    return f"the two differ in {', '.join(found)}: measure both alike." if found else None


def overall(checks: "list[Check] | tuple[Check, ...]") -> Verdict:
    """The worst of all: a regression that is certain outweighs what cannot be told."""
    order: tuple[Verdict, ...] = ("REGRESSION", "INCOMPARABLE", "INCONCLUSIVE")
    return next((v for v in order if any(c.verdict == v for c in checks)), "PASS")


def metrics_known() -> dict[str, str]:
    """Every number that there is, and the metric (a file in evaluate/) that gives it."""
    return {part: name for name in methods.names("evaluate") for part in methods.load("evaluate", name).parts}


def metrics_behind(gates: Mapping[str, Gate], measured: tuple[str, ...] = ()) -> list[str]:
    """The metrics to measure so that every gate can be decided. measured: metrics that are measured anyway.

    Raises UserError for a name that no metric gives, with a suggestion.
    """
    known = metrics_known()
    for own in measured:
        if "." in own:  # a module of the user's
            known |= dict.fromkeys(methods.load("evaluate", own).parts, own)
    needed = []
    for name in gates:
        part, at, batch = name.partition("@")
        if at and not (part in ("latency", "latency_p90") and batch.isdigit() and int(batch) > 1):
            raise UserError(f"gates: {name!r}: only latency and latency_p90 have a batch size behind an @, of 2 or more.")
        if part not in known:
            raise UserError(f"gates: no metric {name!r}; there are {', '.join(known)}.{methods.suggest(name, known)}")
        needed.append(known[part])
    return list(dict.fromkeys(needed))


def _quantity(rule: Rule, base: Measurement, candidate: Measurement) -> tuple[float, tuple[float, float] | None]:
    if rule in ("min", "max"):
        return candidate.value, candidate.interval()
    if rule == "max_ratio":
        return ratio(candidate, base)
    return difference(candidate, base) if rule == "max_increase" else difference(base, candidate)


def _decide(
    rule: Rule, limit: float, value: float, interval: tuple[float, float] | None, slack: float, candidate: Measurement
) -> tuple[Verdict, int | None, str]:
    """The verdict, how many images would decide where it is open, and why."""
    what = {
        "max_increase": "increase", "max_decrease": "decrease", "max_ratio": "ratio", "min": "value", "max": "value"
    }[rule]  # fmt: skip
    bound = f"at {'least' if rule == 'min' else 'most'} {limit:g}"
    if interval is None:
        why = "a ratio of values that are not both positive" if rule == "max_ratio" else "too few images for an interval"
        return "INCONCLUSIVE", None, f"{what} {value:.4g} has no interval ({why}), allowed is {bound}."
    low, high = interval
    said = f"{what} {value:.4g} [{low:.4g}, {high:.4g}], allowed is {bound}"
    kept = low >= limit - slack if rule == "min" else high <= limit + slack
    broken = high < limit - slack if rule == "min" else low > limit + slack
    if kept or broken:
        return ("PASS" if kept else "REGRESSION"), None, said + "."
    images = _deciding(limit, value, interval, candidate)
    more = "" if images is None else f"; about {images:,} images would decide it if the value stays"
    return "INCONCLUSIVE", images, f"{said}: the interval holds the limit{more}."


def _deciding(limit: float, value: float, interval: tuple[float, float], candidate: Measurement) -> int | None:
    """Images that would put the limit outside the interval: intervals shrink with the root of their number."""
    half, gap = (interval[1] - interval[0]) / 2, abs(value - limit)
    if candidate.seeds is None or gap == 0:
        return None
    images = candidate.n * (half / gap) ** 2
    if images >= MOST:
        return None
    return max(candidate.n + 1, 100 * round(images / 100) if images >= 1000 else math.ceil(images))


def _short(digest: str | None) -> str | None:
    return digest and digest[:12]


def _said(value: object) -> str:
    return "none" if value is None else str(value)
