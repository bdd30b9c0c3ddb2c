"""What a comparison says of its two sides: under which conditions each was measured, and where these differ."""

from collections.abc import Iterable
from typing import NamedTuple

from ..core.measurement import Measurement
from ._words import duration
from .compare_schema import CompareReport, Side

RUN = ("source", "denoiser calls", "time")  # differ from run to run and say nothing about the numbers
PER_METRIC = ("features", "evaluation")  # versions that belong to single metrics: others would be incomparable


class Condition(NamedTuple):
    """One condition on both sides."""

    name: str
    base: str
    candidate: str
    version: bool = False  # of a library, the machine, …: worth a line where it differs

    @property
    def differs(self) -> bool:
        return self.base != self.candidate and self.name not in RUN


class Taken(NamedTuple):
    """One measurement in full."""

    label: str
    side: str
    number: float
    value: str
    interval: str
    under: str  # everything that it depends on


def conditions(report: CompareReport) -> list[Condition]:
    """What both sides were measured under; a figure without these cannot be compared with another."""
    pairs = [(_facts(side), _versions(side, measured(report, name))) for name, side in _sides(report)]
    (base, base_versions), (candidate, candidate_versions) = pairs
    base["device, dtype"], candidate["device, dtype"] = (_devices(measured(report, name)) for name, _ in _sides(report))
    found = [Condition(name, base[name], candidate[name]) for name in base]
    names = dict.fromkeys([*base_versions, *candidate_versions])
    found += [Condition(n, base_versions.get(n, "–"), candidate_versions.get(n, "–"), version=True) for n in names]
    return [one for one in found if one.base or one.candidate]


def common(report: CompareReport) -> list[tuple[str, str]]:
    """What holds for the comparison as a whole."""
    limits = "; ".join(
        f"{name}: " + ", ".join(f"{rule} {limit:g}" for rule, limit in gate.rules()) for name, gate in report.gates.items()
    )
    return [
        ("limits from", report.gates_source),
        *([("limits", limits)] if limits else []),
        ("undecided limits", "allowed (--allow-inconclusive)" if report.allow_inconclusive else "fail (exit code 4)"),
        ("intervals", "95 %, from half-samples of the images; a limit is kept or broken only by the whole interval"),
        ("compared by", f"lissom {report.lissom}"),
    ]


def measurements(report: CompareReport) -> list[Taken]:
    """Every measurement of both sides, in full."""
    return [
        _taken(one, side) for row in report.rows for side, one in (("baseline", row.base), ("candidate", row.candidate)) if one
    ]


def measured(report: CompareReport, side: str) -> list[Measurement]:
    """All measurements of the 'baseline' or of the 'candidate'."""
    return [one for row in report.rows if (one := row.base if side == "baseline" else row.candidate) is not None]


def warnings(report: CompareReport) -> list[str]:
    """What the two sides alone say about how far their numbers can be trusted."""
    found = []
    differing = [one for one in conditions(report) if one.differs]
    if device := next((one for one in differing if one.name == "device, dtype"), None):
        found.append(
            f"Other device or data type ({device.base} against {device.candidate}): a part of a difference may be theirs."
        )
    if versions := [f"{one.name} {one.base} against {one.candidate}" for one in differing if one.version]:
        found.append(f"Other versions or machine: {'; '.join(versions)}.")
    base, candidate = report.base, report.candidate
    same = base.model_hash == candidate.model_hash and base.what == candidate.what and base.pipeline == candidate.pipeline
    if same and base.model_hash:
        found.append(
            "Both evaluations are of the same weights and the same plan: what differs comes from seeds, machine or versions."
        )
    return found


def _sides(report: CompareReport) -> tuple[tuple[str, Side], tuple[str, Side]]:
    return ("baseline", report.base), ("candidate", report.candidate)


def _facts(side: Side) -> dict[str, str]:
    return {
        "source": side.source,
        "model": side.model,
        "weights hash": side.model_hash,
        "pipeline": side.pipeline,
        "sampled by": side.what,
        "seeds": side.seeds,
        "images": f"{side.samples:,}",
        "denoiser calls": f"{side.denoiser_calls:,}",
        "time": duration(side.seconds),
    }


def _devices(every: Iterable[Measurement]) -> str:
    return "; ".join(sorted({f"{one.device}, {one.dtype}" for one in every}))


def _versions(side: Side, every: Iterable[Measurement]) -> dict[str, str]:
    """Libraries and machine of one side: what its measurements name, and its environment."""
    found: dict[str, list[str]] = {}
    for versions in (*(one.versions for one in every), side.environment):
        for name, version in versions.items():
            if name not in PER_METRIC and version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " and ".join(versions) for name, versions in found.items()}


def _taken(one: Measurement, side: str) -> Taken:
    interval = one.interval()
    facts = [
        "" if one.exact else f"{one.n:,} {'images' if one.seeds else 'repetitions'}",
        f"seeds {one.seeds.role} {one.seeds.base}, from {one.seeds.start:,}" if one.seeds else "",
        *(f"{name} {text[:12]}" for name, text in (("reference", one.reference), ("prompts", one.prompts)) if text),
        *(f"{name} {text}" for name, text in (("features", one.features), ("resize", one.resize)) if text),
        *(f"{name}={setting}" for name, setting in one.settings.items()),
        *(f"{name} {text}" for name, text in one.conditions.items()),
        f"{one.device}, {one.dtype}",
    ]
    return Taken(
        label=one.label + (f" [{one.unit}]" if one.unit else ""),
        side=side,
        number=one.value,
        value=f"{one.value:,.0f}" if one.exact and one.value == int(one.value) else f"{one.value:.8g}",
        interval="counted" if one.exact else "–" if interval is None else f"[{interval[0]:.6g}, {interval[1]:.6g}]",
        under="; ".join(text for text in facts if text),
    )
