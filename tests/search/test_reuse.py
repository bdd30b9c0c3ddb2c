"""Reuse in the space: what every method keeps to, and what a genome may say."""

import random
from dataclasses import replace

import pytest
from lissom.core import methods
from lissom.core.candidate import Step
from lissom.core.driving.refusals import check_reuse
from lissom.search._operators import cross, mutate
from lissom.search._space import Genome, leaving, toggled
from lissom.search._vector import Layout
from lissom.tests.search.landscape import BEST, LAYERS, PRICES, plain, play, quality, space, task

NAMES = [n for n in methods.names("search") if "reuse" in methods.load("search", n).varies]
CASES = [(n, o) for n in NAMES for o in (("fid",), ("fid", "macs")) if len(o) >= getattr(methods.load("search", n), "least", 1)]
CASES = [(n, o) for n, o in CASES if len(o) == 1 or methods.load("search", n).several]
ALL = pytest.mark.parametrize(("name", "objectives"), CASES, ids=[f"{n}-{len(o)}" for n, o in CASES])
WAYS = pytest.mark.parametrize("ways", [("reuse",), ("skip", "reuse")], ids="-".join)
UNIFORM = ((999, 749, 499, 249), (750, 500, 250, 0))
TIMES = (900, 600, 300, 50)


def genome(*reuses, skips=((), (), (), ()), shape=(0, 0)):
    steps = tuple(Step(timestep=t, reuse=r, skip=s) for t, r, s in zip(TIMES, reuses, skips, strict=True))
    return Genome(steps, shape)


@ALL
@WAYS
@pytest.mark.parametrize("budget", [{}, {"macs": 0.86}, {"macs": 0.8, "latency": 0.92}, {"params": 0.7}], ids=str)
def test_every_candidate_can_be_followed_and_keeps_the_budget(name, objectives, ways, budget):
    the_task = task(name, 80, objectives, known=UNIFORM, budget=budget, ways=ways)
    requests = play(name, the_task)
    assert len(requests) == 80 == len({r.key("e") for r in requests})
    for request in requests:
        steps = request.candidate.plan.steps
        check_reuse(steps)
        assert len(steps) == 4 and all(set(s.left_out) <= set(LAYERS) for s in steps)
        assert not any(set(s.skip) & set(s.reuse) for s in steps) and (ways != ("reuse",) or not any(s.skip for s in steps))
        found = the_task.space.genome(request.candidate)
        assert the_task.space.candidate(found) == request.candidate and request.costs == the_task.space.shares(found)
    whole_first = name == "autodiffusion"  # its first stage searches timesteps alone
    for request in requests[-20 if whole_first else 0 :]:
        assert all(request.costs[n] <= most + 1e-9 for n, most in budget.items())
    if "macs" in budget or "macs" in objectives:
        assert any(s.reuse for r in requests for s in r.candidate.plan.steps)


@ALL
@WAYS
def test_a_restart_proposes_the_same_again(name, objectives, ways):
    the_task = task(name, 60, objectives, known=UNIFORM, budget={"macs": 0.85}, ways=ways)
    assert play(name, the_task) == play(name, the_task)


@ALL
def test_survives_failed_trials(name, objectives):
    assert len(play(name, task(name, 50, objectives, ways=("skip", "reuse")), lambda n: n % 2 == 0)) == 50


def test_evolution_finds_that_reuse_hurts_less_than_skipping():
    wins = 0
    for seed in range(5):
        given = {"known": (BEST,), "budget": {"macs": 0.85}, "sites": (), "ways": ("skip", "reuse")}
        found = play("autodiffusion", task("autodiffusion", 120, **given), seed=seed, stage_one=0.0)
        steps = min(found, key=quality).candidate.plan.steps
        wins += sum(len(s.reuse) for s in steps) > sum(len(s.skip) for s in steps)
    assert wins >= 4


def test_cmaes_searches_schedules_alone():
    assert methods.load("search", "cmaes").varies == {"timesteps"}


def test_a_reused_layer_costs_what_a_skipped_one_does():
    made = space(ways=("skip", "reuse"))
    one = genome((), ("layer.0", "layer.1"), ("layer.0",), (), skips=(("layer.2",), (), (), ()))
    assert made.cost(one) == 400 - 7 - 11 - 5
    twice = replace(made, evaluations=(2, 2, 2, 1))
    assert twice.cost(one) == 700 - 14 - 22 - 10


def test_what_no_earlier_step_executed_is_executed():
    made = space(ways=("skip", "reuse"))
    one = genome(("layer.0",), ("layer.0", "layer.1"), ("layer.1",), (), skips=(("layer.1",), (), (), ()))
    found = made.consistent(one)
    assert [s.reuse for s in found.steps] == [(), ("layer.0",), ("layer.1",), ()] and found.steps[0].skip == ("layer.1",)
    check_reuse(found.steps)
    assert made.consistent(found) == found


