"""Kernel distances, nearest neighbours, inception score and diversity: by hand, by loops over pairs, by clean-fid."""

import math
import statistics as stdlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lissom.core.errors import UserError
from lissom.core.measurement import Measurement, half_samples
from lissom.evaluate import _kernels, cmmd, diversity, inception_score, kid, precision_recall
from lissom.evaluate._sample import Sample, Score
from torch import Tensor

Draw = Callable[[int, torch.Generator], Tensor]


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn((n, d), generator=torch.Generator().manual_seed(seed))


def sample(x: Tensor, y: Tensor | None = None, period: int = 1, halves: bool = True, **more: Any) -> Sample:
    reference: Any = None if y is None else SimpleNamespace(kept=y)
    found = half_samples(len(x), period) if halves else ()
    return Sample(features=x, reference=reference, period=period, halves=found, **more)


def scores(metric: ModuleType, given: Sample, **settings: Any) -> dict[str, Score]:
    found = metric.evaluate(given, metric.Config(**settings))
    return found if isinstance(found, dict) else {next(iter(metric.parts)): found}


def plane(n: int, seed: int) -> Tensor:
    """Points on a small grid: full of ties, duplicates and neighbours at exactly the radius."""
    return torch.randint(0, 5, (n, 2), generator=torch.Generator().manual_seed(seed)).float() + 100


# Kernel distances


@pytest.mark.parametrize("n", [60, 61])
def test_kid_agrees_with_cleanfid(n: int) -> None:  # over one subset of everything its average is the whole estimator
    from cleanfid.fid import kernel_distance

    x, y = normal(n, 16, 0), 1.1 * normal(n, 16, 1) + 0.2
    expected = kernel_distance(x.double().numpy(), y.double().numpy(), num_subsets=1, max_subset_size=n)
    assert kid.evaluate(sample(x, y), kid.Config()).value == pytest.approx(expected, rel=1e-6)


def test_kid_is_what_the_random_subsets_of_cleanfid_tend_to() -> None:
    import numpy as np
    from cleanfid.fid import kernel_distance

    np.random.seed(0)
    x, y = normal(300, 8, 0), normal(200, 8, 1) + 0.3
    one = [kernel_distance(x.double().numpy(), y.double().numpy(), num_subsets=1, max_subset_size=50) for _ in range(400)]
    error = stdlib.stdev(one) / len(one) ** 0.5
    assert abs(kid.evaluate(sample(x, y), kid.Config()).value - stdlib.mean(one)) < 3 * error


def test_cmmd_by_two_loops() -> None:
    x, y = normal(17, 5, 0), 3 * normal(13, 5, 1) + 1

    def kernel(a: Tensor, b: Tensor) -> float:
        a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
        return math.exp(-((a - b) ** 2).sum().item() / (2 * 10**2))

    def within(z: Tensor) -> float:
        return stdlib.fmean(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)

    across = stdlib.fmean(kernel(a, b) for a in x for b in y)
    expected = 1000 * (within(x) + within(y) - 2 * across)
    assert cmmd.evaluate(sample(x, y), cmmd.Config()).value == pytest.approx(expected, abs=1e-9)


def test_cmmd_sees_directions_only_and_takes_a_zero_for_what_it_is() -> None:
    x, y = normal(20, 4, 0), normal(30, 4, 1)
    same = [cmmd.evaluate(sample(a, b, halves=False), cmmd.Config()).value for a, b in ((x, y), (7 * x, 0.1 * y))]
    assert same[0] == pytest.approx(same[1], rel=1e-5)
    # zeros are at distance 1 of every unit vector: 2 exp(-1/200) of two zeros and two equal units is 2 - that
    found = cmmd.evaluate(sample(torch.zeros(2, 3), torch.ones(2, 3), halves=False), cmmd.Config()).value
    assert found == pytest.approx(1000 * (2 - 2 * math.exp(-1 / 200)), rel=1e-9)


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_kernel_distances_are_unbiased(metric: ModuleType) -> None:
    """Of equal distributions they are 0 in the mean, at few images as at many, where a Frechet distance is far above."""
    found = []
    for seed in range(300):
        x, y = normal(24, 6, 2 * seed) + 0.5, normal(40, 6, 2 * seed + 1) + 0.5
        found.append(metric.evaluate(sample(x, y, halves=False), metric.Config()).value)
    error = stdlib.stdev(found) / len(found) ** 0.5
    assert abs(stdlib.mean(found)) < 2.5 * error
    biased = 4 * error  # what an estimator with the diagonal would be off by is felt: the test can fail
    assert abs(stdlib.mean(found) + biased) > 2.5 * error


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_kernel_distances_are_unbiased_over_balanced_conditions(metric: ModuleType) -> None:
    """Eight of each of five kinds: independent images would have more pairs of one kind, so the plain estimator is too low."""
    centres = normal(5, 6, 0)
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(200):
        kinds = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(seed))
        x, y = centres.repeat(8, 1) + 0.3 * normal(40, 6, 2 * seed), centres[kinds] + 0.3 * normal(60, 6, 2 * seed + 1)
        for balanced, values in found.items():
            given = sample(x, y, period=5, halves=False)
            values.append(metric.evaluate(given, metric.Config(balanced=balanced)).value)
    error = stdlib.stdev(found[True]) / len(found[True]) ** 0.5
    assert abs(stdlib.mean(found[True])) < 2.5 * error
    assert stdlib.mean(found[False]) < -5 * error


