"""LAPTOP-Diff: the best subset by the sum of scores, re-scoring in rounds, and losses that are not finite."""

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.prune import laptop
from lissom.prune._task import Option, Pruned, Space, Task, enough
from lissom.tests.prune import given
from torch import nn

Losses = Callable[[Sequence[tuple[Cut, ...]]], list[float]]


def remove(name: str) -> Cut:
    return Cut(address=name, what="remove")


def task(saved: dict[str, float], need: float, losses: Losses, spaces: tuple[Space, ...] = ()) -> Task:
    sites = tuple((Option((remove(name),), amount),) for name, amount in saved.items())
    return Task(nn.Module(), (), spaces or (Space(sites),), need, losses, say=lambda line: None)


def run(given_task: Task, seed: int = 0, **settings: object) -> Pruned:
    return laptop.prune(given_task, laptop.Config.model_validate(settings), random.Random(seed))


def names(result: Pruned) -> set[str]:
    return {cut.address for cut in result.cuts}


def priced(prices: dict[str, float]) -> Losses:
    return lambda options: [sum(prices[cut.address] for cut in cuts) for cuts in options]


@pytest.mark.parametrize("seed", range(20))
def test_the_scores_of_what_is_cut_add_up_to_the_least_of_all_subsets(seed: int) -> None:
    rng = random.Random(seed)
    saved = {f"l{i}": rng.uniform(1, 5) for i in range(9)}
    prices = {name: rng.uniform(0, 3) for name in saved}
    need = rng.uniform(0, 0.9) * sum(saved.values())
    subsets = itertools.chain.from_iterable(itertools.combinations(saved, n) for n in range(10))
    fit = [subset for subset in subsets if enough(sum(saved[name] for name in subset), need)]
    result = run(task(saved, need, priced(prices)))
    assert names(result) == set(min(fit, key=lambda subset: sum(prices[name] for name in subset)))
    assert result.predicted == pytest.approx(sum(prices[name] for name in names(result)))
    assert result.scores == prices


def test_greedy_takes_the_lowest_loss_per_saved_unit_and_may_be_beaten() -> None:
    prices, saved = {"small": 1.0, "large": 6.0, "fits": 5.0}, {"small": 2.0, "large": 9.0, "fits": 7.0}
    assert names(run(task(saved, 9.0, priced(prices)), solver="greedy")) == {"large"}  # small was given back
    assert names(run(task(saved, 10.0, priced(prices)), solver="greedy")) == {"small", "large"}  # 7
    assert names(run(task(saved, 7.0, priced(prices)), solver="greedy")) == {"large"}  # 6
    assert names(run(task(saved, 7.0, priced(prices)))) == {"fits"}  # 5


