"""How far images are from others of the same seeds, one number an image.

Shapes: B images, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SIGMA = 11, 1.5  # of the Gaussian, Wang et al. 2004, Sec. III-C
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with K1 = 0.01, K2 = 0.03, for pixels in 0..1


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of every pair: (B, …) and (B, …) -> (B,) in the inputs' type."""
    return (a - b).square().flatten(1).mean(1)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of uint8 images (B, H, W, 3): float64 (B,), 1 for equal images.

    Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 13 (2004), Eq. 13, with their Gaussian window, on the windows that lie wholly
    inside the image; the mean over windows and channels. Images smaller than the window get the largest odd window that fits.
    """
    x, y = (t.permute(0, 3, 1, 2).double() / 255 for t in (a, b))  # (B, 3, H, W)
    side = min(WINDOW, x.shape[2], x.shape[3])
    kernel = _gaussian(side - (side + 1) % 2)
    mean_x, mean_y = _blur(x, kernel), _blur(y, kernel)
    var_x, var_y = _blur(x * x, kernel) - mean_x**2, _blur(y * y, kernel) - mean_y**2
    covariance = _blur(x * y, kernel) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return (luminance * structure).flatten(1).mean(1)


def _gaussian(side: int) -> Tensor:
    """(side,) float64, sums to 1."""
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = torch.exp(-(at**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel of (B, C, H, W) convolved with the separable window, without padding."""
    channels = x.shape[1]
    rows = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return conv2d(conv2d(x, rows, groups=channels), columns, groups=channels)