def test_balanced_kid_by_two_loops() -> None:
    x, y = normal(22, 4, 0), normal(15, 4, 1)  # 5 conditions of 5 and 4 images
    k = ((x.double() @ x.double().T) / 4 + 1) ** 3

    def pair(a: int, b: int) -> float:
        rows, columns = range(a, 22, 5), range(b, 22, 5)
        return stdlib.fmean(k[i, j].item() for i in rows for j in columns if i != j)

    share = [len(range(c, 22, 5)) / 22 for c in range(5)]
    within = sum(share[a] * share[b] * pair(a, b) for a in range(5) for b in range(5))
    plain = kid.evaluate(sample(x, y, period=5), kid.Config(balanced=False)).value
    off_diagonal = (k.sum() - k.trace()).item() / (22 * 21)
    found = kid.evaluate(sample(x, y, period=5), kid.Config()).value
    assert found - plain == pytest.approx(within - off_diagonal, rel=1e-9)
    few = sample(x, y, period=6)  # fewer than four of each: taken for independent
    assert kid.evaluate(few, kid.Config()).value == pytest.approx(plain, rel=1e-9)


# Nearest neighbours


def loops(x: Tensor, y: Tensor, k: int, k_density: int) -> dict[str, float]:
    a, b = x.double().tolist(), y.double().tolist()

    def radius(points: list[list[float]], i: int, k: int) -> float:
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(p: list[float], points: list[list[float]], k: int) -> list[bool]:
        return [math.dist(p, c) <= radius(points, i, k) * (1 + 1e-12) for i, c in enumerate(points)]

    dense = [sum(inside(p, b, k_density)) for p in a]
    return {
        "precision": stdlib.fmean(any(inside(p, b, k)) for p in a),
        "recall": stdlib.fmean(any(inside(p, a, k)) for p in b),
        "density": stdlib.fmean(dense) / k_density,
        "coverage": stdlib.fmean(
            any(math.dist(p, c) <= radius(b, j, k_density) * (1 + 1e-12) for p in a) for j, c in enumerate(b)
        ),
    }


@pytest.mark.parametrize("k, k_density", [(3, 5), (1, 2)])
@pytest.mark.parametrize(
    "x, y",
    [(normal(30, 3, 0), normal(25, 3, 1)), (0.6 * normal(21, 3, 2) + 0.5, normal(28, 3, 3)), (plane(24, 4), plane(30, 5))],
    ids=["alike", "narrow", "ties"],
)
def test_precision_recall_density_coverage_by_loops(x: Tensor, y: Tensor, k: int, k_density: int) -> None:
    found = scores(precision_recall, sample(x, y, halves=False), k=k, k_density=k_density)
    assert {name: s.value for name, s in found.items()} == pytest.approx(loops(x, y, k, k_density), rel=1e-12)


