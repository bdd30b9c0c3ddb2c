"""Frechet distance extrapolated to infinitely many images. Chong and Forsyth, CVPR 2020, https://arxiv.org/abs/1911.07023

Over N images the distance is biased upward by about c / N, and c differs between models, so that even equal N can rank them
wrongly. Here it is taken over growing subsets of the images; a straight line in 1 / N through these values meets 1 / N = 0
at the distance of infinitely many (Sec. 3). The subsets are nested, and balanced over the conditions.

The price is noise: its standard error is at least 1.2 times that of the plain distance, and a model as good as the reference
scores about 0, below as often as above. And the line is straight only where images outnumber features by far, at least 10
to 1: with fewer, what is left of the bias can be of either sign, and with fewer images than features it is not to be trusted.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import UserError
from ._sample import Part, Sample, Score

if TYPE_CHECKING:
    from ._frechet import Subsets

# Subsets of a half-sample: only the spread is wanted, which hardly depends on how many points a line goes through.
POINTS_OF_HALF = 5
parts = {"fid_infinity": Part("lower")}  # squared units of the features
needs = frozenset({"features", "reference"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1911.07023"

    # Subsets that the line goes through, evenly spaced in their number of images. The paper's 15.
    points: int = Field(15, ge=2)
    # Share of the images in the smallest subset. The paper's is 0.1, of 50,000 images: 2.4 for each feature of Inception. With
    # fewer the line bends, and small subsets pull it down (docs/results.md has both).
    smallest: float = Field(0.2, gt=0, lt=1)


def evaluate(sample: Sample, config: Config) -> Score:
    """Extrapolated squared distance of sample.features (N, D) from sample.reference. Raises UserError for too few images."""
    from . import _frechet

    n = len(sample.features)
    # The smallest subset has a covariance, and is not the largest one too.
    needed = math.ceil(max(2 / config.smallest, 1 / (1 - config.smallest)))
    if n < needed:
        raise UserError(f"fid_infinity needs at least {needed} images, got {n}. Ask for more samples.")
    assert sample.reference is not None  # in `needs`
    subsets = _frechet.Subsets(sample.features, sample.reference.mean, sample.reference.root)
    period = sample.period if 2 * sample.period <= n else 1
    rank = list(range(n))
    random.Random(f"fid_infinity {n}").shuffle(rank)  # not as the half-samples are shuffled
    halves = sample.halves if all(len(half) >= needed for half in sample.halves) else ()
    value = _intercept(subsets, shuffled(range(n), rank, period), config)
    fewer = config.model_copy(update={"points": min(config.points, POINTS_OF_HALF)})
    return Score(value, tuple(_intercept(subsets, shuffled(half, rank, period), fewer) for half in halves))


def shuffled(images: Sequence[int], rank: Sequence[int], period: int) -> list[int]:
    """The images by rank, moved so that the first n of them hold every condition (i % period) equally often, to within one.

    A half-sample keeps the order of the whole, so that each image has the same weight in both lines: the spread over
    half-samples is that of the value. With an order of its own for each half it would be 16 % too wide.
    """
    seen: Counter[int] = Counter()
    turns = []
    for i in sorted(images, key=rank.__getitem__):
        turns.append((seen[i % period], i))
        seen[i % period] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]


def _intercept(subsets: "Subsets", order: Sequence[int], config: Config) -> float:
    """Least squares of the distances of the first n images against 1 / n, at 1 / n = 0."""
    import torch

    ends = config.smallest * len(order), len(order)
    sizes = sorted({round(size) for size in torch.linspace(*ends, config.points, dtype=torch.float64).tolist()})
    values = subsets.nested(order, sizes)
    x = 1 / torch.tensor(sizes, dtype=torch.float64)
    slope = ((x - x.mean()) * (values - values.mean())).sum() / (x - x.mean()).square().sum()
    return (values.mean() - slope * x.mean()).item()
