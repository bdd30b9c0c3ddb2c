"""Followers against their stock schedulers (bit for bit) and against the papers' formulas in float64, without a pipeline."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving.run import Run
from lissom.core.driving.schedulers import entries, follower
from lissom.tests.core.tiny import SD_BETAS

TIMES = (901.0, 640.0, 333.0, 120.0, 17.0)  # far from uniform


def model(x: Any, t: float) -> Any:
    """Any smooth function of sample and time, for tensors and arrays."""
    tanh = torch.tanh if isinstance(x, torch.Tensor) else np.tanh
    return tanh(x * 0.7 + t / 900) + 0.1 * x


def start() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def integrate(scheduler: Any, **options: Any) -> torch.Tensor:
    """The loop of a pipeline. The noise is scaled as pipelines do."""
    x = start() * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has none
    if "generator" in inspect.signature(type(scheduler).step).parameters:
        options = {"generator": torch.Generator().manual_seed(5)} | options
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(shown, float(t)), t, x, **options).prev_sample
    return x


def following(scheduler: Any, steps: tuple[Step, ...]) -> Any:
    plan = SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)
    return follower(plan.scheduler, Run(plan))


def planned(*times: float) -> tuple[Step, ...]:
    return tuple(Step(timestep=t) for t in times)


PLMS: dict[str, Any] = {**SD_BETAS, "skip_prk_steps": True}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
LAST: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
STOCK: dict[str, tuple[Callable[[], Any], int]] = {
    "ddim, 10": (lambda: DDIMScheduler(**SD_BETAS, steps_offset=1, clip_sample=False), 10),
    "ddim, all": (lambda: DDIMScheduler(**SD_BETAS), 1000),
    "ddim v, thresholding": (lambda: DDIMScheduler(**SD_BETAS, prediction_type="v_prediction", thresholding=True), 20),
    "ddim zero snr trailing": (
        lambda: DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        10,
    ),
    "ddpm, 10": (lambda: DDPMScheduler(), 10),
    "ddpm fixed_large": (lambda: DDPMScheduler(variance_type="fixed_large"), 10),
    "euler leading": (lambda: EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1), 10),
    "euler fractional": (lambda: EulerDiscreteScheduler(**SD_BETAS), 7),
    "euler, all": (lambda: EulerDiscreteScheduler(**SD_BETAS), 1000),
    "dpm++ 2M": (lambda: DPMSolverMultistepScheduler(**SD_BETAS), 10),
    "dpm++ 2M trailing": (lambda: DPMSolverMultistepScheduler(**SD_BETAS, timestep_spacing="trailing"), 100),
    "dpm++ 3M": (lambda: DPMSolverMultistepScheduler(**SD_BETAS, solver_order=3), 20),
    "dpm++ sde": (lambda: DPMSolverMultistepScheduler(**SD_BETAS, algorithm_type="sde-dpmsolver++"), 10),
    "dpm flow": (lambda: DPMSolverMultistepScheduler(**FLOW), 10),
    "euler karras": (lambda: EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True), 10),
    "dpm++ 2M karras": (lambda: DPMSolverMultistepScheduler(**SD_BETAS, use_karras_sigmas=True), 10),
    "flow, shift 3": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), 10),
    "flow, all": (lambda: FlowMatchEulerDiscreteScheduler(), 1000),
    "dpm flow to the last level": (lambda: DPMSolverMultistepScheduler(**FLOW, **LAST), 10),
    "pndm": (lambda: PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1), 10),
    "pndm v, to 1": (lambda: PNDMScheduler(**PLMS, prediction_type="v_prediction", set_alpha_to_one=True), 20),
    "pndm, 1": (lambda: PNDMScheduler(**PLMS), 1),
    "pndm, 2": (lambda: PNDMScheduler(**PLMS), 2),
    "pndm, all": (lambda: PNDMScheduler(**PLMS), 1000),
    "unipc": (lambda: UniPCMultistepScheduler(**SD_BETAS), 10),
    "unipc 3, bh1, trailing": (
        lambda: UniPCMultistepScheduler(**SD_BETAS, solver_order=3, solver_type="bh1", timestep_spacing="trailing", **LAST),
        20,
    ),
    "unipc eps, no corrector at first": (
        lambda: UniPCMultistepScheduler(**SD_BETAS, predict_x0=False, disable_corrector=[0, 1], **LAST),
        10,
    ),
    "unipc karras": (lambda: UniPCMultistepScheduler(**SD_BETAS, use_karras_sigmas=True), 10),
    "unipc flow": (lambda: UniPCMultistepScheduler(**FLOW), 10),
    "unipc flow to the last level": (lambda: UniPCMultistepScheduler(**FLOW, **LAST), 10),
    "deis": (lambda: DEISMultistepScheduler(**SD_BETAS), 10),
    "deis 3": (lambda: DEISMultistepScheduler(**SD_BETAS, solver_order=3), 20),
    "deis karras": (lambda: DEISMultistepScheduler(**SD_BETAS, use_karras_sigmas=True), 10),
    "heun": (lambda: HeunDiscreteScheduler(**SD_BETAS), 10),
    "heun, 1": (lambda: HeunDiscreteScheduler(**SD_BETAS), 1),
    "heun v leading": (
        lambda: HeunDiscreteScheduler(**SD_BETAS, prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1),
        10,
    ),
    "heun karras": (lambda: HeunDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True), 10),
    "lms": (lambda: LMSDiscreteScheduler(**SD_BETAS), 10),
    "lms karras": (lambda: LMSDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True), 10),
    "euler ancestral": (lambda: EulerAncestralDiscreteScheduler(**SD_BETAS), 10),
    "euler ancestral leading": (
        lambda: EulerAncestralDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        10,
    ),
    "lcm, 1": (lambda: LCMScheduler(), 1),
    "lcm, 4": (lambda: LCMScheduler(), 4),
    "lcm v, all": (lambda: LCMScheduler(prediction_type="v_prediction", clip_sample=True), 50),
    "flow heun, shift 3": (lambda: FlowMatchHeunDiscreteScheduler(shift=3.0), 10),
}


@pytest.mark.parametrize("case", STOCK)
def test_stock_schedule_gives_stock_bits(case: str) -> None:
    make, count = STOCK[case]
    stock = make()
    stock.set_timesteps(count)
    order = entries(type(stock).__name__, count)
    assert len(stock.timesteps) == len(order)
    once = [order.index(i) for i in range(count)]
    own = "flow" in case or "karras" in case  # levels that the timesteps alone do not give back
    times, sigmas = stock.timesteps.tolist(), stock.sigmas.tolist() if own else [None] * len(order)
    steps = tuple(Step(timestep=times[i], sigma=sigmas[i]) for i in once)
    images = integrate(stock)
    assert images.isfinite().all() and torch.equal(integrate(following(make(), steps)), images)


def test_dynamic_shift_is_in_the_plan_already() -> None:
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    stock.set_timesteps(sigmas=np.linspace(1, 0.2, 5).tolist(), mu=1.15)
    follows = following(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), planned(*stock.timesteps.tolist()))
    follows.set_timesteps(sigmas=[1.0, 0.5], mu=0.3)  # what a pipeline asks for does not matter
    torch.testing.assert_close(integrate(follows), integrate(stock), rtol=1e-6, atol=1e-6)


def test_karras_spacing_does_not_move_the_plan() -> None:
    plain, karras = (EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=flag) for flag in (False, True))
    assert torch.equal(integrate(following(karras, planned(*TIMES))), integrate(following(plain, planned(*TIMES))))


def alphas(betas: dict[str, Any] = SD_BETAS) -> np.ndarray:
    """abar_t in float64, (1000,)."""
    return np.cumprod(1 - np.linspace(betas["beta_start"] ** 0.5, betas["beta_end"] ** 0.5, 1000) ** 2)


def close(follows: torch.Tensor, formula: np.ndarray, tolerance: float = 5e-6) -> None:
    assert np.abs(follows.double().numpy() - formula).max() <= tolerance * np.abs(formula).max()


def ddim(times: tuple[float, ...]) -> np.ndarray:
    """Song et al., 2010.02502, Eq. 12 with sigma = 0."""
    x, abar = start().double().numpy(), alphas()
    for t, after in zip(times, [*times[1:], None], strict=True):
        a, a_next = abar[int(t)], 1.0 if after is None else abar[int(after)]
        eps = model(x, t)
        x = np.sqrt(a_next) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - a_next) * eps
    return x


def test_ddim_equals_the_papers_formula() -> None:
    close(integrate(following(DDIMScheduler(**SD_BETAS, clip_sample=False), planned(*TIMES))), ddim(TIMES))


@pytest.mark.parametrize("times", [(500.0,), (999.0, 0.0), (999.0, 998.0, 1.0)])
def test_ddim_of_few_or_extreme_steps(times: tuple[float, ...]) -> None:
    close(integrate(following(DDIMScheduler(**SD_BETAS, clip_sample=False), planned(*times))), ddim(times))


def test_euler_equals_the_ode_in_sigma() -> None:
    """Karras et al., 2206.00364, Eq. 4: dx/dsigma = eps, in the scale where x = x0 + sigma eps."""
    scheduler = following(EulerDiscreteScheduler(**SD_BETAS), planned(*TIMES))
    sigma = [float(np.sqrt((1 - alphas()[int(t)]) / alphas()[int(t)])) for t in TIMES] + [0.0]
    x = start().double().numpy() * sigma[0]
    for i, t in enumerate(TIMES):
        x = x + (sigma[i + 1] - sigma[i]) * model(x / np.sqrt(sigma[i] ** 2 + 1), t)
    close(integrate(scheduler), x)


def test_dpm_solver_2m_equals_algorithm_2() -> None:
    """Lu et al., 2211.01095, Algorithm 2; the last step, to sigma = 0, is of first order as there (App. on few steps)."""
    abar = alphas()
    alpha = [float(np.sqrt(abar[int(t)])) for t in TIMES] + [1.0]
    sigma = [float(np.sqrt(1 - abar[int(t)])) for t in TIMES] + [0.0]
    x, data, h_before = start().double().numpy(), [], 0.0
    for i, t in enumerate(TIMES):
        data.append((x - sigma[i] * model(x, t)) / alpha[i])  # x_theta
        if i + 1 == len(TIMES):
            x = data[-1]  # sigma_t = 0: x = alpha_t x_theta
            break
        h = np.log(alpha[i + 1] / sigma[i + 1]) - np.log(alpha[i] / sigma[i])
        if i == 0:
            d = data[0]
        else:
            r = h_before / h
            d = (1 + 1 / (2 * r)) * data[-1] - 1 / (2 * r) * data[-2]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * d
        h_before = h
    close(integrate(following(DPMSolverMultistepScheduler(**SD_BETAS), planned(*TIMES))), x)


def test_dpm_solver_of_first_order_is_ddim() -> None:
    close(integrate(following(DPMSolverMultistepScheduler(**SD_BETAS, solver_order=1), planned(*TIMES))), ddim(TIMES))


def test_ddpm_equals_the_respaced_posterior() -> None:
    """Ho et al., 2006.11239, Eq. 7 with the alphas of the plan (Nichol and Dhariwal, 2102.09672, Eq. 19)."""
    abar, g = alphas(), torch.Generator().manual_seed(5)
    x = start().double().numpy()
    for t, after in zip(TIMES, [*TIMES[1:], None], strict=True):
        a, a_next = abar[int(t)], 1.0 if after is None else abar[int(after)]
        alpha = a / a_next
        x0 = (x - np.sqrt(1 - a) * model(x, t)) / np.sqrt(a)
        mean = np.sqrt(a_next) * (1 - alpha) / (1 - a) * x0 + np.sqrt(alpha) * (1 - a_next) / (1 - a) * x
        noise = torch.randn(x.shape, generator=g).double().numpy()
        x = mean + np.sqrt((1 - a_next) / (1 - a) * (1 - alpha)) * noise
    close(integrate(following(DDPMScheduler(**SD_BETAS, clip_sample=False), planned(*TIMES))), x)


def test_ddim_with_eta_1_is_ddpm() -> None:
    stochastic = following(DDIMScheduler(**SD_BETAS, clip_sample=False), planned(*TIMES))
    x = integrate(stochastic, eta=1.0, generator=torch.Generator().manual_seed(5))
    close(x, integrate(following(DDPMScheduler(**SD_BETAS, clip_sample=False), planned(*TIMES))).double().numpy())


def test_flow_euler_takes_the_plan_as_it_is() -> None:
    times = (1000.0, 731.5, 400.25, 12.0)
    x, sigma = start().double().numpy(), [t / 1000 for t in times] + [0.0]
    for i, t in enumerate(times):
        x = x + (sigma[i + 1] - sigma[i]) * model(x, t)
    close(integrate(following(FlowMatchEulerDiscreteScheduler(shift=3.0), planned(*times))), x)


def test_planned_sigma_overrides_the_timesteps() -> None:
    by_time = following(FlowMatchEulerDiscreteScheduler(), planned(900.0, 500.0, 100.0))
    by_sigma = following(
        FlowMatchEulerDiscreteScheduler(), tuple(Step(timestep=t, sigma=s) for t, s in ((900, 0.8), (500, 0.5), (100, 0.2)))
    )
    assert by_sigma.sigmas.tolist() == pytest.approx([0.8, 0.5, 0.2, 0.0])
    assert by_sigma.timesteps.tolist() == by_time.timesteps.tolist() == [900.0, 500.0, 100.0]
    euler = following(EulerDiscreteScheduler(**SD_BETAS), (Step(timestep=900, sigma=11.0), Step(timestep=100)))
    assert euler.sigmas[0] == 11.0 and euler.init_noise_sigma == 11.0


def test_add_noise_uses_the_whole_table() -> None:
    follows, stock = following(DDIMScheduler(**SD_BETAS), planned(*TIMES)), DDIMScheduler(**SD_BETAS)
    t = torch.tensor([640, 333])
    assert torch.equal(follows.add_noise(start(), start(), t), stock.add_noise(start(), start(), t))
