"""The space: what genomes go out as, what excludes what, and what it all costs."""

import random
from dataclasses import replace

import pytest
from lissom.core.candidate import Candidate, Cut, SamplingPlan, Scheduler, Step
from lissom.search._space import Choice, Genome, Price, Space, toggled
from lissom.tests.search.landscape import LAYERS, plain, space


def genome(*skips, shape=(0, 0), times=(900, 600, 300, 50)):
    skips = skips or ((),) * len(times)
    return Genome(tuple(Step(timestep=t, skip=s) for t, s in zip(times, skips, strict=True)), shape)


def test_repair_gives_k_distinct_valid_timesteps_in_order():
    made, rng = space(), random.Random(0)
    few = made.repair([Step(timestep=1200.4), Step(timestep=999), Step(timestep=5.4, sigma=2.0)], (1, 0), rng)
    assert len(set(few.times)) == 4 and list(few.times) == sorted(few.times, reverse=True)
    assert {999, 5} < set(few.times) and few.shape == (1, 0) and {s.sigma for s in few.steps} == {None}
    many = made.repair([Step(timestep=t, skip=(f"layer.{t % 6}",)) for t in range(30)], (), rng)
    assert len(many.steps) == 4 and many.shape == (0, 0)
    assert all(step.skip == (f"layer.{int(step.timestep) % 6}",) for step in many.steps)  # skips stay with their timestep


def test_the_earlier_of_two_choices_that_exclude_each_other_stays():
    made = space()
    assert made.consistent(genome(shape=(2, 1))).shape == (2, 0)  # block.1 holds block.1.attn
    assert made.consistent(genome(shape=(1, 1))).shape == (1, 1)
    assert made.recut(genome(shape=(0, 1)), 0, 2).shape == (2, 0)
    assert [c.name for c in made.chosen(genome(shape=(2, 2)))] == ["both", "layer"]


def test_what_is_cut_cannot_be_skipped():
    made = space()
    found = made.recut(genome(("layer.5", "layer.1"), (), ("layer.5",), ()), 1, 2)
    assert [s.skip for s in found.steps] == [("layer.1",), (), (), ()]
    assert made.left(found) == LAYERS[:5] and made.left(genome()) == LAYERS


def test_costs_are_those_counted_by_hand():
    made = space()
    one = genome(("layer.0", "layer.2"), ("layer.0",), (), (), shape=(1, 2))
    # 4 evaluations of 100 - 4 - 10; less 5 + 7 in the first step and 5 in the second
    assert made.cost(one) == 4 * 86 - 12 - 5 == 327
    assert made.share(one) == 327 / 400
    assert made.shares(one) == {"macs": 0.8175, "latency": round((4 * 17 - 2 - 1) / 80, 9), "params": 0.75}


def test_a_step_that_evaluates_twice_costs_and_saves_twice():
    made = space(steps=2, evaluations=(2, 1))
    times = (900, 50)
    assert made.share(genome(times=times)) == 1.0
    assert made.cost(genome(("layer.1",), (), times=times)) == 300 - 12
    assert made.cost(genome((), ("layer.1",), times=times)) == 300 - 6


def test_the_cheapest_candidate_leaves_out_all_that_saves():
    made = space()
    # "layer" takes layer.5 along, which cannot be skipped any more
    assert made.cost(made.cheapest("macs")) == 4 * (100 - 9 - 10 - (5 + 6 + 7 + 8 + 9))
    assert made.share(made.cheapest("params"), "params") == 0.65
    rng = random.Random(0)
    least = made.share(made.cheapest("macs"))
    assert all(made.share(space(budget={"macs": 0.0}).fill(made.random_times(rng), rng)) >= least - 1e-9 for _ in range(50))


@pytest.mark.parametrize(
    "budget", [{"macs": 0.9}, {"macs": 0.6, "latency": 0.8}, {"params": 0.75}, {"params": 0.7, "macs": 0.7}], ids=str
)
def test_fill_keeps_every_budget_and_leaves_out_no_more_than_it_must(budget):
    made, rng = space(budget=budget), random.Random(0)
    spent = []
    for _ in range(200):
        found = made.fill(made.random_times(rng), rng)
        assert made.fits(found) and made.consistent(found) == found
        spent.append(min(most - made.share(found, name) for name, most in budget.items()))
    assert min(spent) < 0.03  # the last step towards a budget is a small one


