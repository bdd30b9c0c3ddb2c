import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from lissom.evaluate import _resize
from lissom.tests.evaluate.judge import images


@pytest.mark.parametrize("shape", [(40, 40), (512, 300), (299, 298), (7, 9)])
def test_same_numbers_as_cleanfid(shape: tuple[int, int]) -> None:
    pixels = torch.randint(256, (2, *shape, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = np.stack([build_resizer("clean")(image) for image in pixels.numpy()])
    found = _resize.resize(pixels, 299)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 299, 299)
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)


def test_the_right_size_is_left_alone() -> None:
    pixels = images(3)
    assert torch.equal(_resize.resize(pixels, 8), pixels.permute(0, 3, 1, 2).float())


def test_nothing_is_rounded_or_out_of_range() -> None:
    found = _resize.resize(images(3, size=20), 8)
    assert (found != found.round()).any() and 0 <= found.min() and found.max() <= 255


def test_no_images() -> None:
    assert _resize.resize(images(0, size=20), 8).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 8, 8), torch.zeros(8, 8, 3).byte(), torch.zeros(1, 8, 8, 4).byte()])
def test_only_uint8_rgb(pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 pixels"):
        _resize.resize(pixels, 8)
