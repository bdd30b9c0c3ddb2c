"""Other models in the space: what every method keeps to, what a genome may say, and T-Stitch's sweep."""

import random
from dataclasses import replace

import pytest
from lissom.core import methods
from lissom.core.candidate import Step
from lissom.core.driving.refusals import check_reuse
from lissom.search._operators import cross, mutate
from lissom.search._space import Genome, made_by
from lissom.search._vector import Layout
from lissom.search.t_stitch import divisions
from lissom.tests.search.landscape import BEST, LAYERS, answer, plain, play, quality, space, task

NAMES = [n for n in methods.names("search") if "models" in methods.load("search", n).varies]
FREE = [n for n in NAMES if n != "t_stitch"]
CASES = [(n, o) for n in FREE for o in (("fid",), ("fid", "macs")) if len(o) >= getattr(methods.load("search", n), "least", 1)]
CASES = [(n, o) for n, o in CASES if len(o) == 1 or methods.load("search", n).several]
ALL = pytest.mark.parametrize(("name", "objectives"), CASES, ids=[f"{n}-{len(o)}" for n, o in CASES])
UNIFORM = ((999, 749, 499, 249), (750, 500, 250, 0))
TIMES = (900, 600, 300, 50)


def makers(genome):
    return tuple(step.model for step in genome.steps)


def genome(*models, shape=(0, 0), times=TIMES):
    return Genome(tuple(Step(timestep=t, model=m) for t, m in zip(times, models, strict=True)), shape)


@ALL
@pytest.mark.parametrize("models", [("small",), ("large",), ("small", "large")], ids="-".join)
@pytest.mark.parametrize("budget", [{}, {"macs": 0.6}, {"macs": 0.7, "latency": 0.9}], ids=str)
def test_every_candidate_can_be_followed_and_keeps_the_budget(name, objectives, models, budget):
    the_task = task(name, 80, objectives, known=UNIFORM, budget=budget, models=models, ways=("skip", "reuse"))
    requests = play(name, the_task)
    assert len(requests) == 80 == len({r.key("e") for r in requests})
    for request in requests:
        steps = request.candidate.plan.steps
        check_reuse(steps)
        assert len(steps) == 4 and {s.model for s in steps} <= {None, *models}
        assert not any(s.left_out for s in steps if s.model) and all(set(s.left_out) <= set(LAYERS) for s in steps)
        found = the_task.space.genome(request.candidate)
        assert the_task.space.candidate(found) == request.candidate and request.costs == the_task.space.shares(found)
    for request in requests[-20 if name == "autodiffusion" else 0 :]:  # its first stage searches timesteps alone
        assert all(request.costs[n] <= most + 1e-9 for n, most in budget.items())
    if "small" in models and ("macs" in budget or "macs" in objectives):
        assert any(s.model == "small" for r in requests for s in r.candidate.plan.steps)


@ALL
def test_a_restart_proposes_the_same_again(name, objectives):
    the_task = task(name, 60, objectives, known=UNIFORM, budget={"macs": 0.7}, models=("small",))
    assert play(name, the_task) == play(name, the_task)


@pytest.mark.parametrize("name", ["autodiffusion", "bayes"])
def test_search_finds_that_the_small_model_belongs_into_the_noise(name):
    given = {"known": (BEST,), "budget": {"macs": 0.65}, "sites": (), "layers": (), "models": ("small",)}
    settings = {"stage_one": 0.0} if name == "autodiffusion" else {}
    found = play(name, task(name, 120, **given), **settings)
    best = min((r for r in found if r.costs["macs"] <= 0.65), key=quality)
    assert makers(best.candidate.plan)[0] == "small" and makers(best.candidate.plan)[-1] is None


def test_costs_of_a_step_are_those_of_who_makes_it():
    made = space(models=("small", "large"))
    assert made.cost(genome("small", None, None, "large")) == 20 + 100 + 100 + 180
    assert made.share(genome(*["large"] * 4)) == 1.0 and made.share(genome(*[None] * 4)) == 100 / 180
    assert replace(made, evaluations=(2, 2, 2, 1)).cost(genome("small", None, None, "large")) == 40 + 200 + 200 + 180
    cut = genome("small", None, None, None, shape=(1, 0))  # what is cut from the own model saves nothing in the other's step
    assert made.cost(cut) == 20 + 3 * (100 - 4)
    assert made.cost(genome("small", None, None, None), "params") == 4000


def test_the_cheapest_candidate():
    assert makers(space(models=("small",)).cheapest("macs")) == ("small",) * 4
    assert makers(space(models=("large",)).cheapest("macs")) == (None,) * 4
    made = space(models=("small", "large"))
    tight, rng = replace(made, budget={"macs": made.share(made.cheapest("macs"))}), random.Random(0)
    assert all(tight.fits(tight.fill(tight.random_times(rng), rng)) for _ in range(20))


