"""Points of a box and the genomes that they stand for."""

import itertools
import random
import statistics

import pytest
from lissom.search._space import Genome, Price
from lissom.search._vector import LAYERS as AT_LEAST
from lissom.search._vector import VISIBLE, Layout, gaps_of, times_of
from lissom.tests.search.landscape import plain, space

KINDS = pytest.mark.parametrize(
    "made",
    [
        space(steps=1), space(steps=4), space(steps=50), space(steps=4, high=3.0), space(steps=3, high=4.0),
        space(steps=8, whole=False, high=1000.0), space(steps=30, whole=False, high=1000.0),
    ],
    ids=["one", "four", "fifty", "all", "nearly all", "flow", "long flow"],
)  # fmt: skip


@KINDS
def test_every_vector_is_k_distinct_valid_timesteps(made):
    rng = random.Random(0)
    for _ in range(300):
        gaps = [rng.choice((0.0, 1.0, rng.random(), rng.random() ** 9)) for _ in range(made.steps)]
        times = times_of(made, gaps)
        assert len(times) == made.steps and all(a > b for a, b in itertools.pairwise(times))
        assert all(made.low <= t <= made.high and t == made.snap(t) for t in times)


@KINDS
def test_timesteps_are_found_again(made):
    rng = random.Random(0)
    for _ in range(300):
        times = made.random_times(rng).times
        gaps = gaps_of(made, times)
        assert all(0 <= gap <= 1 for gap in gaps)
        far = 0 if made.whole else made.steps * made.grid  # fractions may be nearer to each other than vectors allow
        assert max(abs(a - b) for a, b in zip(times_of(made, gaps), times, strict=True)) <= far


def test_uniform_vectors_are_uniform_sets():
    made, rng = space(), random.Random(0)
    drawn = [times_of(made, [rng.random() for _ in range(4)]) for _ in range(4000)]
    for place, times in enumerate(zip(*drawn, strict=True)):
        assert statistics.mean(times) == pytest.approx(999 * (4 - place) / 5, abs=10)


def test_a_set_of_all_timesteps_has_one_vector():
    assert times_of(space(high=3.0), [0.1, 0.9, 0.3, 0.0]) == [3.0, 2.0, 1.0, 0.0]


@KINDS
def test_decoding_and_encoding_settle(made):
    rng, layout = random.Random(0), Layout.of(made)
    for _ in range(200):
        point = layout.uniform(rng)
        for _ in range(20):
            point = layout.moved(point, rng)
        genome = layout.decode(point)
        assert made.consistent(genome) == genome and len(set(genome.times)) == made.steps
        assert layout.decode(layout.encode(genome)) == genome


def test_moving_changes_a_point_and_keeps_it_in_the_box():
    rng, layout = random.Random(0), Layout.of(space())
    for _ in range(200):
        point = layout.uniform(rng)
        moved = layout.moved(point, rng)
        assert moved != point and moved.keys() == point.keys() == {*layout.gaps, *layout.choices}
        assert all(0 <= moved[name] < count for name, count in layout.choices.items())


def test_skips_in_other_patterns_are_encoded_as_the_nearest():
    made = space(steps=5)
    layout = Layout.of(made)
    steps = list(plain(made, (900, 700, 500, 300, 100)).steps)  # the first half has three of them
    for i, skip in enumerate((("layer.0", "layer.1"), ("layer.0",), (), ("layer.0",), ("layer.0",))):
        steps[i] = steps[i].model_copy(update={"skip": skip})
    found = layout.decode(layout.encode(Genome(tuple(steps), (0, 0))))
    assert [s.skip for s in found.steps] == [("layer.0",)] * 5


def test_a_single_step_has_no_halves():
    assert set(Layout.of(space(steps=1, sites=())).choices.values()) == {2}
    assert set(Layout.of(space(steps=4, sites=())).choices.values()) == {4}


def test_filling_keeps_the_budget_and_can_be_told_exactly():
    rng = random.Random(0)
    for budget in ({"macs": 0.7}, {"macs": 0.9, "params": 0.8}, {"latency": 0.85}):
        layout = Layout.of(space(budget=budget))
        for _ in range(100):
            point = layout.filled(layout.moved(layout.uniform(rng), rng), rng)
            genome = layout.decode(point)
            assert layout.space.fits(genome) and layout.decode(layout.encode(genome)) == genome


def test_filling_ends_where_no_budget_can_be_met():
    layout = Layout.of(space(budget={"macs": 0.1}))
    assert not layout.space.fits(layout.decode(layout.filled(layout.uniform(random.Random(0)), random.Random(0))))


@pytest.mark.parametrize(("steps", "count"), [(4, 36), (4, 37), (4, 60), (10, 60), (10, 100), (50, 60), (50, 6)])
def test_many_layers_share_parameters_and_the_costliest_have_their_own(steps, count):
    layers = tuple(f"block.{i}" for i in range(count))
    price = Price(1000, {a: (7 * i) % count + 1 for i, a in enumerate(layers)})
    layout = Layout.of(space(steps=steps, layers=layers, sites=(), prices={"macs": price}))
    assert sorted(a for group in layout.groups for a in group) == sorted(layers)
    assert len(layout.groups) == min(count, len(layout.groups)) <= max(VISIBLE - steps, AT_LEAST)
    alone = [price.layers[group[0]] for group in layout.groups if len(group) == 1]
    shared = [price.layers[a] for group in layout.groups if len(group) > 1 for a in group]
    assert not shared or len(layout.groups) > max(VISIBLE - steps, AT_LEAST) // 2
    assert not alone or not shared or min(alone) > max(shared)
