"""Shared prefixes: the same bits as a cold run, fewer calls, and never a stale answer."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import Memo, Run, follow
from lissom.core.driving.memo import BLIND_TO_LENGTH
from lissom.tests.core import tiny

FIRST = (901.0, 640.0, 333.0, 120.0, 17.0)
SECOND = (901.0, 640.0, 333.0, 90.0, 5.0)  # three leading steps in common
SKIPS = {"sd": "mid_block.attentions.0", "dit": "transformer_blocks.1", "ddim": "mid_block.attentions.0"}


def plan(scheduler: Any, times: tuple[float, ...], skips: dict[int, str] | None = None) -> SamplingPlan:
    skips = skips or {}
    steps = tuple(Step(timestep=t, skip=(skips[i],) if i in skips else ()) for i, t in enumerate(times))
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)


def run(family: str, plan: SamplingPlan, memo: Memo | None = None, first_seed: int = 0, **changes: Any) -> Run:
    pipe = tiny.shared(family)
    with follow(pipe, plan, memo=memo, context="test") as state:
        pipe(**(tiny.FAMILIES[family][1](2) | changes), generator=tiny.generators(2, first_seed))
    return state


CASES: dict[str, tuple[str, Any]] = {
    **{family: (family, None) for family in tiny.FAMILIES if family != "ddpm"},
    "ddpm": ("ddpm", None),
    "sd euler": ("sd", EulerDiscreteScheduler(**tiny.SD_BETAS)),
    "sd dpm++ 2M": ("sd", DPMSolverMultistepScheduler(**tiny.SD_BETAS)),
    "sd dpm++ sde": ("sd", DPMSolverMultistepScheduler(**tiny.SD_BETAS, algorithm_type="sde-dpmsolver++")),
    "sd plms": ("sd", PNDMScheduler(**tiny.SD_BETAS, skip_prk_steps=True, steps_offset=1)),
    "sd heun": ("sd", HeunDiscreteScheduler(**tiny.SD_BETAS)),
    "sd unipc": ("sd", UniPCMultistepScheduler(**tiny.SD_BETAS)),
    "sd deis": ("sd", DEISMultistepScheduler(**tiny.SD_BETAS)),
    "sd lms": ("sd", LMSDiscreteScheduler(**tiny.SD_BETAS)),
    "sd euler ancestral": ("sd", EulerAncestralDiscreteScheduler(**tiny.SD_BETAS)),
    "sd lcm": ("sd", LCMScheduler(**tiny.SD_BETAS)),
    "sd ddpm": ("sd", DDPMScheduler(**tiny.SD_BETAS, clip_sample=False)),
    "dit plms": ("dit", PNDMScheduler(skip_prk_steps=True)),
    "sd3 heun": ("sd3", FlowMatchHeunDiscreteScheduler()),
    "sd3 unipc": ("sd3", UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")),
}
# Of the second plan: denoiser calls in all, and those at the three leading timesteps, which it has in common with the first.
CALLS = {PNDMScheduler: (6, 4), HeunDiscreteScheduler: (9, 5), FlowMatchHeunDiscreteScheduler: (9, 5)}


@pytest.mark.parametrize("case", CASES)
def test_warm_equals_cold(case: str) -> None:
    family, scheduler = CASES[case]
    scheduler = scheduler or tiny.shared(family).scheduler
    total, shared = CALLS.get(type(scheduler), (5, 3))
    cold, memo = run(family, plan(scheduler, SECOND)), Memo()
    assert (cold.calls, cold.served) == (total, 0)
    run(family, plan(scheduler, FIRST), memo)
    warm = run(family, plan(scheduler, SECOND), memo)
    assert (warm.calls, warm.served) == (total - shared, shared)
    assert torch.equal(warm.last, cold.last)
    again = run(family, plan(scheduler, SECOND), memo)
    assert (again.calls, again.served) == (0, total) and torch.equal(again.last, cold.last)


@pytest.mark.parametrize("family", SKIPS)
def test_skips_are_part_of_the_prefix(family: str) -> None:
    scheduler, layer, memo = tiny.shared(family).scheduler, SKIPS[family], Memo()
    cold = run(family, plan(scheduler, SECOND, {1: layer, 3: layer}))
    run(family, plan(scheduler, FIRST, {1: layer}), memo)
    same = run(family, plan(scheduler, SECOND, {1: layer, 3: layer}), memo)
    assert (same.calls, same.served) == (2, 3) and torch.equal(same.last, cold.last)
    other = run(family, plan(scheduler, FIRST), memo)
    assert (other.calls, other.served) == (4, 1)


def test_length_matters_only_to_solvers_that_look_ahead() -> None:
    longer = (*FIRST, 9.0, 4.0)
    for family, scheduler in CASES.values():
        scheduler = scheduler or tiny.shared(family).scheduler
        blind = type(scheduler).__name__ in BLIND_TO_LENGTH
        assert blind == (type(scheduler) not in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler))
        cold, memo = run(family, plan(scheduler, longer)), Memo()
        first = run(family, plan(scheduler, FIRST), memo)
        warm = run(family, plan(scheduler, longer), memo)
        assert warm.served == (first.calls if blind else 0) and torch.equal(warm.last, cold.last)


@pytest.mark.parametrize("scheduler", [PNDMScheduler(skip_prk_steps=True), HeunDiscreteScheduler()], ids=["plms", "heun"])
def test_a_second_call_is_found_by_the_timestep_it_is_made_at(scheduler: Any) -> None:
    """Plans that differ in their second step: the correction of the first is another one, and never the stored one."""
    layer, memo = SKIPS["sd"], Memo()
    other = (901.0, 500.0, 333.0)
    run("sd", plan(scheduler, (901.0, 640.0, 333.0)), memo)
    for times, skips, served in ((other, {}, 1), (other, {1: layer}, 2), (other, {0: layer}, 0)):
        cold, warm = run("sd", plan(scheduler, times, skips)), run("sd", plan(scheduler, times, skips), memo)
        assert torch.equal(warm.last, cold.last) and warm.served == served


def test_other_inputs_under_the_same_key_are_a_miss() -> None:
    scheduler, memo = tiny.shared("sd").scheduler, Memo()
    run("sd", plan(scheduler, FIRST), memo)
    for changes in ({"first_seed": 7}, {"prompt": ["a bag", "a shoe"]}, {"guidance_scale": 2.0}):
        cold, warm = run("sd", plan(scheduler, FIRST), **changes), run("sd", plan(scheduler, FIRST), memo, **changes)
        assert torch.equal(warm.last, cold.last)
        assert warm.served <= 1  # the first call does not see the guidance scale


def test_two_models_do_not_share() -> None:
    memo, scheduler = Memo(), tiny.shared("dit").scheduler
    run("dit", plan(scheduler, FIRST), memo)
    twin = tiny.dit()
    with follow(twin, plan(scheduler, FIRST), memo=memo, context="test") as state:
        twin(**tiny.FAMILIES["dit"][1](2), generator=tiny.generators(2))
    assert state.served == 0


def test_nothing_is_remembered_with_gradients() -> None:
    pipe, memo = tiny.shared("sd"), Memo()
    call = inspect.unwrap(type(pipe).__call__)
    with follow(pipe, plan(pipe.scheduler, (700.0, 300.0)), memo=memo) as state:
        for _ in range(2):
            call(pipe, **tiny.FAMILIES["sd"][1](1), generator=tiny.generators(1))
    assert (state.calls, state.served, len(memo)) == (4, 0, 0)


def test_memory_is_bounded_and_shared_tensors_count_once() -> None:
    text, memo = torch.randn(1000), Memo(limit=50_000)
    for i in range(30):
        memo.put(i, (torch.full((500,), float(i)), text.clone()), torch.full((500,), float(-i)))
        assert memo.bytes <= 50_000
    assert len(memo) == (50_000 - 4000) // 4000
    assert memo.get(29, (torch.full((500,), 29.0), text)) is not None
    assert memo.get(0, (torch.zeros(500), text)) is None  # the oldest went first
    memo.put("huge", (torch.zeros(100_000),), torch.zeros(1))
    assert memo.bytes <= 50_000
    memo.clear()
    assert (memo.bytes, len(memo)) == (0, 0)


def test_answers_are_copies() -> None:
    memo = Memo()
    given, made = torch.zeros(3), torch.ones(3)
    memo.put("k", (given,), {"sample": made})
    made.add_(1)
    given_again = torch.zeros(3)
    memo.get("k", (given_again,))["sample"].add_(5)
    assert memo.get("k", (given_again,))["sample"].tolist() == [1, 1, 1]
    given.add_(1)  # the pipeline writes into its own tensor
    assert memo.get("k", (given,)) is None
