"""Learned masks on real denoisers: the ranking, the target to within one unit, how many shapes; and gates that collapse."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.widths import Width
from lissom.prune import _hard_concrete, masks
from lissom.prune._hard_concrete import alive
from lissom.prune._task import Pruned, Task
from lissom.tests.prune import given
from lissom.tests.prune.test_masks import PRICE, WORTH, Killed, Made, learned, saves

SHARES = {"sd": 0.08, "dit": 0.05, "sd3": 0.4, "flux": 0.3, "zoo:fashion": 0.12}  # of the parameters that go


def asked(name: str, of: str = "params", share: float | None = None) -> Task:
    job = given.job(name, "masks", keep=round(1 - (share or SHARES[name]), 4), of=of)
    return given.ask(job)


def negative(task: Task, seed: int, shift: float = -6.0) -> dict[Width, list[float]]:
    """Gates most of which are below the zero of the gate without noise: a clamp there would make ties of them."""
    drawn = random.Random(seed)
    return {w: [drawn.gauss(shift, 2) for _ in w.groups] for w in task.widths}


def counts(cuts: tuple[Cut, ...]) -> dict[tuple[str, str], set[int]]:
    return {(c.address, c.what): set(c.value) for c in cuts if isinstance(c.value, tuple)}


def price(task: Task, w: Width) -> float:
    """What one group of a width saves."""
    stay = tuple(i for group in w.groups[1:] for i in group)
    return task.saves((Cut.model_validate({"address": w.address, "what": w.what, "value": stay}),))


@pytest.mark.parametrize(("name", "of"), [*((name, "params") for name in SHARES), ("dit", "macs"), ("sd3", "macs")])
def test_the_target_is_met_within_one_unit_and_the_least_open_gates_go(name: str, of: str) -> None:
    """5.5, item 10: whatever the sign; only the last one of a layer stays out of its turn."""
    task = asked(name, of)
    for seed in range(2):
        scores = negative(task, seed)
        cuts = masks.chosen(task, task.widths, scores, masks.Config())
        saved = task.saves(cuts)
        assert 0 <= saved - task.need < max(price(task, w) for w in task.widths)
        left = counts(cuts)
        gone, kept = list[float](), list[float]()
        for w in task.widths:
            stay = left.get((w.address, w.what), set(range(w.count)))
            shut = [k for k, group in enumerate(w.groups) if not set(group) <= stay]
            gone += [scores[w][k] for k in shut]
            if len(shut) < len(w.groups) - 1:
                kept += [scores[w][k] for k in range(len(w.groups)) if k not in shut]
        assert gone and max(gone) < min(kept)
        moved = {w: [100 + value for value in values] for w, values in scores.items()}
        assert masks.chosen(task, task.widths, moved, masks.Config()) == cuts  # only the order counts


@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_equal_gates_are_cut_as_far_as_is_asked_for_and_no_further(shift: float) -> None:
    """All shut or all open: no gate says anything, and yet the model has the size that was asked for, no layer is empty."""
    task = asked("sd3")
    scores = {w: [shift] * len(w.groups) for w in task.widths}
    cuts = masks.chosen(task, task.widths, scores, masks.Config())
    assert 0 <= task.saves(cuts) - task.need < max(price(task, w) for w in task.widths)
    assert all(counts(cuts).values())


class Given:
    """A Lesson whose gates were learned before."""

    device, folder = "cpu", "run"

    def __init__(self, gates: Mapping[str, torch.Tensor]) -> None:
        self.gates, self.kept = dict(gates), dict[str, torch.Tensor]()

    def read(self, path: str) -> dict[str, torch.Tensor]:
        return self.gates

    def keep(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        self.kept = dict(tensors)


def shapes(task: Task, cuts: tuple[Cut, ...]) -> int:
    left = {at: len(stay) for at, stay in counts(cuts).items()}
    blocks: dict[str, list[int]] = {}
    for w in task.widths:
        blocks.setdefault(w.address.rpartition(".")[0], []).append(left.get((w.address, w.what), w.count))
    return len(set(map(tuple, blocks.values())))


def test_more_than_eight_widths_in_a_class_are_warned_of_and_eight_are_not() -> None:
    """5.5, item 12, of what the method itself answers."""
    task = asked("zoo:fashion-dit", share=0.1)
    lesson = Given({masks.name(w): torch.tensor(values) for w, values in negative(task, 0, 0.0).items()})
    made: Any = lambda: lesson
    ready: Any = replace(task, lesson=made)

    def prune(**settings: Any) -> Pruned:
        return masks.prune(ready, masks.Config(gates="earlier", **settings), random.Random(0))

    free = prune()
    assert shapes(task, free.cuts) > 8
    (said,) = [one for one in free.warnings if "different widths" in one]
    assert f"BasicTransformerBlocks come in {shapes(task, free.cuts)} different widths" in said and "shapes=8" in said
    few = prune(shapes=8)
    assert shapes(task, few.cuts) <= 8 and not any("different widths" in one for one in few.warnings)
    assert task.saves(few.cuts) >= task.need * (1 - 1e-9)


def test_what_is_closed_rises_with_the_target_and_never_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the first part a share of it, then all of it, in the last part too."""
    asked, real = list[float](), _hard_concrete.shift

    def watched(logits: Any, prices: Any, target: float, delta: float) -> torch.Tensor:
        asked.append(target)
        return real(logits, prices, target, delta)

    monkeypatch.setattr(_hard_concrete, "shift", watched)
    learned(Made(WORTH), need=84.0, iterations=20, ramp=0.5, settle=0.25)
    assert asked == pytest.approx([8.4 * (k + 1) for k in range(10)] + [84.0] * 11)


