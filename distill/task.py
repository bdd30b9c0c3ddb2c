"""The task loss: the denoising error that the model was trained with in the first place, on the noise of each sample.

L = E |eps_student(x_t, t, c) - eps|^2 (Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 14), or on
the velocity or the clean sample where the model predicts those. The first of the three terms of BK-SDM's loss (arXiv 2305.15798).
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from ._seen import Seen

taught = False  # needs no teacher


class Config(BaseModel):
    """Settings of the task loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "https://arxiv.org/abs/2006.11239"


def loss(seen: "Seen", config: Config) -> "Tensor":
    """Mean over samples and elements. A variance that the student also predicts (DiT) is not compared with anything."""
    from ._seen import mean_square

    return mean_square(seen.student[:, : seen.target.shape[1]], seen.target).mean()
