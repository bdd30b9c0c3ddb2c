"""The fixed schedules that a searched one must beat, as plans, and what a plan for a scheduler may contain."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .candidate import SamplingPlan, Scheduler, Step

OWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@dataclass(frozen=True)
class Times:
    """Which timesteps a plan may contain."""

    n: int  # timesteps of the training schedule
    integer: bool  # whole numbers only
    lowest: float
    highest: float


def times(scheduler: Any) -> Times:
    """What a plan for a diffusers scheduler may contain: 0..N-1 for variance-preserving schedules, 1..N for flow matching.

    (Flow matching takes any time above 0; below 1 is less noise than the model was trained to remove.)
    """
    from .driving.schedulers import WHOLE

    n, flow = scheduler.config.num_train_timesteps, _is_flow(scheduler)
    integer = not flow or type(scheduler).__name__ in WHOLE
    return Times(n, integer, 1.0 if flow else 0.0, float(n) if flow else float(n - 1))


def fixed(scheduler: Any, steps: int) -> dict[str, SamplingPlan]:
    """The usual schedules of `steps` timesteps, by name. Raises ValueError unless 1 <= steps <= N.

    Variance-preserving: leading, trailing and linspace by the scheduler's own formula, `steps_offset` included
    (Lin et al., 2305.08891, Table 2), and quadratic, (linspace(0, sqrt(0.8 N), K))^2 (Song et al., 2010.02502, App. D.2);
    stock too where the scheduler is set to noise levels of its own (Karras et al., 2206.00364, and the like), and for LCM, up to
    the number of steps it was distilled with: its skipping schedule (Luo et al., 2310.04378, Sec. 4.3). It knows no other
    spacing, so that the other schedules are DDIM's there.
    Flow matching, t = N sigma: stock (what the scheduler itself would do, with its shift), linear (sigma from 1 to 1/K)
    and quadratic (the square of linear).
    Where a formula repeats a timestep or leaves the range, the timesteps are moved to the nearest free ones.
    """
    limits = times(scheduler)
    if not 1 <= steps <= limits.n:
        raise ValueError(f"steps must be in 1..{limits.n}, got {steps}")
    described = Scheduler.of(scheduler)
    if _is_flow(scheduler):
        plans = {name: _plan(described, limits, t) for name, t in _flow_shapes(limits.n, steps).items()}
        return {"stock": _stock_flow(scheduler, described, limits, steps)} | plans
    plans = {name: _plan(described, limits, t) for name, t in _preserving_shapes(scheduler, limits.n, steps).items()}
    if described.name == "LCMScheduler":
        if steps > scheduler.config.original_inference_steps:
            return plans
        return {"stock": _plan(described, limits, _shown(described, steps))} | plans
    if _kind(scheduler) == "sigma" and any(scheduler.config.get(key) for key in OWN_LEVELS):
        return {"stock": _stock_levels(described, limits, steps)} | plans
    return plans


def _is_flow(scheduler: Any) -> bool:
    return _kind(scheduler) == "flow"


def _kind(scheduler: Any) -> str | None:
    from .driving.schedulers import kind_of

    return kind_of(type(scheduler).__name__, dict(scheduler.config))


def _preserving_shapes(scheduler: Any, n: int, steps: int) -> dict[str, np.ndarray]:
    from .driving.schedulers import NEUTRAL

    own = Scheduler.of(scheduler)
    described = own.model_copy(update={"name": "DDIMScheduler"}) if own.name == "LCMScheduler" else own
    shapes = {
        name: _shown(described, steps, **(NEUTRAL | {"timestep_spacing": name})) for name in ("leading", "trailing", "linspace")
    }
    roots = np.linspace(np.sqrt(0.8 * n), 0, steps)  # from the top, so that a single step starts at noise
    return shapes | {"quadratic": roots**2}


def _shown(described: Scheduler, steps: int, **changes: Any) -> np.ndarray:
    """The timesteps that a scheduler sets for `steps` steps, each once, (steps,)."""
    from .driving.schedulers import build

    stock = build(described, **changes)
    stock.set_timesteps(steps)
    return stock.timesteps.double().numpy()[_once(described, steps)]


def _once(described: Scheduler, steps: int) -> list[int]:
    """Where in its list a scheduler first shows each of `steps` timesteps: Heun and PLMS show some of them twice.

    What follows is left out: "trailing" rounds to one timestep too many for some numbers of steps.
    """
    from .driving.schedulers import entries

    order = entries(described.name, steps)
    return [order.index(i) for i in range(steps)]


def _flow_shapes(n: int, steps: int) -> dict[str, np.ndarray]:
    linear = np.linspace(1, 1 / steps, steps)
    return {"linear": n * linear, "quadratic": n * linear**2}


def _stock_levels(described: Scheduler, limits: Times, steps: int) -> SamplingPlan:
    """The noise levels that a scheduler is set to (Karras, exponential, beta), and the timesteps it shows for them."""
    from .driving.schedulers import WHOLE, build

    stock = build(described)
    stock.set_timesteps(steps)
    once = _once(described, steps)
    levels = stock.sigmas.double().numpy()[once].tolist()
    placed = _placed(stock.timesteps.double().numpy()[once], replace(limits, integer=described.name in WHOLE))
    return SamplingPlan(
        scheduler=described, steps=tuple(Step(timestep=t, sigma=level) for t, level in zip(placed, levels, strict=True))
    )


def _stock_flow(scheduler: Any, described: Scheduler, limits: Times, steps: int) -> SamplingPlan:
    """The scheduler's own flow-matching schedule, with its shift.

    Dynamic shifting depends on the image size: taken at its upper end (`max_shift`), Flux's 1024 x 1024, over Flux's own
    linear base sigmas.
    """
    from .driving.schedulers import build

    stock = build(described)
    config = stock.config
    if config.get("use_dynamic_shifting") and "max_shift" in config:
        stock.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), mu=config.max_shift)
    elif config.get("use_dynamic_shifting"):
        stock = build(described, use_dynamic_shifting=False)
        stock.set_timesteps(steps)
    else:
        stock.set_timesteps(steps)
    once = _once(described, steps)
    shown, levels = stock.timesteps.double().numpy()[once], stock.sigmas.double().numpy()[once]
    if config.get("invert_sigmas"):
        shown, levels = limits.n - shown, 1 - levels
    placed = _placed(shown, limits)
    # The noise level is written out where the timestep alone would not give it back: shown times may be truncated.
    same = [np.float32(t / limits.n) == np.float32(level) for t, level in zip(placed, levels, strict=True)]
    sigmas = [None if s else float(level) for s, level in zip(same, levels, strict=True)]
    return SamplingPlan(
        scheduler=described, steps=tuple(Step(timestep=t, sigma=s) for t, s in zip(placed, sigmas, strict=True))
    )


def _plan(described: Scheduler, limits: Times, wanted: np.ndarray) -> SamplingPlan:
    return SamplingPlan(scheduler=described, steps=tuple(Step(timestep=t) for t in _placed(wanted, limits)))


def _placed(wanted: Sequence[float] | np.ndarray, limits: Times) -> list[float]:
    """Valid, strictly descending timesteps near the wanted ones, (K,). Raises nothing for K <= N.

    >>> _placed([1000, 3, 3, 0], Times(n=1000, integer=True, lowest=0, highest=999))
    [999.0, 3.0, 2.0, 0.0]
    """
    values = np.sort(np.asarray(wanted, dtype=np.float64))[::-1]
    if not limits.integer:
        single = values.astype(np.float32)  # as schedulers hold them
        if (single[-1] > 0 or limits.lowest == 0) and single[0] <= limits.highest and np.all(np.diff(single) < 0):
            return [float(t) for t in values]
    placed: list[float] = []
    for i, t in enumerate(np.round(values)):
        left = len(values) - 1 - i  # so many must still fit below
        t = min(max(t, limits.lowest + left), limits.highest - i)
        placed.append(float(min(t, placed[-1] - 1) if placed else t))
    return placed
