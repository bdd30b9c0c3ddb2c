"""What is known of the trials of a study: an index by key, brought up to date by reading each trial that has ended once."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from .measurement import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


class Ledger:
    """The trials of a study as they were last seen."""

    def __init__(self) -> None:
        self.scored: dict[str, Trial] = {}
        self.proposals: dict[int, str] = {}  # position in the method's sequence of proposals -> key
        self.open: dict[str, int | None] = {}  # key -> number of its trial that waits or runs; None: not yet seen there
        self.waiting: dict[int, FrozenTrial] = {}  # oldest first
        self.running: dict[int, FrozenTrial] = {}
        self.lost: Counter[str] = Counter()  # key -> workers that died over it
        self._ended: set[int] = set()
        self._settled = 0  # trials at the beginning that have all ended: they are not looked at again
        self._order: list[Trial] = []  # as they came to be known
        self._best: tuple[int, Trial | None] = (0, None)  # how many of them were asked, and the best of those

    def absorb(self, trials: "list[FrozenTrial]") -> None:
        """Bring the index up to date. trials: all of the study, by number."""
        for frozen in trials[self._settled :]:
            key, number = frozen.user_attrs.get("key"), frozen.number
            if number in self._ended:
                continue
            if key is None:  # somebody else's
                self._ended.add(number)
                continue
            if (index := frozen.user_attrs.get("index")) is not None:
                self.proposals[index] = key
            self.waiting.pop(number, None)
            self.running.pop(number, None)
            if frozen.state.is_finished():
                self._ended.add(number)
                if key in self.open and self.open[key] in (None, number):
                    del self.open[key]
                if "lost" in frozen.user_attrs:
                    self.lost[key] += 1
            else:
                first = self.open.get(key)  # the answer to an enqueueing may be lost, and the request be there twice
                self.open[key] = number if first is None else min(first, number)
                (self.waiting if frozen.state.name == "WAITING" else self.running)[number] = frozen
            if (result := frozen.user_attrs.get("result")) is not None:
                self._read(key, number, result)
        while self._settled < len(trials) and trials[self._settled].number in self._ended:
            self._settled += 1

    def keep(self, key: str, trial: Trial) -> None:
        """Take in a result."""
        self.scored[key] = trial
        self._order.append(trial)

    def end(self, key: str, trial: Trial) -> None:
        """Take in a result of a trial that this process has just ended."""
        self._ended.add(trial.number)
        if key in self.open and self.open[key] in (None, trial.number):
            del self.open[key]
        self.keep(key, trial)

    def known(self, key: str) -> bool:
        """Whether a request is scored, waits or is in work."""
        return key in self.scored or key in self.open

    def elsewhere(self, key: str, number: int) -> bool:
        """Whether a request has a value, or waits or runs under another number."""
        known = self.scored.get(key)
        return (known is not None and known.state == "complete") or self.open.get(key) not in (None, number)

    def best(self, objective: str, counts: Callable[[Trial], bool]) -> Trial | None:
        """The complete trial with the best objective. counts: asked once of each trial, whether it may be the best."""
        asked, best = self._best
        for trial in self._order[asked:]:
            better = best is None or trial.value(objective) < best.value(objective)
            if trial.state == "complete" and better and counts(trial):
                best = trial
        self._best = (len(self._order), best)
        return best

    def _read(self, key: str, number: int, written: str) -> None:
        known = self.scored.get(key)
        if known is None or (known.number != number and known.state == "failed"):
            trial = Trial.model_validate_json(written)
            self.keep(key, trial if trial.number == number else trial.model_copy(update={"number": number}))
