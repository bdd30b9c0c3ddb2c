"""How many images look real, and how much of the real they cover: k nearest neighbours in feature space.

Precision and recall: Kynkaanniemi et al., NeurIPS 2019, https://arxiv.org/abs/1904.06991, Eq. 1 and 2. A ball around every
image of a set, as far as its k-th nearest neighbour in the set, makes up the set's manifold. Precision is the share of
generated images within the manifold of the reference, recall the share of reference images within that of the generated.
Density and coverage: Naeem et al., ICML 2020, https://arxiv.org/abs/2002.09797, Sec. 3.2, with balls around reference images
alone. Density is in how many of them an image lies, over k: not bounded by 1. Coverage is the share of them that hold an
image.

All four depend on the numbers of images and of reference images: compare runs where both are equal.

Shapes: N images and K reference images of D features, S sets of images: all N, then the half-samples.
"""

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import UserError
from ._sample import Part, Sample, Score

if TYPE_CHECKING:
    from torch import Tensor

TIE = 1e-12  # squared distances that differ by less, relative to the features' own length, are equal: float32 has 1e-7
parts = {
    "precision": Part("higher", "share"),
    "recall": Part("higher", "share"),
    "density": Part("higher"),  # may exceed 1
    "coverage": Part("higher", "share"),
}
needs = frozenset({"features", "reference", "kept"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1904.06991"

    # Which nearest neighbour is on the rim of a ball, for precision and recall. The paper's 3.
    k: int = Field(3, ge=1)
    # The same for density and coverage. Their paper's 5.
    k_density: int = Field(5, ge=1)


def evaluate(sample: Sample, config: Config) -> dict[str, Score]:
    """Of sample.features (N, D) and sample.reference.kept (K, D). Raises UserError for fewer images than neighbours."""
    import torch

    from . import _kernels

    assert sample.reference is not None  # in `needs`
    y = sample.reference.kept.double()
    middle = y.mean(0)  # near the origin, distances lose no digits
    x, y = sample.features.double() - middle, y - middle
    if len(x) <= config.k or len(y) <= max(config.k, config.k_density):
        raise UserError(
            f"precision_recall with k {config.k} and k_density {config.k_density} needs more than {config.k} images and"
            f" {max(config.k, config.k_density)} reference images, got {len(x)} and {len(y)}. Give more, or set a smaller k."
        )
    halves = sample.halves if all(len(half) > config.k for half in sample.halves) else ()
    sets = _kernels.members(len(x), halves).bool()  # (S, N)
    k_half = _k_half(config.k_density, len(x), min(map(len, halves), default=len(x)), len(y))
    real_reach = _reach(_nearest(y, max(config.k, config.k_density, k_half))[0], y)
    reach = torch.where(sets, _reach(_radii(x, config.k, sets).mT, x).mT, -1.0)  # (S, N); nothing is within -1
    widest = reach.amax(0)

    precise = torch.zeros(len(x), dtype=torch.float64)
    dense = torch.zeros(len(x), dtype=torch.float64)
    recalled, covered = torch.zeros((2, len(sets), len(y)), dtype=torch.bool)
    for rows in _kernels.blocks(len(x), len(y)):
        squared = _kernels.squared_distances(x[rows], y)
        precise[rows] = (squared <= real_reach[:, config.k - 1]).any(1).double()
        inside = squared <= real_reach[:, config.k_density - 1]
        dense[rows] = inside.sum(1).double()
        # Few pairs are near enough to count in any set: what differs between sets is looked up for these alone.
        covered[0] |= inside.any(0)
        i, j = (squared <= real_reach[:, k_half - 1]).nonzero(as_tuple=True)
        for s, here in enumerate(sets[1:, rows], start=1):
            covered[s, j[here[i]]] = True
        i, j = (squared <= widest[rows, None]).nonzero(as_tuple=True)
        near = squared[i, j]
        for s, radius in enumerate(reach[:, rows]):
            recalled[s, j[near <= radius[i]]] = True
    held, n = sets.double(), sets.sum(1)
    found = {
        "precision": held @ precise / n,
        "recall": recalled.double().mean(1),
        "density": held @ dense / n / config.k_density,
        "coverage": covered.double().mean(1),
    }
    return {name: Score(values[0].item(), tuple(values[1:].tolist())) for name, values in found.items()}


def _k_half(k: int, n: int, half: int, reference: int) -> int:
    """Which neighbour is on the rim of the balls that coverage is taken over in half-samples: about 1.3 k to 2 k.

    Half the images reach fewer balls of the same size, and the spread of that share is not the value's: too wide near 1 and
    too narrow near 0. A ball of k of K reference images has none of n images of the same
    distribution in it with probability (1 + n / K)^-k; here the half's is as large as that of the whole.
    """
    return min(reference - 1, int(k * math.log1p(n / reference) / math.log1p(half / reference)))


def _reach(radii: "Tensor", centres: "Tensor") -> "Tensor":
    """Squared radii (n, …) of the balls around centres (n, D), with room for rounding, so that what lies on the rim is in."""
    return radii + TIE * (radii + centres.square().sum(1, keepdim=True))


def _nearest(x: "Tensor", k: int) -> tuple["Tensor", "Tensor"]:
    """Squared distances (n, k), rising, of each of x (n, D) to its k nearest others, and which they are (n, k)."""
    import torch

    from . import _kernels

    found = []
    for rows in _kernels.blocks(len(x), len(x)):
        squared = _kernels.squared_distances(x[rows], x)
        squared[:, rows].fill_diagonal_(torch.inf)
        found.append(squared.topk(k, largest=False))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _radii(x: "Tensor", k: int, sets: "Tensor") -> "Tensor":
    """(S, N): squared distance of each of x (N, D) to its k-th nearest other image in each of the sets (S, N) of > k images.

    Half-samples need no distances of their own: among the nearest others of an image, every second is in the half.
    """
    import torch

    wide = 16 * k + 48
    while True:
        squared, who = _nearest(x, min(wide, len(x) - 1))
        counts = [(held[who].cumsum(1, dtype=torch.int32) >= k) for held in sets]  # S times (N, wide)
        if all(count[held, -1].all() for count, held in zip(counts, sets, strict=True)):
            return torch.stack([squared.gather(1, count.int().argmax(1, keepdim=True))[:, 0] for count in counts])
        wide *= 2  # an image whose neighbours are all in the other half: next to impossible, and slow
