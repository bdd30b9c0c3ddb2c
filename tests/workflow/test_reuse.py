"""Reuse of the steps before, searched end to end on the embedded models, evaluated, and carried over to other models."""

from pathlib import Path
from typing import Any

import pytest
from lissom.core.artifact import read_plan
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.errors import UserError
from lissom.search._space import Price, Space
from lissom.tests.workflow import small
from lissom.workflow import _identity, _opening
from lissom.workflow._pruned_model import moved_plan
from lissom.workflow.context import Options

DDIM = Scheduler(name="DDIMScheduler", config={"num_train_timesteps": 1000})


@pytest.mark.parametrize("space", [["timesteps", "reuse"], ["timesteps", "skips", "reuse"]], ids="-".join)
def test_reuse_is_searched_measured_and_reproduced(space: list[str], tmp_path: Path) -> None:
    small.search(tmp_path / "run", small.text("zoo:fashion-dit", space=space, steps=3, budget={"macs": 0.85}))
    found, plan = small.report(tmp_path / "run"), read_plan(tmp_path / "run")
    assert found["winner"]["macs_ratio"] <= 0.85 + 1e-9 and any(step.left_out for step in plan.steps)
    assert not plan.steps[0].reuse
    if "skips" not in space:
        assert any(step.reuse for step in plan.steps) and not any(step.skip for step in plan.steps)
        assert [one["part"] for one in found["gained"]] == ["fixed", "timesteps", "reuse"]
        assert found["gained"][1]["scored"].get("macs_ratio", 1.0) == 1.0
        assert found["gained"][2]["scored"]["macs_ratio"] == found["winner"]["macs_ratio"]
    recipe = small.text("zoo:fashion-dit", space=space, steps=3, budget={"macs": 0.85})
    small.search(tmp_path / "cold", recipe, options=Options(device="cpu", memo_mib=0))
    cold = small.report(tmp_path / "cold")
    assert [row.get("value") for row in cold["candidates"]] == [row.get("value") for row in found["candidates"]]
    assert "leave_out" in (tmp_path / "run" / "reproduce.py").read_text() or not any(step.reuse for step in plan.steps)


def test_an_impossible_budget_of_reuse_says_what_the_cheapest_does(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"which reuses all 12 layers that can be reused in every step but the first, still costs 0\.5"
    ):
        small.search(tmp_path / "run", small.text("zoo:fashion-dit", space=["timesteps", "reuse"], budget={"macs": 0.1}))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"space": ["timesteps", "reuse"], "steps": 1}, "reuse: a single step has no step before it"),
        ({"space": ["timesteps", "reuse"], "search": "cmaes", "population": None}, "cmaes does not vary reuse"),
    ],
)
def test_where_nothing_can_be_reused(stage: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        small.search(tmp_path / "run", small.text(**stage))


def plan(*reuses: tuple[str, ...], skip: tuple[str, ...] = ()) -> SamplingPlan:
    steps = tuple(Step(timestep=900 - 100 * i, reuse=r, skip=skip) for i, r in enumerate(reuses))
    return SamplingPlan(scheduler=DDIM, steps=steps)


def test_a_warm_start_takes_reuse_over_where_the_space_has_it() -> None:
    usual: dict[str, Any] = {"low": 0.0, "high": 999.0, "whole": True, "prices": {"macs": Price(100.0, {"a": 9.0})}}
    given = plan((), ("a", "b"), ("a",), skip=("c",))
    for ways, want in ((("reuse",), [(), ("a",), ("a",)]), (("skip",), [()] * 3), (("skip", "reuse"), [(), ("a",), ("a",)])):
        found = _opening.fitted(given, Space(scheduler=DDIM, steps=3, layers=("a",), ways=ways, **usual))
        assert [step.reuse for step in found.steps] == want and not any(step.skip for step in found.steps)
    short = _opening.fitted(given, Space(scheduler=DDIM, steps=1, layers=("a",), ways=("skip", "reuse"), **usual))
    assert short.steps[0].left_out == ()


def test_reuse_follows_layers_to_a_smaller_model() -> None:
    moved = moved_plan(plan((), ("blocks.2", "blocks.0"), skip=("blocks.1",)), {"blocks.0": None, "blocks.2": "blocks.1"})
    assert moved.steps[1].reuse == ("blocks.1",)


def test_reuse_is_said_of_an_evaluation() -> None:
    assert _identity.said(plan((), ("a", "b"), skip=("c",)), None).endswith("(900, 800), 2 layers skipped, 2 layers reused")
