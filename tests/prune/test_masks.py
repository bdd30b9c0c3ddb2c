"""Learned masks: the target that gates keep, what is cut, and how learning goes on or fails."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.widths import Width
from lissom.prune import _hard_concrete, masks
from lissom.prune._task import Pruned, Task
from lissom.tests.prune.test_tinyfusion import _bytes

HEADS, UNITS = Width("attn", "keep_heads", 4, 1), Width("ff", "keep_units", 12, 1)
PRICE = {"keep_heads": 30.0, "keep_units": 4.0}  # of one


class Killed(Exception):
    pass


class Made:
    """A Lesson: every head and unit that is masked costs what it is worth."""

    device = "cpu"
    folder = Path("run")
    chunk, by_block = 64, False

    def __init__(self, worth: Mapping[str, Sequence[float]], broken: Callable[[int], bool] = lambda call: False) -> None:
        self.worth = {address: torch.tensor(values) for address, values in worth.items()}
        self.broken, self.state, self.kept, self.facts = broken, None, dict[str, torch.Tensor](), dict[str, Any]()
        self.asked: list[list[int]] = []
        self.seen: list[dict[str, torch.Tensor]] = []
        self.given: dict[str, torch.Tensor] = {}
        self.steps: list[bool] = []
        self.kill_at = math.inf

    def distance(self, positions: Sequence[int], given: Mapping[str, tuple[str, torch.Tensor]]) -> torch.Tensor:
        self.asked.append(list(positions))
        self.seen.append({address: factors.detach().clone() for address, (_, factors) in given.items()})
        total = sum((self.worth[address] * (1 - factors) ** 2).sum() for address, (_, factors) in given.items())
        assert isinstance(total, torch.Tensor)
        return total * math.nan if self.broken(len(self.asked)) else total

    def fitting(self, run: Callable[[], float]) -> float:
        return run()

    def read(self, path: str) -> dict[str, torch.Tensor]:
        return self.given

    def load(self) -> Any:
        return self.state

    def save(self, state: Any) -> None:
        self.state = torch.load(_bytes(state), weights_only=True)

    def keep(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        self.kept, self.facts = {k: v.detach().clone() for k, v in tensors.items()}, dict(facts)

    def began(self, iterations: int) -> None: ...

    def advance(self, note: str, *, fresh: bool = True) -> None:
        self.steps.append(fresh)
        if sum(self.steps) >= self.kill_at:
            raise Killed


WORTH = {"attn": [9.0, 0.01, 9.0, 0.01], "ff": [0.01 if i % 3 else 5.0 for i in range(12)]}


def saves(cuts: tuple[Cut, ...]) -> float:
    widths = {"attn": HEADS, "ff": UNITS}
    return sum(PRICE[c.what] * (widths[c.address].count - len(c.value)) for c in cuts if isinstance(c.value, tuple))


def learned(lesson: Made, need: float = 60.0, seed: int = 0, widths: Any = (HEADS, UNITS), **settings: Any) -> Pruned:
    made: Any = lambda: lesson
    task = Task(torch.nn.Linear(1, 1), (), (), need, lambda options: [], widths=widths, saves=saves, lesson=made)
    return masks.prune(task, masks.Config(**{"iterations": 80, "batch": 2, **settings}), random.Random(seed))


def stay(found: Pruned) -> dict[str, Any]:
    return {cut.address: cut.value for cut in found.cuts}


def test_what_is_worth_little_goes_and_the_target_is_met_within_one_unit() -> None:
    lesson = Made(WORTH)
    found = learned(lesson, need=84.0)
    assert saves(found.cuts) >= 84.0 and saves(found.cuts) - 84.0 < max(PRICE.values())
    gone = {a: set(range(n)) - set(stay(found).get(a, range(n))) for a, n in (("attn", 4), ("ff", 12))}
    assert gone["attn"] <= {1, 3} and gone["ff"] <= {i for i in range(12) if i % 3} and gone["attn"]
    assert lesson.kept.keys() == {"attn keep_heads", "ff keep_units"} and lesson.facts["widths"][0] == [
        "attn",
        "keep_heads",
        4,
        1,
    ]


def test_in_every_step_gates_save_what_the_target_asks_for() -> None:
    """On average over the draws: while it rises and then, whatever the distance pulls to; and so does what is kept."""
    lesson = Made(WORTH)
    learned(lesson, need=84.0, iterations=400, settle=0.0, ramp=0.5, rate=0.05)
    saved = [30.0 * float((one["attn"] == 0).sum()) + 4.0 * float((one["ff"] == 0).sum()) for one in lesson.seen]
    rising, there = saved[:200], saved[200:]
    assert sum(rising) / 200 == pytest.approx(42.0, rel=0.15) and sum(there) / 200 == pytest.approx(84.0, rel=0.1)
    assert sum(rising[:50]) / 50 == pytest.approx(10.5, abs=7)
    closed = sum(
        PRICE[what] * float((1 - _hard_concrete.alive(lesson.kept[name], 1e-8)).sum())
        for name, what in (("attn keep_heads", "keep_heads"), ("ff keep_units", "keep_units"))
    )
    assert closed == pytest.approx(84.0, rel=1e-4)


@pytest.mark.parametrize(("settle", "shares"), [(0.0, [1.0] * 8), (0.5, [1.0] * 5 + [0.75, 0.5, 0.25])])
def test_in_the_last_part_the_rate_falls_to_nothing(
    settle: float, shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a killed run goes on."""
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    lesson = Made(WORTH)
    lesson.kill_at = 6
    with pytest.raises(Killed):
        learned(lesson, iterations=8, settle=settle, rate=0.2)
    lesson.kill_at, lesson.steps = math.inf, []
    learned(lesson, iterations=8, settle=settle, rate=0.2)
    again = lesson.steps.count(False)
    assert rates == pytest.approx([0.2 * share for share in [*shares[:6], *shares[again:]]]) and again == 5