def test_what_saves_nothing_of_a_budget_is_not_left_out_for_it():
    made, rng = space(budget={"params": 0.8}), random.Random(0)
    found = [made.fill(made.random_times(rng), rng) for _ in range(50)]
    assert all(not step.skip for one in found for step in one.steps)
    assert {one.shape for one in found} >= {(2, 0), (1, 2)}


def test_fill_ends_where_nothing_is_left_to_leave_out():
    for budget in ({"macs": 0.01}, {"params": 0.1, "macs": 0.1}):
        found = space(budget=budget).fill(plain(space(), (900, 600, 300, 50)), random.Random(0))
        assert not space(budget=budget).fits(found)


def test_a_deeper_option_of_the_same_site_is_within_reach():
    made = space(budget={"params": 0.8}, sites=space().sites[:1])
    found = made.fill(Genome(genome().steps, (1,)), random.Random(0))
    assert found.shape == (2,) and made.fits(found)


def test_a_genome_is_found_again_in_its_candidate():
    made, rng = space(budget={"macs": 0.7}), random.Random(0)
    for _ in range(200):
        one = made.fill(made.random_times(rng), rng)
        assert made.genome(made.candidate(one)) == one


def test_a_candidate_with_other_cuts_has_no_genome():
    made = space()
    plan = SamplingPlan(scheduler=made.scheduler, steps=genome().steps)
    assert made.genome(Candidate(plan=plan)) == genome()
    assert made.genome(Candidate(plan=plan, cuts=(Cut(address="block.7", what="remove"),))) is None
    assert made.genome(Candidate(cuts=(Cut(address="block.0", what="remove"),))) is None


def test_a_layer_is_toggled_in_one_step():
    once = toggled(genome(), 2, "layer.3")
    assert [s.skip for s in once.steps] == [(), (), ("layer.3",), ()] and toggled(once, 2, "layer.3") == genome()


def test_timesteps_snap_to_what_the_scheduler_takes():
    assert [space().snap(t) for t in (-3, 2.4, 1e6)] == [0.0, 2.0, 999.0]
    flow = space(whole=False, high=1000.0)
    assert flow.snap(0.2) == 1.0 and flow.snap(500.123456) == 500.1235 and flow.grid == 0.999


def excluding():
    """Two sites of which the first's option is small and excludes the second's large one; a layer holds a block that can be cut."""
    small = Choice("small", (Cut(address="inner.0.pair", what="remove"),), frozenset({"inner.0"}))
    large = Choice("large", (Cut(address="inner", what="remove"),), frozenset({"inner"}))
    block = Choice("block", (Cut(address="attn.block", what="remove"),), frozenset({"attn.block"}))
    price = Price(100.0, {"attn": 30.0}, {"small": 5.0, "large": 40.0, "block": 20.0})
    usual = {"scheduler": Scheduler(name="DDIMScheduler"), "steps": 2, "low": 0.0, "high": 999.0, "whole": True}
    return Space(**usual, prices={"macs": price}, layers=("attn",), sites=((small,), (large,), (block,)))


def test_skipping_a_layer_that_has_lost_a_part_saves_what_is_left_of_it():
    made = excluding()
    one = Genome((Step(timestep=9, skip=("attn",)), Step(timestep=5)), (0, 0, 1))
    assert made.cost(one) == (100 - 30) + (100 - 20)
    assert made.cost(Genome(one.steps, (0, 0, 0))) == (100 - 30) + 100


def test_the_cheapest_candidate_takes_the_larger_of_two_choices_that_exclude_each_other():
    made = excluding()
    assert made.cheapest("macs").shape == (0, 1, 1) and made.share(made.cheapest("macs")) == pytest.approx(0.3)
    tight, rng = replace(made, budget={"macs": 0.5}), random.Random(0)
    assert all(tight.fits(tight.fill(made.random_times(rng), rng)) for _ in range(50))  # also where the small one came first
