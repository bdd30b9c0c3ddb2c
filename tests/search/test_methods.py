"""Contracts that every search method keeps, run over every file found in search/."""

import random
import re

import pytest
from lissom.core import methods
from lissom.core.candidate import Candidate, Request, SamplingPlan, Scheduler, Step
from lissom.core.measurement import Measurement, Trial
from lissom.search._space import Genome
from lissom.tests.search.landscape import BEST, LAYERS, SEEDS, best, hypervolume, plain, play, quality, space, task

NAMES = methods.names("search")
VARIED = {"timesteps", "skips", "reuse", "models", "cuts"}
FRONTS = {"nsga2"}  # these need two objectives
FREE = [n for n in NAMES if not getattr(methods.load("search", n), "needs", None)]  # sweeps end: see test_models
CASES = [(n, ("fid",)) for n in FREE if n not in FRONTS]
CASES += [(n, ("fid", "macs")) for n in FREE if methods.load("search", n).several]
ALL = pytest.mark.parametrize(("name", "objectives"), CASES, ids=[f"{n}-{len(o)}" for n, o in CASES])
UNIFORM = ((999, 749, 499, 249), (750, 500, 250, 0))


@pytest.mark.parametrize("name", NAMES)
def test_names_its_paper_documents_every_knob_and_says_what_it_can_do(name):
    module = methods.load("search", name)
    assert re.match(r"https://", module.Config.paper) and module.__doc__ and module.Config.__doc__
    assert module.Config.model_config["frozen"] and module.Config.model_config["extra"] == "forbid"
    assert set(methods.comments(module)) >= set(module.Config.model_fields)
    assert isinstance(module.several, bool) and {"timesteps"} <= module.varies <= VARIED


@ALL
@pytest.mark.parametrize("trials", [1, 7, 60, 61])
def test_proposes_exactly_as_many_new_candidates_as_asked(name, objectives, trials):
    requests = play(name, task(name, trials, objectives, known=UNIFORM))
    assert len(requests) == trials == len({r.key("e") for r in requests})


@ALL
@pytest.mark.parametrize("budget", [{}, {"macs": 0.86}, {"macs": 0.8, "latency": 0.9}, {"params": 0.7}], ids=str)
def test_every_plan_has_k_descending_steps_and_keeps_the_budget(name, objectives, budget):
    budget = budget if "skips" in methods.load("search", name).varies else {}
    the_task = task(name, 80, objectives, known=UNIFORM, budget=budget)
    requests = play(name, the_task)
    for request in requests:
        steps = request.candidate.plan.steps
        assert len(steps) == 4 and all(0 <= s.timestep <= 999 and s.timestep == int(s.timestep) for s in steps)
        assert all(set(s.skip) <= set(LAYERS) for s in steps)
        found = the_task.space.genome(request.candidate)
        assert the_task.space.candidate(found) == request.candidate and request.costs == the_task.space.shares(found)
    whole_first = name == "autodiffusion"  # its first stage searches timesteps alone
    assert all(
        request.costs[n] <= most + 1e-9 for n, most in budget.items() for request in requests[-20 if whole_first else 0 :]
    )


@ALL
def test_fractional_timesteps_for_flow_matching(name, objectives):
    requests = play(name, task(name, 14, objectives, whole=False, high=1000.0, layers=(), sites=()))
    assert all(1.0 <= s.timestep <= 1000.0 for r in requests for s in r.candidate.plan.steps)
    assert any(s.timestep != int(s.timestep) for r in requests for s in r.candidate.plan.steps)


@ALL
def test_a_restart_proposes_the_same_again(name, objectives):
    the_task = task(name, 60, objectives, known=UNIFORM)
    assert play(name, the_task) == play(name, the_task)
    assert play(name, the_task, seed=1) != play(name, the_task)


def test_a_restart_of_the_gaussian_process_proposes_the_same_again():
    the_task = task("bayes", 8, known=UNIFORM, layers=(), sites=())
    requests = play("bayes", the_task, startup=4)
    assert "gp" in {r.origin for r in requests} and requests == play("bayes", the_task, startup=4)


@ALL
@pytest.mark.parametrize("fails", [lambda n: True, lambda n: n % 2 == 0, lambda n: n < 25], ids=["all", "half", "first"])
def test_survives_failed_trials(name, objectives, fails):
    assert len(play(name, task(name, 50, objectives), fails)) == 50


@ALL
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_space_smaller_than_the_trials_is_left_without_a_loop(name, objectives, steps):
    requests = play(name, task(name, 60, objectives, steps=steps, high=3.0, layers=(), sites=()))
    assert len(requests) == len({r.key("e") for r in requests}) == {1: 4, 3: 4, 4: 1}[steps]


@ALL
def test_sites_are_varied_and_choices_that_exclude_each_other_never_meet(name, objectives):
    if "cuts" not in methods.load("search", name).varies:
        pytest.skip("timesteps alone")
    the_task = task(name, 120, objectives, known=UNIFORM, budget={"macs": 0.8})
    shapes = set()
    for request in play(name, the_task):
        genome = the_task.space.genome(request.candidate)
        shapes.add(genome.shape)
        assert genome.shape != (2, 1)
        assert genome.shape[1] != 2 or all("layer.5" not in step.skip for step in genome.steps)
    assert len({first for first, _ in shapes}) > 1 and len({second for _, second in shapes}) > 1


