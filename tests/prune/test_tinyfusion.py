"""Learning which blocks stay: it finds the structure that the answers come from, goes on where it was killed, and says when it fails."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import surgery
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.prune import tinyfusion
from lissom.prune._task import Option, Pruned, Space, Task
from lissom.tests.prune.given import DENOISERS
from lissom.workflow._gauge import Gauge

QUICK: dict[str, Any] = {
    "structure": "1:2", "iterations": 60, "batch": 8, "update": "none", "gate_rate": 0.01, "ema": 0.8, "rank": 2,
}  # fmt: skip


class Killed(Exception):
    pass


class Made:
    """A Lesson: made-up samples whose answers come from the model without some blocks."""

    device = "cpu"
    chunk, by_block = 64, False

    def __init__(
        self, denoiser: Any, hidden: Sequence[int], broken: Callable[[int, int], bool] = lambda at, salt: False
    ) -> None:
        self.denoiser, self.cuts, self.broken = (
            denoiser,
            [Cut(address=f"transformer_blocks.{i}", what="remove") for i in hidden],
            broken,
        )
        self.gauge = Gauge(denoiser, latent=None)
        self.state: dict[str, Any] | None = None
        self.kept: dict[str, torch.Tensor] = {}
        self.facts: Mapping[str, Any] = {}
        self.steps: list[bool] = []
        self.kill_at = math.inf
        self.folder = Path("run")

    def samples(self, positions: Sequence[int], salt: int) -> tuple[dict[str, Any], torch.Tensor]:
        kwargs = self.gauge.example(len(positions), "cpu", torch.float32)
        drawn = torch.Generator().manual_seed(1000 * salt + positions[0])
        kwargs["hidden_states"] = torch.randn(kwargs["hidden_states"].shape, generator=drawn)
        answer: Any
        if self.broken(positions[0], salt):
            return kwargs, torch.full_like(kwargs["hidden_states"], math.nan)
        with torch.no_grad(), Whole(self.denoiser), surgery.applied(self.denoiser, self.cuts):
            answer = self.denoiser(**kwargs, return_dict=False)[0]
        return kwargs, answer

    def fitting(self, run: Callable[[], float]) -> float:
        return run()

    def load(self) -> dict[str, Any] | None:
        return self.state

    def save(self, state: dict[str, Any]) -> None:
        self.state = torch.load(_bytes(state), weights_only=True)  # what a file gives back

    def keep(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        self.kept, self.facts = dict(tensors), facts

    def began(self, iterations: int) -> None: ...

    def advance(self, note: str, *, fresh: bool = True) -> None:
        self.steps.append(fresh)
        if sum(self.steps) >= self.kill_at:
            raise Killed


class Whole:
    """Inside, the denoiser without the hooks of gates: the answers are not masked."""

    def __init__(self, denoiser: Any) -> None:
        self.blocks = list(denoiser.transformer_blocks)

    def __enter__(self) -> None:
        self.hooks = [(b._forward_hooks.copy(), b._forward_hooks_with_kwargs.copy()) for b in self.blocks]
        for b in self.blocks:
            b._forward_hooks.clear()

    def __exit__(self, *_: object) -> None:
        for b, (hooks, _kwargs) in zip(self.blocks, self.hooks, strict=True):
            b._forward_hooks.update(hooks)


def _bytes(state: Any) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


class Block:
    def __init__(self, address: str) -> None:
        self.address = address


def learned(lesson: Made, seed: int = 0, **settings: Any) -> Pruned:
    addresses = [f"transformer_blocks.{i}" for i in range(4)]
    sites = tuple((Option((Cut(address=a, what="remove"),), 1.0),) for a in addresses)
    blocks: Any = tuple(map(Block, addresses))
    given: Any = lambda: lesson
    task = Task(lesson.denoiser, blocks, (Space(sites),), 0.0, lambda options: [], lesson=given)
    return tinyfusion.prune(task, tinyfusion.Config(**{**QUICK, **settings}), random.Random(seed))


def gone(pruned: Pruned) -> list[int]:
    return sorted(int(cut.address.rpartition(".")[2]) for cut in pruned.cuts)


def model() -> Any:
    """Random blocks that do something: in a fresh one adaLN scales them by almost nothing."""
    denoiser = DENOISERS["dit, trained"]()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return denoiser


@pytest.mark.parametrize("hidden", [(0, 3), (1, 2)])
@pytest.mark.parametrize(
    "settings", [{}, {"update": "lora"}, {"noise": False}, {"structure": "2:4", "iterations": 100}], ids=str
)
def test_it_finds_the_structure_that_the_answers_come_from(hidden: tuple[int, int], settings: dict[str, Any]) -> None:
    lesson = Made(model(), hidden)
    before = {name: p.clone() for name, p in lesson.denoiser.named_parameters()}
    found = learned(lesson, **settings)
    assert gone(found) == list(hidden)
    assert all(found.scores[f"transformer_blocks.{i}"] < 0.5 for i in hidden) and sum(found.scores.values()) == pytest.approx(
        2.0
    )
    assert all(torch.equal(p, before[name]) for name, p in lesson.denoiser.named_parameters())
    assert len(lesson.facts["groups"]) == len(lesson.kept)


@pytest.mark.parametrize("update", ["none", "lora", "full"])
def test_a_killed_search_goes_on_exactly(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)
    settings = {"update": update, "iterations": 12}
    straight = Made(model(), (0, 3))
    learned(straight, **settings)
    killed = Made(model(), (0, 3))
    killed.kill_at = 5
    with pytest.raises(Killed):
        learned(killed, **settings)
    assert killed.state is not None and killed.state["at"] < 12
    killed.kill_at, killed.steps = math.inf, []
    learned(killed, **settings)
    assert all(torch.equal(killed.kept[name], tensor) for name, tensor in straight.kept.items())
    assert killed.steps.count(False) == 4


def test_a_nan_goes_back_once_with_other_noise() -> None:
    lesson = Made(model(), (0, 3), broken=lambda at, salt: at == 8 * 5 and salt == 0)
    found = learned(lesson)
    assert gone(found) == [0, 3] and lesson.state is not None and lesson.state["restarts"] == 1


def test_a_second_nan_ends_with_a_sentence_and_the_last_good_state() -> None:
    lesson = Made(model(), (0, 3), broken=lambda at, salt: at >= 8 * 5)
    with pytest.raises(UserError, match=r"NaN or infinite in step 6, for the second time.*Lower the learning rates"):
        learned(lesson)
    assert lesson.state is not None and all(bool(torch.isfinite(g).all()) for g in lesson.state["average"].values())


def test_undecided_groups_are_said() -> None:
    found = learned(Made(model(), (0, 3)), structure="2:4", iterations=1)
    assert "1 of 1 groups are undecided" in found.warnings[0]


def test_a_seed_decides_the_draws() -> None:
    one, again, other = (Made(model(), (0, 3)) for _ in range(3))
    for lesson, seed in ((one, 0), (again, 0), (other, 1)):
        learned(lesson, seed, iterations=5)
    assert torch.equal(one.kept["group 0"], again.kept["group 0"]) and not torch.equal(
        one.kept["group 0"], other.kept["group 0"]
    )
