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


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_halves_one_by_one_or_stacked(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(_frechet, "CHUNK", chunk)
    x, target = normal(101, 7, 0), reference(normal(200, 7, 1) + 0.2)
    halves = half_samples(101)
    expected = [_frechet.distance(x[list(half)], *target).item() for half in halves]
    assert _frechet.over_halves(x, halves, *target).tolist() == pytest.approx(expected, rel=1e-9)
    assert _frechet.over_halves(x, (), *target).tolist() == []
