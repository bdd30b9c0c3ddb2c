"""clean-fid's resizing: PIL bicubic per channel in float32, never rounded back to bytes. Parmar et al., 2104.11222, Sec. 3.

Shapes: B images, H x W pixels in, S x S pixels out.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def record(size: int) -> str:
    """What a Measurement says about resizing.

    >>> record(32)
    'clean-bicubic-32'
    """
    return f"clean-bicubic-{size}"


def resize(pixels: Tensor, size: int) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, S, S) in 0..255; images that have the size already keep their exact values."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"expected uint8 pixels (B, H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    if tuple(pixels.shape[1:3]) != (size, size):
        to_size = _resizer(size)
        resized = [torch.from_numpy(to_size(image)) for image in pixels.cpu().numpy()]
        pixels = torch.stack(resized) if resized else pixels.new_zeros((0, size, size, 3))
    return pixels.permute(0, 3, 1, 2).float()


@functools.cache
def _resizer(size: int) -> Callable[[np.ndarray], np.ndarray]:
    from cleanfid.resize import make_resizer  # the module that holds nothing but PIL calls: no download, no file written

    return make_resizer("PIL", False, "bicubic", (size, size))
