"""Variation that keeps K distinct timesteps, what a step leaves out with it, and budgets: what evolutionary methods breed with."""

import random
from dataclasses import replace
from typing import Protocol

from ..core.candidate import Step
from ._space import Genome, Space, Way, leaving, made_by, toggled
from ._task import Task

MAKER = 0.3  # share of mutations that change who makes a step, where more than one model can


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
    """Change each gene with probability `mutation`, at least one of them: its timestep, or (second) what it leaves out.

    If second, `recut` of the mutations cut the model in another way, and `throughout` of the others switch one layer instead:
    on in all steps if no step runs it, else off in all; or reused from one step on, and back. Where other models may make
    steps, MAKER of the mutations move the place where one takes over from another.
    """
    if second and space.sites and rng.random() < config.recut:
        site = rng.randrange(len(space.sites))
        others = [pick for pick in range(len(space.sites[site]) + 1) if pick != genome.shape[site]]
        return space.fill(space.recut(genome, site, rng.choice(others)), rng)
    if second and space.models and rng.random() < MAKER:
        return space.fill(_taken_over(genome, space, rng), rng)
    if second and space.layers and rng.random() < config.throughout:
        layer = rng.choice(space.layers)
        reused = _way(space.ways, rng) == "reuse"
        return space.fill(_handed_on(genome, layer, space, rng) if reused else _switched(genome, layer, space), rng)
    chosen = [i for i in range(len(genome.steps)) if rng.random() < config.mutation] or [rng.randrange(len(genome.steps))]
    genes = list(genome.steps)
    for i in chosen:
        ways = space.ways if i else tuple(way for way in space.ways if way != "reuse")  # the first step has nothing to reuse
        if second and space.models and rng.random() < MAKER:
            makers = [model for model in (None, *space.models) if model != genes[i].model]
            genes[i] = made_by(genes[i], rng.choice(makers))
        elif second and space.layers and ways and genes[i].model is None and rng.random() < 0.5:
            genes[i] = _layers_mutated(genes[i], _way(ways, rng), space, config, rng)
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
    return space.consistent(Genome(tuple(_set(step, "skip", layer, off) for step in genome.steps), genome.shape))


def _handed_on(genome: Genome, layer: str, space: Space, rng: random.Random) -> Genome:
    """The genome with one layer reused in a step, half of the time in all later ones too; executed there if it was reused."""
    if len(genome.steps) == 1:
        return genome
    i = rng.randrange(1, len(genome.steps))
    last = len(genome.steps) if rng.random() < 0.5 else i + 1
    on = not all(layer in step.reuse for step in genome.steps[i:last])
    steps = [_set(step, "reuse", layer, on) if i <= n < last else step for n, step in enumerate(genome.steps)]
    return space.consistent(Genome(tuple(steps), genome.shape))


def _taken_over(genome: Genome, space: Space, rng: random.Random) -> Genome:
    """The genome with all steps up to one, or from one on, made by one model: trajectories are mostly stitched in one place."""
    i, model = rng.randrange(len(genome.steps)), rng.choice((None, *space.models))
    first, last = (0, i + 1) if rng.random() < 0.5 else (i, len(genome.steps))
    steps = [made_by(step, model) if first <= n < last and step.model != model else step for n, step in enumerate(genome.steps)]
    return space.consistent(Genome(tuple(steps), genome.shape))


def _set(step: Step, way: Way, layer: str, out: bool) -> Step:
    """The step with a layer left out in this way, or not in this way; one of another model as it is."""
    if step.model is not None:
        return step
    now = {*getattr(step, way)}
    return leaving(step, way, now | {layer} if out else now - {layer})


def _way(ways: tuple[Way, ...], rng: random.Random) -> Way:
    return ways[0] if len(ways) == 1 else rng.choice(ways)  # where there is no choice no chance is spent


def _layers_mutated(step: Step, way: Way, space: Space, config: Rates, rng: random.Random) -> Step:
    """A fresh set for a step that leaves nothing out in this way (AutoDiffusion, Sec. 3.3), else one layer more, one fewer, or
    one exchanged. What was left out in the other way changes sides."""
    layers, out = sorted(space.layers), getattr(step, way)
    if not out:
        most = max(1, round(config.skipped * len(layers)))
        return leaving(step, way, rng.sample(layers, rng.randint(1, most)))
    one = Genome((step,))
    kind = rng.choice(("more", "fewer", "exchange"))
    if kind != "more":
        one = toggled(one, 0, rng.choice(out), way)
    if kind != "fewer" and (unused := [a for a in layers if a not in out]):
        one = toggled(one, 0, rng.choice(unused), way)
    return one.steps[0]
