"""Closed forms, and agreement with clean-fid and scipy."""

import warnings

import numpy as np
import pytest
import torch
from lissom.core.measurement import half_samples
from lissom.evaluate import _frechet
from torch import Tensor

G = torch.Generator


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn((n, d), generator=G().manual_seed(seed), dtype=torch.float64)


def white(n: int, d: int, seed: int = 0) -> Tensor:
    """n samples whose mean is exactly 0 and whose covariance is exactly the identity (to rounding)."""
    x = normal(n, d, seed)
    q = torch.linalg.qr(x - x.mean(0)).Q
    return q * (n - 1) ** 0.5


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.double().mean(0), _frechet.root(torch.cov(x.double().T))


def cleanfid(x: Tensor, y: Tensor) -> float:
    from cleanfid.fid import frechet_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy deprecates the `disp` that clean-fid passes to sqrtm
        moments = [np.asarray(m) for z in (x, y) for m in (z.double().mean(0), torch.cov(z.double().T))]
        return float(frechet_distance(*moments))


@pytest.mark.parametrize("n, d", [(256, 64), (1024, 64), (40, 10), (65, 3)])
def test_agrees_with_cleanfid_where_images_outnumber_features(n: int, d: int) -> None:
    mix = normal(d, d, 7)
    x, y = (normal(n, d, 1) @ mix).float(), (1.2 * normal(2 * n, d, 2) @ mix + 0.3).float()
    assert _frechet.distance(x, *reference(y)).item() == pytest.approx(cleanfid(x, y), rel=1e-6)
    assert _frechet.between(*reference(x), *reference(y)) == pytest.approx(cleanfid(x, y), rel=1e-6)


def test_agrees_with_cleanfid_on_a_steep_spectrum() -> None:  # like real features: variances over six decades
    scale = torch.logspace(0, -3, 32, dtype=torch.float64)
    x, y = normal(400, 32, 1) * scale, normal(500, 32, 2) * scale.flip(0) + 0.1
    assert _frechet.distance(x, *reference(y)).item() == pytest.approx(cleanfid(x, y), rel=1e-6)


def test_equal_sets_are_at_distance_zero() -> None:
    x = normal(100, 8, 0)
    assert _frechet.distance(x, *reference(x)).item() == pytest.approx(0, abs=1e-12)


def test_shifted_sets_differ_by_the_squared_shift() -> None:  # |m1 - m2|^2 when the covariances agree
    x = normal(100, 8, 0)
    assert _frechet.distance(x + 3.0, *reference(x)).item() == pytest.approx(9.0 * 8, rel=1e-10)


def test_scaled_sets() -> None:  # C1 = a^2 I, C2 = b^2 I: d (a - b)^2
    assert _frechet.distance(2 * white(50, 6), *reference(5 * white(70, 6, 1))).item() == pytest.approx(6 * 9.0, rel=1e-10)


def test_disjoint_supports_add_their_variances() -> None:  # tr sqrt(C1 C2) = 0: what general matrix roots get wrong
    x, y = torch.zeros(50, 8), torch.zeros(60, 8)
    x[:, :4], y[:, 4:] = white(50, 4), 3 * white(60, 4)
    assert _frechet.distance(x, *reference(y)).item() == pytest.approx(4 * 1 + 4 * 9, rel=1e-6)
    rotation = torch.linalg.qr(normal(8, 8, 3)).Q
    turned = _frechet.distance(x.double() @ rotation, *reference(y.double() @ rotation)).item()
    assert turned == pytest.approx(4 * 1 + 4 * 9, rel=1e-6)


def test_rank_one() -> None:  # C1 = a^2 uu^T, C2 = b^2 vv^T: a^2 + b^2 - 2 a b |u.v|
    u, v = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    u[0], v[0], v[1] = 1.0, 0.6, 0.8
    x, y = 2 * white(30, 1) * u, 5 * white(40, 1) * v
    assert _frechet.root(torch.cov(y.T)).shape == (16, 1)
    assert _frechet.distance(x, *reference(y)).item() == pytest.approx(4 + 25 - 2 * 10 * 0.6, rel=1e-9)


def test_fewer_images_than_features_is_exact() -> None:  # against the singular values of both sets: X Y^T
    x, y = normal(20, 64, 1), normal(30, 64, 2)
    xc, yc = x - x.mean(0), y - y.mean(0)
    overlap = torch.linalg.matrix_norm(xc @ yc.T, "nuc") / (19 * 29) ** 0.5
    expected = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() / 19 + yc.square().sum() / 29 - 2 * overlap
    assert _frechet.distance(x, *reference(y)).item() == pytest.approx(expected.item(), rel=1e-9)


def test_collapsed_images() -> None:  # all alike: C1 = 0, so tr C2 + |m1 - m2|^2
    y = white(50, 5)
    assert _frechet.distance(torch.ones(10, 5), *reference(y)).item() == pytest.approx(10.0, rel=1e-9)
    mean, root = reference(torch.ones(9, 5))
    assert root.shape == (5, 0)
    assert _frechet.distance(y, mean, root).item() == pytest.approx(10.0, rel=1e-9)


def test_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 images, got 1"):
        _frechet.distance(torch.ones(1, 5), *reference(white(50, 5)))


