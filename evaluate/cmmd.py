"""CMMD: a kernel distance that sees any difference of distributions. Jayasumana et al., https://arxiv.org/abs/2401.09603

The squared maximum mean discrepancy of embeddings of length 1 with the kernel exp(-|x - y|^2 / (2 * 10^2)), times 1,000
(Sec. 4). The paper states the unbiased estimator, used here; its released code keeps the pairs of an image with itself, which
adds 5 to 10 / N, and as much / K, for N and K images. The paper's CMMD is on clip:ViT-L-14-336/openai; values on other
features are not comparable with it, nor with each other.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import UserError
from ._sample import Part, Sample, Score

if TYPE_CHECKING:
    from torch import Tensor

SIGMA, SCALE = 10.0, 1000.0  # of the paper: with others the number would need another name
parts = {"cmmd": Part("lower")}
needs = frozenset({"features", "reference", "kept"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.09603"

    # Whether images of conditions in turn are taken as such. False takes them for independent, as the paper's estimator does:
    # about 1,000 * (kernel within a condition - kernel over all) / N too low.
    balanced: bool = Field(True)


def evaluate(sample: Sample, config: Config) -> Score:
    """Discrepancy of sample.features (N, D) from sample.reference.kept (K, D). Raises UserError for fewer than 2 images."""
    from torch.nn.functional import normalize

    from . import _kernels

    if len(sample.features) < 2:
        raise UserError(f"cmmd needs at least 2 images, got {len(sample.features)}. Ask for more samples.")
    assert sample.reference is not None  # in `needs`
    x, y = normalize(sample.features.double()), normalize(sample.reference.kept.double())
    period = sample.period if config.balanced else 1
    value, *replicates = (SCALE * _kernels.mmd(x, y, gaussian, sample.halves, period)).tolist()
    return Score(value, tuple(replicates))


def gaussian(x: "Tensor", y: "Tensor") -> "Tensor":
    """exp(-|x_i - y_j|^2 / (2 SIGMA^2)) - 1 of features (B, D) and (M, D): (B, M).

    Less 1, which leaves a discrepancy as it is: on the unit sphere the kernel is 0.98 to 1, and the digits would be lost.
    """
    from . import _kernels

    return (_kernels.squared_distances(x, y) / (-2 * SIGMA**2)).expm1()
