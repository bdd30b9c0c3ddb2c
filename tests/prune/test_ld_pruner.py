"""LD-Pruner: the score on latents of known mean and spread, the order, the target, scoring again, what breaks them."""

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.prune import ld_pruner
from lissom.prune._task import Option, Pruned, Space, Task
from lissom.tests.prune import given
from torch import nn

Losses = Callable[[Sequence[tuple[Cut, ...]]], list[float]]


def remove(name: str) -> Cut:
    return Cut(address=name, what="remove")


def task(saved: dict[str, float], need: float, losses: Losses, spaces: tuple[Space, ...] = ()) -> Task:
    sites = tuple((Option((remove(name),), amount),) for name, amount in saved.items())
    return Task(nn.Module(), (), spaces or (Space(sites),), need, losses, say=lambda line: None)


def run(given_task: Task, **settings: object) -> Pruned:
    return ld_pruner.prune(given_task, ld_pruner.Config.model_validate(settings), random.Random(0))


def names(result: Pruned) -> list[str]:
    return [cut.address for cut in result.cuts]


def priced(prices: dict[str, float]) -> Losses:
    return lambda options: [sum(prices[cut.address] for cut in cuts) for cuts in options]


def latents(seed: int = 0, n: int = 6, shape: tuple[int, ...] = (4, 3, 5)) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4, 3, 5), (12, 7), (4, 2, 3, 3)])  # of pictures, packed, of videos
def test_a_shift_moves_the_mean_and_a_stretch_the_spread(shape: tuple[int, ...]) -> None:
    z, elements = latents(shape=shape), math.prod(shape)
    assert ld_pruner.measure(z, z) == 0.0
    assert ld_pruner.measure(z, z + 3.0) == pytest.approx(3.0 * math.sqrt(elements), rel=1e-5)
    centred = z - z.mean(0)
    spread = float(z.double().var(0, correction=0).sqrt().norm())  # the population's
    assert ld_pruner.measure(centred, 3.0 * centred) == pytest.approx(2.0 * spread, rel=1e-5)
    assert ld_pruner.measure(centred, 3.0 * centred + 1.0) == pytest.approx(2.0 * spread + math.sqrt(elements), rel=1e-5)


def test_by_hand() -> None:
    original = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # mean (2, 0), spread (1, 0)
    modified = torch.tensor([[5.0, 2.0], [5.0, -6.0]])  # mean (5, -2), spread (0, 4)
    assert ld_pruner.measure(original, modified) == pytest.approx(math.sqrt(9 + 4) + math.sqrt(1 + 16))


def test_it_compares_sets_and_not_pairs() -> None:
    z, other = latents(), latents(1)
    assert ld_pruner.measure(z, z.flip(0)) == pytest.approx(0.0, abs=1e-12)
    assert ld_pruner.measure(z, other) == pytest.approx(ld_pruner.measure(other, z))
    assert ld_pruner.measure(z.half(), other.half()) == pytest.approx(ld_pruner.measure(z, other), rel=1e-2)
    assert not math.isfinite(ld_pruner.measure(z, z / 0))


def test_the_lowest_scores_go_first_whatever_they_save() -> None:
    prices = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 9.0}
    saved = {"a": 50.0, "b": 1.0, "c": 2.0, "d": 1.0}
    assert names(run(task(saved, 3.0, priced(prices)))) == ["b", "c"]
    result = run(task(saved, 3.5, priced(prices)))
    assert names(result) == ["a"] and result.scores == prices  # b and c came first, and are not needed beside it
    assert result.predicted is None and result.label == "latent mean and spread"
    assert run(task(saved, 0.0, priced(prices))).cuts == ()


def test_per_saved_unit_a_large_layer_goes_before_a_small_one() -> None:
    prices, saved = {"small": 1.0, "large": 6.0, "dear": 9.0}, {"small": 1.0, "large": 9.0, "dear": 10.0}
    assert names(run(task(saved, 1.0, priced(prices)))) == ["small"]
    assert names(run(task(saved, 1.0, priced(prices)), rank="score_per_saved")) == ["large"]


