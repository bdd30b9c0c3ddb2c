"""Magnitude: the layers with the smallest weights go first. The baseline of every pruning paper, and no data is needed.

After Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626, for whole layers.
"""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from ..core.errors import UserError
from ._task import Pruned, Task, gathered, until_met, within

if TYPE_CHECKING:
    from ..core.candidate import Cut

calibrated = False


class Config(BaseModel):
    """Settings of magnitude pruning."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"

    norm: Literal["rms", "l2", "l1"] = "rms"  # rms: per weight, so that large layers are not spared for their size


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """Cut the options with the smallest weights until enough is saved; of several spaces, where least goes in all."""
    scale = _Scale(task.denoiser, config.norm)
    sizes = {option: scale.size(option.cuts) for space in task.spaces for site in space.sites for option in site}
    answers = []
    for space in within(task.spaces, task.need):
        smallest = [min(site, key=lambda option: sizes[option]) for site in space.sites]
        taken = until_met(sorted(smallest, key=lambda option: sizes[option]), space.base, task.need)
        cuts = gathered(space.base, taken)
        answers.append((scale.size(cuts), len(cuts), cuts))
    return Pruned(
        cuts=min(answers, key=lambda answer: answer[:2])[-1],
        scores={option.name: size for option, size in sizes.items()},
        label=f"{config.norm} norm of the weights",
    )


class _Scale:
    """Weighs cuts: the norm of the weights that they take out. What stays, such as a ResNet's shortcut, does not count."""

    def __init__(self, denoiser: Any, norm: str) -> None:
        self.denoiser, self.norm = denoiser, norm
        self.weights = {id(p): p for p in denoiser.parameters()}
        self.sums: dict[int, float] = {}  # of each weight that was asked for: the sum of its squares or absolute values
        if any(p.is_meta for p in self.weights.values()):
            raise UserError(
                "magnitude: the weights are not there to be weighed (a structure alone, or offload: sequential). "
                "Use a model with its weights in memory, or random_cuts."
            )

    def size(self, cuts: "Sequence[Cut]") -> float:
        from ..core import surgery

        with surgery.applied(self.denoiser, cuts):
            left = {id(p) for p in self.denoiser.parameters()}
        gone = [i for i in self.weights if i not in left]
        total = math.fsum(self._sum(i) for i in gone)
        if self.norm == "l1":
            return total
        count = sum(self.weights[i].numel() for i in gone) if self.norm == "rms" else 1
        return math.sqrt(total / max(count, 1))

    def _sum(self, i: int) -> float:
        if i not in self.sums:
            weight = self.weights[i].detach().float()
            self.sums[i] = float((weight.abs() if self.norm == "l1" else weight.square()).sum())
        return self.sums[i]
