"""Genomes as points of a box, for samplers that know nothing of sets: K gaps, patterns of layers left out, options of sites.

A gap is a number from 0 to 1. Going down from the highest timestep, gap i says which share of the range still open the next
timestep keeps below it: with n timesteps to place, the share is gap ** (1 / n). Order and distinctness are built in, every
vector decodes to K valid timesteps, and uniform vectors decode to uniform sets (the largest of n uniform numbers is distributed
as U ** (1 / n)): no part of the box is crowded. Of K whole timesteps each keeps room below it for those that follow.

What a layer does is one of four patterns: run, off in the first half of the steps, off in the second half, off in all. Where
layers may be reused too, that is a further state of each half; what nothing was kept of yet, as in the first step, is run.
Who makes which steps, where several models can, is one more parameter: the pipeline's own all of them, or another one the first
or the last few. A genome that does otherwise is encoded as the nearest one.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..core.candidate import Step
from ._space import Genome, Space, Way

VISIBLE = 40  # parameters, if it can be: samplers learn little of more
LAYERS = 10  # of them for layers at least, however many timesteps and sites there are
Point = dict[str, float | int]
Pattern = tuple[Way | None, ...]  # what a layer does in every step: None where it runs


def times_of(space: Space, gaps: Sequence[float]) -> list[float]:
    """K distinct valid timesteps, descending."""
    rest, times = _slack(space), []
    for left, gap in zip(range(space.steps, 0, -1), gaps, strict=True):
        rest *= min(max(gap, 0.0), 1.0) ** (1 / left)
        kept = round(rest) if space.whole else rest  # before room is added: two halves might be rounded to one number
        times.append(space.snap(space.low + kept + (left - 1) * space.grid))
    return times


def gaps_of(space: Space, times: Sequence[float]) -> list[float]:
    """The vector that decodes to these timesteps, or to the nearest ones that a vector can have."""
    rest, gaps = _slack(space), []
    for left, t in zip(range(space.steps, 0, -1), times, strict=True):
        kept = min(max(t - space.low - (left - 1) * space.grid, 0.0), rest)
        gaps.append((kept / rest) ** left if rest else 0.5)  # of no room any share is the same
        rest = kept
    return gaps


def _slack(space: Space) -> float:
    """The range without the room that K - 1 timesteps keep to their neighbours."""
    return max(space.high - space.low - (space.steps - 1) * space.grid, 0.0)


@dataclass(frozen=True)
class Layout:
    """Which parameters a space has: a point holds a value for each of their names."""

    space: Space
    groups: tuple[tuple[str, ...], ...]  # layers that share a parameter: the cheapest ones, where there are many

    @classmethod
    def of(cls, space: Space, visible: int = VISIBLE) -> "Layout":
        """Every layer has its own parameter, or the costliest have, and the others share theirs with neighbours in the model."""
        room = max(LAYERS, visible - space.steps - len(space.sites))
        size = math.ceil(len(space.layers) / room)  # the smallest groups that do
        if size <= 1:
            return cls(space, tuple((a,) for a in space.layers))
        price = space.prices["macs"] if "macs" in space.prices else next(iter(space.prices.values()))
        alone = (room * size - len(space.layers)) // (size - 1)
        costly = set(sorted(space.layers, key=lambda a: -price.layers.get(a, 0.0))[:alone])
        rest = [a for a in space.layers if a not in costly]
        shared = tuple(tuple(rest[i : i + size]) for i in range(0, len(rest), size))
        return cls(space, (*((a,) for a in space.layers if a in costly), *shared))

    @cached_property
    def gaps(self) -> list[str]:
        return [f"gap {i}" for i in range(self.space.steps)]

    @cached_property
    def choices(self) -> dict[str, int]:
        """Of every categorical parameter, how many values it has; 0 stands for nothing left out."""
        patterns = {f"layers {i}": len(self._patterns) for i in range(len(self.groups))}
        if self.space.models:
            patterns["models"] = len(self._makers)
        return patterns | {f"site {i}": 1 + len(site) for i, site in enumerate(self.space.sites)}

    def decode(self, point: Point) -> Genome:
        off: list[dict[Way, list[str]]] = [{"skip": [], "reuse": []} for _ in range(self.space.steps)]
        for i, group in enumerate(self.groups):
            for step, way in enumerate(self._patterns[int(point[f"layers {i}"])]):
                if way:
                    off[step][way] += group
        times = times_of(self.space, [point[name] for name in self.gaps])
        shape = tuple(int(point[f"site {i}"]) for i in range(len(self.space.sites)))
        steps = (
            Step(timestep=t, model=model) if model else Step(timestep=t, skip=tuple(o["skip"]), reuse=tuple(o["reuse"]))
            for t, o, model in zip(times, off, self._makers[int(point.get("models", 0))], strict=True)
        )
        return self.space.consistent(Genome(tuple(steps), shape))

    def encode(self, genome: Genome) -> Point:
        """The point of a genome: of every layer or group the pattern nearest to what it does, of equals the first."""
        point: Point = dict(zip(self.gaps, gaps_of(self.space, genome.times), strict=True))
        left, makers = set(self.space.left(genome)), [step.model for step in genome.steps]
        patterns = [_seen(pattern, makers) for pattern in self._patterns]
        for i, group in enumerate(self.groups):
            able = [a for a in group if a in left]
            does = [[_does(step, a) for a in able] for step in genome.steps if step.model is None]
            far = [sum(way != own for way, here in zip(pattern, does, strict=True) for own in here) for pattern in patterns]
            point[f"layers {i}"] = far.index(min(far))
        if self.space.models:
            wrong = [sum(a != b for a, b in zip(found, makers, strict=True)) for found in self._makers]
            point["models"] = wrong.index(min(wrong))
        return point | {f"site {i}": pick for i, pick in enumerate(genome.shape)}

    def uniform(self, rng: random.Random) -> Point:
        """Uniform timesteps, nothing left out."""
        return dict.fromkeys(self.choices, 0) | {name: rng.random() for name in self.gaps}

    def moved(self, point: Point, rng: random.Random) -> Point:
        """Each parameter is drawn anew with chance 1 / their number, at least one."""
        names = [*self.gaps, *self.choices]
        chosen = [name for name in names if rng.random() < 1 / len(names)] or [rng.choice(names)]
        drawn: Point = {}
        for name in chosen:
            if name in self.choices:
                drawn[name] = rng.choice([value for value in range(self.choices[name]) if value != point[name]])
            else:
                drawn[name] = rng.random()
        return point | drawn

    def filled(self, point: Point, rng: random.Random) -> Point:
        """`Space.fill` in steps that a point can express: what is told to a sampler is then what was evaluated."""
        genome = self.decode(point)
        while broken := self.space.broken(genome):
            further = self._further(point)
            rng.shuffle(further)
            for name, value in further:
                changed = self.decode(point | {name: value})
                if sum(self.space.broken(changed).values()) < sum(broken.values()):
                    break
            else:
                return self.encode(self.space.fill(genome, rng))
            point, genome = self.encode(changed), changed
        return point

    def _further(self, point: Point) -> list[tuple[str, int]]:
        """Every value of one parameter that leaves out more than it does now, or lets another model make steps."""
        out = [{step for step, way in enumerate(pattern) if way} for pattern in self._patterns]
        found = [
            (f"layers {i}", value)
            for i in range(len(self.groups))
            for value in range(len(out))
            if out[value] > out[int(point[f"layers {i}"])]
        ]
        found += [("models", value) for value in range(1, len(self._makers)) if value != point.get("models")]
        sites = [(f"site {i}", value) for i, site in enumerate(self.space.sites) for value in range(1, len(site) + 1)]
        return found + [(name, value) for name, value in sites if value != point[name]]

    @cached_property
    def _halves(self) -> list[tuple[int, ...]]:
        """The steps of the first and of the second half; a single step is one half."""
        middle = (self.space.steps + 1) // 2
        halves = (tuple(range(middle)), tuple(range(middle, self.space.steps)))
        return [half for half in halves if half]

    @cached_property
    def _makers(self) -> list[tuple[str | None, ...]]:
        """Who makes each step: the pipeline's own model all of them, or another one the first or the last few, or all."""
        k, own = self.space.steps, list[str | None]([None])
        found: list[tuple[str | None, ...]] = [(None,) * k]
        for name in self.space.models:
            found += [(*[name] * n, *own * (k - n)) for n in range(1, k + 1)]
            found += [(*own * (k - n), *[name] * n) for n in range(1, k)]
        return found

    @cached_property
    def _patterns(self) -> list[Pattern]:
        """What a layer may do: the first is to run in all steps."""
        states: tuple[Way | None, ...] = (None, *self.space.ways)
        found: dict[Pattern, None] = {}
        for pick in itertools.product(states, repeat=len(self._halves)):
            pattern: list[Way | None] = []
            for half, way in zip(self._halves, pick, strict=True):
                for _ in half:
                    pattern.append(None if way == "reuse" and None not in pattern else way)
            found[tuple(pattern)] = None  # of few steps, some are the same
        return list(found)


def _seen(pattern: Pattern, makers: Sequence[str | None]) -> Pattern:
    """What a pattern comes to in the steps that the pipeline's own model makes: what none of them executed is not reused."""
    seen: list[Way | None] = []
    for way, maker in zip(pattern, makers, strict=True):
        if maker is None:
            seen.append(None if way == "reuse" and None not in seen else way)
    return tuple(seen)


def _does(step: Step, address: str) -> Way | None:
    return "skip" if address in step.skip else "reuse" if address in step.reuse else None
