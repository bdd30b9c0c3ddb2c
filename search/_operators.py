"""Variation that keeps K distinct timesteps, skips with their timestep, and budgets: what the evolutionary methods breed with."""

import random
from dataclasses import replace
from typing import Protocol

from ..core.candidate import Step
from ._space import Genome, Space, toggled
from ._task import Task


class Rates(Protocol):
    """The settings of `mutate`; a method's Config has them, each with its comment."""

    @property
    def mutation(self) -> float: ...
    @property
    def jump(self) -> float: ...
    @property
    def throughout(self) -> float: ...
    @property
    def recut(self) -> float: ...
    @property
    def skipped(self) -> float: ...


def mutate(genome: Genome, *, space: Space, config: Rates, rng: random.Random, second: bool) -> Genome:
    """Change each gene with probability `mutation`, at least one of them: its timestep, or (second) its skips.

    If second, `recut` of the mutations cut the model in another way, and `throughout` of the others switch one layer instead:
    on in all steps if no step runs it, else off in all.
    """
    if second and space.sites and rng.random() < config.recut:
        site = rng.randrange(len(space.sites))
        others = [pick for pick in range(len(space.sites[site]) + 1) if pick != genome.shape[site]]
        return space.fill(space.recut(genome, site, rng.choice(others)), rng)
    if second and space.layers and rng.random() < config.throughout:
        return space.fill(_switched(genome, rng.choice(space.layers), space), rng)
    chosen = [i for i in range(len(genome.steps)) if rng.random() < config.mutation] or [rng.randrange(len(genome.steps))]
    genes = list(genome.steps)
    for i in chosen:
        if second and space.layers and rng.random() < 0.5:
            genes[i] = _skips_mutated(genes[i], space, config, rng)
        elif rng.random() < config.jump:
            genes[i] = genes[i].model_copy(update={"timestep": space.draw(rng)})  # AutoDiffusion's mutation
        else:
            upper = genes[i - 1].timestep if i else space.high + space.grid
            lower = genes[i + 1].timestep if i + 1 < len(genes) else space.low - space.grid
            spread = max((upper - lower) / 6, space.grid)
            genes[i] = genes[i].model_copy(update={"timestep": space.snap(rng.gauss(genes[i].timestep, spread))})
    repaired = space.repair(genes, genome.shape, rng)
    return space.fill(repaired, rng) if second else repaired


def cross(one: Genome, two: Genome, *, space: Space, rng: random.Random, second: bool) -> Genome:
    """Union crossover: timesteps that both parents have stay, the rest of K is drawn from the others' steps; cuts of either."""
    common = set(one.times) & set(two.times)
    both = (*one.steps, *two.steps)
    genes = [rng.choice([s for s in both if s.timestep == t]) for t in sorted(common)]
    rest = [s for s in both if s.timestep not in common]
    genes += rng.sample(rest, space.steps - len(genes))
    shape = [rng.choice(picks) if picks[0] != picks[1] else picks[0] for picks in zip(one.shape, two.shape, strict=True)]
    child = space.repair(genes, shape, rng)
    return space.fill(child, rng) if second else child


def tightened(task: Task, rng: random.Random) -> Space:
    """The space under a budget drawn at random for every cost that is an objective: first candidates then cover a front.

    A cost that is no objective keeps its budget.
    """
    space, budget = task.space, dict(task.space.budget)
    for name in task.objectives:
        if name in space.prices:
            least, most = space.share(space.cheapest(name), name), budget.get(name, 1.0)
            budget[name] = rng.uniform(min(least, most), most)
    return replace(space, budget=budget)


def _switched(genome: Genome, layer: str, space: Space) -> Genome:
    """The genome with one layer off in all steps, or on in all if none runs it."""
    off = not all(layer in step.skip for step in genome.steps)
    skips = [set(step.skip) | {layer} if off else set(step.skip) - {layer} for step in genome.steps]
    steps = (s.model_copy(update={"skip": tuple(sorted(skip))}) for s, skip in zip(genome.steps, skips, strict=True))
    return space.consistent(Genome(tuple(steps), genome.shape))


def _skips_mutated(step: Step, space: Space, config: Rates, rng: random.Random) -> Step:
    """A fresh skip set for a step that skips nothing (AutoDiffusion, Sec. 3.3), else one layer more, one fewer, or one exchanged."""
    layers = sorted(space.layers)
    if not step.skip:
        most = max(1, round(config.skipped * len(layers)))
        return step.model_copy(update={"skip": tuple(sorted(rng.sample(layers, rng.randint(1, most))))})
    one = Genome((step,))
    kind = rng.choice(("more", "fewer", "exchange"))
    if kind != "more":
        one = toggled(one, 0, rng.choice(step.skip))
    if kind != "fewer" and (unused := [a for a in layers if a not in step.skip]):
        one = toggled(one, 0, rng.choice(unused))
    return one.steps[0]
