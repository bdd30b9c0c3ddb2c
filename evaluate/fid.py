"""Frechet distance between generated and reference images. Heusel et al., NeurIPS 2017, https://arxiv.org/abs/1706.08500

The name FID is kept for Inception features; with others the same formula (Eq. 6) is printed as FD[features].
The value over N images is biased upward by about 1/N (Chong and Forsyth, 1911.07023): compare equal N only.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ..core.errors import UserError
from ._sample import Part, Sample, Score

parts = {"fid": Part("lower")}  # squared units of the features
needs = frozenset({"features", "reference"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.08500"


def evaluate(sample: Sample, config: Config) -> Score:
    """Squared Frechet distance of sample.features (N, D) from sample.reference. Raises UserError for fewer than 2 images."""
    from . import _frechet

    if len(sample.features) < 2:
        raise UserError(f"fid needs at least 2 images, got {len(sample.features)}. Ask for more samples.")
    assert sample.reference is not None  # in `needs`
    mean, root = sample.reference.mean, sample.reference.root
    value = _frechet.distance(sample.features, mean, root)
    replicates = _frechet.over_halves(sample.features, sample.halves, mean, root)
    return Score(value.item(), tuple(replicates.tolist()))


def bias(value: float, replicates: Sequence[float]) -> float | None:
    """About how far the value lies above that of infinitely many images; None without replicates.

    With a bias of c / N, half-samples lie another c / N higher. Where features outnumber images the bias grows slower
    than that as images get fewer, and the real one is larger still.
    """
    return sum(replicates) / len(replicates) - value if replicates else None
