"""What a search opens with: a prune method's choices, and another search's best plans fitted to this model."""

import json
from pathlib import Path
from typing import Any

import pytest
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.errors import UserError
from lissom.core.recipe import build
from lissom.core.stages import SearchStage
from lissom.search._space import Price, Space
from lissom.tests.workflow import small
from lissom.workflow import _opening
from lissom.workflow._evaluator import Evaluator
from lissom.workflow._plans import plans_of
from lissom.workflow._subject import Subject
from lissom.workflow.context import Context, Options

DDIM = Scheduler(name="DDIMScheduler", config={"num_train_timesteps": 1000})


def space(steps: int = 4, **changes: Any) -> Space:
    usual: dict[str, Any] = {
        "low": 0.0,
        "high": 999.0,
        "whole": True,
        "prices": {"macs": Price(100.0, {"a": 9.0})},
        "layers": ("a",),
    }
    return Space(scheduler=DDIM, steps=steps, **(usual | changes))


def plan(*times: float, skip: tuple[str, ...] = ()) -> SamplingPlan:
    return SamplingPlan(scheduler=DDIM, steps=tuple(Step(timestep=t, skip=skip) for t in times))


def plan_times(row: dict[str, Any]) -> list[float]:
    return [step["timestep"] for step in row["plan"]["steps"]]


def test_a_plan_fits_as_it_is_where_nothing_differs() -> None:
    found = _opening.fitted(plan(900, 500, 100, 5, skip=("a", "elsewhere")), space())
    assert found.times == (900, 500, 100, 5) and {step.skip for step in found.steps} == {("a",)}


def test_another_number_of_steps_is_read_off_the_line_through_the_times() -> None:
    assert _opening.fitted(plan(900, 500, 100), space(5)).times == (900, 700, 500, 300, 100)
    assert _opening.fitted(plan(900, 700, 500, 300, 100), space(3)).times == (900, 500, 100)
    assert _opening.fitted(plan(700), space(1)).times == (700,)
    assert len(set(_opening.fitted(plan(2, 1), space(6)).times)) == 6  # where there is no room between, it is made


def test_times_are_shares_of_the_training_schedule() -> None:
    longer = Scheduler(name="DDIMScheduler", config={"num_train_timesteps": 2000})
    found = _opening.fitted(plan(900, 500, 100, 5), Space(**{**vars(space()), "scheduler": longer, "high": 1999.0}))
    assert found.times == (1800, 1000, 200, 10)


def test_a_budget_holds_for_what_is_taken_over() -> None:
    tight = space(budget={"macs": 0.95}, prices={"macs": Price(100.0, {"a": 9.0})})
    assert tight.fits(_opening.fitted(plan(900, 500, 100, 5), tight))


def test_kept_openings_are_read_as_they_were() -> None:
    opening = [("one", _opening.fitted(plan(900, 500, 100, 5, skip=("a",)), space()))]
    assert _opening.read(json.loads(json.dumps(_opening.plain(opening)))) == opening


def test_the_best_plans_of_another_search_open_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "score", small.pretended)
    small.search(tmp_path / "first")
    first = small.report(tmp_path / "first")
    small.search(tmp_path / "second", small.text("zoo:fashion-dit", warm_start=str(tmp_path / "first")))
    second = small.report(tmp_path / "second")
    opened = [row for row in second["candidates"] if row["origin"].startswith("warm start")]
    assert 2 <= len(opened) <= 6 and all(row["number"] < 4 + len(opened) for row in opened)  # right after the fixed schedules
    fixed = [plan_times(row) for row in second["candidates"] if row["origin"].startswith("fixed")]
    searched = [r for r in first["candidates"] if not r["origin"].startswith("fixed") and plan_times(r) not in fixed]
    best = min((r for r in searched if r["rescored"] is not None), key=lambda r: r["rescored"], default=searched[0])
    there = [plan_times(row) for row in opened]
    assert plan_times(best) in there and all(t in map(plan_times, searched) for t in there)
    (tmp_path / "first" / "report.json").unlink()  # a search that goes on does not need it any more
    small.search(tmp_path / "second", small.text("zoo:fashion-dit", warm_start=str(tmp_path / "first")), resume=True)
    with pytest.raises(UserError, match="warm_start .*first: no report of a finished search there"):
        small.search(tmp_path / "third", small.text(warm_start=str(tmp_path / "first")))


@pytest.mark.parametrize("method", ["laptop", "ld_pruner"])
def test_a_prune_methods_choices_open_a_search_of_cuts(method: str, tmp_path: Path) -> None:
    stage = SearchStage(
        search="random_search", steps=2, space=("timesteps", "cuts"), budget={"macs": 0.8}, calibration=4, seeded_by=method
    )
    context = Context(
        build({"lissom": 1, "model": "zoo:fashion-dit", "stages": [stage.plain()]}, "r"), tmp_path, Options(device="cpu")
    )
    subject = Subject.load("zoo:fashion-dit", context)
    plans = plans_of(subject, stage)
    best = next(iter(plans.fixed.values()))
    found = _opening.pruned(stage, subject, plans, best, tmp_path)
    assert [origin for origin, _ in found] == [f"{method}, 90% of the MACs", f"{method}, 80% of the MACs"]
    assert [plans.space.share(genome) for _, genome in found] == pytest.approx([0.9, 0.8], abs=0.09)
    assert all(plans.space.share(g) <= share for (_, g), share in zip(found, (0.9, 0.8), strict=True))
    assert all(plans.space.candidate(genome).cuts and genome.times == best.timesteps for _, genome in found)
    assert _opening.pruned(stage.model_copy(update={"seeded_by": None}), subject, plans, best, tmp_path) == []
