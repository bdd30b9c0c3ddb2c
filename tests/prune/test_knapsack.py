"""The knapsack against all subsets."""

import itertools
import math
import random

import pytest
from lissom.prune._knapsack import LIMIT, solve
from lissom.prune._task import SLACK

Sites = list[list[tuple[float, float]]]  # options of every site as (loss, saved)


def least(sites: Sites, need: float) -> float:
    """The least loss with which enough is saved, by trying everything."""
    found = math.inf
    for picks in itertools.product(*([(0.0, 0.0), *options] for options in sites)):
        if sum(saved for _, saved in picks) >= need * (1 - SLACK) and not math.isnan(sum(loss for loss, _ in picks)):
            found = min(found, sum(loss for loss, _ in picks))
    return found


def made_of(sites: Sites, picks: list[int | None]) -> tuple[float, float]:
    chosen = [options[pick] for options, pick in zip(sites, picks, strict=True) if pick is not None]
    return sum(loss for loss, _ in chosen), sum(saved for _, saved in chosen)


def instance(rng: random.Random) -> Sites:
    """Up to eight sites of up to three options: whole and broken sizes, ties, losses of nothing and without end."""
    whole, several = rng.random() < 0.5, rng.random() < 0.5
    odd = [0.0, 0.25, math.inf, math.nan]
    return [
        [
            (rng.choice([rng.random(), rng.random(), *odd]), float(rng.randint(1, 9)) if whole else rng.uniform(0.1, 5))
            for _ in range(rng.randint(0, 3) if several else 1)
        ]
        for _ in range(rng.randint(1, 8 if not several else 5))
    ]


@pytest.mark.parametrize("seed", range(300, 340))
def test_loses_as_little_as_the_best_subset_and_saves_enough(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        sites = instance(rng)
        finite = [[saved for loss, saved in options if math.isfinite(loss)] for options in sites]
        most = sum(max(options, default=0.0) for options in finite)
        some = sum(rng.choice(options) for options in finite if options and rng.random() < 0.6)  # can be met exactly
        for need in (0.0, -1.0, some, most, rng.uniform(0, 1.1) * most, math.nextafter(most, math.inf)):
            picks, best = solve(sites, need), least(sites, need)
            assert (picks is None) == math.isinf(best)
            if picks is None:
                continue
            loss, saved = made_of(sites, picks)
            assert loss == pytest.approx(best, abs=1e-12) and saved >= need * (1 - SLACK)
            for at, pick in enumerate(picks):  # nothing is cut that need not be
                assert pick is None or saved - sites[at][pick][1] < need * (1 - SLACK)


@pytest.mark.parametrize("seed", range(20))
def test_thinned_out_it_still_saves_what_it_promises(seed: int) -> None:
    rng = random.Random(seed)
    sites = [[(rng.random(), rng.lognormvariate(0, 1))] for _ in range(12)]
    need = rng.uniform(0.2, 1.0) * sum(site[0][1] for site in sites)
    exact = solve(sites, need)
    for limit in (1, 4, 40):
        picks = solve(sites, need, limit)
        assert picks is not None and exact is not None
        loss, saved = made_of(sites, picks)
        assert saved >= need * (1 - SLACK) and loss >= made_of(sites, exact)[0] - 1e-12


def test_of_many_equal_layers_the_cheapest_go() -> None:
    losses = [random.Random(1).random() for _ in range(200)]
    picks = solve([[(loss, 3.0)] for loss in losses], need=3.0 * 80)
    assert picks is not None
    assert {i for i, pick in enumerate(picks) if pick == 0} == set(sorted(range(200), key=lambda i: losses[i])[:80])


def test_losses_in_step_with_sizes_are_the_hard_case_and_stay_below_the_limit_in_accuracy() -> None:
    """Then nearly all sums are followed, and thinning sets in; no subset loses less than its part of the relaxed problem."""
    rng = random.Random(0)
    sizes = [rng.lognormvariate(0, 1) for _ in range(300)]
    sites = [[(size * rng.uniform(0.999, 1.001), size)] for size in sizes]
    need = 0.5 * sum(sizes)
    picks = solve(sites, need)
    assert picks is not None
    relaxed, left = 0.0, need  # by loss per size, the last one in part: no choice can be better
    for loss, size in sorted((site[0] for site in sites), key=lambda o: o[0] / o[1]):
        relaxed += loss * min(1.0, left / size)
        left -= min(size, left)
    assert relaxed <= made_of(sites, picks)[0] <= relaxed * (1 + 300 / LIMIT)
