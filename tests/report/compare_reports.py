"""Synthetic comparisons, decided by the real gates: every verdict, 40 numbers, other seeds, no limits, no pairs, hostile texts."""

import random
from collections.abc import Mapping
from typing import Any

from lissom.core import measurement
from lissom.core.candidate import Seeds
from lissom.core.gates import Gate, check, incomparable, overall, zero_tolerance
from lissom.core.measurement import Measurement
from lissom.report.compare_schema import CompareReport, Pair, Row, Side
from lissom.report.schema import Ratio
from lissom.tests.report.prune_reports import EVIL

CAPTION = (
    "a photo of a sneaker, seen from the side on a wooden floor, late afternoon light, a long shadow to the left, 35 mm film grain, "
    "shallow depth of field, the laces half untied, a reflection of the window in the varnish, très détaillé, 高精細"
)
REPORT = Seeds(role="report", base=0, count=1024)
OTHER = Seeds(role="report", base=7, count=1024)
LIMITS = {
    "fid": Gate(max_increase=0.5),
    "clip_score": Gate(max_decrease=0.01, min=0.25),
    "latency": Gate(max_ratio=1.05),
    "params": Gate(max_ratio=0.75),
}


def measured(metric: str, value: float, side: str, **changes: Any) -> Measurement:
    """A value with half-samples: most of their spread is the images', which both sides share on the same seeds."""
    lower = not metric.startswith(("clip", "accuracy", "psnr", "higher"))
    record: dict[str, Any] = {
        "metric": metric,
        "value": value,
        "direction": "lower" if lower else "higher",
        "features": "zoo:judge" if metric in ("fid", "clip_score") else None,
        "reference": "ab12" * 16 if metric == "fid" else None,
        "resize": "clean" if metric == "fid" else None,
        "n": 1024,
        "prompts": "cd34" * 16,
        "seeds": REPORT,
        "versions": {"torch": "2.14", "diffusers": "0.42"},
    }
    if metric in ("params", "macs"):
        unit = {"params": "parameters", "macs": "MACs per image"}[metric]
        record |= {"exact": True, "n": 0, "seeds": None, "prompts": None, "unit": unit}
    elif metric.startswith("latency"):
        record |= {"n": 20, "seeds": None, "prompts": None, "unit": "ms per call", "conditions": {"batch": "1", "threads": "2"}}
    record |= changes
    seeds = record["seeds"]
    shared = random.Random(f"{metric}{seeds.base}" if seeds else f"{metric}{side}")
    own = random.Random(f"{metric}{side}")
    size = abs(value) or 1.0
    spread = () if record.get("exact") else [shared.gauss(0, 0.012) + own.gauss(0, 0.003) for _ in range(40)]
    return Measurement.model_validate({"replicates": tuple(value + size * x for x in spread), **record})


def row(metric: str, base: float | Measurement | None, candidate: float | Measurement | None, gate: Gate | None = None) -> Row:
    """A row as `lissom compare` makes it."""
    one = measured(metric, base, "base") if isinstance(base, (int, float)) else base
    two = measured(metric, candidate, "candidate") if isinstance(candidate, (int, float)) else candidate
    known = two or one
    assert known is not None
    why = incomparable(one, two) if one and two else None
    both = one is not None and two is not None and not why
    return Row(
        metric=metric,
        label=known.label,
        unit=known.unit,
        direction=known.direction,
        base=one,
        candidate=two,
        difference=_ratio(measurement.difference(two, one)) if both and one and two else None,
        ratio=_ratio(measurement.ratio(two, one)) if both and one and two and one.value else None,
        paired=both and measurement.paired(one, two) if one and two else False,
        incomparable=why or "",
        checks=tuple(check(metric, rule, limit, one, two) for rule, limit in gate.rules()) if gate else (),
    )


def side(name: str, **changes: Any) -> Side:
    record = {
        "source": f"runs/{name}.json",
        "model": "zoo:fashion" if name == "base" else "runs/pruned/model",
        "model_hash": ("ef56" if name == "base" else "0a1b") * 16,
        "pipeline": "StableDiffusionPipeline",
        "what": "stock schedule of 4 steps" if name == "base" else "a plan of 4 steps (999, 749, 499, 249)",
        "seeds": "report, base 0, images 0 to 1,023",
        "samples": 1024,
        "denoiser_calls": 4096,
        "seconds": 48.3 if name == "base" else 41.9,
        "environment": {"python": "3.13", "gpu": "H200"},
    }
    return Side.model_validate(record | changes)


def pairs(count: int = 30) -> tuple[Pair, ...]:
    rng = random.Random(0)
    changes = sorted((rng.random() * 0.4 for _ in range(count)), reverse=True)
    return tuple(
        Pair(
            index=rng.randrange(1024),
            caption=CAPTION if place == 0 else "" if place == 1 else "a photo of a bag",
            base=f"pairs/{place:03d}-base.png",
            candidate=f"pairs/{place:03d}-candidate.png",
            change=change,
        )
        for place, change in enumerate(changes)
    )


