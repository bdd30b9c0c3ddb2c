"""Frechet distances against clean-fid's: `OMP_NUM_THREADS=1 python -m lissom.benchmarks.frechet` (two to three minutes).

Features of Inception's width whose variances fall as 1 / i^1.2, once with more images than features and once with fewer. The
two take turns. clean-fid's distance starts from means and covariances; ours does so too, and also from features with the
reference's root known, which is what an evaluation does for every model: there the time includes mean and covariance.
Then two covariances with common axes, one of them of the rank that few images leave it: their distance is known exactly.
Then the peak memory of fresh processes that stream features into statistics.
"""

import contextlib
import io
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..evaluate import _frechet
from . import _results

FEATURES, REFERENCES, IMAGES, TURNS = 2048, 10_000, (5_000, 1_000), 3
STREAM_FEATURES, STREAM_BATCH, STREAM = 512, 500, (0, 2_000, 20_000, 200_000)  # 0: what the libraries take
Gaussian = tuple[Tensor, Tensor]  # mean (D,), covariance (D, D)


def main() -> None:
    axes = torch.linalg.qr(_normal(FEATURES, FEATURES, 0)).Q
    deviation = torch.arange(1, FEATURES + 1, dtype=torch.float64) ** -0.6
    other = deviation * (1 + 0.1 * _normal(1, FEATURES, 1)[0])
    reference = _moments(_normal(REFERENCES, FEATURES, 2) * deviation @ axes)
    root = _frechet.root(reference[1])
    rows = [_compare(_normal(n, FEATURES, 3) * other @ axes + 0.005, reference, root) for n in IMAGES]
    few = other * (torch.arange(FEATURES) < IMAGES[1] - 1)
    zero = torch.zeros(FEATURES, dtype=torch.float64)
    pair = [(zero, (axes.mT * d.square()) @ axes) for d in (few, deviation)]
    exact = (few - deviation).square().sum().item()
    errors = [abs(work(*pair) / exact - 1) for work in (_cleanfid, _ours)]
    memory = [[f"{n:,}", f"{_peak(n):.0f} MB"] for n in STREAM]
    head = ["images", "clean-fid", "from statistics", "times faster", "from features, root known", "times faster", "difference"]
    _results.write(
        "frechet",
        f"{FEATURES} features against statistics of {REFERENCES:,} images; {TURNS} turns, median and range; difference: the "
        f"largest of ours from clean-fid's value, relative; {_results.machine()}, float64 from the features on.\n\n"
        + _results.table(head, rows)
        + "\n\nWhere features outnumber images, the difference is clean-fid's: for covariances with common axes, one of rank "
        f"{IMAGES[1] - 1}, whose distance is known, it is off by {errors[0]:.1e}, ours by {errors[1]:.1e} (relative).\n\n"
        f"Peak memory of a fresh process that streams {STREAM_FEATURES} features into statistics (`Statistics.update`):\n\n"
        + _results.table(["images", "peak memory"], memory),
    )


def _compare(features: Tensor, reference: Gaussian, root: Tensor) -> list[str]:
    """A row of the table: the three ways in turn."""
    generated = _moments(features)
    ways: list[Callable[[], float]] = [
        lambda: _cleanfid(generated, reference),
        lambda: _ours(generated, reference),
        lambda: _frechet.distance(features, reference[0], root).item(),
    ]
    values = [way() for way in ways[1:]]  # warms up ours; clean-fid needs none
    turns = []
    for _ in range(TURNS):
        timed = [_timed(way) for way in ways]
        values.append(timed[0][1])
        turns.append([seconds for seconds, _ in timed])
    clean, ours, direct = ([turn[i] for turn in turns] for i in range(3))
    difference = max(abs(value / values[-1] - 1) for value in values[:2])
    return [
        f"{len(features):,}",
        _seconds(clean),
        _seconds(ours),
        _times(clean, ours),
        _seconds(direct),
        _times(clean, direct),
        f"{difference:.1e}",
    ]


def _cleanfid(generated: Gaussian, reference: Gaussian) -> float:
    from cleanfid.fid import frechet_distance

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # scipy deprecates the `disp` that clean-fid passes to sqrtm
        return float(frechet_distance(*(m.numpy() for m in (*generated, *reference))))


def _ours(generated: Gaussian, reference: Gaussian) -> float:
    return _frechet.between_covariances(*generated, *reference)


def _moments(features: Tensor) -> Gaussian:
    return features.mean(0), torch.cov(features.mT)


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _timed(work: Callable[[], float]) -> tuple[float, float]:
    began = time.perf_counter()
    value = work()
    return time.perf_counter() - began, value


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def _times(slow: list[float], fast: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"


def _peak(images: int) -> float:
    """Megabytes of memory that a process has held at most after streaming this many images."""
    code = f"from lissom.benchmarks import frechet; frechet.stream({images})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) / 1024


def stream(images: int) -> None:
    """Print the peak memory in kB of this process, which Linux tells, after streaming this many images."""
    from pathlib import Path

    from ..evaluate._statistics import Provenance, Statistics

    result = Statistics(Provenance(features="random", features_hash="0" * 64, resize="none"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, images, STREAM_BATCH):
        result.update(torch.randn((STREAM_BATCH, STREAM_FEATURES), generator=generator))
    assert result.n == images
    print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
