"""Which candidates are scored again, and which one of them is exported."""

from typing import Any

from lissom.core.candidate import Candidate, Cut, Request, SamplingPlan, Scheduler, Seeds, Step
from lissom.core.measurement import Measurement, Trial
from lissom.workflow._elites import default_pick, elites, front, parts

SEEDS = Seeds(role="search", base=0, count=8)
BOTH = ("fid", "macs")


def plan(*times: float, skip: tuple[str, ...] = ()) -> SamplingPlan:
    return SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=tuple(Step(timestep=t, skip=skip) for t in times))


def trial(number: int, fid: float | None, macs: float = 1.0) -> Trial:
    request = Request(candidate=Candidate(plan=plan(900 - number, 5)), seeds=SEEDS, costs={"macs": macs})
    found: Any = (Measurement(metric="fid", value=fid, direction="lower", n=8),) if fid is not None else ()
    return Trial(number=number, request=request, measurements=found)


def numbers(trials: list[Trial]) -> list[int]:
    return [t.number for t in trials]


def test_the_winner_in_parts() -> None:
    whole = plan(900, 400, skip=("a",))
    last = whole.steps[1].model_copy(update={"reuse": ("b",)})
    winner = Candidate(plan=whole.model_copy(update={"steps": (whole.steps[0], last)}), cuts=(Cut(address="c", what="remove"),))
    found = parts(winner)
    assert list(found) == ["timesteps", "skips", "reuse", "cuts"]
    assert found["timesteps"].plan == plan(900, 400) and found["skips"].plan == whole and found["reuse"].plan == winner.plan
    assert found["cuts"] == winner and list(parts(Candidate(plan=whole.without("skip")))) == ["timesteps"]
    reusing = winner.plan.without("skip") if winner.plan else None
    assert list(parts(Candidate(plan=reusing))) == ["timesteps", "reuse"]


def test_of_one_objective_the_best_in_order_and_equal_ones_as_proposed() -> None:
    trials = [trial(0, 3.0), trial(1, 1.0), trial(2, 2.0), trial(3, 1.0), trial(4, None)]
    assert numbers(elites(trials, ("fid",), 3)) == [1, 3, 2]
    assert numbers(elites(trials, ("fid",), 99)) == [1, 3, 2, 0]


def test_the_front_is_what_nothing_dominates() -> None:
    trials = [
        trial(0, 3.0, 0.5),
        trial(1, 1.0, 1.0),
        trial(2, 2.0, 0.8),
        trial(3, 2.5, 0.9),
        trial(4, 2.0, 0.8),
        trial(5, 3.0, 0.4),
    ]
    assert numbers(front(trials, BOTH)) == [1, 2, 5]


def test_a_front_that_is_too_long_is_thinned_evenly_and_one_too_short_filled_up() -> None:
    line = [trial(i, 1.0 + i, 1.0 - i / 20) for i in range(11)]
    assert numbers(elites(line, BOTH, 3)) == [0, 5, 10]
    assert numbers(elites(line, BOTH, 1)) == [0]
    behind = [trial(20 + i, 9.0 + i, 1.0 - i / 20) for i in range(2)]
    assert numbers(elites([*behind, *line[:2]], BOTH, 3)) == [0, 1, 20]


def test_the_default_pick_is_the_cheapest_that_is_no_worse_than_the_best_fixed_schedule() -> None:
    members = [trial(0, 1.0, 1.0), trial(1, 1.5, 0.8), trial(2, 2.1, 0.5)]
    assert default_pick(members, BOTH, trial(9, 2.0)) == 2
    assert default_pick(members, BOTH, trial(9, 0.5)) == 1  # nothing is as good: the best
    assert default_pick(members, BOTH, None) == 1
    assert default_pick(members, ("fid",), trial(9, 2.0)) == 1


def test_the_winner_comes_about_part_by_part() -> None:
    whole = plan(900, 5, skip=("a",))
    cut = Candidate(plan=whole, cuts=(Cut(address="b", what="remove"),))
    found = parts(cut)
    assert list(found) == ["timesteps", "skips", "cuts"]
    assert (
        found["timesteps"] == Candidate(plan=plan(900, 5)) and found["skips"] == Candidate(plan=whole) and found["cuts"] == cut
    )
    assert list(parts(Candidate(plan=plan(900, 5)))) == ["timesteps"]
