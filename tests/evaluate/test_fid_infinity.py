"""The extrapolated Frechet distance: against distances of subsets, on Gaussians whose distance is known, and its spread."""

import statistics as stdlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lissom.core.errors import UserError
from lissom.core.measurement import Measurement, half_samples
from lissom.evaluate import _frechet, fid, fid_infinity
from lissom.evaluate._sample import Sample
from torch import Tensor


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(d: int, scale: float = 1.0) -> Any:
    """Statistics of infinitely many images: N(0, scale^2 I)."""
    return SimpleNamespace(mean=torch.zeros(d, dtype=torch.float64), root=scale * torch.eye(d, dtype=torch.float64))


def ranks(n: int) -> list[int]:
    import random

    rank = list(range(n))
    random.Random(f"fid_infinity {n}").shuffle(rank)
    return rank


def line(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(1 / np.array(sizes), np.array(values), 1)[1])


@pytest.mark.parametrize("d", [6, 150])
def test_is_the_line_through_plain_distances(d: int) -> None:
    x, target = normal(100, d, 0) + 0.2, exact(d)
    halves = half_samples(100, 4)
    given = Sample(x, reference=target, period=4, halves=halves)
    found = fid_infinity.evaluate(given, fid_infinity.Config(points=6, smallest=0.3))
    order = fid_infinity.shuffled(range(100), ranks(100), 4)
    sizes = [30, 44, 58, 72, 86, 100]
    expected = line(sizes, [_frechet.distance(x[order[:n]], target.mean, target.root).item() for n in sizes])
    assert found.value == pytest.approx(expected, rel=1e-6)
    order = fid_infinity.shuffled(halves[7], ranks(100), 4)
    sizes = [15, 24, 32, 41, 50]  # five of them, enough for a spread
    expected = line(sizes, [_frechet.distance(x[order[:n]], target.mean, target.root).item() for n in sizes])
    assert len(found.replicates) == 40 and found.replicates[7] == pytest.approx(expected, rel=1e-6)


def test_equal_gaussians_are_near_zero_where_the_distance_is_far_above() -> None:
    plain, extrapolated = [], []
    for seed in range(20):
        given = Sample(normal(600, 24, seed), reference=exact(24))
        plain.append(fid.evaluate(given, fid.Config()).value)
        extrapolated.append(fid_infinity.evaluate(given, fid_infinity.Config()).value)
    assert stdlib.mean(plain) > 0.2
    assert abs(stdlib.mean(extrapolated)) < 0.05 * stdlib.mean(plain)
    assert min(extrapolated) < 0  # not clamped: models that are as good as the reference must not seem worse


def test_unequal_gaussians_have_their_distance() -> None:  # d (1.5 - 1)^2 + d 0.2^2
    found = [
        fid_infinity.evaluate(Sample(1.5 * normal(500, 16, seed) + 0.2, reference=exact(16)), fid_infinity.Config()).value
        for seed in range(60)
    ]
    assert abs(stdlib.mean(found) - 16 * (0.25 + 0.04)) < 2.5 * stdlib.stdev(found) / 60**0.5


def test_subsets_are_balanced_over_conditions_and_depend_on_the_number_of_images_alone() -> None:
    order = fid_infinity.shuffled(range(50), ranks(50), 7)
    assert sorted(order) == list(range(50))
    for n in range(1, 51):
        counts = Counter(i % 7 for i in order[:n])
        assert max(counts.values()) - min(counts[c] for c in range(7)) <= 1
    half = half_samples(50, 7)[3]
    assert sorted(fid_infinity.shuffled(half, ranks(50), 7)) == list(half)
    images = range(0, 50, 7)  # of one condition: in the order of the whole
    assert [i for i in fid_infinity.shuffled(half, ranks(50), 7) if i in images] == [
        i for i in order if i in images and i in half
    ]


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="fid_infinity needs at least 10 images, got 9"):
        fid_infinity.evaluate(Sample(normal(9, 3, 0), reference=exact(3)), fid_infinity.Config())
    with pytest.raises(UserError, match="fid_infinity needs at least 100 images, got 60"):
        fid_infinity.evaluate(Sample(normal(60, 3, 0), reference=exact(3)), fid_infinity.Config(smallest=0.99))
    given = Sample(normal(12, 3, 0), reference=exact(3), halves=half_samples(12))  # halves of 6 cannot be cut further
    assert fid_infinity.evaluate(given, fid_infinity.Config()).replicates == ()


@pytest.mark.parametrize("metric", [fid, fid_infinity])
def test_half_samples_estimate_the_standard_error(metric: Any) -> None:
    """Within 25 % of the spread over repeated draws, on a model that is not as good as the reference."""
    measured = []
    for seed in range(200):
        given = Sample(0.8 * normal(300, 8, seed) + 0.8, reference=exact(8), period=10, halves=half_samples(300, 10))
        s = metric.evaluate(given, metric.Config())
        measured.append(Measurement(metric="x", value=s.value, direction="lower", n=300, replicates=s.replicates))
    claimed = stdlib.fmean((m.standard_error or 0) ** 2 for m in measured) ** 0.5
    assert claimed == pytest.approx(stdlib.stdev(m.value for m in measured), rel=0.25)


def test_bias_of_the_plain_distance_from_its_halves() -> None:
    estimated, values = [], []
    for seed in range(20):
        s = fid.evaluate(Sample(normal(800, 16, seed), reference=exact(16), halves=half_samples(800)), fid.Config())
        values.append(s.value)
        estimated.append(fid.bias(s.value, s.replicates) or 0)
    assert stdlib.mean(estimated) == pytest.approx(stdlib.mean(values), rel=0.1)  # all of it: the distance is 0
    assert fid.bias(1.0, ()) is None
    few = fid.evaluate(Sample(normal(60, 200, 0), reference=exact(200), halves=half_samples(60)), fid.Config())
    assert 0 < (fid.bias(few.value, few.replicates) or 0) < few.value  # too low, not too high, where features outnumber images
