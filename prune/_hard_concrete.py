"""Hard-concrete gates: between 0 and 1, at both ends with a chance above zero, and with a gradient.

Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312, Sec. 2.2; with the noise of
arXiv 2412.02852: s = sigma((log(u + delta) - log(1 - u + delta) + lambda) / alpha), u uniform, M = clip(s (zeta - gamma) + gamma, 0, 1).
With delta > 0 the noise has an end, at log((1 + delta) / delta).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALPHA, GAMMA, ZETA = 0.83, -0.1, 1.1  # the temperature and the stretch of arXiv 2412.02852's published settings
FAR = 40.0  # a gate so far from zero is surely shut or open
HALVINGS = 64  # of an interval: what is left is nothing beside its ends
ZERO = ALPHA * math.log(-GAMMA / ZETA)  # lambda at which the gate without noise reaches zero: -1.990


def gate(logits: Tensor, noise: Tensor | None, delta: float) -> Tensor:
    """M of lambda. logits: any shape. noise: u of that shape; None for the gate without noise (u = 1/2)."""
    drawn = torch.zeros_like(logits) if noise is None else torch.log(noise + delta) - torch.log(1 - noise + delta)
    return stretched(drawn + logits).clamp(0.0, 1.0)


def stretched(logits: Tensor) -> Tensor:
    """The gate without noise before it is clipped: it has a gradient beyond both ends."""
    return torch.sigmoid(logits / ALPHA) * (ZETA - GAMMA) + GAMMA


def alive(logits: Tensor, delta: float) -> Tensor:
    """P(M > 0): the closed form of the expected L0 norm.

    M > 0 where log((u + delta) / (1 - u + delta)) > ZERO - lambda, that is u > (r (1 + delta) - delta) / (1 + r), r = e^(ZERO - lambda).
    With delta = 0 this is sigma(lambda - ZERO), eq. 12 of arXiv 1712.01312.
    """
    return ((1 + 2 * delta) * torch.sigmoid(logits - ZERO) - delta).clamp(0.0, 1.0)  # without the overflow of r


def shift(logits: Sequence[Tensor], prices: Sequence[float], target: float, delta: float) -> Tensor:
    """b with which the gates of lambda + b are expected to save the target: sum of prices (1 - P(M > 0)) = target.

    logits: of some gates each, whose price is the same. A number with the gradient of the equation's solution, -p_i P'_i / sum of
    p_j P'_j: what opens one gate shuts the others, by what they cost. P' is that of gates whose noise has no end, since the cost
    of gates beyond it would never move them.
    """
    every = torch.cat(list(logits))
    values = every.detach().cpu().double()  # on the CPU: not every device has it
    costs = torch.cat([torch.full((len(one),), price, dtype=torch.float64) for one, price in zip(logits, prices, strict=True)])
    low, high = -float(values.max()) - FAR, FAR - float(values.min())  # all shut, all open
    for _ in range(HALVINGS):
        b = (low + high) / 2
        low, high = (b, high) if float(costs @ (1 - alive(values + b, delta))) > target else (low, b)
    p = torch.sigmoid(values + high - ZERO)
    slopes = costs * p * (1 - p)
    shares = (slopes / slopes.sum().clamp(min=1e-300)).to(every)
    return high - (shares * (every - every.detach())).sum()
