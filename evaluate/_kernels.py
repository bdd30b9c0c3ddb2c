"""Sums over all pairs of images, in blocks that fit in memory: kernels and distances, in float64.

Shapes: N images and K reference images of D features, B images of a block, S sets of images: all N, then the half-samples.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._sample import Halves

CHUNK = 2**20  # numbers of a block held at once: 8 MB, which stay in the cache of most processors
Kernel = Callable[[Tensor, Tensor], Tensor]  # features (B, D) and (M, D) -> their kernel (B, M), all float64


def members(n: int, halves: Halves) -> Tensor:
    """float64 (S, n): 1 where a set holds an image. The first set holds all, the others are the half-samples."""
    result = torch.zeros((1 + len(halves), n), dtype=torch.float64)
    result[0] = 1
    for row, half in zip(result[1:], halves, strict=True):
        row[list(half)] = 1
    return result


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of 0..rows, so that a block of that many rows and `columns` columns holds about CHUNK numbers."""
    step = max(1, CHUNK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 >= 0 of float64 features (B, D) and (M, D): (B, M)."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.mT).clamp_(min=0)


def mmd(x: Tensor, y: Tensor, kernel: Kernel, halves: Halves, period: int = 1) -> Tensor:
    """Unbiased squared maximum mean discrepancy, float64 (S,), of every set of images x (N, D) from the reference y (K, D).

    Gretton et al., A Kernel Two-Sample Test, JMLR 2012, Lemma 6:
    mean of k(x_i, x_j) over i != j + the same of y - 2 * mean of k(x_i, y_j).

    Images of conditions in turn (i and i + period show the same) are too different for that: the n pairs (i, i) that are left
    out are all within a condition. There, each condition's other pairs stand for its own share of them (stratified sampling).
    Where a condition may have a single image in a half-sample, all images count as independent.
    """
    x, y = x.double(), y.double()
    sets = members(len(x), halves)
    n = sets.sum(1)  # (S,)
    period = period if 4 * period <= len(x) else 1
    conditions = [slice(start, None, period) for start in range(period)]
    within = [_pairs(x[rows], kernel, sets[:, rows]) / (sets[:, rows].sum(1) - 1) for rows in conditions]
    total = within[0] * (n - 1) if period == 1 else _pairs(x, kernel, sets)
    cross = torch.cat([kernel(x[rows], y).sum(1) for rows in blocks(len(x), len(y))])  # (N,)
    of_y = _pairs(y, kernel, members(len(y), ())).item() / (len(y) * (len(y) - 1))
    return (total + torch.stack(within).sum(0)) / n.square() + of_y - 2 * sets @ cross / (n * len(y))


def _pairs(x: Tensor, kernel: Kernel, sets: Tensor) -> Tensor:
    """(S,): the sum of k(x_i, x_j) over i != j of every set. The kernel is symmetric: half of it is computed."""
    total = torch.zeros(len(sets), dtype=torch.float64)
    for rows in blocks(len(x), len(x)):
        size, later = rows.stop - rows.start, slice(rows.start, None)
        block = kernel(x[rows], x[later])
        block[:, :size].fill_diagonal_(0)
        block[:, size:] *= 2  # (i, j) stands for (j, i) too
        total += (sets[:, rows].mT * (block @ sets[:, later].mT)).sum(0)
    return total