@pytest.mark.parametrize("solver", ["knapsack", "greedy"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rounds", [1, 3, 50])
def test_where_losses_add_up_the_prediction_is_the_loss(solver: str, plain: bool, rounds: int) -> None:
    asked = given.ask(given.whole("sd", plain), keep=0.7)
    result = run(asked, solver=solver, rounds=rounds)
    assert result.predicted == pytest.approx(given.added([result.cuts])[0])
    assert result.additivity is not None and len(result.additivity.sums) == 16
    assert result.additivity.losses == pytest.approx(result.additivity.sums)
    assert len(set(result.additivity.sums)) > 8  # different subsets, of two options or more


def test_the_knapsack_finds_the_best_of_all_spaces_and_their_options() -> None:
    asked = given.ask(given.whole("sd", plain=True), keep=0.8)
    result = run(asked)
    for space in asked.spaces:  # the best of each by trying everything that is not dearer
        options = [option for (option,) in space.sites]
        for n in range(5):
            for some in itertools.combinations(options, n):
                if enough(space.base.saved + sum(o.saved for o in some), asked.need):
                    loss = given.added([(*space.base.cuts, *(cut for o in some for cut in o.cuts))])[0]
                    assert result.predicted is not None and result.predicted <= loss + 1e-12


def test_rounds_see_what_single_scores_do_not() -> None:
    """Two layers that stand in for each other: alone neither is missed, together they are."""

    def losses(options: Sequence[tuple[Cut, ...]]) -> list[float]:
        prices = {"twin": 0.1, "other twin": 0.11, "apart": 0.3, "dear": 0.9}
        found = []
        for cuts in options:
            gone = {cut.address for cut in cuts}
            found.append(sum(prices[name] for name in gone) + (5.0 if {"twin", "other twin"} <= gone else 0.0))
        return found

    saved = {"twin": 1.0, "other twin": 1.0, "apart": 1.0, "dear": 1.0}
    once, twice = run(task(saved, 2.0, losses)), run(task(saved, 2.0, losses), rounds=2)
    assert names(once) == {"twin", "other twin"} and once.predicted == pytest.approx(0.21)
    assert names(twice) == {"twin", "apart"} and twice.predicted == pytest.approx(0.4)
    assert twice.scores == once.scores  # those of the layers alone


def test_rounds_ask_only_for_what_may_still_be_chosen_and_give_back_what_is_not_needed() -> None:
    asked: list[tuple[str, ...]] = []

    def losses(options: Sequence[tuple[Cut, ...]]) -> list[float]:
        asked.extend(tuple(cut.address for cut in cuts) for cuts in options)
        return priced({"a": 0.1, "b": 2.0, "c": 9.0})(options)

    result = run(task({"a": 1.0, "b": 10.0, "c": 12.0}, 10.0, losses), rounds=10, additivity=0)
    assert asked == [("a",), ("b",), ("c",), ("a",), ("a", "b"), ("a", "c")]  # the rounds after the second had enough
    assert names(result) == {"b"} and result.predicted == pytest.approx(2.0)
    assert result.additivity is None


def test_rounds_go_on_in_the_space_that_is_best_for_the_whole_target() -> None:
    """For the first part alone a space without base is cheaper, but then the rest of the target is dear."""
    cheap, dear = Option((remove("cheap"),), 2.0), Option((remove("dear"),), 4.0)
    spaces = (Space(((cheap,), (dear,))), Space(((cheap,),), Option((remove("base"),), 3.0)))
    prices = {"cheap": 0.1, "dear": 9.0, "base": 1.0}
    for rounds in (1, 2, 7):
        result = run(task({}, 5.0, priced(prices), spaces), rounds=rounds)
        assert names(result) == {"base", "cheap"} and result.predicted == pytest.approx(1.1)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("solver", ["knapsack", "greedy"])
def test_what_breaks_the_output_is_never_cut(rounds: int, broken: float, solver: str) -> None:
    saved = {f"l{i}": 1.0 for i in range(6)}
    prices = {name: broken if name in ("l0", "l3") else 1.0 for name in saved}
    heard: list[str] = []
    the_task = task(saved, 4.0, priced(prices))
    said = Task(the_task.denoiser, (), the_task.spaces, 4.0, the_task.losses, say=heard.append)
    result = run(said, rounds=rounds, solver=solver)
    assert names(result) == {"l1", "l2", "l4", "l5"} and set(result.scores) == names(result)
    assert heard[0].startswith("2 of 6 cuts make the output infinite or NaN")
    assert result.additivity is not None and all(map(math.isfinite, (*result.additivity.sums, *result.additivity.losses)))
    with pytest.raises(UserError, match="too many cuts make the output infinite or NaN"):
        run(task(saved, 5.0, priced(prices)), rounds=rounds, solver=solver)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_together_with_what_is_cut_already_a_layer_may_break_the_output(broken: float) -> None:
    def losses(options: Sequence[tuple[Cut, ...]]) -> list[float]:
        return [
            broken if {"a", "b"} <= {c.address for c in cuts} else 1.0 * len(cuts) - 0.5 * (remove("a") in cuts)
            for cuts in options
        ]

    saved = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert names(run(task(saved, 2.0, losses), rounds=2)) == {"a", "c"}


def test_a_space_whose_base_breaks_the_output_is_left_out() -> None:
    spaces = tuple(Space(((Option((remove("x"),), 2.0),),), Option((remove(base),), 1.0)) for base in ("bad", "good"))
    prices = {"bad": math.inf, "good": 3.0, "x": 1.0}
    result = run(task({}, 3.0, priced(prices), spaces))
    assert names(result) == {"good", "x"} and result.predicted == 4.0
