"""How much images of one condition differ: mean distance of pairs, as Zhu et al., https://arxiv.org/abs/1711.11586, Sec. 5.

That paper takes LPIPS between images made from one input; here it is the cosine distance of features. A model that paints
one picture per prompt scores 0 whatever its Frechet distance, and noise scores high: read it beside a measure of quality.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from ..core.errors import UserError
from ._sample import Part, Sample, Score

if TYPE_CHECKING:
    from torch import Tensor

parts = {"diversity": Part("higher", "cosine distance")}  # 0..2
needs = frozenset({"features"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1711.11586"


def evaluate(sample: Sample, config: Config) -> Score:
    """Mean over conditions of the mean of 1 - cos over the pairs of its images, of sample.features (N, D).

    Where every condition has one image only, over all pairs. Raises UserError for fewer than 2 images.
    """
    import torch
    from torch.nn.functional import normalize

    n = len(sample.features)
    if n < 2:
        raise UserError(f"diversity needs at least 2 images, got {n}. Ask for more samples.")
    period = sample.period if sample.period < n else 1
    units, condition = normalize(sample.features.double()), torch.arange(n) % period
    value, paired = _mean(units, condition)
    found = [_mean(units[list(half)], condition[list(half)]) for half in sample.halves]
    if any(pairs < paired for _, pairs in found):
        # A half leaves conditions without a pair. Then half of the conditions, whole: those whose first image is in the half.
        # How the conditions differ counts as well then, so that the interval is rather too wide.
        chosen = [torch.isin(condition, torch.tensor([i for i in half if i < period])) for half in sample.halves]
        found = [_mean(units[rows], condition[rows]) for rows in chosen] if period > 1 else []
    replicates = tuple(mean for mean, _ in found) if all(pairs for _, pairs in found) else ()
    return Score(value, replicates)


def _mean(units: "Tensor", condition: "Tensor") -> tuple[float, int]:
    """The mean over conditions, and how many have a pair; features (n, D) of length 1, condition (n,) of each.

    The sum of all cosines of n unit vectors is |their sum|^2, n of them being 1: no pair is looked at.
    """
    import torch

    number, condition = condition.unique(return_inverse=True)
    count = torch.bincount(condition).double()  # (conditions,)
    sums = torch.zeros((len(number), units.shape[1]), dtype=torch.float64).index_add_(0, condition, units)
    own = torch.zeros(len(number), dtype=torch.float64).index_add_(0, condition, units.square().sum(1))
    cosine = (sums.square().sum(1) - own) / (count * (count - 1))
    pairs = count >= 2
    return (1 - cosine[pairs]).mean().item(), int(pairs.sum())
