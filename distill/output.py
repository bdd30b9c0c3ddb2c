"""Output distillation: the student's prediction against the teacher's, on the same noised samples.

L = E |eps_student - eps_teacher|^2, the second term of BK-SDM's loss (Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version
of Stable Diffusion", arXiv 2305.15798), and of most that came after it.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from ._seen import Seen

taught = True


class Config(BaseModel):
    """Settings of output distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.15798"


def loss(seen: "Seen", config: Config) -> "Tensor":
    """Mean over samples and elements, a predicted variance included: the student must not unlearn it."""
    from ._seen import mean_square

    assert seen.teacher is not None
    return mean_square(seen.student, seen.teacher).mean()
