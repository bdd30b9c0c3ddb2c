"""What may be searched on a model and what it costs, against counts of the real thing; and what is refused before any work."""

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lissom.core import cost
from lissom.core.candidate import Cut, Scheduler
from lissom.core.errors import UserError
from lissom.core.recipe import build
from lissom.core.stages import SearchStage
from lissom.search._space import Choice, Price, Space
from lissom.workflow import _latency
from lissom.workflow._evaluator import trimmed
from lissom.workflow._plans import _together, check_objectives, plans_of
from lissom.workflow._subject import Subject
from lissom.workflow.context import Context, Options


def context(model: str = "zoo:fashion", **stage: Any) -> Context:
    data = {"lissom": 1, "model": model, "stages": [{"search": "random_search", "steps": 3, **stage}]}
    return Context(build(data, "r"), Path.cwd(), Options(device="cpu"))


@functools.cache
def subject(model: str = "zoo:fashion") -> Subject:
    return Subject.load(model, context(model))


def stage_of(**stage: Any) -> SearchStage:
    return SearchStage(search="random_search", steps=3, **stage)


def check(method: str, **stage: Any) -> None:
    check_objectives(SearchStage(search=method, steps=3, **stage), context(), subject().conditions)


@pytest.mark.parametrize(
    ("model", "space"),
    [("zoo:fashion", ("cuts",)), ("zoo:fashion", ("slim",)), ("zoo:fashion", ("slim", "cuts")), ("zoo:fashion-dit", ("cuts",))],
)
def test_costs_add_up_to_what_the_cut_and_skipping_pipeline_really_runs(model: str, space: tuple[str, ...]) -> None:
    the_subject, rng = subject(model), random.Random(1)
    plans = plans_of(the_subject, stage_of(space=("timesteps", "skips", *space)))
    pipe, whole = the_subject.model.pipe, plans.costs.total
    arguments = {**the_subject.conditions.arguments(range(1)), **the_subject.call}
    for target in (0.95, 0.8, 0.6):
        within = replace(plans.space, budget={"macs": target})
        genome = within.fill(within.random_times(rng), rng)
        candidate = plans.space.candidate(genome)
        assert plans.space.genome(candidate) == genome
        with trimmed(the_subject.model, the_subject.sampler, candidate.plan, candidate.cuts) as moved:
            assert moved is not None
            real = cost.measure(pipe, arguments)
            macs = cost.plan_macs(real, moved)
            params = real.params
        assert plans.space.cost(genome, "macs") == pytest.approx(macs, rel=1e-9)
        assert plans.shares(candidate)["macs"] == pytest.approx(macs / (3 * whole), abs=1e-8)
        assert plans.space.cost(genome, "params") / 3 == pytest.approx(params, rel=1e-9)


def test_slim_is_for_u_nets() -> None:
    with pytest.raises(UserError, match="space: slim: zoo:fashion-dit: .*is no U-Net.*take cuts instead of slim"):
        plans_of(subject("zoo:fashion-dit"), stage_of(space=("timesteps", "slim")))


def test_a_budget_that_nothing_satisfies_names_the_cheapest_candidate() -> None:
    with pytest.raises(
        UserError, match=r"budget macs=0\.01: cannot be met with 3 steps; the cheapest candidate, which skips all "
    ):
        plans_of(subject(), stage_of(budget={"macs": 0.01}))
    with pytest.raises(UserError, match=r"and makes \d+ cuts \(.*still costs 0\.\d+"):
        plans_of(subject(), stage_of(budget={"params": 0.01}, space=("timesteps", "skips", "cuts")))
    with pytest.raises(UserError, match=r"with nothing to leave out, still costs 1\.000.*let the search leave more out"):
        plans_of(subject(), stage_of(budget={"macs": 0.9}, space=("timesteps",)))


