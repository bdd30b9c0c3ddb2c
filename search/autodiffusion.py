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
"""

import random
from collections.abc import Generator, Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Request, Step
from ..core.measurement import Trial
from ._space import Fresh, Genome, Space, Task, toggled


class Config(BaseModel):
    """Evolutionary search, timesteps first, layer skips second."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.10438"

    population: int = Field(default=20, ge=4)  # candidates per generation; the paper has 50
    parents: int = Field(default=8, ge=2)  # the archive: best candidates ever seen, parents are drawn from it; paper: 10
    mutants: float = Field(default=0.5, ge=0, le=1)  # share of a generation made by mutation; paper: 25 of 50
    children: float = Field(default=0.3, ge=0, le=1)  # share made by crossover; paper: 10 to 15 of 50; the rest is random
    mutation: float = Field(default=0.25, gt=0, le=1)  # chance that a gene changes; at least one always does
    jump: float = Field(default=0.3, ge=0, le=1)  # share of timestep mutations that jump anywhere; the paper's all do
    stage_one: float = Field(default=0.4, ge=0, le=1)  # share of the trials spent on timesteps alone
    throughout: float = Field(default=0.4, ge=0, le=1)  # share of stage 2 mutations that switch one layer in all steps at once
    skipped: float = Field(default=0.1, ge=0, le=1)  # share of a step's layers that a fresh skip set may hold; paper: 0.1


class _Individual(list[Step]):
    """A genome with the fitness that DEAP's archive ranks by: more is better."""

    def __init__(self, genome: Genome, cost: float) -> None:
        super().__init__(genome)
        self.fitness = -cost


def search(task: Task, config: Config, rng: random.Random) -> Generator[list[Request], list[Trial], None]:
    """Yield generations of requests, breed from the archive of the best."""
    from deap import base, tools  # here, because `lissom search autodiffusion --help` reads this file too

    space, fresh, left = task.space, Fresh(), task.trials
    last_of_stage_one = round(config.stage_one * task.trials) if space.layers else task.trials
    archive = tools.HallOfFame(config.parents)
    skipping = False  # stage 2: layers too

    toolbox = base.Toolbox()
    toolbox.register("mate", cross, space=space, rng=rng)
    toolbox.register("mutate", mutate, space=space, config=config, rng=rng)

    # Initial population (Sec. 3.4): the uniform schedules (scored already), mutants of them, and random candidates.
    _keep(archive, task.known, task.objective)
    uniform = [tuple(parent) for parent in archive]
    for genome in uniform:
        fresh.take(genome)
    start: list[tuple[str, Genome]] = []
    while len(start) < config.population:
        if uniform and len(start) % 2 == 0:
            start.append(("mutant of uniform", toolbox.mutate(rng.choice(uniform), skipping=False)))
        else:
            start.append(("random", space.random_times(rng)))
    proposals = start
    while left > 0:
        if not skipping and space.layers and task.trials - left >= last_of_stage_one:
            skipping = True
            if not all(space.fits(tuple(parent)) for parent in archive):
                # The winners of stage 1 run every layer and break the budget: their filled copies found stage 2.
                elites = [tuple(parent) for parent in archive]
                archive.clear()
                proposals = [("fill", space.fill(elite, rng)) for elite in elites]
            else:
                proposals = _breed(archive, toolbox, space, config, rng, skipping, fresh)
        batch: list[Request] = []
        limit = left if skipping else min(left, max(last_of_stage_one - (task.trials - left), 1))
        for origin, genome in proposals:
            if len(batch) < limit and fresh.take(genome):
                batch.append(task.request(genome, origin))
        if not batch:
            return  # nothing new can be found: the space is exhausted
        left -= len(batch)
        trials = yield batch
        _keep(archive, trials, task.objective)
        proposals = _breed(archive, toolbox, space, config, rng, skipping, fresh)


def _keep(archive: Any, trials: Iterable[Trial], objective: str) -> None:
    for trial in trials:
        if trial.state == "complete" and trial.request.candidate.plan is not None:
            archive.update([_Individual(trial.request.candidate.plan.steps, trial.value(objective))])


