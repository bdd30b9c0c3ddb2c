"""Least loss of many random structures: N of M blocks, and of all that are drawn the one that moves the output least.

TinyFusion (Fang et al., arXiv 2412.01199, Table 3) draws 100,000 and finds the least loss among the worst choices once
the model is retrained; `median_loss` is its counterpart. The loss here is that of the output on recorded calls (ours).
"""

import math
import random
from typing import ClassVar

from pydantic import Field

from ..core.errors import UserError
from . import _depth
from ._task import Pruned, Task

calibrated = True  # asks for losses on calibration calls
units = _depth.KINDS


class Config(_depth.Structured):
    """How many structures are drawn."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01199"

    structures: int = Field(default=64, ge=1)  # drawn at random, or all there are; the paper draws 100,000


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The structure of least loss."""
    return ranked(task, config, rng, "min_loss")[0]


def ranked(task: Task, config: Config, rng: random.Random, name: str) -> list[Pruned]:
    """Random structures by what they lose, least first; those that break the output are left out."""
    found = _depth.groups(task, config, name)
    options = [_depth.cuts(gone) for gone in _depth.distinct(found, config.structures, rng)]
    losses = task.losses(options)
    finite = [(loss, i) for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise UserError(f"{name}: all {len(options)} structures make the output infinite or NaN. Is the model broken?")
    return [Pruned(cuts=options[i], predicted=loss) for loss, i in sorted(finite)]
