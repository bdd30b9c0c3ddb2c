"""Frechet distance between Gaussians, in float64. Dowson and Landau 1982; as FID, Heusel et al., 1706.08500, Eq. 6.

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

C1 C2 is not symmetric, and a general matrix root of it turns complex when a covariance is singular. With C1 = L L^T and
C2 = R R^T its nonzero eigenvalues are those of the symmetric (L^T R)^T (L^T R), so that tr (C1 C2)^(1/2) is the sum of the
singular values of L^T R: never negative, never complex, and exact to rounding for singular covariances too. Images give L
for nothing: their centred features X (N, D) are L^T sqrt(N - 1). R is worked out once per reference.

Shapes: N images, D features, r the rank of the reference, K half-samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**24  # numbers of a stack of half-samples held at once: 128 MB


def root(covariance: Tensor) -> Tensor:
    """R (D, r) float64 with covariance (D, D) = R R^T, r being its numerical rank; singular covariances are welcome."""
    values, vectors = torch.linalg.eigh(covariance.double())
    keep = values > len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    return vectors[:, keep] * values[keep].sqrt()


def distance(features: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Squared Frechet distance between images and a reference with this mean (D,) and root (D, r).

    `features` (..., N, D) with N >= 2 may be a stack of sets: one distance (...,) for each, in float64.
    """
    x = features.double()
    n = x.shape[-2]
    if n < 2:
        raise ValueError(f"a covariance needs 2 images, got {n}")
    m = x.mean(-2, keepdim=True)
    x = x - m
    trace = x.square().sum((-2, -1)) / (n - 1)
    y = x @ root / (n - 1) ** 0.5  # (..., N, r) = L^T R
    overlap = torch.linalg.svdvals(y).sum(-1)
    return ((m[..., 0, :] - mean).square().sum(-1) + trace + root.square().sum() - 2 * overlap).clamp(min=0)


def over_halves(features: Tensor, halves: Sequence[Sequence[int]], mean: Tensor, root: Tensor) -> Tensor:
    """The distance (K,) of every half-sample of features (N, D), in stacks that fit in memory."""
    if not halves:
        return torch.zeros(0, dtype=torch.float64)
    values = torch.empty(len(halves), dtype=torch.float64, device=features.device)
    for size in {len(half) for half in halves}:  # an odd number of images has halves of two sizes
        places = torch.tensor([i for i, half in enumerate(halves) if len(half) == size])
        index = torch.tensor([list(halves[i]) for i in places.tolist()])  # (K', size)
        together = max(1, CHUNK // (size * features.shape[1]))
        for where, part in zip(places.split(together), index.split(together), strict=True):
            values[where] = distance(features[part], mean, root)
    return values


def between(mean1: Tensor, root1: Tensor, mean2: Tensor, root2: Tensor) -> float:
    """Squared Frechet distance between two Gaussians given by means (D,) and roots (D, r1), (D, r2) of their covariances."""
    overlap = torch.linalg.svdvals(root1.mT @ root2).sum()
    total = (mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * overlap
    return max(0.0, total.item())
