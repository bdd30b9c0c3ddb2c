"""Covariance matrix adaptation over timesteps: for pure schedules, one objective.

Hansen, "The CMA Evolution Strategy: A Tutorial", https://arxiv.org/abs/1604.00772. The strategy is that of the package cmaes,
with the tutorial's defaults; a strategy that has converged gives way to one with twice the population, as in Auger and Hansen,
"A Restart CMA Evolution Strategy With Increasing Population Size" (CEC 2005).

What differs, and why:
- K timesteps are K gaps in a box (`_vector`), so that every vector is a plan and order is built in; the strategy draws again what
  falls out of the box.
- Timesteps are whole where the scheduler's are: vectors that come to the same plan are drawn again, and the strategy is told the
  vector of the plan that was really scored.
- The first mean is the best fixed schedule, not the middle of the box.
- Failed candidates rank last; where a whole generation failed, the strategy is told nothing.
"""

import math
import random
from collections.abc import Generator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Request, Step
from ..core.measurement import Trial
from ._space import Genome, Space
from ._task import Fresh, Task
from ._vector import gaps_of, times_of

several = False
varies = frozenset({"timesteps"})

TRIES = 100  # draws for one plan that is new: a strategy that finds none has converged
RESTARTS = 10  # that find nothing new, one after the other: the space is exhausted


class Config(BaseModel):
    """CMA-ES over timesteps."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1604.00772"

    sigma: float = Field(default=0.15, gt=0, le=1)  # first standard deviation of every gap, each from 0 to 1; tutorial: 0.3
    population: int | None = Field(default=None, ge=4)  # plans per generation; by default the tutorial's 4 + 3 ln K


def search(task: Task, config: Config, rng: random.Random) -> Generator[list[Request], list[Trial], None]:
    """Yield generations drawn around a mean, and move mean and covariance towards the better half."""
    space, fresh, left = task.space, Fresh(), task.trials
    scored = list(task.scored(task.known))
    for genome, _ in scored:
        fresh.take(genome)
    if opening := task.opening(fresh):
        left -= len(opening)
        scored += task.scored((yield opening))
    population = config.population or 4 + math.floor(3 * math.log(space.steps))
    best = min(scored, key=lambda found: found[1], default=None)
    strategy = _strategy(gaps_of(space, best[0].times) if best else _anywhere(space, rng), config.sigma, population, rng)
    empty = 0
    while left > 0 and empty < RESTARTS:
        wanted = min(strategy.population_size, left)
        genomes = _drawn(strategy, space, fresh, wanted)
        left -= len(genomes)
        if genomes:
            trials = yield [task.request(genome, "cma-es") for genome in genomes]
            values = [task.values(trial)[0] for trial in trials]
            if len(values) == strategy.population_size and min(values) < math.inf:
                strategy.tell([(_array(gaps_of(space, g.times)), v) for g, v in zip(genomes, values, strict=True)])
        empty = 0 if genomes else empty + 1
        if len(genomes) < wanted:  # converged: anew, and wider
            population *= 2 if genomes else 1
            strategy = _strategy(_anywhere(space, rng), config.sigma, population, rng)


def _drawn(strategy: Any, space: Space, fresh: Fresh, count: int) -> list[Genome]:
    """New plans, fewer than asked for where the strategy goes on drawing what is known."""
    found: list[Genome] = []
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        genome = space.consistent(Genome(tuple(Step(timestep=t) for t in times_of(space, strategy.ask().tolist()))))
        if fresh.take(genome):
            found.append(genome)
    return found


def _anywhere(space: Space, rng: random.Random) -> list[float]:
    return [rng.random() for _ in range(space.steps)]


def _strategy(mean: list[float], sigma: float, population: int, rng: random.Random) -> Any:
    from cmaes import CMA  # here, because `lissom search cmaes --help` reads this file too

    box = _array([[0.0, 1.0]] * len(mean))
    return CMA(mean=_array(mean), sigma=sigma, bounds=box, population_size=population, seed=rng.getrandbits(32))


def _array(values: Any) -> Any:
    import numpy as np

    return np.array(values)
