"""Followers of the later solvers against their papers' formulas in float64, on an uneven plan, without a pipeline."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from lissom.core.candidate import Step
from lissom.tests.core.test_driving_solvers import (
    FLOW,
    PLMS,
    SD_BETAS,
    TIMES,
    alphas,
    close,
    ddim,
    following,
    integrate,
    model,
    planned,
    start,
)


def levels(times: tuple[float, ...] = TIMES) -> list[float]:
    """sigma = sqrt((1 - abar) / abar) of each timestep, and 0."""
    return [float(np.sqrt((1 - alphas()[int(t)]) / alphas()[int(t)])) for t in times] + [0.0]


def transfer(x: Any, eps: Any, a: float, a_next: float) -> Any:
    """phi of Liu et al., 2202.09778, Eq. 9: a DDIM step between two alpha-bars."""
    below = np.sqrt(a) * (np.sqrt((1 - a_next) * a) + np.sqrt((1 - a) * a_next))
    return np.sqrt(a_next / a) * x - (a_next - a) / below * eps


@pytest.mark.parametrize("times", [(500.0,), (901.0, 640.0), TIMES, (999.0, 998.0, 500.0, 3.0, 2.0, 0.0)])
def test_plms_equals_the_papers_adams_steps(times: tuple[float, ...]) -> None:
    """Liu et al., 2202.09778, Eq. 12, whatever the distances; the first step is taken again with the mean of both slopes."""
    abar = [float(alphas()[int(t)]) for t in times] + [float(alphas()[0])]
    x, slopes = start().double().numpy(), []
    for i, t in enumerate(times):
        slopes = [*slopes[-3:], model(x, t)]
        e = slopes[::-1]
        if len(e) == 1:
            eps = e[0]
            if len(times) > 1:
                eps = (eps + model(transfer(x, eps, abar[0], abar[1]), times[1])) / 2
        elif len(e) == 2:
            eps = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            eps = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            eps = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = transfer(x, eps, abar[i], abar[i + 1])
    close(integrate(following(PNDMScheduler(**PLMS), planned(*times))), x, 2e-5)


def test_euler_ancestral_equals_its_formula_with_the_same_noise() -> None:
    """Ancestral steps in the scale of Karras et al. (2206.00364): Euler down to sigma_down, then noise of sigma_up.

    They are DDPM's of the planned steps (Ho et al., 2006.11239): sigma_up^2 is the variance of its posterior, rescaled.
    """
    sigma, g = levels(), torch.Generator().manual_seed(5)
    x = start().double().numpy() * sigma[0]
    for i, t in enumerate(TIMES):
        up = np.sqrt(sigma[i + 1] ** 2 * (sigma[i] ** 2 - sigma[i + 1] ** 2) / sigma[i] ** 2)
        down = np.sqrt(sigma[i + 1] ** 2 - up**2)
        x = x + (down - sigma[i]) * model(x / np.sqrt(sigma[i] ** 2 + 1), t)
        x = x + up * torch.randn(x.shape, generator=g).double().numpy()
    close(integrate(following(EulerAncestralDiscreteScheduler(**SD_BETAS), planned(*TIMES))), x)


def test_lcm_equals_multistep_consistency_sampling() -> None:
    """Luo et al., 2310.04378, Algorithm 3: denoise at once with the scalings of the boundary condition, add noise, repeat."""
    abar, g = alphas(), torch.Generator().manual_seed(5)
    x = start().double().numpy()
    for t, after in zip(TIMES, [*TIMES[1:], None], strict=True):
        data = (x - np.sqrt(1 - abar[int(t)]) * model(x, t)) / np.sqrt(abar[int(t)])
        skip = 0.5**2 / ((10 * t) ** 2 + 0.5**2)  # c_skip, c_out: sigma_data 0.5, timestep scaling 10
        out = 10 * t / np.sqrt((10 * t) ** 2 + 0.5**2)
        x = skip * x + out * data
        if after is not None:
            a = abar[int(after)]
            x = np.sqrt(a) * x + np.sqrt(1 - a) * torch.randn(x.shape, generator=g).double().numpy()
    close(integrate(following(LCMScheduler(**SD_BETAS), planned(*TIMES))), x)


def test_lcm_follows_more_steps_than_it_was_distilled_with() -> None:
    times = tuple(range(999, 0, -9))
    assert len(times) > LCMScheduler().config.original_inference_steps
    assert integrate(following(LCMScheduler(**SD_BETAS), planned(*times))).isfinite().all()


def heun(sigma: list[float], times: tuple[float, ...], slope: Any, x: Any) -> Any:
    """Karras et al., 2206.00364, Algorithm 1 without churn: the trapezoidal rule, the last step to 0 by Euler."""
    for i, t in enumerate(times):
        d, h = slope(x, sigma[i], t), sigma[i + 1] - sigma[i]
        if sigma[i + 1] > 0:
            d = (d + slope(x + h * d, sigma[i + 1], times[i + 1])) / 2
        x = x + h * d
    return x


def test_heun_equals_algorithm_1() -> None:
    sigma = levels()
    x = heun(sigma, TIMES, lambda x, s, t: model(x / np.sqrt(s**2 + 1), t), start().double().numpy() * sigma[0])
    close(integrate(following(HeunDiscreteScheduler(**SD_BETAS), planned(*TIMES))), x)


def test_flow_heun_takes_the_plan_as_it_is() -> None:
    times = (1000.0, 731.5, 400.25, 12.0)
    x = heun([t / 1000 for t in times] + [0.0], times, lambda x, s, t: model(x, t), start().double().numpy())
    close(integrate(following(FlowMatchHeunDiscreteScheduler(shift=3.0), planned(*times))), x)


def test_deis_of_first_order_is_ddim() -> None:
    """Zhang and Chen, 2204.13902, Prop. 2. It ends at the lowest noise level, as DDIM without set_alpha_to_one."""
    x, abar = start().double().numpy(), alphas()
    for t, after in zip(TIMES, [*TIMES[1:], 0.0], strict=True):
        x = transfer(x, model(x, t), abar[int(t)], abar[int(after)])
    close(integrate(following(DEISMultistepScheduler(**SD_BETAS, solver_order=1), planned(*TIMES))), x)


def test_unipc_of_first_order_without_corrector_is_ddim() -> None:
    """Zhao et al., 2302.04867, Sec. 3.4: UniP-1 is DDIM."""
    alone = UniPCMultistepScheduler(**SD_BETAS, solver_order=1, disable_corrector=list(range(len(TIMES))))
    close(integrate(following(alone, planned(*TIMES))), ddim(TIMES))


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_begins_at_pure_noise_of_flow_matching(order: int) -> None:
    """Level 1 has no signal, whose logarithm the solver takes: it is moved by a millionth, as in the stock schedule."""
    scheduler = following(UniPCMultistepScheduler(**FLOW, solver_order=order), planned(1000, 731, 400, 100, 12))
    assert scheduler.sigmas.tolist() == pytest.approx([1 - 1e-6, 0.731, 0.4, 0.1, 0.012, 0], rel=1e-7)
    assert integrate(scheduler).isfinite().all()


def test_planned_levels_are_doubled_with_the_timesteps() -> None:
    steps = tuple(Step(timestep=t, sigma=s) for t, s in ((900, 11.0), (500, 3.0), (100, 0.5)))
    scheduler = following(HeunDiscreteScheduler(**SD_BETAS), steps)
    assert scheduler.sigmas.tolist() == [11.0, 3.0, 3.0, 0.5, 0.5, 0.0] and scheduler.init_noise_sigma == 11.0
    assert scheduler.timesteps.tolist() == [900, 500, 500, 100, 100]