def test_fill_lets_cheaper_models_make_steps_where_nothing_else_saves():
    made, rng = space(models=("small", "large"), layers=(), sites=(), budget={"macs": 0.4}), random.Random(0)
    seen = set()
    for _ in range(100):
        found = made.fill(genome(*(rng.choice((None, "large")) for _ in range(4)), shape=()), rng)
        assert made.fits(found) and made.consistent(found) == found
        seen.add(makers(found))
    assert len(seen) > 10
    odd = replace(made, budget={"macs": 0.4, "latency": 1.0})
    assert "small" in makers(odd.fill(genome(*["large"] * 4, shape=()), rng))


def test_a_step_of_another_model_leaves_nothing_out():
    made = space(models=("small",), ways=("skip", "reuse"))
    step = Step(timestep=600, skip=("layer.1",))
    assert made_by(step, "small") == Step(timestep=600, model="small")
    mixed = Genome(
        (Step(timestep=900, model="small"), step, Step(timestep=300, reuse=("layer.0", "layer.1")), Step(timestep=5))
    )
    found = made.consistent(replace(mixed, shape=(0, 0)))
    assert found.steps[2].reuse == ("layer.0",)  # nobody has executed the other one


def test_mutation_reaches_every_maker_of_every_step():
    config, rng = methods.load("search", "autodiffusion").Config(), random.Random(0)
    made, seen = space(models=("small", "large"), ways=("skip", "reuse")), set()
    one = plain(made, TIMES)
    for _ in range(400):
        one = mutate(one, space=made, config=config, rng=rng, second=True)
        assert made.consistent(one) == one
        check_reuse(one.steps)
        seen |= set(enumerate(makers(one)))
    assert seen == {(i, m) for i in range(4) for m in (None, "small", "large")}
    first = [mutate(plain(made, TIMES), space=made, config=config, rng=rng, second=False) for _ in range(50)]
    assert all(makers(g) == (None,) * 4 for g in first)  # timesteps alone


def test_mutations_without_other_models_are_as_they_were():
    config = methods.load("search", "autodiffusion").Config()
    plain_space, rng = space(), random.Random(3)
    found = [mutate(plain(plain_space, TIMES), space=plain_space, config=config, rng=rng, second=True) for _ in range(30)]
    assert all(makers(g) == (None,) * 4 for g in found)


def test_crossover_keeps_the_maker_with_its_step():
    made, rng = space(models=("small",)), random.Random(0)
    one, two = genome("small", "small", None, None), genome(None, "small", None, "small", times=(800, 600, 200, 20))
    for _ in range(50):
        assert all(step in one.steps + two.steps for step in cross(one, two, space=made, rng=rng, second=True).steps)


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_points_decode_to_what_they_encode(steps):
    made, rng = space(steps=steps, models=("small", "large"), ways=("skip", "reuse")), random.Random(0)
    layout, seen = Layout.of(made), set()
    assert layout.choices["models"] == 1 + 2 * (2 * steps - 1)
    for _ in range(300):
        point = layout.moved(layout.moved(layout.uniform(rng), rng), rng)
        found = layout.decode(point)
        assert made.consistent(found) == found and layout.decode(layout.encode(found)) == found
        seen |= set(enumerate(makers(found)))
    assert seen == {(i, m) for i in range(steps) for m in (None, "small", "large")}


def test_other_divisions_are_encoded_as_the_nearest():
    layout = Layout.of(space(models=("small",)))
    assert makers(layout.decode(layout.encode(genome("small", None, "small", None)))) == ("small", None, None, None)


def test_t_stitch_tries_every_place_to_change_over():
    the_task = task("t_stitch", 60, known=(*UNIFORM, BEST), models=("small",))
    requests = play("t_stitch", the_task)
    assert [makers(r.candidate.plan) for r in requests] == [("small",) * n + (None,) * (4 - n) for n in range(1, 5)]
    assert all(r.candidate.plan.timesteps == BEST for r in requests)
    assert len(play("t_stitch", replace(the_task, trials=2), batch=1)) == 2
    module = methods.load("search", "t_stitch")
    proposals, answers, batches = module.search(replace(the_task, trials=2), module.Config(batch=1), random.Random(0)), None, []
    while True:
        try:
            batches.append(proposals.send(answers))
        except StopIteration:
            break
        answers = [answer(r, n) for n, r in enumerate(batches[-1])]
    assert [len(batch) for batch in batches] == [1, 1]  # and no empty ones
    within = task("t_stitch", 60, known=(BEST,), models=("small",), budget={"macs": 0.6})
    assert [sum(m == "small" for m in makers(r.candidate.plan)) for r in play("t_stitch", within)] == [2, 3, 4]


def test_t_stitch_orders_models_by_what_they_cost():
    made = space(steps=10, models=("large",), layers=(), sites=())
    found = [makers(g) for g in divisions(plain(made, range(999, 0, -100)), made, 0.1)]
    assert found[3] == (None,) * 3 + ("large",) * 7 and len(found) == 11
    three = space(steps=10, models=("large", "small"), layers=(), sites=())
    found = [makers(g) for g in divisions(plain(three, range(999, 0, -100)), three, 0.1)]
    assert len(found) == len(set(found)) == 66  # of the paper's three-model sweep
    assert ("small",) * 4 + (None,) * 4 + ("large",) * 2 in found
