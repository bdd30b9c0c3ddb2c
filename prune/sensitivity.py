"""Sensitivity: the blocks whose absence alone moves the denoiser's output least go, wherever they are.

The baseline of that name in TinyFusion's tables (Fang et al., arXiv 2412.01199), where it ends far behind structures that are
spread over the network. The measure is the output loss on recorded calls (ours: noised as sampling noises them).
"""

import math
import random
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from . import _depth
from ._task import Pruned, Task, gathered, until_met, usable, within

calibrated = True  # asks for losses on calibration calls
units = _depth.KINDS


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01199"


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """Cut the options of least loss until enough is saved."""
    options = list(dict.fromkeys(o for space in task.spaces for site in space.sites for o in site))
    bases = [space.base.cuts for space in task.spaces if space.base.cuts]
    losses = task.losses([*(option.cuts for option in options), *bases])
    scores = {(): 0.0, **dict(zip([*(o.cuts for o in options), *bases], losses, strict=True))}
    answers = []
    for space in within(usable("sensitivity", task.spaces, scores, task.need), task.need):
        least = [min(site, key=lambda o: scores[o.cuts]) for site in space.sites]
        taken = until_met(sorted(least, key=lambda o: scores[o.cuts]), space.base, task.need)
        answers.append((sum(scores[o.cuts] for o in taken), gathered(space.base, taken)))
    named = {option.name: scores[option.cuts] for option in options if math.isfinite(scores[option.cuts])}
    return Pruned(cuts=min(answers, key=lambda answer: answer[0])[1], scores=named, label="output loss")
