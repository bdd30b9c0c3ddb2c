"""T-Stitch: small models make the steps of high noise, larger ones the rest; every place to change over is tried.

Pan et al., "T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching", ICLR 2025,
https://arxiv.org/abs/2402.14167, Sec. 3: no search algorithm, but a sweep over the share r of the trajectory that the small
model makes, r = 0, 0.1, ..., 1; of three models, over all pairs of shares on that grid.

Notation: grid -> the distance of two shares r; K steps, so that the first round-half-down(r K) are the small model's.

The timesteps are those of the best fixed schedule. Which model is small is decided by its MACs, the pipeline's own among them,
so that the same sweep lets a large model finish what a pruned one began. Shares that come to the same steps are tried once, as
are those that a budget allows. Ours: the rounding, for which the released scripts have two rules that differ by a step.
"""

import itertools
import math
import random
from collections.abc import Generator, Iterator
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Request
from ..core.measurement import Trial
from ._space import Genome, Space, made_by
from ._task import Fresh, Task

several = True
varies = frozenset({"timesteps", "models"})
needs = frozenset({"models"})


class Config(BaseModel):
    """A sweep over the places where a larger model takes over."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.14167"

    grid: float = Field(default=0.1, gt=0, le=1)  # distance of two shares; the paper has 0.1
    batch: int = Field(default=20, ge=1)  # candidates proposed at once; does not change which ones


def search(task: Task, config: Config, rng: random.Random) -> Generator[list[Request], list[Trial], None]:
    """Yield every division of the best fixed schedule among the models, from few steps of the small ones to all."""
    space, fresh, left = task.space, Fresh(), task.trials
    scored = sorted(task.scored(task.known), key=lambda found: found[1])
    for genome, _ in scored:
        fresh.take(genome)
    batch = task.opening(fresh)
    schedule = scored[0][0] if scored else space.random_times(rng)
    for genome in divisions(schedule, space, config.grid):
        if len(batch) >= min(config.batch, left):
            left -= len(batch)
            yield batch
            batch = []
        if left <= 0:
            return
        if space.fits(genome) and fresh.take(genome):
            batch.append(task.request(genome, "stitched"))
    if batch:
        yield batch


def divisions(schedule: Genome, space: Space, grid: float) -> Iterator[Genome]:
    """All ways to divide the steps of a schedule among the models, the cheapest first in time; least of the cheapest first."""
    price = space.prices["macs"]
    models: list[str | None] = sorted((None, *space.models), key=lambda m: price.whole if m is None else price.models[m])
    parts, k = round(1 / grid), len(schedule.steps)
    for ends in itertools.combinations_with_replacement(range(parts + 1), len(models) - 1):
        last = [math.ceil(end / parts * k - 0.5 - 1e-9) for end in ends]  # of each model but the largest: steps done by then
        makers = [models[sum(i >= end for end in last)] for i in range(k)]
        steps = (made_by(step, maker) for step, maker in zip(schedule.steps, makers, strict=True))
        yield space.consistent(Genome(tuple(steps), schedule.shape))
