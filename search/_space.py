"""The space of sampling plans: K timesteps as a set, and layers that a step may skip, under a budget in MACs."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.candidate import Candidate, Request, SamplingPlan, Scheduler, Seeds, Step
from ..core.measurement import Trial

Genome = tuple[Step, ...]  # by descending timestep; a timestep and its skips always travel together


@dataclass(frozen=True)
class Space:
    """What a plan may contain. All randomness comes in as an argument; genomes go out repaired: K distinct, sorted, valid."""

    scheduler: Scheduler
    steps: int  # K
    low: float  # lowest and highest timestep that the scheduler takes
    high: float
    whole: bool  # timesteps are integers (else fractions of 1/1000 of the range)
    macs: int  # of one uncut denoiser step, per image
    layers: Mapping[str, int] = field(default_factory=dict)  # skippable layers -> MACs that skipping saves in a step
    budget: float = 1.0  # MACs of a plan at most, as a share of K uncut steps

    @property
    def grid(self) -> float:
        """The finest difference between two timesteps."""
        return 1.0 if self.whole else (self.high - self.low) / 1000

    def snap(self, t: float) -> float:
        """The nearest valid timestep."""
        t = min(max(t, self.low), self.high)
        return float(round(t)) if self.whole else round(t, 4)

    def draw(self, rng: random.Random) -> float:
        """A timestep, uniformly."""
        if self.whole:
            return float(rng.randint(int(self.low), int(self.high)))
        return self.snap(rng.uniform(self.low, self.high))

    def random_times(self, rng: random.Random) -> Genome:
        """K distinct timesteps, uniformly, nothing skipped."""
        return self.repair([Step(timestep=self.draw(rng))], rng)

    def repair(self, genes: Sequence[Step], rng: random.Random) -> Genome:
        """Exactly K distinct valid timesteps, sorted; surplus genes leave at random, missing ones are drawn.

        A noise level of its own (a step of the stock schedule has one) stays behind: it belongs to its old neighbours.
        """
        kept: dict[float, Step] = {}
        for gene in genes:
            t = self.snap(gene.timestep)
            kept.setdefault(t, gene.model_copy(update={"timestep": t, "sigma": None}))
        while len(kept) > self.steps:
            del kept[rng.choice(sorted(kept))]
        while len(kept) < self.steps:
            t = self.draw(rng)
            kept.setdefault(t, Step(timestep=t))
        return tuple(kept[t] for t in sorted(kept, reverse=True))

    def cost(self, genome: Genome) -> int:
        """MACs per image of all steps."""
        return sum(self.macs - sum(self.layers[a] for a in step.skip) for step in genome)

    def share(self, genome: Genome) -> float:
        """MACs as a share of K uncut steps."""
        return self.cost(genome) / (self.steps * self.macs)

    def fits(self, genome: Genome) -> bool:
        return self.share(genome) <= self.budget + 1e-9

    def cheapest(self) -> float:
        """The smallest share of MACs that any plan can have."""
        return 1 - sum(self.layers.values()) / self.macs

    def fill(self, genome: Genome, rng: random.Random) -> Genome:
        """Skip further layers, drawn at random, until the budget holds."""
        while not self.fits(genome):
            open_ = [(i, a) for i, step in enumerate(genome) for a in self.layers if a not in step.skip]
            i, address = rng.choice(open_)
            genome = toggled(genome, i, address)
        return genome

    def plan(self, genome: Genome) -> SamplingPlan:
        return SamplingPlan(scheduler=self.scheduler, steps=genome)


def toggled(genome: Genome, i: int, address: str) -> Genome:
    """The genome with one layer of step i skipped if it was not, executed if it was skipped."""
    skip = set(genome[i].skip) ^ {address}
    return (*genome[:i], genome[i].model_copy(update={"skip": tuple(sorted(skip))}), *genome[i + 1 :])


@dataclass(frozen=True)
class Task:
    """What a search method is asked for. It yields batches of Requests and receives their Trials; it never evaluates."""

    space: Space
    trials: int  # how many candidates may be proposed in all
    seeds: Seeds  # common to all candidates (common random numbers)
    objective: str  # metric name; Trial.value(objective) is a cost to minimise, infinite for failures
    known: tuple[Trial, ...] = ()  # the fixed schedules, scored already on the same seeds: free parents

    def request(self, genome: Genome, origin: str) -> Request:
        return Request(candidate=Candidate(plan=self.space.plan(genome)), seeds=self.seeds, origin=origin)


class Fresh:
    """Remembers what was proposed, so that a method spends its trials on new candidates only."""

    def __init__(self) -> None:
        self._seen: set[Genome] = set()

    def knows(self, genome: Genome) -> bool:
        return genome in self._seen

    def take(self, genome: Genome) -> bool:
        """True the first time; permutations and duplicated genes never get here, genomes are sorted sets."""
        if genome in self._seen:
            return False
        self._seen.add(genome)
        return True
