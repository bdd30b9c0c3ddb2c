"""Magnitude of widths: the heads, units and channels with the smallest weights go first. No data is needed.

Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, for all that goes together with a filter, as "DepGraph"
(arXiv 2301.12900) weighs it: the magnitude baseline of Diff-Pruning's tables.
"""

import random
from typing import ClassVar

from pydantic import Field

from ..core.errors import UserError
from ._task import Pruned, Task
from ._widths import Narrowing, chosen, ladders, many_shapes, means

calibrated = False
narrows = True  # cuts widths, not layers


class Config(Narrowing):
    """Settings of magnitude pruning of widths."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1608.08710"

    norm: int = Field(default=2, ge=1, le=2)  # p: the score is the sum of |w|^p


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The heads, units and channels of least weight, as many as the target needs."""
    from ._coupled import importances, magnitude

    if any(p.is_meta for p in task.denoiser.parameters()):
        raise UserError(
            "magnitude_widths: the weights are not there to be weighed (a structure alone, or offload: sequential). "
            "Use a model with its weights in memory, or random_widths."
        )
    steps, scorer = ladders("magnitude_widths", task, config), magnitude(config.norm)
    scores = {width: importances(task.denoiser, width, scorer).tolist() for width in steps}
    cuts = chosen(task, steps, scores, config)
    return Pruned(cuts=cuts, scores=means(scores), label=f"mean sum of |w|^{config.norm}", warnings=many_shapes(task, cuts))
