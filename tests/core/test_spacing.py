"""Fixed schedules: exactly K distinct valid timesteps for every K, and the formulas they are named after."""

from typing import Any

import diffusers
import numpy as np
import pytest
from lissom.core.driving.refusals import check_times
from lissom.core.spacing import Times, fixed, times
from lissom.tests.core.tiny import SD_BETAS

VP = {
    "ddim": diffusers.DDIMScheduler(**SD_BETAS, steps_offset=1),
    "ddpm": diffusers.DDPMScheduler(),
    "euler": diffusers.EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True),
    "dpm": diffusers.DPMSolverMultistepScheduler(**SD_BETAS),
    "dpm karras": diffusers.DPMSolverMultistepScheduler(**SD_BETAS, use_karras_sigmas=True),
    "pndm": diffusers.PNDMScheduler(**SD_BETAS, steps_offset=1, skip_prk_steps=True),
    "heun": diffusers.HeunDiscreteScheduler(**SD_BETAS),
    "heun karras": diffusers.HeunDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True),
    "unipc": diffusers.UniPCMultistepScheduler(**SD_BETAS),
    "unipc karras": diffusers.UniPCMultistepScheduler(**SD_BETAS, use_karras_sigmas=True),
    "deis": diffusers.DEISMultistepScheduler(**SD_BETAS),
    "lms": diffusers.LMSDiscreteScheduler(**SD_BETAS),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler(**SD_BETAS),
    "lcm": diffusers.LCMScheduler(),
}
FLOW = {
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dynamic": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "inverted": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "dpm flow": diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "unipc flow": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "flow heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
}
VP_PLAIN = diffusers.DDIMScheduler(**SD_BETAS)
COUNTS = (1, 2, 3, 4, 7, 10, 49, 333, 501, 999, 1000)


@pytest.mark.parametrize("name", [*VP, *FLOW])
def test_every_count_gives_as_many_valid_steps(name: str) -> None:
    scheduler = (VP | FLOW)[name]
    for count in COUNTS:
        for shape, plan in fixed(scheduler, count).items():
            assert len(plan.steps) == count
            check_times(plan)
            if name in VP and shape != "stock":
                assert all(t == int(t) for t in plan.timesteps)


def test_formulas_on_ddim() -> None:
    plans = fixed(VP["ddim"], 10)
    assert plans["leading"].timesteps == tuple(range(901, 0, -100))  # steps_offset included
    assert plans["trailing"].timesteps == tuple(range(999, 0, -100))
    assert plans["linspace"].timesteps == tuple(np.linspace(0, 999, 10).round()[::-1])
    assert plans["quadratic"].timesteps == tuple((np.linspace(0, np.sqrt(800), 10) ** 2).round()[::-1])
    assert fixed(VP["ddim"], 1)["quadratic"].timesteps == (800,)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm", "pndm", "unipc", "deis"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_formulas_are_the_schedulers_own(name: str, spacing: str) -> None:
    scheduler: Any = VP[name]
    stock = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)
    stock.set_timesteps(20)
    assert fixed(scheduler, 20)[spacing].timesteps == tuple(dict.fromkeys(stock.timesteps.tolist()))  # PLMS repeats one


def test_collisions_are_moved_to_free_timesteps() -> None:
    full = fixed(VP["ddim"], 1000)
    assert all(plan.timesteps == tuple(range(999, -1, -1)) for plan in full.values())
    crowded = fixed(VP["ddim"], 300)["quadratic"].timesteps  # the square repeats small numbers
    assert crowded[-1] == 0 and len(set(crowded)) == 300


def test_stock_flow_is_the_schedulers_own() -> None:
    for name in ("flow", "dpm flow", "unipc flow", "flow heun"):
        scheduler: Any = FLOW[name]
        stock = type(scheduler).from_config(scheduler.config)
        stock.set_timesteps(8)
        steps = fixed(scheduler, 8)["stock"].steps
        assert [s.timestep for s in steps] == list(dict.fromkeys(stock.timesteps.tolist()))  # Heun's are doubled
        levels = [s.timestep / 1000 if s.sigma is None else s.sigma for s in steps]
        assert levels == pytest.approx(list(dict.fromkeys(stock.sigmas[:-1].tolist())), rel=1e-7)


@pytest.mark.parametrize("count", [1, 4, 8, 50])
def test_stock_lcm_is_its_own_skipping_schedule(count: int) -> None:
    scheduler: Any = VP["lcm"]
    stock = type(scheduler).from_config(scheduler.config)
    stock.set_timesteps(count)
    assert fixed(scheduler, count)["stock"].timesteps == tuple(stock.timesteps.tolist())
    assert fixed(scheduler, count)["leading"].timesteps == fixed(VP_PLAIN, count)["leading"].timesteps
    assert "stock" not in fixed(scheduler, 51)  # more steps than it was distilled with


@pytest.mark.parametrize("name", ["euler", "dpm karras", "heun karras"])
@pytest.mark.parametrize("count", [1, 4, 25])
def test_stock_karras_levels_are_the_schedulers_own(name: str, count: int) -> None:
    scheduler: Any = VP[name]
    stock = type(scheduler).from_config(scheduler.config)
    stock.set_timesteps(count)
    steps = fixed(scheduler, count)["stock"].steps
    assert [s.timestep for s in steps] == list(dict.fromkeys(stock.timesteps.tolist()))
    assert [s.sigma for s in steps] == list(dict.fromkeys(stock.sigmas[:-1].tolist()))
    assert "stock" not in fixed(VP["ddim"], count)


def test_dynamic_shift_at_its_upper_end() -> None:
    sigma = np.linspace(1, 0.25, 4)
    shifted = np.exp(1.15) / (np.exp(1.15) + (1 / sigma - 1))  # Esser et al., 2403.03206, Eq. 23
    assert fixed(FLOW["dynamic"], 4)["stock"].timesteps == pytest.approx(1000 * shifted, rel=1e-6)


def test_times() -> None:
    assert times(VP["ddim"]) == times(VP["euler"]) == Times(n=1000, integer=True, lowest=0, highest=999)
    assert times(FLOW["flow"]) == Times(n=1000, integer=False, lowest=1, highest=1000)
    assert times(VP["pndm"]) == times(VP["lcm"]) == times(VP["heun"]) == times(VP["ddim"])
    assert times(FLOW["flow heun"]) == times(FLOW["flow"]) and times(FLOW["unipc flow"]) == times(FLOW["dpm flow"])
    assert times(FLOW["dpm flow"]) == Times(n=1000, integer=True, lowest=1, highest=1000)


@pytest.mark.parametrize("count", [0, 1001])
def test_impossible_counts(count: int) -> None:
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.1000"):
        fixed(VP["ddim"], count)