def test_a_copy_of_the_reference_is_perfect() -> None:
    y = 1e-3 * normal(50, 512, 0) + 10  # far from the origin, where differences of squares lose digits
    found = scores(precision_recall, sample(y.clone(), y, halves=False))
    assert [found[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1] and found["density"].value >= 1
    copies = y.repeat(8, 1)  # every radius is 0, and every image in 8 balls
    found = scores(precision_recall, sample(copies, copies, halves=False))
    assert {name: s.value for name, s in found.items()} == {"precision": 1, "recall": 1, "density": 8 / 5, "coverage": 1}
    apart = scores(precision_recall, sample(y + 1, y, halves=False))
    assert {s.value for s in apart.values()} == {0}


def test_dropped_modes_cost_recall_and_coverage_alone() -> None:
    centres = 20 * normal(4, 8, 0)
    y = centres[torch.arange(400) % 4] + normal(400, 8, 1)
    x = centres[torch.arange(400) % 2] + normal(400, 8, 2)
    found = {name: s.value for name, s in scores(precision_recall, sample(x, y, halves=False)).items()}
    assert found["recall"] <= 0.5 and found["coverage"] <= 0.5 and found["precision"] > 0.8 and found["density"] > 0.9


def test_too_few_images_for_the_neighbours() -> None:
    with pytest.raises(UserError, match="needs more than 3 images and 5 reference images, got 3 and 9"):
        precision_recall.evaluate(sample(normal(3, 2, 0), normal(9, 2, 1)), precision_recall.Config())
    with pytest.raises(UserError, match="got 9 and 5"):
        precision_recall.evaluate(sample(normal(9, 2, 0), normal(5, 2, 1)), precision_recall.Config())
    found = scores(precision_recall, sample(normal(6, 2, 0), normal(9, 2, 1)))  # halves of 3 have no third neighbour
    assert all(s.replicates == () for s in found.values())


def test_neighbours_in_the_other_half_are_looked_for_further(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([normal(200, 2, 0), normal(200, 2, 1) + 100])  # the nearest 199 of an image are all in one half
    half = tuple(range(4)) + tuple(range(200, 203))
    found = precision_recall._radii(x.double(), 3, torch.stack([_kernels.members(400, (half,))[1].bool()]))
    alone = _kernels.squared_distances(x[list(half)].double(), x[list(half)].double()).fill_diagonal_(torch.inf)
    assert found[0, list(half)].tolist() == pytest.approx(alone.sort(1).values[:, 2].tolist(), rel=1e-9)


# Inception score


def test_inception_score_by_hand() -> None:
    sure = torch.eye(3)[torch.arange(9) % 3]
    assert inception_score.evaluate(sample(sure, probabilities=sure), inception_score.Config()).value == pytest.approx(3)
    alike = torch.tensor([[0.5, 0.3, 0.2]]).repeat(8, 1)
    assert inception_score.evaluate(sample(alike, probabilities=alike), inception_score.Config()).value == pytest.approx(1)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    mean = [0.55, 0.45]
    divergences = [sum(q * math.log(q / m) for q, m in zip(row, mean, strict=True)) for row in ([0.9, 0.1], [0.2, 0.8])]
    found = inception_score.evaluate(sample(p, halves=False, probabilities=p), inception_score.Config())
    assert found.value == pytest.approx(math.exp(stdlib.fmean(divergences)), rel=1e-6)


# Diversity


@pytest.mark.parametrize("n, period", [(24, 4), (22, 5), (9, 1), (7, 7), (7, 20), (12, 8)])
def test_diversity_by_two_loops(n: int, period: int) -> None:
    x = normal(n, 6, 0).double()
    if period >= n:  # every condition once: all pairs
        period = 1

    def distance(i: int, j: int) -> float:
        return 1 - (x[i] @ x[j] / (x[i].norm() * x[j].norm())).item()

    groups = [range(c, n, period) for c in range(period)]
    means = [stdlib.fmean(distance(i, j) for i in g for j in g if i != j) for g in groups if len(g) > 1]
    assert diversity.evaluate(sample(x, period=period), diversity.Config()).value == pytest.approx(
        stdlib.fmean(means), abs=1e-12
    )


def test_diversity_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 5.0], [2.0, 0.0], [0.0, -1.0]])  # conditions (0, 2): alike, (1, 3): opposite
    assert diversity.evaluate(sample(x, period=2, halves=False), diversity.Config()).value == pytest.approx((0 + 2) / 2)
    with pytest.raises(UserError, match="diversity needs at least 2 images, got 1"):
        diversity.evaluate(sample(x[:1], halves=False), diversity.Config())


def test_diversity_of_two_images_a_condition_has_intervals_over_conditions() -> None:
    x = normal(80, 6, 0)
    given = sample(x, period=40)  # a half has one image of each condition: nothing to compare within it
    found = diversity.evaluate(given, diversity.Config())
    assert len(found.replicates) == 40
    first = [i for i in given.halves[0] if i < 40]
    whole = torch.cat([x[first], x[[i + 40 for i in first]]])
    again = diversity.evaluate(sample(whole, period=len(first), halves=False), diversity.Config())
    assert found.replicates[0] == pytest.approx(again.value, rel=1e-9)
    assert diversity.evaluate(sample(normal(21, 6, 0), period=20), diversity.Config()).replicates == ()  # one pair in all


# Half-samples