def test_budgets_that_hold_one_by_one_but_not_together_are_refused() -> None:
    one = Choice("one", (Cut(address="inner.0", what="remove"),), frozenset({"inner.0"}))
    two = Choice("two", (Cut(address="inner", what="remove"),), frozenset({"inner"}))  # holds the other
    prices = {
        "macs": Price(100.0, {}, {"one": 60.0, "two": 1.0}),
        "params": Price(100.0, {}, {"one": 1.0, "two": 60.0}),
    }
    scheduler = Scheduler(name="DDIMScheduler")
    space = Space(scheduler=scheduler, steps=2, low=0, high=999, whole=True, prices=prices, sites=((one,), (two,)))
    for budget in ({"macs": 0.5}, {"params": 0.5}, {"macs": 0.5, "params": 0.99}):
        _together(replace(space, budget=budget))
    with pytest.raises(
        UserError, match=r"budget macs=0\.5, params=0\.5: no candidate was found that keeps all of it; the nearest"
    ):
        _together(replace(space, budget={"macs": 0.5, "params": 0.5}))


def test_parameters_need_cuts() -> None:
    with pytest.raises(UserError, match="nothing in the space removes parameters. Add cuts"):
        plans_of(subject(), stage_of(objective=["fid", "params"]))


@pytest.mark.parametrize(
    ("method", "stage", "message"),
    [
        (
            "random_search",
            {"objective": ["fid", "energy"]},
            "objective 'energy' is not among what is measured, fid, clip_score, nor a cost",
        ),
        ("random_search", {"objective": ["fid", "latency:cuda"]}, "Costs are those of the machine that searches"),
        ("random_search", {"objective": ["fid", "mac"]}, "Did you mean 'macs'"),
        (
            "random_search",
            {"objective": ["fid", "clip_score"]},
            "metrics: fid and clip_score are what the search optimises. Add one",
        ),
        ("autodiffusion", {"space": ("timesteps", "cuts"), "seeded_by": "lptop"}, "no method 'lptop' in prune/"),
        ("autodiffusion", {"objective": ["fid", "macs"]}, "autodiffusion searches one objective, not 2. Set a --budget"),
        ("nsga2", {}, "nsga2 looks for a front, which takes two objectives. Add one, e.g. --objective macs"),
        ("cmaes", {}, "cmaes does not vary skips. Give --space timesteps, or take another method"),
        ("cmaes", {"space": ("timesteps", "slim")}, "cmaes does not vary slim"),
    ],
)
def test_what_cannot_be_measured_or_done_is_refused(method: str, stage: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(method, **stage)


def test_predicted_times_are_stored_and_compared_with_whole_runs(tmp_path: Path) -> None:
    stage = stage_of(budget={"latency": 0.9}, space=("timesteps", "skips", "cuts"))
    plans = plans_of(subject("zoo:fashion-dit"), stage, tmp_path)
    (table,) = tmp_path.glob(f"{_latency.TABLE}-*.json")
    kept = table.read_bytes()
    price = plans.space.prices["latency"]
    assert price.whole > 0 and set(price.layers) == set(plans.space.layers) and price.beside >= 0
    assert sum(price.layers.values()) < price.whole
    found = plans.validated(stage, subject("zoo:fashion-dit"), tmp_path)
    assert found is not None and len(found.predicted) == len(found.measured) == _latency.CANDIDATES
    assert found.batch == 1 and found.device == "cpu" and set(found.layers) >= set(plans.space.layers)
    assert all(0 < share < 5 for share in found.measured) and all(0 < share <= 1 for share in found.predicted)
    again = plans_of(subject("zoo:fashion-dit"), stage, tmp_path)  # nothing is measured anew
    assert again.space == plans.space and again.validated(stage, subject("zoo:fashion-dit"), tmp_path) == found
    assert table.read_bytes() == kept
    other = plans_of(subject("zoo:fashion-dit"), stage.model_copy(update={"latency_batch": 2}), tmp_path)
    assert other.space != plans.space and table.read_bytes() == kept  # other conditions, another file
