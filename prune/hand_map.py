"""Hand-made depth: of every group the first blocks stay in the first half of the network, the last ones in the second half.

The structure that BK-SDM (Kim et al., arXiv 2305.15798) has for U-Nets, carried over to transformers as the "oracle" baseline
of TinyFusion (Fang et al., arXiv 2412.01199, Table 1): 0, 2, 4, ... of the first half, and the odd ones of the second.
"""

import random
from typing import ClassVar

from . import _depth
from ._task import Pruned, Task

calibrated = False
units = _depth.KINDS


class Config(_depth.Structured):
    """Which groups there are."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01199"


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The first of each group, the last of each in the second half."""
    found = _depth.groups(task, config, "hand_map")
    total, before, gone = sum(len(group.blocks) for group in found), 0, list[str]()
    for group in found:
        size = len(group.blocks)
        second = 2 * before >= total
        gone += group.without(range(size - group.stay, size) if second else range(group.stay))
        before += size
    return Pruned(cuts=_depth.cuts(gone))
