"""The order of the solvers of which no closed form is written out, by convergence on an ODE whose solution is known.

Data from a normal distribution N(MEAN, SPREAD^2) make the probability-flow ODE (Song et al., 2011.13456, Eq. 13) linear: with
x = alpha x0 + sigma noise, x - alpha MEAN stays proportional to sqrt(alpha^2 SPREAD^2 + sigma^2), the spread of x. A solver of
order p makes an error that falls by 2^p where the number of steps doubles.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from lissom.tests.core.test_driving_solvers import FLOW, PLMS, SD_BETAS, following, planned

MEAN = 0.4
SPREAD = torch.tensor([0.3, 0.7, 1.6], dtype=torch.float64).view(1, 3, 1, 1)  # several: one error may pass through 0
FIRST, LAST = 900.0, 100.0
Grid = Callable[[int], tuple[float, ...]]


def even(count: int) -> tuple[float, ...]:
    """count whole steps from FIRST to LAST, as equal as they get: `count + 1` timesteps."""
    return tuple(np.round(np.linspace(FIRST, LAST, count + 1)).tolist())


def uneven(count: int) -> tuple[float, ...]:
    """Steps that are long and short by turns, 3 to 1, as a search leaves them."""
    lengths = np.tile([3.0, 1.0], count // 2)
    return tuple(np.round(FIRST - (FIRST - LAST) * np.concatenate([[0], np.cumsum(lengths)]) / lengths.sum()).tolist())


def error(make: Callable[[], Any], times: tuple[float, ...]) -> float:
    """Largest distance to the solution at the last timestep, before the step to the data, which is of first order everywhere."""
    scheduler = following(make(), planned(*times))
    flow = not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas")
    scaled = hasattr(scheduler, "init_noise_sigma") and scheduler.init_noise_sigma != 1  # keeps x / alpha

    def parts(t: float) -> tuple[float, float]:
        """alpha and sigma at a timestep, in the scale that the scheduler keeps."""
        if flow:
            return 1 - t / 1000, t / 1000
        a = float(scheduler.alphas_cumprod[int(t)])
        return (1.0, ((1 - a) / a) ** 0.5) if scaled else (a**0.5, (1 - a) ** 0.5)

    def exact(t: float) -> torch.Tensor:
        alpha, sigma = parts(t)
        return alpha * MEAN + (alpha**2 * SPREAD**2 + sigma**2) ** 0.5

    x = exact(times[0])
    for t in scheduler.timesteps[:-1]:
        if scaled:
            scheduler.scale_model_input(x, t)
        alpha, sigma = parts(float(t))
        noise = sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
        x = scheduler.step((noise - (x - sigma * noise) / alpha) if flow else noise, t, x).prev_sample
    return float((x - exact(times[-1])).abs().max())


def orders(make: Callable[[], Any], grid: Grid) -> np.ndarray:
    """Measured orders: log2 of the ratio of errors from 10 to 20 and from 20 to 40 steps. More drown in single precision."""
    errors = np.array([error(make, grid(count)) for count in (10, 20, 40)])
    return np.log2(errors[:-1] / errors[1:])


FIRST_ORDER: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(**SD_BETAS, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**SD_BETAS),
    "flow euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "deis 1": lambda: DEISMultistepScheduler(**SD_BETAS, solver_order=1),
    "unip 1": lambda: UniPCMultistepScheduler(**SD_BETAS, solver_order=1, disable_corrector=list(range(40))),
}
# Of the methods as they begin: a multistep solver of higher order makes its first step with order 1, which leaves an error of
# second order, unless a corrector raises that (Zhao et al., 2302.04867, Theorem 3.1: UniC adds one order).
HIGHER_ORDER: dict[str, tuple[Callable[[], Any], int]] = {
    "dpm++ 2M": (lambda: DPMSolverMultistepScheduler(**SD_BETAS), 2),
    "deis 2": (lambda: DEISMultistepScheduler(**SD_BETAS), 2),
    "deis 3": (lambda: DEISMultistepScheduler(**SD_BETAS, solver_order=3), 2),
    "heun": (lambda: HeunDiscreteScheduler(**SD_BETAS), 2),
    "flow heun": (lambda: FlowMatchHeunDiscreteScheduler(), 2),
    "lms": (lambda: LMSDiscreteScheduler(**SD_BETAS), 2),
    "unip 2": (lambda: UniPCMultistepScheduler(**SD_BETAS, disable_corrector=list(range(40))), 2),
    "unipc 1": (lambda: UniPCMultistepScheduler(**SD_BETAS, solver_order=1), 2),
    "unipc 2": (lambda: UniPCMultistepScheduler(**SD_BETAS), 3),
    "unipc 3": (lambda: UniPCMultistepScheduler(**SD_BETAS, solver_order=3), 3),
    "unipc 2 flow": (lambda: UniPCMultistepScheduler(**FLOW), 3),
}


@pytest.mark.parametrize("case", FIRST_ORDER)
def test_first_order(case: str) -> None:
    for grid in (even, uneven):
        assert orders(FIRST_ORDER[case], grid) == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("case", HIGHER_ORDER)
def test_the_order_is_kept_on_an_uneven_plan(case: str) -> None:
    make, order = HIGHER_ORDER[case]
    for grid in (even, uneven):
        assert orders(make, grid).min() > order - 0.35


def test_plms_is_of_second_order_on_even_plans_only() -> None:
    """Its Adams weights assume equal distances (Liu et al., 2202.09778, Eq. 12)."""
    assert orders(lambda: PNDMScheduler(**PLMS), even).min() > 1.65
    assert orders(lambda: PNDMScheduler(**PLMS), uneven).max() < 1.1
    assert error(lambda: PNDMScheduler(**PLMS), uneven(40)) > 30 * error(lambda: PNDMScheduler(**PLMS), even(40))
