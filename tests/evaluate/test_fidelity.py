"""Fidelity against an independent SSIM, and against numbers worked out by hand."""

import numpy as np
import pytest
import torch
from lissom.core.errors import UserError
from lissom.core.measurement import half_samples
from lissom.evaluate import _pixels, fidelity
from lissom.evaluate._sample import Base, Sample
from lissom.evaluate._scorer import Scorer, Shown, View
from lissom.tests.evaluate.judge import Means, images
from torch import Tensor


def blurred(pixels: Tensor, amount: float, seed: int = 9) -> Tensor:
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)) * amount
    return (pixels + noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", [32, 17, 11])
def test_ssim_is_scipys(size: int) -> None:
    """The same formula by scipy's Gaussian filter: radius 5 at sigma 1.5, the border left out."""
    from scipy.ndimage import gaussian_filter

    a = images(3, size)
    b = blurred(a, 40)
    expected = []
    for x, y in zip(a.double().numpy() / 255, b.double().numpy() / 255, strict=True):
        per_channel = []
        for c in range(3):

            def blur(image: np.ndarray) -> np.ndarray:
                return np.asarray(gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5])

            u, v = x[..., c], y[..., c]
            mu, mv = blur(u), blur(v)
            su, sv, suv = blur(u * u) - mu**2, blur(v * v) - mv**2, blur(u * v) - mu * mv
            c1, c2 = 0.01**2, 0.03**2
            per_channel.append((((2 * mu * mv + c1) * (2 * suv + c2)) / ((mu**2 + mv**2 + c1) * (su + sv + c2))).mean())
        expected.append(np.mean(per_channel))
    assert _pixels.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_falls_with_noise_and_small_images_have_one() -> None:
    a = images(4, 32)
    values = [_pixels.ssim(a, blurred(a, amount)).mean().item() for amount in (0, 10, 40, 120)]
    assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True)
    for size in (1, 2, 7, 10):
        assert _pixels.ssim(images(2, size), images(2, size)).tolist() == pytest.approx([1, 1])


def test_the_four_numbers_by_hand() -> None:
    base = Base(
        features=torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 4.0]]),
        ssim=torch.tensor([1.0, 0.5, 0.0, 0.5], dtype=torch.float64),
        squared_error=torch.tensor([0.0, 0.01, 0.1, 1.0], dtype=torch.float64),
        latent_squared_error=torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64),
    )
    features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 1.0], [-3.0, -4.0]])
    halves = half_samples(4)
    found = fidelity.evaluate(Sample(features, base=base, halves=halves), fidelity.Config())
    assert {name: score.value for name, score in found.items()} == pytest.approx(
        {"fidelity": (0 + 1 + 0 + 2) / 4, "ssim": 0.5, "psnr": (100 + 20 + 10 + 0) / 4, "latent_mse": 1.5}
    )
    assert found["psnr"].each == pytest.approx((100, 20, 10, 0))
    each = found["fidelity"].each
    assert found["fidelity"].replicates == pytest.approx([sum(each[i] for i in half) / len(half) for half in halves])


def test_a_scorer_sees_both_models_images() -> None:
    made, base = images(6, 12), images(6, 12, seed=1)
    latents = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scorer = Scorer({"fidelity": View(Means())})
    seen = scorer.observe(Shown(made, latents), Shown(base, latents + 2))
    torch.testing.assert_close(seen[f"base {Means.hash}"], Means().extract(base))
    assert seen["latent_squared_error"].tolist() == pytest.approx([4.0] * 6, rel=1e-5)
    assert seen["squared_error"].tolist() == pytest.approx(
        (((made.double() - base.double()) / 255) ** 2).mean((1, 2, 3)).tolist()
    )
    packed = scorer.observe(
        Shown(made, latents), Shown(base, latents.flatten(2))
    )  # another family's latents cannot be compared
    assert "latent_squared_error" not in packed
    with pytest.raises(
        UserError, match=r"fidelity: the images have the shape \(6, 12, 12, 3\), those of the base model \(6, 8, 8, 3\)"
    ):
        scorer.observe(Shown(made), Shown(images(6)))