def test_gates_that_cost_alike_compete_by_what_they_are_worth() -> None:
    """Every unit is worth something, and still the target's share of them closes: those that are worth least."""
    lesson = Made({"ff": [1.0 + i for i in range(12)]})
    width = Width("ff", "keep_units", 12, 1)
    found = learned(lesson, need=24.0, iterations=200, widths=(width,), rate=0.05, delta=0.5)
    (cut,) = found.cuts
    gates = lesson.kept["ff keep_units"]
    assert set(cut.value) >= set(range(8, 12)) and gates[-4:].min() > 0 > gates[:4].max()  # type: ignore[arg-type]


@pytest.mark.parametrize("need", [20.0, 40.0])
def test_gates_that_are_all_half_open_are_cut_to_the_target_with_a_warning(need: float) -> None:
    lesson = Made({address: [0.0] * len(values) for address, values in WORTH.items()})
    found = learned(lesson, need=need, iterations=1, rate=1e-3)
    assert "16 of 16 gates are half open: learn for longer" in found.warnings[0]
    assert 0 <= saves(found.cuts) - need < 30.0 and lesson.kept.keys() == {"attn keep_heads", "ff keep_units"}


@pytest.mark.parametrize(("step", "at"), [(1, 0), (5, 4)])
def test_after_a_nan_the_state_is_the_last_good_one(step: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds finite gates of the step before, not of the one that failed, and no gates are handed on."""
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)
    lesson = Made(WORTH, broken=lambda call: call >= step)
    with pytest.raises(
        UserError, match=rf"NaN or infinite in step {step}, for the second time.*kept in run.*Lower the learning"
    ):
        learned(lesson, iterations=10)
    assert lesson.state is not None and lesson.state["at"] == at and not lesson.kept
    good = Made(WORTH)
    good.kill_at = at + 1  # in the step after the last one that was saved
    with pytest.raises(Killed):
        learned(good, iterations=10)
    assert good.state is not None and good.state["at"] == at
    for which in ("named", "average"):
        assert all(bool(one.isfinite().all()) for one in lesson.state[which].values())
        assert all(torch.equal(one, good.state[which][name]) for name, one in lesson.state[which].items())


def test_a_nan_takes_back_all_that_was_not_saved_yet() -> None:
    """Within the minute between two saves: to the beginning, with other noise; gates and trajectories."""
    lesson = Made(WORTH, broken=lambda call: call in (5, 6))
    with pytest.raises(UserError, match="NaN or infinite in step 1, for the second time"):
        learned(lesson, iterations=10)
    assert lesson.asked[3:] == [[6, 7], [8, 9], [0, 1]] and lesson.state is not None
    assert (lesson.state["at"], lesson.state["salt"], lesson.state["restarts"]) == (0, 1, 1)
    for which in ("named", "average"):
        for name, one in lesson.state[which].items():
            assert not one.any(), name
    once = Made(WORTH, broken=lambda call: call == 5)
    assert learned(once, iterations=10).cuts and once.asked[4:6] == [[8, 9], [0, 1]] and len(once.asked) == 15
    first, second = once.seen[0], once.seen[5]
    assert not torch.equal(first["ff"], second["ff"])


class Steep(Made):
    """A distance that is a number, with a gradient that is none."""

    def distance(self, positions: Any, given: Any) -> torch.Tensor:
        found = super().distance(positions, given)
        factors = next(iter(given.values()))[1]
        return found + (factors.sum() - factors.sum().detach()).abs().sqrt()  # infinite slope at zero


def test_a_gradient_that_is_not_finite_ends_the_same_way() -> None:
    lesson = Steep(WORTH)
    with pytest.raises(UserError, match=r"NaN or infinite in step \d, for the second time"):
        learned(lesson, iterations=10)
    assert lesson.state is not None and all(bool(one.isfinite().all()) for one in lesson.state["named"].values())
    assert all(math.isfinite(float(one.mean())) for one in lesson.state["average"].values())


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0])
def test_gates_keep_the_target_at_the_published_ends_of_the_noise(delta: float) -> None:
    """What is handed on exactly, what was drawn on average."""
    lesson = Made(WORTH)
    learned(lesson, need=84.0, iterations=300, settle=0.0, delta=delta)
    kinds = (("attn keep_heads", "keep_heads"), ("ff keep_units", "keep_units"))
    shut = sum(PRICE[what] * float((1 - alive(lesson.kept[name], delta)).sum()) for name, what in kinds)
    assert shut == pytest.approx(84.0, rel=1e-4)
    drawn = [30.0 * float((one["attn"] == 0).sum()) + 4.0 * float((one["ff"] == 0).sum()) for one in lesson.seen[150:]]
    assert sum(drawn) / 150 == pytest.approx(84.0, rel=0.12)


@pytest.mark.parametrize("need", [0.5, 134.0])
def test_gates_that_never_moved_are_warned_of(need: float) -> None:
    """Not half open, but all wide or all shut, as the target has it."""
    (said,) = learned(Made(WORTH), need=need, iterations=20, settle=0.0, rate=1e-6).warnings
    assert said.startswith("the gates hardly differ, so that what goes is hardly chosen")
    assert not learned(Made(WORTH), need=84.0, iterations=80, rate=0.3).warnings
