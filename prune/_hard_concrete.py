"""Hard-concrete gates: between 0 and 1, at both ends with a chance above zero, and with a gradient.

Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312, Sec. 2.2; with the noise of
arXiv 2412.02852: s = sigma((log(u + delta) - log(1 - u + delta) + lambda) / alpha), u uniform, M = clip(s (zeta - gamma) + gamma, 0, 1).
With delta > 0 the noise has an end, at log((1 + delta) / delta).
"""

import math

import torch
from torch import Tensor

ALPHA, GAMMA, ZETA = 0.83, -0.1, 1.1  # the temperature and the stretch of arXiv 2412.02852's published settings
ZERO = ALPHA * math.log(-GAMMA / ZETA)  # lambda at which the gate without noise reaches zero: -1.990


def gate(logits: Tensor, noise: Tensor | None, delta: float) -> Tensor:
    """M of lambda. logits: any shape. noise: u of that shape; None for the gate without noise (u = 1/2)."""
    shift = torch.zeros_like(logits) if noise is None else torch.log(noise + delta) - torch.log(1 - noise + delta)
    s = torch.sigmoid((shift + logits) / ALPHA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def alive(logits: Tensor, delta: float) -> Tensor:
    """P(M > 0): the closed form of the expected L0 norm.

    M > 0 where log((u + delta) / (1 - u + delta)) > ZERO - lambda, that is u > (r (1 + delta) - delta) / (1 + r), r = e^(ZERO - lambda).
    With delta = 0 this is sigma(lambda - ZERO), eq. 12 of arXiv 1712.01312.
    """
    return _unclamped(logits, delta).clamp(0.0, 1.0)


def steered(logits: Tensor, delta: float) -> Tensor:
    """`alive`, with the gradient of what is not clamped (straight through).

    With delta > 0 gates beyond the noise's end are surely open or shut: without a gradient their cost would never move them.
    """
    free = _unclamped(logits, delta)
    return free + (free.clamp(0.0, 1.0) - free).detach()


def _unclamped(logits: Tensor, delta: float) -> Tensor:
    """(1 + delta - r delta) / (1 + r) without the overflow of r."""
    return (1 + 2 * delta) * torch.sigmoid(logits - ZERO) - delta