def mutate(genome: Genome, *, space: Space, config: Config, rng: random.Random, skipping: bool) -> Genome:
    """Change each gene with probability `mutation`, at least one of them: its timestep, or (stage 2) its skips.

    In stage 2, `throughout` of the mutations switch one layer instead: on in all steps if no step runs it, else off in all.
    """
    if skipping and rng.random() < config.throughout:
        return space.fill(_switched(genome, rng.choice(sorted(space.layers))), rng)
    chosen = [i for i in range(len(genome)) if rng.random() < config.mutation] or [rng.randrange(len(genome))]
    genes = list(genome)
    for i in chosen:
        if skipping and rng.random() < 0.5:
            genes[i] = _skips_mutated(genes[i], space, config, rng)
        elif rng.random() < config.jump:
            genes[i] = genes[i].model_copy(update={"timestep": space.draw(rng)})  # the paper's mutation
        else:
            upper = genes[i - 1].timestep if i else space.high + space.grid
            lower = genes[i + 1].timestep if i + 1 < len(genes) else space.low - space.grid
            spread = max((upper - lower) / 6, space.grid)
            genes[i] = genes[i].model_copy(update={"timestep": space.snap(rng.gauss(genes[i].timestep, spread))})
    repaired = space.repair(genes, rng)
    return space.fill(repaired, rng) if skipping else repaired


def cross(one: Genome, two: Genome, *, space: Space, rng: random.Random, skipping: bool) -> Genome:
    """Union crossover: timesteps that both parents have stay, the rest of K is drawn from the others' steps."""
    common = {step.timestep for step in one} & {step.timestep for step in two}
    genes = [rng.choice([s for s in (*one, *two) if s.timestep == t]) for t in sorted(common)]
    rest = [s for s in (*one, *two) if s.timestep not in common]
    genes += rng.sample(rest, space.steps - len(genes))
    child = space.repair(genes, rng)
    return space.fill(child, rng) if skipping else child


def _switched(genome: Genome, layer: str) -> Genome:
    """The genome with one layer off in all steps, or on in all if none runs it."""
    off = not all(layer in step.skip for step in genome)
    skips = [set(step.skip) | {layer} if off else set(step.skip) - {layer} for step in genome]
    return tuple(s.model_copy(update={"skip": tuple(sorted(skip))}) for s, skip in zip(genome, skips, strict=True))


def _skips_mutated(step: Step, space: Space, config: Config, rng: random.Random) -> Step:
    """A fresh skip set for a step that skips nothing (Sec. 3.3), else one layer more, one fewer, or one exchanged."""
    layers = sorted(space.layers)
    if not step.skip:
        most = max(1, round(config.skipped * len(layers)))
        return step.model_copy(update={"skip": tuple(sorted(rng.sample(layers, rng.randint(1, most))))})
    one: Genome = (step,)
    kind = rng.choice(("more", "fewer", "exchange"))
    if kind != "more":
        one = toggled(one, 0, rng.choice(step.skip))
    if kind != "fewer" and (unused := [a for a in layers if a not in step.skip]):
        one = toggled(one, 0, rng.choice(unused))
    return one[0]


def _breed(
    archive: Any, toolbox: Any, space: Space, config: Config, rng: random.Random, skipping: bool, fresh: Fresh
) -> list[tuple[str, Genome]]:
    """New candidates for one generation."""
    parents = [tuple(p) for p in archive]

    def random_one() -> Genome:
        genome = space.random_times(rng)
        return space.fill(genome, rng) if skipping else genome

    if not parents:  # everything failed so far
        return [("random", random_one()) for _ in range(config.population)]
    mutants, children = round(config.mutants * config.population), round(config.children * config.population)
    made: list[tuple[str, Genome]] = []
    here = Fresh()

    def add(origin: str, count: int, make: Any) -> None:
        done = 0
        for _ in range(10 * count):  # at most ten attempts each, as the released loop
            if done < count and not fresh.knows(genome := make()) and here.take(genome):
                made.append((origin, genome))
                done += 1

    add("mutation", mutants, lambda: toolbox.mutate(rng.choice(parents), skipping=skipping))
    add("crossover", children, lambda: toolbox.mate(rng.choice(parents), rng.choice(parents), skipping=skipping))
    if skipping:  # random timesteps would give away what stage 1 has found
        add("mutation", config.population - len(made), lambda: toolbox.mutate(rng.choice(parents), skipping=True))
    add("random", config.population - len(made), random_one)
    return made
