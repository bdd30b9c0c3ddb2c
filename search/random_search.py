"""Uniform random plans: the baseline that every search method must beat at the same number of denoiser calls.

Bergstra and Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 13 (2012),
https://www.jmlr.org/papers/v13/bergstra12a.html
"""

import random
from collections.abc import Generator
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Request
from ..core.measurement import Trial
from ._operators import tightened
from ._task import Fresh, Task

several = True
varies = frozenset({"timesteps", "skips", "reuse", "models", "cuts"})


class Config(BaseModel):
    """Uniform random plans."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://www.jmlr.org/papers/v13/bergstra12a.html"

    batch: int = Field(default=20, ge=1)  # candidates proposed at once; does not change which ones


def search(task: Task, config: Config, rng: random.Random) -> Generator[list[Request], list[Trial], None]:
    """Draw K timesteps uniformly without replacement, and who makes each step where several models can; where there is a budget,
    leave out random layers until it holds.

    Where a cost is an objective, its budget is drawn too, between the least possible and the budget that is given.
    """
    fresh, left = Fresh(), task.trials
    batch = task.opening(fresh)
    while left > 0:
        for _ in range(100 * config.batch):  # a tiny space (K near N) may hold fewer plans than asked
            if len(batch) >= min(config.batch, left):
                break
            genome = tightened(task, rng).fill(task.space.random_steps(rng), rng)
            if task.space.fits(genome) and fresh.take(genome):
                batch.append(task.request(genome, "random"))
        if not batch:
            return
        left -= len(batch)
        yield batch
        batch = []