@ALL
def test_what_another_search_found_is_proposed_first(name, objectives):
    made = task(name).space
    winner = plain(made, (950, 640, 310, 20))
    other = made.recut(plain(made, (900, 500, 100, 3)), 0, 1) if made.sites else plain(made, (900, 500, 100, 3))
    start = (("earlier search", winner), ("pruned", other), ("again", winner))
    requests = play(name, task(name, 12, objectives, known=UNIFORM, start=start))
    assert [r.origin for r in requests[:2]] == ["earlier search", "pruned"] and len(requests) == 12
    assert [r.candidate for r in requests[:2]] == [made.candidate(winner), made.candidate(other)]
    assert len(play(name, task(name, 1, objectives, start=start))) == 1


@ALL
def test_the_fixed_schedules_are_parents_and_cost_no_trial(name, objectives):
    if name == "random_search":
        pytest.skip("has no parents")
    requests = play(name, task(name, 20, objectives, known=(BEST,)))
    assert all(r.candidate != task(name).space.candidate(plain(task(name).space, BEST)) for r in requests)
    without = play(name, task(name, 20, objectives))
    assert sorted(map(quality, requests))[4] < sorted(map(quality, without))[4]


@ALL
def test_noise_levels_of_the_stock_schedule_do_not_travel_to_other_timesteps(name, objectives):
    plan = SamplingPlan(
        scheduler=Scheduler(name="DDIMScheduler"), steps=tuple(Step(timestep=t, sigma=t / 100) for t in (990, 400, 100, 10))
    )
    stock = Request(candidate=Candidate(plan=plan), seeds=SEEDS, origin="fixed: stock", costs={"macs": 1.0})
    measured = Measurement(metric="fid", value=0.5, direction="lower", n=8)
    without = task(name, 40, objectives)
    known = (Trial(number=0, request=stock, measurements=(measured,)),)
    for proposed in play(name, type(without)(**{**vars(without), "known": known})):
        found = proposed.candidate.plan
        if found.timesteps != plan.timesteps:
            assert {s.sigma for s in found.steps} == {None}


@pytest.mark.parametrize("name", ["autodiffusion", "bayes", "cmaes"])
def test_beats_random_search_on_a_smooth_landscape(name):
    settings = {"sampler": "tpe"} if name == "bayes" else {}
    wins = 0
    for seed in range(9):
        the_task = task(name, 120, layers=(), sites=())
        wins += best(play(name, the_task, seed=seed, **settings)) < best(play("random_search", the_task, seed=seed))
    assert wins >= 7


def test_the_gaussian_process_beats_random_search_with_few_trials():
    the_task = task("bayes", 16, steps=2, layers=(), sites=())
    wins = sum(best(play("bayes", the_task, seed=s)) < best(play("random_search", the_task, seed=s)) for s in range(3))
    assert wins >= 2


@pytest.mark.parametrize(("name", "trials"), [("bayes", 100), ("nsga2", 240)])
def test_finds_a_better_front_than_random_search(name, trials):
    wins = 0
    for seed in range(7):
        the_task = task(name, trials, ("fid", "macs"), known=UNIFORM)
        found, other = play(name, the_task, seed=seed), play("random_search", the_task, seed=seed)
        wins += hypervolume(found) > hypervolume(other)
    assert wins >= 6


def test_the_search_for_a_front_leaves_the_global_generator_alone():
    random.seed(5)
    before = random.getstate()
    play("nsga2", task("nsga2", 60, ("fid", "macs")))
    assert random.getstate() == before


def test_costs_of_the_first_candidates_are_spread_where_they_are_objectives():
    for name in ("random_search", "nsga2", "bayes"):
        shares = [r.costs["macs"] for r in play(name, task(name, 12, ("fid", "macs"), known=UNIFORM))]
        assert min(shares) < 0.65 and max(shares) > 0.75


def test_union_crossover_keeps_what_both_parents_have_and_skips_travel_with_their_step():
    from lissom.search._operators import cross

    one = Genome((Step(timestep=900, skip=("layer.0",)), Step(timestep=500), Step(timestep=10)), (0, 2))
    two = Genome((Step(timestep=800), Step(timestep=500, skip=("layer.1",)), Step(timestep=20, skip=("layer.2",))), (1, 2))
    made, rng = space(steps=3), random.Random(0)
    shapes = set()
    for _ in range(50):
        child = cross(one, two, space=made, rng=rng, second=True)
        assert len(child.steps) == 3 and 500 in child.times
        assert all(step in one.steps + two.steps for step in child.steps)
        shapes.add(child.shape)
    assert shapes == {(0, 2), (1, 2)}
    assert cross(one, one, space=made, rng=rng, second=True) == one


def test_a_layer_is_switched_in_all_steps_at_once_and_back():
    from lissom.search._operators import mutate

    always = methods.load("search", "autodiffusion").Config(throughout=1.0)
    made = space(steps=3, layers=("layer.1",), sites=())
    plan = tuple(Step(timestep=t, skip=skip) for t, skip in ((900, ()), (600, ("layer.1",)), (300, ())))
    off = mutate(Genome(plan), space=made, config=always, rng=random.Random(0), second=True)
    assert [s.skip for s in off.steps] == [("layer.1",)] * 3 and off.times == (900, 600, 300)
    assert [s.skip for s in mutate(off, space=made, config=always, rng=random.Random(0), second=True).steps] == [()] * 3


def test_mutation_always_changes_the_genome_and_reaches_skips_and_cuts():
    from lissom.search._operators import mutate

    config, rng = methods.load("search", "autodiffusion").Config(), random.Random(0)
    genome = Genome(tuple(Step(timestep=t, skip=("layer.1",)) for t in BEST), (0, 0))
    made = [mutate(genome, space=space(), config=config, rng=rng, second=True) for _ in range(300)]
    assert sum(m == genome for m in made) < 10  # a jump may land where it was
    assert {len(step.skip) for m in made for step in m.steps} >= {0, 1, 2}
    assert {m.shape for m in made} == {(0, 0), (1, 0), (2, 0), (0, 1), (0, 2)}
