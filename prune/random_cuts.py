"""Random cuts, seeded: what any criterion has to beat."""

import random
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ._task import Pruned, Task, gathered, until_met, within

calibrated = False


class Config(BaseModel):
    """No settings: the seed is that of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = ""


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """Cut layers in random order until enough is saved."""
    space = rng.choice(within(task.spaces, task.need))
    order = [rng.choice(site) for site in space.sites]
    rng.shuffle(order)
    return Pruned(cuts=gathered(space.base, until_met(order, space.base, task.need)))
