"""The 0-1 knapsack in its covering form: save at least so much, lose as little as possible. At most one option of each site.

Dynamic programming over sets of (saved, loss) that no other set beats in both, as Nemhauser and Ullmann do: no quantisation, so
that the answer is exact for parameters, MACs and milliseconds alike. Where such sets pass LIMIT, those that save nearly the same
are thinned out: what the answer promises to save it saves still, and its loss may be a little above the least.
"""

import math
from collections.abc import Sequence

from ._task import SLACK, enough

LIMIT = 20_000  # sets that are followed at a time


def solve(sites: Sequence[Sequence[tuple[float, float]]], need: float, limit: int = LIMIT) -> list[int | None] | None:
    """sites: for each, its options as (loss, saved). Returns the chosen option of every site (None: none), or None if infeasible.

    Losses that are not finite are never chosen. Nothing is chosen that could be left out.

    >>> solve([[(1.0, 4.0)], [(1.5, 6.0)], [(9.0, 10.0)]], need=6.0)
    [None, 0, None]
    """
    import numpy as np

    usable = [[(n, *o) for n, o in enumerate(options) if math.isfinite(o[0])] for options in sites]
    most = [max((saved for *_, saved in options), default=0.0) for options in usable]
    if not enough(sum(most), need):
        return None
    met, rounding = need * (1 - SLACK), abs(need) * 1e-12
    saved, lost = np.zeros(1), np.zeros(1)  # of every set that is followed: both ascend
    trail = []  # for each site: which set was extended, and by which option (-1: by none)
    for site, options in enumerate(usable):
        all_saved = np.concatenate([saved, *(saved + more for _, _, more in options)])
        all_lost = np.concatenate([lost, *(lost + more for _, more, _ in options)])
        source = np.tile(np.arange(len(saved)), len(options) + 1)
        pick = np.repeat([-1, *(n for n, _, _ in options)], len(saved))
        all_saved[all_saved >= met] = max(need, 0.0)  # more than enough is worth no more
        order = np.lexsort((-all_saved, all_lost))  # stable: of equal sets the one without this site
        highest = np.maximum.accumulate(all_saved[order])
        order = order[np.diff(highest, prepend=-1.0) > 0]
        order = order[all_saved[order] + sum(most[site + 1 :]) >= met - rounding]  # later sites can still save enough
        if len(order) > limit:
            bins = np.floor(all_saved[order] * (limit / need))
            order = order[(np.diff(bins, prepend=-1.0) > 0) | (order == order[-1])]
        saved, lost = all_saved[order], all_lost[order]
        trail.append((source[order], pick[order]))
    picks: list[int | None] = []
    at = len(saved) - 1
    for source, pick in reversed(trail):
        picks.append(int(pick[at]) if pick[at] >= 0 else None)
        at = int(source[at])
    return _without_idle(sites, picks[::-1], need)


def _without_idle(sites: Sequence[Sequence[tuple[float, float]]], picks: list[int | None], need: float) -> list[int | None]:
    """Options given back that are not needed: those that lose nothing, or were taken because sets were thinned out."""
    chosen = [(sites[at][pick], at) for at, pick in enumerate(picks) if pick is not None]
    total = sum(saved for (_, saved), _ in chosen)
    for (_, saved), at in sorted(chosen, reverse=True):
        if enough(total - saved, need):
            picks[at], total = None, total - saved
    return picks