def build(rows: tuple[Row, ...], gates: Mapping[str, Gate] = LIMITS, **changes: Any) -> CompareReport:
    record: dict[str, Any] = {
        "lissom": "0.1",
        "verdict": overall(tuple(one for row in rows for one in row.checks)),
        "gates": dict(gates),
        "gates_source": "gates.yaml" if gates else "none given: zero tolerance for every metric",
        "base": side("base"),
        "candidate": side("candidate"),
        "rows": rows,
        "pairs": pairs(),
        "command": "lissom compare runs/base.json runs/candidate.json --gates gates.yaml",
    }
    return CompareReport.model_validate(record | changes)


def rows(fid: float = 12.4, clip: float = 0.312, latency: float = 24.6) -> tuple[Row, ...]:
    """Six numbers, of which four have limits."""
    return (
        row("accuracy", 0.871, 0.859),
        row("fid", 12.3, fid, LIMITS["fid"]),
        row("clip_score", 0.312, clip, LIMITS["clip_score"]),
        row("latency", 24.5, latency, LIMITS["latency"]),
        row("params", 859_520_964, 601_664_675, LIMITS["params"]),
        row("macs", 3_212_000_000_000, 2_608_144_000_000),
    )


def passed(**changes: Any) -> CompareReport:
    return build(rows(), **changes)


def regression(**changes: Any) -> CompareReport:
    """Two of five limits are broken, one cannot be told."""
    return build(rows(fid=13.9, clip=0.303, latency=27.1), **changes)


def inconclusive(**changes: Any) -> CompareReport:
    return build(rows(fid=12.85), **changes)


def incomparable_features(**changes: Any) -> CompareReport:
    """Scored by other features and on fewer images; one number was not measured at all."""
    other = measured("fid", 14.2, "candidate", features="inception")
    fewer = measured("clip_score", 0.31, "candidate", n=512)
    found = (
        row("fid", 12.3, other, LIMITS["fid"]),
        row("clip_score", 0.312, fewer, LIMITS["clip_score"]),
        row("latency", 24.5, None, LIMITS["latency"]),
        row("params", 859_520_964, 601_664_675, LIMITS["params"]),
    )
    return build(found, **changes)


def unpaired(**changes: Any) -> CompareReport:
    """Other seeds, device and versions."""
    gpu = {"seeds": OTHER, "device": "cuda", "dtype": "float16", "versions": {"torch": "2.6", "diffusers": "0.42"}}
    found = (
        row("fid", 12.3, measured("fid", 13.4, "candidate", **gpu), LIMITS["fid"]),
        row("clip_score", 0.312, measured("clip_score", 0.309, "candidate", **gpu), LIMITS["clip_score"]),
    )
    two = side("candidate", seeds="report, base 7, images 0 to 1,023", environment={"python": "3.11", "gpu": "A100"})
    return build(found, {k: LIMITS[k] for k in ("fid", "clip_score")}, candidate=two, **changes)


def many(count: int = 40, **changes: Any) -> CompareReport:
    """No gates: zero tolerance for each of many numbers."""
    rng, found = random.Random(5), []
    for i in range(count):
        name = ("higher_" if i % 2 else "distance_") + "of_a_metric_with_a_long_name" * (i % 7 == 0) + str(i)
        value = 10 ** rng.uniform(-4, 5)
        one = measured(name, value, "base")
        two = measured(name, value * (1 + rng.gauss(0, 0.004)), "candidate")
        found.append(row(name, one, two, zero_tolerance(one)))
    return build(tuple(found), {}, **changes)


def without_limits(**changes: Any) -> CompareReport:
    return build(tuple(one.model_copy(update={"checks": ()}) for one in rows()), {}, **changes)


def hostile() -> CompareReport:
    """Every text that a model, a user or a metric brings is made to break out of what it stands in."""
    evil = EVIL + "\x1b[31m\x00\u202e%0A::error::x\r\n::set-env name=A::b ]]> @everyone #1 --> ,:"
    texts = {"features": evil, "unit": evil, "settings": {evil: evil}, "conditions": {evil: evil}, "versions": {evil: evil}}
    one = measured("fid", 12.3, "base", **texts)
    two = measured("fid", 14.9, "candidate", **texts)
    three = measured("fid", 14.9, "candidate", **(texts | {"features": "other" + evil}))
    found = (
        row("fid", one, two, Gate(max_increase=0.5, max_ratio=1.2)),
        row("fid", one, three, Gate(max_increase=0.5)).model_copy(update={"metric": "other"}),
    )
    whole = ("source", "model", "model_hash", "pipeline", "what", "seeds")
    both = {name: side(name, **dict.fromkeys(whole, evil), environment={evil: evil + name}) for name in ("base", "candidate")}
    pair = Pair(index=3, caption=evil, base="http://evil/e.png", candidate="../../" + evil, change=0.5)
    return build(
        found, {evil: Gate(max_increase=0.5)}, base=both["base"], candidate=both["candidate"], gates_source=evil, command=evil,
        warnings=(evil, "[x]: http://evil/e.png", "# a heading", "``` fence", "1. a list"), pairs=(pair,), pairs_missing=evil,
    )  # fmt: skip


def _ratio(found: tuple[float, tuple[float, float] | None]) -> Ratio:
    value, ends = found
    return Ratio(value=value, low=ends[0] if ends else None, high=ends[1] if ends else None)


EVERY = {
    "pass": passed,
    "regression": regression,
    "inconclusive": inconclusive,
    "incomparable": incomparable_features,
    "unpaired": unpaired,
    "many": many,
    "without_limits": without_limits,
    "hostile": hostile,
}
