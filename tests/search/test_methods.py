"""Contracts that every search method keeps, run over every file found in search/."""

import random
import re

import pytest
from lissom.core import methods
from lissom.core.candidate import Candidate, Request, SamplingPlan, Scheduler, Seeds, Step
from lissom.core.measurement import Measurement, Trial
from lissom.search._space import Space, Task

SEEDS = Seeds(role="search", base=0, count=8)
LAYERS = {f"layer.{i}": 5 + i for i in range(6)}


def task(trials=60, steps=4, budget=1.0, layers=LAYERS, high=999.0, whole=True, known=()):
    space = Space(
        scheduler=Scheduler(name="DDIMScheduler"), steps=steps, low=0.0 if whole else 1.0, high=high, whole=whole,
        macs=100, layers=layers, budget=budget,
    )  # fmt: skip
    return Task(space=space, trials=trials, seeds=SEEDS, objective="fid", known=known)


def answer(request, number, fails=lambda n: False):
    """A smooth stand-in for quality: best at 900, 600, 300, 50, and every skipped layer hurts a little."""
    if fails(number):
        return Trial(number=number, request=request, state="failed", error="boom")
    steps = request.candidate.plan.steps
    cost = sum(abs(s.timestep - t) for s, t in zip(steps, (900, 600, 300, 50), strict=False)) + 5 * sum(
        len(s.skip) for s in steps
    )
    measured = Measurement(metric="fid", value=1 + cost, direction="lower", n=8)
    return Trial(number=number, request=request, measurements=(measured,))


def play(name, the_task, fails=lambda n: False, seed=0, **settings):
    module = methods.load("search", name)
    proposals = module.search(the_task, module.Config(**settings), random.Random(seed))
    requests, trials = [], None
    try:
        while True:
            batch = proposals.send(trials)
            trials = [answer(r, len(requests) + i, fails) for i, r in enumerate(batch)]
            requests += batch
    except StopIteration:
        return requests


ALL = pytest.mark.parametrize("name", methods.names("search"))


@ALL
def test_names_its_paper_and_documents_every_knob(name):
    module = methods.load("search", name)
    assert re.match(r"https://", module.Config.paper) and module.__doc__ and module.Config.__doc__
    assert module.Config.model_config["frozen"] and module.Config.model_config["extra"] == "forbid"


@ALL
@pytest.mark.parametrize("trials", [1, 7, 60, 61])
def test_proposes_exactly_as_many_new_candidates_as_asked(name, trials):
    requests = play(name, task(trials))
    assert len(requests) == trials == len({r.key("e") for r in requests})


@ALL
@pytest.mark.parametrize("budget", [1.0, 0.9, 0.86])
def test_every_plan_has_k_descending_steps_and_the_last_ones_keep_the_budget(name, budget):
    the_task = task(80, budget=budget)
    requests = play(name, the_task)
    for request in requests:
        steps = request.candidate.plan.steps
        assert len(steps) == 4 and all(0 <= s.timestep <= 999 and s.timestep == int(s.timestep) for s in steps)
        assert all(set(s.skip) <= set(LAYERS) for s in steps)
    assert all(the_task.space.fits(r.candidate.plan.steps) for r in requests[-20:])


@ALL
def test_fractional_timesteps_for_flow_matching(name):
    requests = play(name, task(30, whole=False, high=1000.0, layers={}))
    assert all(1.0 <= s.timestep <= 1000.0 for r in requests for s in r.candidate.plan.steps)
    assert any(s.timestep != int(s.timestep) for r in requests for s in r.candidate.plan.steps)


@ALL
def test_a_restart_proposes_the_same_again(name):
    assert play(name, task()) == play(name, task())
    assert play(name, task(), seed=1) != play(name, task())


@ALL
@pytest.mark.parametrize("fails", [lambda n: True, lambda n: n % 2 == 0, lambda n: n < 25], ids=["all", "half", "first"])
def test_survives_failed_trials(name, fails):
    assert len(play(name, task(50), fails)) == 50


@ALL
def test_a_space_smaller_than_the_trials_is_left_without_a_loop(name):
    requests = play(name, task(60, steps=3, high=3.0, layers={}))
    assert len(requests) == len({r.key("e") for r in requests}) <= 4  # 4 choose 3


def test_evolution_beats_random_search_on_a_smooth_landscape():
    def best(name, seed):
        return min(answer(r, 0).value("fid") for r in play(name, task(120), seed=seed))

    wins = sum(best("autodiffusion", s) < best("random_search", s) for s in range(9))
    assert wins >= 8


def test_the_fixed_schedules_are_parents_and_cost_no_trial():
    optimum = tuple(Step(timestep=t) for t in (900, 600, 300, 50))
    plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=optimum)
    known = answer(Request(candidate=Candidate(plan=plan), seeds=SEEDS), 0)
    requests = play("autodiffusion", task(20, known=(known,)))
    assert all(r.candidate.plan != plan for r in requests)
    assert sum(bool({s.timestep for s in r.candidate.plan.steps} & {900, 600, 300, 50}) for r in requests) >= 8


@ALL
def test_noise_levels_of_the_stock_schedule_do_not_travel_to_other_timesteps(name):
    steps = tuple(Step(timestep=t, sigma=t / 100) for t in (990, 400, 100, 10))
    request = task().request(steps, "fixed: stock")
    known = (Trial(number=0, request=request, measurements=(Measurement(metric="fid", value=0.5, direction="lower", n=8),)),)
    for proposed in play(name, task(trials=40, known=known)):
        found = proposed.candidate.plan
        if found.timesteps != tuple(s.timestep for s in steps):
            assert {s.sigma for s in found.steps} == {None}


def test_union_crossover_keeps_what_both_parents_have_and_skips_travel_with_their_step():
    cross = methods.load("search", "autodiffusion").cross
    one = (Step(timestep=900, skip=("layer.0",)), Step(timestep=500), Step(timestep=10))
    two = (Step(timestep=800), Step(timestep=500, skip=("layer.1",)), Step(timestep=20, skip=("layer.2",)))
    space = task(steps=3).space
    for seed in range(50):
        child = cross(one, two, space=space, rng=random.Random(seed), skipping=True)
        assert len(child) == 3 and 500 in {s.timestep for s in child}
        assert all(step in one + two for step in child)
    assert cross(one, one, space=space, rng=random.Random(0), skipping=True) == one


def test_a_layer_is_switched_in_all_steps_at_once_and_back():
    module = methods.load("search", "autodiffusion")
    plain = tuple(Step(timestep=t, skip=skip) for t, skip in ((900, ()), (600, ("layer.1",)), (300, ())))
    always = module.Config(throughout=1.0)

    def made(genome, layers):
        space = task(steps=3, layers=layers).space
        return module.mutate(genome, space=space, config=always, rng=random.Random(0), skipping=True)

    off = made(plain, {"layer.1": 6})
    assert [s.skip for s in off] == [("layer.1",)] * 3 and [s.timestep for s in off] == [900, 600, 300]
    assert [s.skip for s in made(off, {"layer.1": 6})] == [()] * 3


def test_mutation_always_changes_the_genome_and_reaches_skips():
    module = methods.load("search", "autodiffusion")
    genome = tuple(Step(timestep=t, skip=("layer.1",)) for t in (900, 600, 300, 50))
    made = [
        module.mutate(genome, space=task().space, config=module.Config(), rng=random.Random(s), skipping=True)
        for s in range(200)
    ]
    assert sum(m == genome for m in made) < 10  # a jump may land where it was
    assert {len(step.skip) for m in made for step in m} >= {0, 1, 2}
