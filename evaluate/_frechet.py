"""Frechet distance between Gaussians, in float64. Dowson and Landau 1982; as FID, Heusel et al., 1706.08500, Eq. 6.

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

C1 C2 is not symmetric, and a general matrix root of it turns complex, and wrong in the sixth digit, when a covariance is
singular. With C1 = L L^T and C2 = R R^T its nonzero eigenvalues are those of the symmetric (L^T R)^T (L^T R), so that
tr (C1 C2)^(1/2) is the sum of the singular values of L^T R: never negative, never complex, and exact to rounding for singular
covariances too. Images give L for nothing: their centred features X (N, D) are L^T sqrt(N - 1). R is worked out once per
reference.

Shapes: N images, D features, r the rank of the reference, K half-samples.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
CLOSE = 1e-7  # relative error that is accepted of eigenvalues in place of singular values, by a bound that is rarely reached


def root(covariance: Tensor) -> Tensor:
    """R (D, r) float64 with covariance (D, D) = R R^T, r being its numerical rank; singular covariances are welcome."""
    lower, order = _cholesky(covariance)
    result = torch.empty_like(lower)
    result[order] = lower
    return result


def distance(features: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Squared Frechet distance, float64 (), of features (N, D) with N >= 2 from a reference: mean (D,) and root (D, r)."""
    x = features.double()
    n = len(x)
    if n < 2:
        raise ValueError(f"a covariance needs 2 images, got {n}")
    m = x.mean(0)
    x = x - m
    z = x @ root / (n - 1) ** 0.5  # (N, r): L^T R
    apart = (m - mean).square().sum() + x.square().sum() / (n - 1) + root.square().sum()
    if 0 < z.shape[1] < n:  # (r, r) is smaller than (N, r)
        values = torch.linalg.eigvalsh(z.mT @ z).clamp(min=0)
        total = apart - 2 * values.sqrt().sum()
        if _felt(values) <= CLOSE * total:
            return total
    return (apart - 2 * torch.linalg.svdvals(z).sum()).clamp(min=0)


class Subsets:
    """Distances of many subsets of one set of images, at a fraction of the cost of `distance`.

    The squares of the singular values of L^T R are eigenvalues of a symmetric matrix: (n, n) of the inner products of
    n images in the reference's metric, all worked out beforehand, or the (r, r) scatter of n images. Squaring costs half of
    the digits of singular values below 1e-8 of the largest; sums keep about eight, plenty for a spread.
    """

    def __init__(self, features: Tensor, mean: Tensor, root: Tensor) -> None:
        """Features (N, D) of all images; mean (D,) and root (D, r) of the reference."""
        x = features.double()
        centre = x.mean(0)
        self._x = x - centre  # small numbers: nothing is lost where means are taken out later
        self._off, self._variance = centre - mean, root.square().sum()
        self._z = self._x @ root  # (N, r)
        self._gram = self._z @ self._z.mT if len(x) <= 2 * root.shape[1] else None  # (N, N), where halves are smaller than r

    def nested(self, order: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Distances, float64 (len(sizes),), of the first sizes[0], sizes[1], … images of `order`; sizes >= 2 rise."""
        index = torch.tensor(list(order), device=self._x.device)
        r = self._z.shape[1]
        total, squares = torch.zeros_like(self._off), torch.zeros_like(self._variance)
        z_total, scatter, scattered = self._z.new_zeros(r), self._z.new_zeros((r, r)), 0  # of the images index[:scattered]
        values, done = [], 0
        for n in sizes:
            x = self._x[index[done:n]]
            total, squares, done = total + x.sum(0), squares + x.square().sum(), n
            if self._gram is not None and n <= r:
                part = self._gram[index[:n, None], index[:n]]
                part = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
            else:
                z = self._z[index[scattered:n]]
                z_total, scatter, scattered = z_total + z.sum(0), scatter + z.mT @ z, n
                part = scatter - torch.outer(z_total, z_total) / n
            rank = min(n - 1, r)  # the other eigenvalues are 0, and would add the root of a rounding error each
            overlap = torch.linalg.eigvalsh(part)[len(part) - rank :].clamp(min=0).sqrt().sum() / (n - 1) ** 0.5
            trace = (squares - total.square().sum() / n) / (n - 1)
            values.append((total / n + self._off).square().sum() + trace + self._variance - 2 * overlap)
        return torch.stack(values).clamp(min=0)


def over_halves(features: Tensor, halves: Sequence[Sequence[int]], mean: Tensor, root: Tensor) -> Tensor:
    """The distance (K,) of every half-sample of features (N, D)."""
    if not halves:
        return torch.zeros(0, dtype=torch.float64)
    subsets = Subsets(features, mean, root)
    return torch.cat([subsets.nested(half, [len(half)]) for half in halves])


def between(mean1: Tensor, root1: Tensor, mean2: Tensor, root2: Tensor) -> float:
    """Squared Frechet distance between two Gaussians given by means (D,) and roots (D, r1), (D, r2) of their covariances."""
    overlap = torch.linalg.svdvals(root1.mT @ root2).sum()
    total = (mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * overlap
    return max(0.0, total.item())


def between_covariances(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Frechet distance between two Gaussians given by means (D,) and covariances (D, D); the fastest from scratch.

    With both regular, C1 = L L^T, the eigenvalues of L^T C2 L are wanted and no singular value: a reduced generalized
    eigenproblem. Where the rounding of these could be felt (`_felt`), or a covariance is singular, roots and singular values
    are taken.
    """
    (lower, order), other = _cholesky(covariance1), _cholesky(covariance2)[0]
    if lower.shape[1] == other.shape[1] == len(lower):
        permuted = covariance2.double().cpu()[order[:, None], order]
        reduced, _ = lapack.dsygst(permuted.numpy().T, lower.numpy(), itype=2, lower=1)
        values = torch.linalg.eigvalsh(torch.from_numpy(reduced)).clamp(min=0)
        total = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * values.sqrt().sum()
        if _felt(values) <= CLOSE * total:
            return total.item()
    return between(mean1, root(covariance1), mean2, root(covariance2))


def _felt(values: Tensor) -> Tensor:
    """How much of the rounding of eigenvalues (r,), ascending, could be felt in the sum of their roots.

    Each is good to EPS of the largest, so its root s to EPS max(s)^2 / s.
    """
    noise = EPS * values[-1]
    return (noise / values.clamp(min=noise).sqrt()).sum()


def _cholesky(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Lower L (D, r) and order (D,) with covariance[order][:, order] = L L^T, up to D EPS of the largest variance.

    Complete pivoting reveals the rank r (Higham 2002, Accuracy and Stability, Sec. 10.3), ten times faster than eigenvalues.
    """
    matrix = covariance.double().cpu().numpy()
    packed, pivots, rank, _ = lapack.dpstrf(matrix.T, lower=1)
    return torch.from_numpy(np.tril(packed)[:, :rank]), torch.from_numpy(pivots - 1).long()