def test_what_is_cut_is_not_reused():
    made = space(ways=("reuse",))
    found = made.recut(genome((), ("layer.4", "layer.5"), ("layer.5",), ()), 1, 2)
    assert [s.reuse for s in found.steps] == [(), ("layer.4",), (), ()]


@WAYS
def test_the_cheapest_candidate(ways):
    made = space(ways=ways, sites=())
    steps, cheapest = 4 if "skip" in ways else 3, made.cheapest("macs")  # the first step has nothing to reuse
    assert made.cost(cheapest) == 400 - steps * sum(PRICES["macs"].layers.values())
    check_reuse(cheapest.steps)
    rng = random.Random(0)
    tight = replace(made, budget={"macs": made.share(cheapest)})
    assert all(tight.fits(tight.fill(tight.random_times(rng), rng)) for _ in range(50))


@WAYS
def test_fill_keeps_every_budget_and_leaves_out_no_more_than_it_must(ways):
    made, rng = space(budget={"macs": 0.8}, ways=ways, sites=()), random.Random(0)
    spent = []
    for _ in range(200):
        found = made.fill(made.random_times(rng), rng)
        assert made.fits(found) and made.consistent(found) == found
        spent.append(0.8 - made.share(found))
    assert max(spent) < 0.03


def test_a_layer_has_one_state_in_a_step():
    step = Step(timestep=9, skip=("a",), reuse=("b",))
    assert leaving(step, "reuse", {"a", "b"}) == Step(timestep=9, reuse=("a", "b"))
    assert toggled(Genome((step,)), 0, "b").steps == (Step(timestep=9, skip=("a", "b")),)
    assert toggled(Genome((step,)), 0, "b", "reuse").steps == (Step(timestep=9, skip=("a",)),)


@WAYS
def test_mutation_reaches_every_state_and_stays_consistent(ways):
    config, rng = methods.load("search", "autodiffusion").Config(), random.Random(0)
    made = space(ways=ways)
    one, seen = made.consistent(genome((), ("layer.1",), (), ())), set()
    for _ in range(400):
        one = mutate(one, space=made, config=config, rng=rng, second=True)
        assert made.consistent(one) == one
        check_reuse(one.steps)
        seen |= {(i, way) for i, s in enumerate(one.steps) for way in ("skip", "reuse") if getattr(s, way)}
    assert seen == {(i, way) for i in range(4) for way in ways if i or way == "skip"}


def test_a_layer_is_reused_in_one_step_or_in_all_later_ones_and_back():
    always = methods.load("search", "autodiffusion").Config(throughout=1.0)
    made = space(layers=("layer.1",), sites=(), ways=("reuse",))
    start = plain(made, TIMES)
    found = [mutate(start, space=made, config=always, rng=random.Random(s), second=True) for s in range(60)]
    on = {tuple(i for i, s in enumerate(g.steps) if s.reuse) for g in found}
    assert on == {(1,), (2,), (3,), (1, 2, 3), (2, 3)}
    back = [mutate(one, space=made, config=always, rng=random.Random(s), second=True) for s, one in enumerate(found)]
    assert start in back


def test_crossover_keeps_reuse_with_its_step():
    made, rng = space(ways=("reuse",)), random.Random(0)
    one = genome((), ("layer.0",), ("layer.1",), ())
    two = Genome(tuple(Step(timestep=t, reuse=r) for t, r in ((800, ()), (600, ()), (200, ("layer.2",)), (20, ()))), (0, 0))
    for _ in range(50):
        child = cross(one, two, space=made, rng=rng, second=True)
        check_reuse(child.steps)
        assert all(step in one.steps + two.steps for step in child.steps[1:])


@WAYS
@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_points_decode_to_what_they_encode(ways, steps):
    made, rng = space(steps=steps, ways=ways), random.Random(0)
    layout, seen = Layout.of(made), set()
    for _ in range(300):
        point = layout.moved(layout.moved(layout.uniform(rng), rng), rng)
        found = layout.decode(point)
        check_reuse(found.steps)
        assert made.consistent(found) == found and layout.decode(layout.encode(found)) == found
        seen |= {(i, way) for i, s in enumerate(found.steps) for way in ("skip", "reuse") if getattr(s, way)}
    assert seen == {(i, way) for i in range(steps) for way in ways if i or way == "skip"}


def test_a_layer_has_a_pattern_for_each_state_of_each_half():
    def patterns(**given):
        return set(Layout.of(space(sites=(), **given)).choices.values())

    assert patterns(ways=("skip",)) == {4} and patterns(ways=("reuse",)) == {4}
    assert patterns(ways=("skip", "reuse")) == {9} and patterns(ways=("reuse",), steps=2) == {2}


def test_other_reuse_is_encoded_as_the_nearest():
    made = space(steps=4, ways=("skip", "reuse"))
    layout = Layout.of(made)
    found = layout.decode(layout.encode(genome((), ("layer.0",), ("layer.0",), ("layer.0", "layer.3"))))
    assert [s.reuse for s in found.steps] == [(), ("layer.0",), ("layer.0",), ("layer.0",)]
    assert quality(task("bayes").request(found, "")) > 0