@pytest.mark.parametrize("n, d, r", [(101, 7, 7), (101, 7, 3), (60, 90, 90), (120, 90, 90), (200, 90, 90), (40, 90, 15)])
def test_subsets_are_what_distance_gives(n: int, d: int, r: int) -> None:  # by inner products and by scatter, and both in turn
    mix = normal(r, d, 7)
    x, target = normal(n, d, 0) + 2, reference(normal(200, r, 1) @ mix + 0.2)
    subsets = _frechet.Subsets(x, *target)
    order = torch.randperm(n, generator=G().manual_seed(2)).tolist()
    sizes = [2, 3, n // 4, n // 2, n - 1, n]
    expected = [_frechet.distance(x[order[:size]], *target).item() for size in sizes]
    assert subsets.nested(order, sizes).tolist() == pytest.approx(expected, rel=1e-6)
    assert subsets.nested(order, sizes[3:]).tolist() == pytest.approx(expected[3:], rel=1e-7)


def test_over_halves() -> None:
    x, target = normal(101, 7, 0), reference(normal(200, 7, 1) + 0.2)
    halves = half_samples(101)
    expected = [_frechet.distance(x[list(half)], *target).item() for half in halves]
    assert _frechet.over_halves(x, halves, *target).tolist() == pytest.approx(expected, rel=1e-9)
    assert _frechet.over_halves(x, (), *target).tolist() == []
    same = _frechet.over_halves(torch.ones(8, 7), half_samples(8), *target)  # images all alike: nothing below zero, no NaN
    assert same.tolist() == pytest.approx([_frechet.distance(torch.ones(8, 7), *target).item()] * 40, rel=1e-7)


@pytest.mark.parametrize("n1, n2", [(400, 500), (40, 500), (500, 40), (30, 20)])
def test_from_covariances(n1: int, n2: int) -> None:
    """The same as from roots, with either or both singular; clean-fid agrees to what its own root loses there."""
    scale = torch.logspace(0, -3, 64, dtype=torch.float64)
    x, y = normal(n1, 64, 1) * scale, 1.1 * normal(n2, 64, 2) * scale + 0.01
    (m1, c1), (m2, c2) = ((z.mean(0), torch.cov(z.T)) for z in (x, y))
    found = _frechet.between_covariances(m1, c1, m2, c2)
    assert found == pytest.approx(_frechet.between(*reference(x), *reference(y)), rel=1e-9)
    assert found == pytest.approx(cleanfid(x, y), rel=1e-6 if min(n1, n2) > 64 else 1e-4)


def test_roots_reproduce_their_covariance() -> None:
    for n, rank in ((20, 19), (200, 32)):
        covariance = torch.cov((normal(n, 32, 0) @ normal(32, 32, 1)).T)
        root = _frechet.root(covariance)
        assert root.shape == (32, rank)
        assert torch.allclose(root @ root.T, covariance, rtol=0, atol=1e-12 * covariance.trace().item())


def test_a_singular_covariance_whose_distance_is_known() -> None:
    """C1 and C2 share their axes, so the distance is the sum of (s1 - s2)^2; clean-fid's root loses half of the digits."""
    axes = torch.linalg.qr(normal(128, 128, 0)).Q
    s1 = torch.arange(1, 129, dtype=torch.float64) ** -0.6
    s2 = s1 * (1 + 0.1 * normal(1, 128, 1)[0]) * (torch.arange(128) < 60)
    c1, c2 = ((axes.T * s.square()) @ axes for s in (s1, s2))
    expected, zero = (s1 - s2).square().sum().item(), torch.zeros(128, dtype=torch.float64)
    assert _frechet.between_covariances(zero, c1, zero, c2) == pytest.approx(expected, rel=1e-10)
    assert _frechet.between(zero, _frechet.root(c1), zero, _frechet.root(c2)) == pytest.approx(expected, rel=1e-10)


def test_where_small_eigenvalues_would_be_felt_the_accurate_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variances over 14 decades, and hardly any distance: squared singular values would be noise."""
    s = torch.logspace(0, -6.5, 100, dtype=torch.float64)
    zero = torch.zeros(100, dtype=torch.float64)
    c1, c2 = torch.diag(s.square()), torch.diag((s * 1.0001).square())
    asked, between = [], _frechet.between

    def spy(*args: Tensor) -> float:
        asked.append(between(*args))
        return asked[-1]

    monkeypatch.setattr(_frechet, "between", spy)
    found = _frechet.between_covariances(zero, c1, zero, c2)
    assert asked == [found]
    assert found == pytest.approx((1e-4 * s).square().sum().item(), rel=1e-5)


def test_samples_of_known_gaussians_converge() -> None:
    """|m|^2 + sum (s1 - s2)^2 for axes in common; the excess is about halved when the images are doubled."""
    s1, s2 = torch.linspace(1, 2, 12, dtype=torch.float64), torch.linspace(2, 0.5, 12, dtype=torch.float64)
    expected = 12 * 0.3**2 + (s1 - s2).square().sum().item()
    target = (torch.zeros(12, dtype=torch.float64), torch.diag(s2))
    means = []
    for n in (100, 200, 20_000):
        found = [_frechet.distance(normal(n, 12, seed) * s1 + 0.3, *target).item() for seed in range(200 if n < 1000 else 3)]
        means.append(sum(found) / len(found))
    assert means[2] == pytest.approx(expected, rel=0.02)
    assert (means[0] - expected) / (means[1] - expected) == pytest.approx(2, rel=0.3)
