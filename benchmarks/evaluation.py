"""What an evaluation takes, and how far its intervals can be trusted: `python -m lissom.benchmarks.evaluation` (about five minutes).

Intervals are simulated, where the truth is known: features of ten conditions in turn, drawn again and again against one
reference, once from the reference's own distribution and once from another. The standard error that half-samples claim is held
against the spread over the draws. Then what `balanced` does on images of zoo:fashion, and the time of the README's command.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..core import methods
from ..core.intervals import spread
from ..core.measurement import half_samples
from ..core.recipe import build
from ..evaluate import _frechet, fid_infinity
from ..evaluate._sample import Sample, Score
from ..evaluate._sketch import Sketch
from ..evaluate._statistics import Provenance, Statistics
from ..workflow._evaluation import Asked, evaluate
from ..workflow.context import Context, Options, Silent
from . import _results

FEATURES, IMAGES, KEPT, PERIOD, DRAWS = 64, 500, 1000, 10, 80
METRICS = ("fid", "fid_infinity", "kid", "cmmd", "precision_recall", "diversity")
SHIFT, SCALE = 0.25, 1.15  # of the other distribution: its mean, and its spread within a condition
TURNS, SECONDS = 3, 120  # timings of the command; what it may take


def main() -> None:
    simulated = {name: _simulate(shift, scale) for name, shift, scale in (("equal", 0.0, 1.0), ("other", SHIFT, SCALE))}
    rows = [[part, *(f"{simulated[case][part]:.2f}" for case in ("other", "equal"))] for part in simulated["equal"]]
    times = [_command() for _ in range(TURNS)]
    assert max(times) < SECONDS
    _results.write(
        "evaluation",
        f"Claimed standard error over the true one, by simulation: {IMAGES} images of {FEATURES} normal features, {PERIOD} conditions in "
        f"turn, {KEPT:,} kept reference images, {DRAWS} draws (each ratio is good to about {1 / math.sqrt(2 * DRAWS):.0%}). Above 1 the "
        "interval is too wide.\n\n"
        + _results.table(["number", "another distribution", "the reference's own"], rows)
        + "\n\n`fid_infinity` of normal features whose distance is known, by its smallest subset (share of the images), mean over draws:\n\n"
        + _results.table(["images", "known", *(f"smallest {s}" for s in (0.1, 0.2))], _extrapolated())
        + "\n\n`kid` and `cmmd` of 1,000 images of zoo:fashion on the report's seeds, classes in turn, against the test images:\n\n"
        + _results.table(["steps", "number", "balanced", "balanced: false"], _balanced())
        + "\n\n`lissom evaluate zoo:fashion --steps 4 --samples 1024 --metrics fid,clip_score,accuracy`, whole process, "
        f"{TURNS} turns, {_results.machine()}: {statistics.median(times):.0f} s ({min(times):.0f} to {max(times):.0f}). Asked: {SECONDS} s.",
    )


def _simulate(shift: float, scale: float) -> dict[str, float]:
    """Claimed over true standard error of every number, for images from the reference's distribution, moved."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn((PERIOD, FEATURES), generator=generator)
    reference = Statistics(Provenance(features="simulated", features_hash="", resize=""), sketch=Sketch(KEPT))
    reference.update(_draw(centres, 10 * KEPT, generator), torch.arange(10 * KEPT))
    claimed: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        x = _draw(centres, IMAGES, generator, scale) + shift
        sample = Sample(x, reference, period=PERIOD, halves=half_samples(IMAGES, PERIOD))
        for name in METRICS:
            module = methods.load("evaluate", name)
            found = module.evaluate(sample, module.Config())
            for part, score in ({name: found} if isinstance(found, Score) else found).items():
                values.setdefault(part, []).append(score.value)
                claimed.setdefault(part, []).append((spread(score.replicates) or 0.0) ** 2)
    return {part: math.sqrt(statistics.fmean(claimed[part])) / statistics.stdev(values[part]) for part in values}


def _draw(centres: torch.Tensor, n: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """Features (n, D), conditions in turn."""
    return centres[torch.arange(n) % len(centres)] + scale * torch.randn((n, FEATURES), generator=generator)


def _extrapolated() -> list[list[str]]:
    """White features whose variance is 1.44 of the reference's: d^2 = D (1.2 - 1)^2."""
    rows, identity = [], torch.eye(FEATURES, dtype=torch.float64)
    reference = Statistics(
        Provenance(features="simulated", features_hash="", resize=""), 2, torch.zeros(FEATURES).double(), identity
    )
    assert torch.allclose(reference.root, _frechet.root(identity))
    for n in (500, 1000):
        cells = []
        for smallest in (0.1, 0.2):
            generator = torch.Generator().manual_seed(1)
            config = fid_infinity.Config.model_validate({"smallest": smallest})
            samples = (Sample(1.2 * torch.randn((n, FEATURES), generator=generator), reference) for _ in range(DRAWS))
            found = [fid_infinity.evaluate(sample, config).value for sample in samples]
            cells.append(f"{statistics.fmean(found):.2f} ± {statistics.stdev(found) / math.sqrt(DRAWS):.2f}")
        rows.append([f"{n:,}", f"{FEATURES * 0.2**2:.2f}", *cells])
    return rows


def _balanced() -> list[list[str]]:
    rows = []
    for steps in (4, 50):
        found = []
        for balanced in (True, False):
            given = {"reference": "zoo:fashion", "metrics": ["kid", "cmmd"], "samples": 1000}
            recipe = build(
                {"lissom": 1, "model": "zoo:fashion", "evaluate": given, "stages": [{"search": "random_search"}]}, "benchmark"
            )
            settings = {name: {"balanced": balanced} for name in ("kid", "cmmd")}
            with tempfile.TemporaryDirectory() as scratch:
                context = Context(recipe, Path.cwd(), Options(device="cpu"), Silent())
                found.append(
                    evaluate(Asked("zoo:fashion", steps=steps, settings=settings), context, Path(scratch)).measurements
                )
        for one, two in zip(*found, strict=True):
            cells = [(m.value, m.interval() or (m.value, m.value)) for m in (one, two)]
            rows.append([str(steps), one.label, *(f"{value:.4f} [{low:.4f}, {high:.4f}]" for value, (low, high) in cells)])
    return rows


def _command() -> float:
    words = "evaluate zoo:fashion --steps 4 --samples 1024 --metrics fid,clip_score,accuracy -q"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lissom", *words.split()], check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    with torch.no_grad():
        main()
