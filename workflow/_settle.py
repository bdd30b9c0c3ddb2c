"""Getting requests scored: enqueue, claim, evaluate, tell, and wait for what others have taken. Workers elsewhere do the middle."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.candidate import Request
from ..core.errors import SamplingError, one_line
from ..core.measurement import Trial
from ..core.store import Claim, TrialStore
from ._judges import Judge

SHORTEST, LONGEST = 0.2, 2.0  # seconds between two looks at what others have done
SHARE = 4  # where a look takes long, the pause is this many times as long at least


@dataclass
class Clock:
    """--max-time: after it, no further candidate is started, and nobody else's is waited for."""

    seconds: float | None
    began: float = 0.0  # as time.monotonic() tells it

    def over(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.began > self.seconds


class Pause:
    """Waiting for others: shortly at first, longer while nothing happens."""

    def __init__(self) -> None:
        self._seconds = SHORTEST

    def end(self) -> None:
        """Something has happened."""
        self._seconds = SHORTEST

    def wait(self, cost: float) -> None:
        """cost: seconds that a look takes."""
        time.sleep(max(self._seconds, SHARE * cost))
        self._seconds = min(1.5 * self._seconds, LONGEST)


def settled(
    store: TrialStore,
    requests: list[tuple[Request, int | None]],
    judge: Judge,
    progress: Any,
    clock: Clock,
    counts: Callable[[Trial], bool],  # whether a trial may be called the best so far
    **extra: Any,
) -> list[Trial]:
    """The trials of these requests, by key, in order; only those that are there where the time is over. For the driver.

    What no other worker takes is evaluated here. A request whose worker died or gave it back is proposed again.
    """
    keys = [store.propose(request, index) for request, index in requests]
    asked = dict(zip(keys, requests, strict=True))
    for key in keys:
        if key in store.trials:
            progress.advance(_note(store, counts), fresh=False)
    lacking, pause = [key for key in asked if key not in store.trials], Pause()
    while lacking and not clock.over():
        claim = store.claim()
        if claim is not None:
            # What is not asked for was proposed before an interruption, and belongs to a later phase.
            evaluate(store, claim, judge, progress, **(extra if claim.key in asked else {}))
        arrived = [key for key in lacking if key in store.trials]
        for _ in arrived:
            progress.advance(_note(store, counts))
        lacking = [key for key in lacking if key not in store.trials]
        for key in lacking:
            if not store.knows(key):
                store.propose(*asked[key])
        if claim is not None or arrived:
            pause.end()
        elif lacking:
            pause.wait(store.cost)
    return [store.trials[key] for key in keys if key in store.trials]


def evaluate(store: TrialStore, claim: Claim, judge: Judge, progress: Any, **extra: Any) -> Trial | None:
    """Score a claimed request and tell the result; a failure is a result. None where it came too late.

    An interrupt gives the request back at once. So does whatever else ends this process; then it counts as one that died.
    """
    with store.keeping(claim):  # at once: the imports alone may take longer than a lease
        score = _scored(store, claim, judge, progress, **extra)
    return store.tell(claim, **score)


def _scored(store: TrialStore, claim: Claim, judge: Judge, progress: Any, **extra: Any) -> dict[str, Any]:
    """What is to be told of a request: measurements or an error, and what they took."""
    from torch import AcceleratorError

    from ..core.driving import CannotFollow
    from ..core.surgery import CannotCut

    failures = (SamplingError, CannotFollow, CannotCut, RuntimeError, ValueError, LookupError, ArithmeticError)
    candidate, began, sampler = claim.request.candidate, time.monotonic(), judge.sampler
    executed, served = sampler.calls, sampler.served
    try:
        score = judge.score(candidate.plan, claim.request.seeds, cuts=candidate.cuts, **extra)
    except KeyboardInterrupt:
        store.give_back(claim)
        raise
    except Exception as e:
        if not isinstance(e, failures) or isinstance(e, AcceleratorError):  # the device is lost, whatever the candidate
            store.give_back(claim, died=True)
            raise
        error = f"{type(e).__name__}: {one_line(e)}"
        progress.warn(f"candidate {claim.number} failed and is recorded as such: {error}")
        calls, spared = sampler.calls - executed, sampler.served - served
        return {"error": error, "calls": calls, "plain_calls": calls + spared, "seconds": time.monotonic() - began}
    took = {"calls": score.calls, "plain_calls": score.plain_calls, "seconds": score.seconds}
    return {"measurements": score.measurements, **took}


def _note(store: TrialStore, counts: Callable[[Trial], bool]) -> str:
    best = store.best(counts)
    found = best.measured(store.objective) if best else None
    return f"best {found.label} {found.value:.4g}" if found else ""
