"""Median loss of many random structures: what a draw of N of M blocks is worth, without luck in either direction.

TinyFusion (Fang et al., arXiv 2412.01199, Table 3): after retraining it ends ahead of the least loss, of ShortGPT and of
sensitivity. See `min_loss`.
"""

import random

from . import min_loss
from ._task import Pruned, Task

calibrated = True  # asks for losses on calibration calls
units = min_loss.units


class Config(min_loss.Config):
    """How many structures are drawn."""


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The structure of median loss; of two the smaller."""
    found = min_loss.ranked(task, config, rng, "median_loss")
    return found[(len(found) - 1) // 2]
