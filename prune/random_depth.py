"""Random depth, seeded: of every group of blocks so many stay, whichever. What any way to choose depth has to beat.

TinyFusion (Fang et al., arXiv 2412.01199, Table 3) finds a random structure of median loss ahead of ShortGPT, sensitivity and least loss.
"""

import random
from typing import ClassVar

from . import _depth
from ._task import Pruned, Task

calibrated = False
units = _depth.KINDS


class Config(_depth.Structured):
    """Which groups there are; the seed is that of the run."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01199"


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """One structure of all, uniformly."""
    return Pruned(cuts=_depth.cuts(_depth.drawn(_depth.groups(task, config, "random_depth"), rng)))
