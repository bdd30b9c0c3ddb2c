"""Synthetic reports of distilled models: better, worse, unclear, unmeasured, with restarts, with many sites, hostile."""

import random
from pathlib import Path

import numpy as np
from lissom.core.measurement import Measurement
from lissom.report.distill_schema import Check, DistillReport, Line
from lissom.report.prune_schema import Scored
from lissom.report.sheets import sheet
from lissom.tests.report.prune_reports import EVIL, NETWORKS, measured

LOSSES = {"task": 1.0, "output": 1.0, "normalized_features": 0.5}
SCALES = {"task": 0.21, "output": 0.034, "normalized_features": 0.9}
FID, CLIP = (12.3, 15.1, 13.2), (0.3121, 0.3004, 0.3088)  # teacher, before, after


def build(**changes: object) -> DistillReport:
    """A report as `lissom distill laptop` would write it: most of the loss came back."""
    record: dict[str, object] = {
        "lissom": "0.1",
        "model": "runs/fashion/01-prune-laptop",
        "model_hash": "ef56" * 16,
        "teacher": "zoo:fashion",
        "teacher_hash": "7a8b" * 16,
        "pipeline": "StableDiffusionPipeline",
        "denoiser": "UNet2DConditionModel",
        "preset": "laptop",
        "losses": LOSSES,
        "paper": "https://arxiv.org/abs/2404.11098",
        "stage": {"distill": "laptop", "iterations": 500, "batch": 32, "ema": 0.99, "check_every": 50},
        "params": 1_688_642,
        "teacher_params": 2_412_345,
        "scales": SCALES,
        "sites": {"normalized_features": ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")},
        "curve": curve(50),
        "check_label": "FD[zoo:judge] on 256 images",
        "checks": checks(10),
        "iterations": 500,
        "asked": 500,
        "scored": scored({"fid": FID, "clip_score": CLIP}),
        "samples": 2048,
        "steps": 25,
        "reference": "zoo:fashion, 10,000 test images",
        "opens_plain": True,
        "open_with": 'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("runs/02/model")',
        "reload_difference": 3.1e-7,
        "data": {"images": 1024, "from": "the teacher's own images", "data_steps": 25, "seeds": "calibrate, base 0"},
        "spent": {"seconds_for_training": 725.4, "iterations": 500.0},
        "command": "lissom distill laptop runs/fashion/01-prune-laptop --teacher zoo:fashion --seed 0",
        "environment": {"python": "3.13", "cpu": "2 cores"},
        "warnings": ("The teacher's images repeat after 32 iterations.",),
    }
    return DistillReport.model_validate(record | changes)


def curve(lines: int, end: float = 0.35) -> tuple[Line, ...]:
    """Losses that fall to a share `end` of what they were, unevenly."""
    rng, found = random.Random(lines), []
    for k in range(1, lines + 1):
        down = (end + (1 - end) * 0.5 ** (8 * k / lines)) * rng.uniform(0.95, 1.05)
        terms = {name: scale * down for name, scale in SCALES.items()}
        total = sum(LOSSES[name] * value for name, value in terms.items())
        found.append(Line(iteration=10 * k, terms=terms, total=total, gradient_norm=0.8 * down, learning_rate=5e-5))
    return tuple(found)


def checks(n: int, sheets: bool = True) -> tuple[Check, ...]:
    return tuple(
        Check(
            iteration=50 * k,
            value=14 + 9 * 0.5**k + 0.3 * (-1) ** k,
            sheet=f"samples/iteration-{50 * k:06}.png" if sheets else None,
        )
        for k in range(1, n + 1)
    )


def scored(values: dict[str, tuple[float, float, float]]) -> tuple[Scored, ...]:
    """values: metric -> of teacher, before and after. The same seeds for all three."""
    return tuple(
        Scored(
            name=name,  # type: ignore[arg-type]
            measurements=tuple(measured(metric, found[place]) for metric, found in values.items()),
            sheet=f"samples/{name}.png",
        )
        for place, name in enumerate(("teacher", "before", "after"))
    )


def swinging(
    metric: str, values: tuple[float | None, float | None, float | None], direction: str = "lower", spread: bool = True
) -> tuple[Scored, ...]:
    """One metric of teacher, before and after: half-samples that swing by 5 % in common and by 0.5 % apart."""
    found = []
    for place, (name, value) in enumerate(zip(("teacher", "before", "after"), values, strict=True)):
        if value is not None:
            halves = [value * (1 + 0.05 * (-1) ** i + 0.005 * (-1) ** (i // 2 ** (place + 1))) for i in range(40)]
            one = measured(metric, value).model_copy(
                update={"direction": direction, "replicates": tuple(halves) if spread else (), "value": value}
            )
            found.append(Scored(name=name, measurements=(one,)))  # type: ignore[arg-type]
    return tuple(found)


def better() -> DistillReport:
    return build()


def worse() -> DistillReport:
    """Training did harm, early, after a NaN."""
    found = scored({"fid": (12.3, 14.1, 15.9), "clip_score": CLIP})
    ending = {"iterations": 300, "stopped_early": True, "restarts": 1, "frozen": 12_480, "spent": {"iterations": 300.0}}
    return build(scored=found, curve=curve(30, end=1.3), checks=checks(6), **ending)


def many_sites() -> DistillReport:
    """Six losses, the layers of SDXL, a long curve, many checks, code beside the weights."""
    names = [f"loss_{k}_of_features" for k in range(6)]
    lines = tuple(
        line.model_copy(update={"terms": {name: line.total * 10.0**-k for k, name in enumerate(names)}}) for line in curve(400)
    )
    return build(
        losses=dict.fromkeys(names, 1.0),
        scales={name: 10.0**-k for k, name in enumerate(names)},
        sites=dict.fromkeys(names[:3], tuple(address for address, _ in NETWORKS["sdxl"])),
        curve=lines,
        checks=checks(40),
        opens_plain=False,
        not_plain_because="the stages of the U-Net are not of one depth",
        warnings=tuple(f"Warning number {k}." for k in range(5)),
    )


def empty() -> DistillReport:
    """What every report has, and nothing more."""
    return DistillReport(
        lissom="0.1", model="m", model_hash="", teacher="t", teacher_hash="", pipeline="P", denoiser="D", preset="bk",
        losses={}, params=0, teacher_params=0, iterations=0, asked=1, opens_plain=True, open_with="", reload_difference=0.0,
        command="",
    )  # fmt: skip


def hostile() -> DistillReport:
    """Every text that a model, a user or a method brings is made to break out."""
    report = build(opens_plain=False)
    first = report.scored[1].measurements[0].model_copy(update={"features": EVIL, "unit": EVIL, "versions": {EVIL: EVIL}})
    before = report.scored[1].model_copy(update={"measurements": (first,), "sheet": EVIL})
    lines = tuple(line.model_copy(update={"terms": {EVIL: line.total, "task": line.total}}) for line in report.curve)
    texts = (
        "model", "model_hash", "teacher", "teacher_hash", "pipeline", "denoiser", "preset", "check_label", "reference",
        "open_with", "not_plain_because", "command",
    )  # fmt: skip
    return report.model_copy(
        update={
            **dict.fromkeys(texts, EVIL),
            "paper": "javascript:alert(1)",
            "losses": {EVIL: 1.0, "task": 1.0},
            "scales": {EVIL: 1.0, "task": 0.5},
            "stage": {EVIL: EVIL},
            "sites": {EVIL: (EVIL, EVIL)},
            "curve": lines,
            "checks": tuple(check.model_copy(update={"sheet": f"../{EVIL}"}) for check in report.checks),
            "data": {EVIL: EVIL},
            "environment": {EVIL: EVIL},
            "spent": {EVIL: 1.0},
            "warnings": (EVIL,),
            "scored": (report.scored[0], before, report.scored[2]),
        }
    )


def unpaired(measurement: Measurement) -> Measurement:
    """As if it were of other seeds."""
    assert measurement.seeds is not None
    return measurement.model_copy(update={"seeds": measurement.seeds.model_copy(update={"base": 7})})


def paint(report: DistillReport, folder: Path) -> None:
    """The sheets that a report names, of noise."""
    rng = np.random.default_rng(0)
    (folder / "samples").mkdir(exist_ok=True)
    for one in (*report.scored, *report.checks):
        if one.sheet:
            sheet(rng.integers(0, 255, (16, 28, 28, 1), dtype=np.uint8), folder / one.sheet)
