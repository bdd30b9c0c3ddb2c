"""Evolution over timesteps, then over timesteps and per-step layer skips.

Li et al., "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model
Acceleration", ICCV 2023, https://arxiv.org/abs/2309.10438 (Sec. 3.3, 3.4). Written from the paper, with DEAP's archive and toolbox.

What differs from the authors' released loop, and why (numbers in docs/methods.md):
- A candidate is a set: genes are sorted records (timestep, its skips), so permutations are one candidate, crossover keeps
  a step's skips with its timestep, and every operator returns exactly K distinct timesteps.
- Common seeds for all candidates; the winner is named after re-scoring elites on fresh seeds (workflow does both).
- Mutation moves a timestep between its neighbours half of the time; the paper only jumps anywhere.
- Some mutations of stage 2 switch one layer in all steps: one that a step can do without, the others often can too.
- Skip mutation really changes the skips, and the budget, in MACs instead of a count of layers, holds after every operator.
- Where cuts of the model are searched too (not in the paper), stage 2 varies them: another option at one site.
- Where layers may be reused (not in the paper), a step skips one, reuses it or runs it; stage 2 varies which.
"""

import random
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Request
from ..core.measurement import Trial
from ._operators import cross, mutate
from ._space import Genome, Space
from ._task import Fresh, Task

several = False
varies = frozenset({"timesteps", "skips", "reuse", "models", "cuts"})


class Config(BaseModel):
    """Evolutionary search, timesteps first, layer skips second."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.10438"

    population: int = Field(default=20, ge=4)  # candidates per generation; the paper has 50
    parents: int = Field(default=8, ge=2)  # the archive: best candidates ever seen, parents are drawn from it; paper: 10
    mutants: float = Field(default=0.5, ge=0, le=1)  # share of a generation made by mutation; paper: 25 of 50
    children: float = Field(default=0.3, ge=0, le=1)  # share made by crossover; paper: 10 to 15 of 50; the rest is random
    mutation: float = Field(default=0.25, gt=0, le=1)  # chance that a gene changes; at least one always does
    jump: float = Field(default=0.3, ge=0, le=1)  # share of timestep mutations that jump anywhere; the paper's all do
    stage_one: float = Field(default=0.4, ge=0, le=1)  # share of the trials spent on timesteps alone
    throughout: float = Field(default=0.4, ge=0, le=1)  # share of stage 2 mutations that switch one layer in all steps at once
    recut: float = Field(default=0.3, ge=0, le=1)  # share of stage 2 mutations that cut the model in another way, if at all
    skipped: float = Field(default=0.1, ge=0, le=1)  # share of a step's layers that a fresh skip set may hold; paper: 0.1


@dataclass(frozen=True)
class _Individual:
    """A genome with the fitness that DEAP's archive ranks by: more is better."""

    genome: Genome
    fitness: float = field(compare=False)


def search(task: Task, config: Config, rng: random.Random) -> Generator[list[Request], list[Trial], None]:
    """Yield generations of requests, breed from the archive of the best."""
    from deap import base, tools  # here, because `lissom search autodiffusion --help` reads this file too

    space, fresh = task.space, Fresh()
    more = bool(space.layers or space.models or space.sites)  # there is something for stage 2 to vary
    last_of_stage_one = round(config.stage_one * task.trials) if more else task.trials
    archive = tools.HallOfFame(config.parents)
    second = False  # stage 2: layers and cuts too

    toolbox = base.Toolbox()
    toolbox.register("mate", cross, space=space, rng=rng)
    toolbox.register("mutate", mutate, space=space, config=config, rng=rng)

    # Initial population (Sec. 3.4): the uniform schedules (scored already), mutants of them, and random candidates.
    _keep(archive, task, task.known)
    uniform = [parent.genome for parent in archive]
    for genome in uniform:
        fresh.take(genome)
    batch = task.opening(fresh)
    left = task.trials - len(batch)
    proposals: list[tuple[str, Genome]] = []
    while len(proposals) < max(config.population - len(batch), config.population // 2):
        if uniform and len(proposals) % 2 == 0:
            proposals.append(("mutant of uniform", toolbox.mutate(rng.choice(uniform), second=False)))
        else:
            proposals.append(("random", space.random_times(rng)))
    while True:
        if left and not second and more and task.trials - left >= last_of_stage_one:
            second = True
            proposals = _filled(archive, space, rng) or _breed(archive, toolbox, space, config, rng, second, fresh)
        room = left if second or not more else min(left, max(last_of_stage_one - (task.trials - left), 1))
        new = [(origin, genome) for origin, genome in proposals if fresh.take(genome)][:room]
        batch += [task.request(genome, origin) for origin, genome in new]
        if not batch:
            return  # all trials are spent, or nothing new can be found: the space is exhausted
        left -= len(new)
        trials = yield batch
        _keep(archive, task, trials, within=second)
        batch = []
        proposals = _breed(archive, toolbox, space, config, rng, second, fresh) if left else []


def _keep(archive: Any, task: Task, trials: Iterable[Trial], *, within: bool = False) -> None:
    """within: only what keeps the budget."""
    scored = task.scored(trials)
    archive.update([_Individual(genome, -values[0]) for genome, values in scored if not within or task.space.fits(genome)])


def _filled(archive: Any, space: Space, rng: random.Random) -> list[tuple[str, Genome]]:
    """Winners of stage 1 that break the budget, since they run every layer, leave the archive: filled copies found stage 2."""
    kept = [parent for parent in archive if space.fits(parent.genome)]
    over = [parent for parent in archive if not space.fits(parent.genome)]
    archive.clear()
    archive.update(kept)
    return [("fill", space.fill(parent.genome, rng)) for parent in over]


def _breed(
    archive: Any, toolbox: Any, space: Space, config: Config, rng: random.Random, second: bool, fresh: Fresh
) -> list[tuple[str, Genome]]:
    """New candidates for one generation."""
    parents = [parent.genome for parent in archive]

    def random_one() -> Genome:
        genome = space.random_times(rng)
        return space.fill(genome, rng) if second else genome

    if not parents:  # everything failed so far
        return [("random", random_one()) for _ in range(config.population)]
    mutants, children = round(config.mutants * config.population), round(config.children * config.population)
    made: list[tuple[str, Genome]] = []
    here = Fresh()

    def add(origin: str, count: int, make: Any) -> None:
        done = 0
        for _ in range(10 * count):  # at most ten attempts each, as the released loop
            if done < count and not fresh.knows(genome := make()) and (not second or space.fits(genome)) and here.take(genome):
                made.append((origin, genome))
                done += 1

    add("mutation", mutants, lambda: toolbox.mutate(rng.choice(parents), second=second))
    add("crossover", children, lambda: toolbox.mate(rng.choice(parents), rng.choice(parents), second=second))
    if second:  # random timesteps would give away what stage 1 has found
        add("mutation", config.population - len(made), lambda: toolbox.mutate(rng.choice(parents), second=True))
    add("random", config.population - len(made), random_one)
    return made
