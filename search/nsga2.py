"""A front of candidates: several objectives, none of which is traded for another beforehand.

Deb, Pratap, Agarwal and Meyarivan, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE Transactions on
Evolutionary Computation 6 (2002), https://doi.org/10.1109/4235.996017. Sorting, crowding and tournaments are DEAP's.

What differs from the paper, and why:
- Crossover and mutation are those of `autodiffusion`, on sets of timesteps with their skips, and on cuts: the paper's are for real
  numbers and bits. A child is crossed or mutated, or both.
- Budgets hold by repair, so that the paper's constrained domination is not needed; what breaks one all the same, or fails, does not
  enter the population.
- No candidate is scored twice: a child that was there before is mutated further.
- The fixed schedules are in the first population, scored already; mutants of them, cut down to costs spread from the least possible
  to the budget, cover the front from the start.
"""

import contextlib
import random
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Request
from ..core.measurement import Trial
from ._operators import cross, mutate, tightened
from ._space import Genome, Space
from ._task import Fresh, Task

several = True
least = 2  # objectives: of one there is no front
varies = frozenset({"timesteps", "skips", "reuse", "models", "cuts"})

TRIES = 50  # mutations of a child that was there before


class Config(BaseModel):
    """NSGA-II: a front over several objectives."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://doi.org/10.1109/4235.996017"

    population: int = Field(default=16, ge=4, multiple_of=4)  # candidates per generation, a multiple of 4; the paper has 100
    crossover: float = Field(default=0.5, ge=0, le=1)  # chance that a child has two parents; paper: 0.9
    mutants: float = Field(default=0.6, ge=0, le=1)  # chance that a crossed child is mutated too; of one parent, it always is
    times: float = Field(default=0.7, ge=0, le=1)  # share of mutations that vary timesteps alone
    mutation: float = Field(default=0.25, gt=0, le=1)  # chance that a gene of a mutant changes; at least one always does
    jump: float = Field(default=0.3, ge=0, le=1)  # share of timestep mutations that jump anywhere
    throughout: float = Field(default=0.4, ge=0, le=1)  # share of mutations that switch one layer in all steps at once
    recut: float = Field(default=0.3, ge=0, le=1)  # share of mutations that cut the model in another way, if at all
    skipped: float = Field(default=0.1, ge=0, le=1)  # share of a step's layers that a fresh skip set may hold


@dataclass
class _Individual:
    genome: Genome
    fitness: Any  # DEAP's: values to minimise, and the crowding distance that selection leaves there


def search(task: Task, config: Config, rng: random.Random) -> Generator[list[Request], list[Trial], None]:
    """Yield generations; keep the best fronts of parents and children, the last one thinned by crowding (Sec. III)."""
    from deap import base, tools  # here, because `lissom search nsga2 --help` reads this file too

    # DEAP's creator would leave this class in a module of its own, for the whole process.
    kind = type("Fitness", (base.Fitness,), {"weights": (-1.0,) * len(task.objectives)})

    def individuals(trials: Iterable[Trial]) -> list[_Individual]:
        return [_Individual(genome, kind(values)) for genome, values in task.scored(trials) if task.space.fits(genome)]

    fresh, left = Fresh(), task.trials
    population = individuals(task.known)
    for genome, _ in task.scored(task.known):
        fresh.take(genome)
    batch = task.opening(fresh)
    proposals = _first(task, config, fresh, [parent.genome for parent in population], config.population - len(batch), rng)
    while True:
        batch += proposals[: left - len(batch)]
        if not batch:
            return  # all trials are spent, or nothing new can be found: the space is exhausted
        left -= len(batch)
        trials = yield batch
        population = tools.selNSGA2(population + individuals(trials), config.population)
        batch, proposals = [], []
        if left > 0:
            with _own_chance(rng):
                parents = _tournaments(population, config.population, tools.selTournamentDCD)
            proposals = _children(task, config, fresh, parents, rng) or _first(
                task, config, fresh, parents, config.population, rng
            )


def _first(task: Task, config: Config, fresh: Fresh, uniform: list[Genome], count: int, rng: random.Random) -> list[Request]:
    """Mutants of the fixed schedules and random candidates in turn, at costs spread over the front."""
    made: list[Request] = []
    for attempt in range(TRIES * max(count, 1)):
        if len(made) >= count:
            break
        mutant = bool(uniform) and attempt % 2 == 0
        space = tightened(task, rng)
        genome = _mutated(rng.choice(uniform), space, config, rng) if mutant else space.fill(space.random_times(rng), rng)
        if task.space.fits(genome) and fresh.take(genome):
            made.append(task.request(genome, "mutant of uniform" if mutant else "random"))
    return made


def _tournaments(population: list[_Individual], count: int, select: Callable[..., Any]) -> list[Genome]:
    """Parents by binary tournaments on rank and crowding, each individual in two of them."""
    if len(population) < 4:  # DEAP's tournaments take four at a time
        return [parent.genome for parent in population]
    chosen: list[Genome] = []
    while len(chosen) < count:
        chosen += [parent.genome for parent in select(population, len(population) // 4 * 4)]
    return chosen[:count]


def _mutated(genome: Genome, space: Space, config: Config, rng: random.Random) -> Genome:
    """Timesteps alone, or whatever the space has."""
    return space.fill(mutate(genome, space=space, config=config, rng=rng, second=rng.random() >= config.times), rng)


def _children(task: Task, config: Config, fresh: Fresh, parents: list[Genome], rng: random.Random) -> list[Request]:
    """One generation of new candidates; none where everything failed so far or the space is exhausted."""
    space, made = task.space, []
    for i in range(config.population if parents else 0):
        one, two = parents[i % len(parents)], parents[(i + 1) % len(parents)]
        crossed = one != two and rng.random() < config.crossover
        child = cross(one, two, space=space, rng=rng, second=True) if crossed else one
        if not crossed or rng.random() < config.mutants:
            child = _mutated(child, space, config, rng)
        for _ in range(TRIES):
            if space.fits(child) and not fresh.knows(child):
                break
            child = _mutated(child, space, config, rng)
        if space.fits(child) and fresh.take(child):
            made.append(task.request(child, "crossover" if crossed else "mutation"))
    return made


@contextlib.contextmanager
def _own_chance(rng: random.Random) -> Iterator[None]:
    """DEAP draws from Python's global generator: for as long as this lasts, that goes on where ours is."""
    before = random.getstate()
    random.setstate(rng.getstate())
    try:
        yield
    finally:
        rng.setstate(random.getstate())
        random.setstate(before)
