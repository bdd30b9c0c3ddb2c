"""What a search method is given, and the two things that every method does with it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..core.candidate import Request, Seeds
from ..core.measurement import Trial
from ._space import Genome, Space


@dataclass(frozen=True)
class Task:
    """What a search method is asked for. It yields batches of Requests and receives their Trials; it never evaluates.

    Every method proposes `start` first, and exactly `trials` different candidates in all.
    """

    space: Space
    trials: int  # how many candidates may be proposed in all
    seeds: Seeds  # common to all candidates (common random numbers)
    objectives: tuple[str, ...]  # metrics and costs (macs, latency, params), the one that matters most first
    known: tuple[Trial, ...] = ()  # the fixed schedules, scored already on the same seeds: free parents
    start: tuple[tuple[str, Genome], ...] = ()  # (origin, genome): another search's winners, pruners' cuts

    def request(self, genome: Genome, origin: str) -> Request:
        return Request(candidate=self.space.candidate(genome), seeds=self.seeds, origin=origin, costs=self.space.shares(genome))

    def values(self, trial: Trial) -> tuple[float, ...]:
        """All objectives as costs to minimise; infinite for failures."""
        return tuple(trial.value(name) for name in self.objectives)

    def scored(self, trials: Iterable[Trial]) -> Iterator[tuple[Genome, tuple[float, ...]]]:
        """The genomes of the trials that count, with their objectives."""
        for trial in trials:
            genome, values = self.space.genome(trial.request.candidate), self.values(trial)
            if genome is not None and all(map(math.isfinite, values)):
                yield genome, values

    def opening(self, fresh: "Fresh") -> list[Request]:
        """Requests for `start`, as many as there are trials; the first batch of a method begins with them."""
        new = [(origin, genome) for origin, genome in self.start if fresh.take(genome)]
        return [self.request(genome, origin) for origin, genome in new[: self.trials]]


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