def twins(options: Sequence[tuple[Cut, ...]]) -> list[float]:
    """Two layers that stand in for each other: alone neither is missed, together they are."""
    prices = {"twin": 0.1, "other twin": 0.11, "apart": 0.3, "dear": 0.9}
    gone = [{cut.address for cut in cuts} for cuts in options]
    return [sum(prices[name] for name in one) + (5.0 if {"twin", "other twin"} <= one else 0.0) for one in gone]


def test_scoring_again_sees_what_single_scores_do_not() -> None:
    saved = {"twin": 1.0, "other twin": 1.0, "apart": 1.0, "dear": 1.0}
    once = run(task(saved, 2.0, twins))
    assert names(once) == ["twin", "other twin"]
    for settings, wanted in (
        ({"rescore": 1}, ["twin", "apart"]),
        ({"rescore": 1, "rank": "score_per_saved"}, ["twin", "apart"]),
        ({"rescore": 2}, ["twin", "other twin"]),  # both had gone before the first look
    ):
        result = run(task(saved, 2.0, twins), **settings)
        assert names(result) == wanted and result.scores == once.scores  # those of the layers alone


def test_what_is_scored_again_are_the_layers_left_on_top_of_those_taken() -> None:
    asked: list[tuple[str, ...]] = []

    def losses(options: Sequence[tuple[Cut, ...]]) -> list[float]:
        asked.extend(tuple(cut.address for cut in cuts) for cuts in options)
        return priced({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5})(options)

    saved = dict.fromkeys("abcde", 1.0)
    assert names(run(task(saved, 4.0, losses), rescore=2)) == ["a", "b", "c", "d"]
    assert asked == [("a",), ("b",), ("c",), ("d",), ("e",), ("a", "b", "c"), ("a", "b", "d"), ("a", "b", "e")]
    asked.clear()
    run(task(saved, 2.0, losses), rescore=2)  # enough before the second look
    assert len(asked) == 5


@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("rescore", [0, 1, 3])
def test_what_breaks_the_latents_is_never_cut(broken: float, rescore: int) -> None:
    prices = {f"l{i}": broken if i in (0, 3) else 1.0 + i for i in range(6)}
    heard: list[str] = []
    plain = task(dict.fromkeys(prices, 1.0), 4.0, priced(prices))
    said = Task(plain.denoiser, (), plain.spaces, 4.0, plain.losses, say=heard.append)
    result = run(said, rescore=rescore)
    assert names(result) == ["l1", "l2", "l4", "l5"] and set(result.scores) == set(names(result))
    assert heard[0].startswith("2 of 6 cuts make the latents infinite or NaN")
    with pytest.raises(UserError, match="ld_pruner: too many cuts make the output infinite or NaN"):
        run(task(dict.fromkeys(prices, 1.0), 5.0, priced(prices)), rescore=rescore)


def test_together_with_what_is_taken_a_layer_may_break_the_latents() -> None:
    def losses(options: Sequence[tuple[Cut, ...]]) -> list[float]:
        gone = [{cut.address for cut in cuts} for cuts in options]
        return [math.nan if {"a", "b"} <= one else float(len(one)) - 0.5 * ("a" in one) for one in gone]

    assert names(run(task({"a": 1.0, "b": 1.0, "c": 1.0}, 2.0, losses), rescore=1)) == ["a", "c"]


def test_of_several_spaces_the_one_with_the_least_sum_of_scores() -> None:
    cheap, dear = Option((remove("cheap"),), 2.0), Option((remove("dear"),), 4.0)
    spaces = (Space(((cheap,), (dear,))), Space(((cheap,),), Option((remove("base"),), 3.0)))
    prices = {"cheap": 0.1, "dear": 9.0, "base": 1.0}
    for rescore in (0, 1):
        assert names(run(task({}, 5.0, priced(prices), spaces), rescore=rescore)) == ["base", "cheap"]
    broken = prices | {"base": math.inf}
    assert names(run(task({}, 5.0, priced(broken), spaces))) == ["cheap", "dear"]


@pytest.mark.parametrize("rescore", [1, 4])
@pytest.mark.parametrize("plain", [False, True])
def test_where_scores_add_up_looking_again_changes_nothing(plain: bool, rescore: int) -> None:
    asked = given.ask(given.whole("sd", plain), keep=0.7)
    assert set(run(asked, rescore=rescore).cuts) == set(run(asked).cuts)