def test_the_last_part_learns_with_the_gates_that_will_be_cut() -> None:
    lesson = Made(WORTH)
    found = learned(lesson, settle=0.25)
    assert all(set(factors.unique().tolist()) <= {0.0, 1.0} for one in lesson.seen[-20:] for factors in one.values())
    assert any(set(factors.unique().tolist()) - {0.0, 1.0} for one in lesson.seen[:60] for factors in one.values())
    open_ones = {a: tuple(i for i, f in enumerate(lesson.seen[-1][a].tolist()) if f) for a in ("attn", "ff")}
    assert {a: stay(found).get(a, tuple(range(n))) for a, n in (("attn", 4), ("ff", 12))} == open_ones


def test_one_structure_is_drawn_for_each_step_and_trajectories_take_turns() -> None:
    lesson = Made(WORTH)
    learned(lesson, iterations=3, settle=0.0)
    assert lesson.asked == [[0, 1], [2, 3], [4, 5]]
    assert len({tuple(one["ff"].tolist()) for one in lesson.seen}) == 3


def test_all_layers_are_ranked_together_negative_gates_too() -> None:
    scores = {HEADS: [-5.0, -1.0, -4.0, -3.0], UNITS: [-2.0] * 6 + [-6.0] * 6}
    task = Task(torch.nn.Linear(1, 1), (), (), 24.0, lambda options: [], widths=(HEADS, UNITS), saves=saves)
    assert stay_of(masks.chosen(task, (HEADS, UNITS), scores, masks.Config())) == {"ff": (0, 1, 2, 3, 4, 5)}
    more = Task(torch.nn.Linear(1, 1), (), (), 25.0, lambda options: [], widths=(HEADS, UNITS), saves=saves)
    assert stay_of(masks.chosen(more, (HEADS, UNITS), scores, masks.Config())) == {"attn": (1, 2, 3), "ff": (0, 1, 2, 3, 4, 5)}


def stay_of(cuts: tuple[Cut, ...]) -> dict[str, Any]:
    return {cut.address: cut.value for cut in cuts}


@pytest.mark.parametrize(("settings", "least"), [({"round_to": 4}, 4), ({"least": 0.5}, 6), ({}, 1)])
def test_what_stays_is_rounded_and_never_nothing(settings: dict[str, Any], least: int) -> None:
    wide = Width("ff", "keep_units", 12, 1)
    task = Task(torch.nn.Linear(1, 1), (), (), 20.0, lambda options: [], widths=(wide,), saves=saves)
    for need in (4.0, 17.0, 24.0):
        made = Task(task.denoiser, (), (), need, task.losses, widths=(wide,), saves=saves)
        (cut,) = masks.chosen(made, (wide,), {wide: [float(i) for i in range(12)]}, masks.Config(**settings))
        assert isinstance(cut.value, tuple) and len(cut.value) >= least and saves((cut,)) >= need
        assert len(cut.value) % settings.get("round_to", 1) == 0 and cut.value == tuple(range(12 - len(cut.value), 12))


def test_a_target_beyond_what_may_go_is_refused_before_anything_is_learned() -> None:
    lesson = Made(WORTH)
    with pytest.raises(UserError, match=r"masks: with what=units, least=0\.5 and round_to=1 only 24% of what has to go can go"):
        learned(lesson, need=100.0, widths=(UNITS,), what=("units",), least=0.5)
    assert not lesson.asked


def test_gates_of_an_earlier_run_are_cut_at_another_ratio_without_learning() -> None:
    first, again = Made(WORTH), Made(WORTH)
    learned(first, need=40.0)
    again.given = first.kept
    found = learned(again, need=90.0, gates="runs/earlier")
    assert not again.asked and saves(found.cuts) >= 90.0
    again.given = {"attn keep_heads": torch.zeros(3)}
    with pytest.raises(UserError, match="attn has 4 heads to choose from and 3 gates in the file"):
        learned(again, gates="runs/earlier")
    again.given = {}
    with pytest.raises(UserError, match="attn has 4 heads to choose from and no gates in the file"):
        learned(again, gates="runs/earlier")


def test_a_killed_run_goes_on_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)
    straight, killed = Made(WORTH), Made(WORTH)
    learned(straight, iterations=20)
    killed.kill_at = 12
    with pytest.raises(Killed):
        learned(killed, iterations=20)
    killed.kill_at, killed.steps = math.inf, []
    found = learned(killed, iterations=20)
    assert all(torch.equal(killed.kept[k], v) for k, v in straight.kept.items()) and killed.steps.count(False) >= 10
    assert found.cuts == learned(Made(WORTH), iterations=20).cuts


def test_a_nan_goes_back_once_and_then_says_so() -> None:
    assert learned(Made(WORTH, broken=lambda call: call == 7)).cuts
    with pytest.raises(UserError, match="NaN or infinite in step 1, for the second time"):
        learned(Made(WORTH, broken=lambda call: call >= 7))


def test_gates_that_stay_half_open_are_said() -> None:
    found = learned(Made(WORTH), need=30.0, iterations=1)
    assert "16 of 16 gates are half open" in found.warnings[0]


def test_channels_go_by_groups() -> None:
    width = Width("resnet", "keep_channels", 8, 4)
    factors = masks.masks({width: torch.tensor([0.0, 0.5])})["resnet"]
    assert factors[0] == "keep_channels" and factors[1].tolist() == [0.0] * 4 + [0.5] * 4
