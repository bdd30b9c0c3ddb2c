"""Kernel distance between generated and reference images. Binkowski et al., ICLR 2018, https://arxiv.org/abs/1801.01401

The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Sec. 4), by its unbiased estimator over all pairs of
images. clean-fid and others print the average over random subsets of 1,000 images: that has the same expectation and more
variance. Unbiased means that it compares across numbers of images, unlike a Frechet distance, and that models as good as the
reference score about 0, below as often as above: then the interval is too wide, by the root of 3 at most. KID is its
name with Inception features; with others it is KD[features].
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import UserError
from ._sample import Part, Sample, Score

if TYPE_CHECKING:
    from torch import Tensor

parts = {"kid": Part("lower")}
needs = frozenset({"features", "reference", "kept"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1801.01401"

    # Whether images of conditions in turn are taken as such. False takes them for independent, as clean-fid does: about
    # (kernel within a condition - kernel over all) / N too low, which for a good model can be all of the value.
    balanced: bool = Field(True)


def evaluate(sample: Sample, config: Config) -> Score:
    """Discrepancy of sample.features (N, D) from sample.reference.kept (K, D). Raises UserError for fewer than 2 images."""
    from . import _kernels

    if len(sample.features) < 2:
        raise UserError(f"kid needs at least 2 images, got {len(sample.features)}. Ask for more samples.")
    assert sample.reference is not None  # in `needs`
    period = sample.period if config.balanced else 1
    value, *replicates = _kernels.mmd(sample.features, sample.reference.kept, cubic, sample.halves, period).tolist()
    return Score(value, tuple(replicates))


def cubic(x: "Tensor", y: "Tensor") -> "Tensor":
    """(x_i.y_j / D + 1)^3 of features (B, D) and (M, D): (B, M)."""
    base = x @ y.mT / x.shape[1] + 1
    return base * base * base