@pytest.mark.parametrize("chunk", [1, 2**10, 2**20])
@pytest.mark.parametrize("metric", [kid, cmmd, precision_recall, inception_score, diversity])
def test_replicates_are_the_values_of_the_halves(monkeypatch: pytest.MonkeyPatch, metric: ModuleType, chunk: int) -> None:
    monkeypatch.setattr(_kernels, "CHUNK", chunk)
    x, y = normal(43, 5, 0) + 0.3, normal(37, 5, 1)
    p = torch.softmax(x, dim=1)
    given = sample(x, y, probabilities=p)
    whole = scores(metric, given)
    for number in (0, 1, 39):
        half = list(given.halves[number])
        for name, found in scores(metric, sample(x[half], y, halves=False, probabilities=p[half])).items():
            assert len(whole[name].replicates) == 40 and found.replicates == ()
            if name != "coverage":
                assert whole[name].replicates[number] == pytest.approx(found.value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("metric", [kid, cmmd, diversity])
def test_replicates_of_balanced_conditions(metric: ModuleType) -> None:
    x, y = normal(48, 5, 0) + 0.3, normal(37, 5, 1)
    given = sample(x, y, period=3)
    half = sorted(given.halves[9], key=lambda i: (i // 3, i))
    turns = [[i for i in half if i % 3 == c] for c in range(3)]  # 8 images of each, in turn again
    alone = metric.evaluate(sample(x[[i for turn in zip(*turns, strict=True) for i in turn]], y, 3, False), metric.Config())
    assert metric.evaluate(given, metric.Config()).replicates[9] == pytest.approx(alone.value, rel=1e-9)


@pytest.mark.parametrize("n, k, expected", [(40, 40, 8), (40, 400, 9), (400, 40, 6)])
def test_coverage_of_halves_is_over_larger_balls(n: int, k: int, expected: int) -> None:
    """So large that of the same distribution as many have no image: the mean over half-samples is near the value."""
    assert precision_recall._k_half(5, n, n // 2, k) == expected
    x, y = normal(n, 3, 0), normal(k, 3, 1)
    given = sample(x, y)
    found = scores(precision_recall, given)["coverage"]
    alone = scores(precision_recall, sample(x[list(given.halves[5])], y, halves=False), k_density=expected)["coverage"]
    assert found.replicates[5] == alone.value
    assert stdlib.mean(found.replicates) == pytest.approx(found.value, abs=0.05)


def clusters(n: int, g: torch.Generator) -> Tensor:
    centres = normal(8, 12, 7)
    return centres[torch.randint(0, 8, (n,), generator=g)] + 0.5 * torch.randn((n, 12), generator=g)


@pytest.mark.parametrize(
    "draw, metrics",
    [
        (lambda n, g: torch.randn((n, 12), generator=g) * 1.2 + 0.15, [kid, cmmd, precision_recall, inception_score]),
        (lambda n, g: clusters(n, g) * 1.3 + 0.3, [kid, cmmd, precision_recall, inception_score, diversity]),
    ],
    ids=["wide", "clusters"],
)
def test_half_samples_estimate_the_standard_error(draw: Draw, metrics: list[ModuleType]) -> None:
    """Within 25 % of the spread over repeated draws, on models that are not as good as the reference."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn((300, 12), generator=g) if len(metrics) == 4 else clusters(300, g)
    found: dict[str, list[Measurement]] = {}
    for _ in range(150):
        x = draw(240, g)
        given = sample(x, y, probabilities=torch.softmax(x, dim=1))
        for metric in metrics:
            for name, s in scores(metric, given).items():
                m = Measurement(metric=name, value=s.value, direction="lower", n=240, replicates=s.replicates)
                found.setdefault(name, []).append(m)
    for name, measured in found.items():
        claimed = stdlib.fmean((m.standard_error or 0) ** 2 for m in measured) ** 0.5
        assert claimed == pytest.approx(stdlib.stdev(m.value for m in measured), rel=0.25), name


def test_near_the_reference_intervals_of_kernel_distances_are_too_wide_but_never_too_narrow() -> None:
    """At equal distributions the linear part of the estimator vanishes; half-samples count the rest up to 3 times."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn((4000, 8), generator=g)
    measured = []
    for _ in range(80):
        s = kid.evaluate(sample(torch.randn((100, 8), generator=g), y), kid.Config())
        measured.append(Measurement(metric="kid", value=s.value, direction="lower", n=100, replicates=s.replicates))
    claimed = stdlib.fmean((m.standard_error or 0) ** 2 for m in measured) ** 0.5
    assert 1.0 < claimed / stdlib.stdev(m.value for m in measured) < 1.9


def test_configs_are_read_without_torch() -> None:
    import subprocess
    import sys

    names = "cmmd, diversity, fid_infinity, inception_score, kid, precision_recall"
    code = f"import sys; from lissom.evaluate import {names}; assert not {{'torch', 'scipy'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
