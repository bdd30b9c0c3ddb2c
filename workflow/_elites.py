"""Which candidates are scored again, which of those can be picked (the best, or a front), and what the picked one is made of."""

import math
from collections.abc import Sequence

from ..core.candidate import Candidate
from ..core.measurement import Trial


def elites(trials: Sequence[Trial], objectives: Sequence[str], count: int) -> list[Trial]:
    """The `count` candidates worth a second look, best first objective first. Equal values keep the order of proposal.

    Of several objectives: the front, spread evenly where it has too many, then the front of the rest, and so on.
    """
    left = [t for t in trials if all(math.isfinite(t.value(name)) for name in objectives)]
    found: list[Trial] = []
    while left and len(found) < count:
        best = front(left, objectives) if len(objectives) > 1 else sorted(left, key=lambda t: t.value(objectives[0]))
        found += _spread(best, count - len(found)) if len(objectives) > 1 else best[:count]
        left = [] if len(objectives) == 1 else [t for t in left if all(t is not other for other in best)]
    return found


def front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The trials that no other one dominates, best first objective first; of equal ones the first."""
    values = [tuple(t.value(name) for name in objectives) for t in trials]
    kept = [
        i
        for i, own in enumerate(values)
        if not any(dominates(other, own) or (other == own and j < i) for j, other in enumerate(values))
    ]
    return [trials[i] for i in sorted(kept, key=lambda i: values[i])]


def default_pick(members: Sequence[Trial], objectives: Sequence[str], fixed: Trial | None) -> int:
    """Which member is exported where nobody says: the first, or, of a front, the one of least second objective that is no worse
    than the best fixed schedule by the first. Counted from 1.
    """
    if len(objectives) == 1 or fixed is None:
        return 1
    limit = fixed.value(objectives[0])
    good = [i for i, t in enumerate(members) if t.value(objectives[0]) <= limit]
    return 1 + min(good, key=lambda i: members[i].value(objectives[1]), default=0)


def parts(winner: Candidate) -> dict[str, Candidate]:
    """How the winner comes about: its timesteps alone, then other models in some steps, then its skips too, then its reuse, then
    its cuts; without parts that it has not."""
    plan = winner.plan
    assert plan is not None
    bare, stitched = plan.without("skip", "reuse", "model"), plan.without("skip", "reuse")
    skipping = plan.without("reuse")
    found = {"timesteps": Candidate(plan=bare)}
    if stitched != bare:
        found["models"] = Candidate(plan=stitched)
    if skipping != stitched:
        found["skips"] = Candidate(plan=skipping)
    if skipping != plan:
        found["reuse"] = Candidate(plan=plan)
    if winner.cuts:
        found["cuts"] = winner
    return found


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether a is no worse than b in any objective, and better in one; all are minimised."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _spread(ordered: list[Trial], count: int) -> list[Trial]:
    """`count` of a list, evenly by place, both ends among them."""
    if count >= len(ordered):
        return ordered
    if count == 1:
        return ordered[:1]
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]
