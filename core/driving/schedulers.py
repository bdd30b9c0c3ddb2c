"""A scheduler that follows a plan, whatever its `set_timesteps` is asked for.

The follower is a subclass of the planned scheduler's own class. Its `set_timesteps` takes every argument that pipelines look
for and lays out the plan instead; its `step` is the stock one. Fresh solver state, terminal sigma and dtypes come from
a stock twin, so no solver is written again here. How a plan is laid out depends on the kind of scheduler:

table  steps by a fixed stride through the table of alphas (DDIM, PNDM): its stock step runs on the table of the planned
       alphas alone, where the stride is 1 and a planned step is its rank. The stock stride would be wrong on a searched list.
sigma  keeps a list of noise levels beside the timesteps: sigma(t) = sqrt((1 - abar_t) / abar_t), interpolated between
       whole t (Karras et al., 2206.00364, Table 1), or the planned sigma.
flow   sigma = t / N, after all shifting: neither `shift` nor `mu` is applied to a plan.
list   looks up the next timestep in its own list (DDPM, LCM). It has no solver state, and LCM's own `set_timesteps` refuses
       more steps than its model was distilled with: no twin is asked.

Heun's method is shown every timestep but the first twice, PLMS (PNDM) the second one: see `entries`. PLMS follows any plan,
but its Adams weights (Liu et al., 2202.09778, Eq. 12) hold for equal distances: on an uneven plan it is of first order, as
DDIM is, not of second. The multistep solvers that work out their weights from the noise levels (DPM-Solver++, UniPC, DEIS,
LMS) keep their order.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import diffusers
import numpy as np
import torch

from ..candidate import SamplingPlan, Scheduler
from .run import CannotFollow, Run, intervals

Kind = Literal["table", "sigma", "flow", "list"]

# Exact classes only: an inverse or ancestral relative has the same attributes and other formulas.
KINDS: dict[str, Kind] = {
    "DDIMScheduler": "table",
    "DDPMScheduler": "list",
    "DEISMultistepScheduler": "sigma",
    "DPMSolverMultistepScheduler": "sigma",
    "EulerAncestralDiscreteScheduler": "sigma",
    "EulerDiscreteScheduler": "sigma",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "HeunDiscreteScheduler": "sigma",
    "LCMScheduler": "list",
    "LMSDiscreteScheduler": "sigma",
    "PNDMScheduler": "table",
    "UniPCMultistepScheduler": "sigma",
}
WHOLE = {  # hold their timesteps as int64
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}
TWICE = {"FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler"}  # evaluate at both ends of a step
# Take flow matching's noise levels if told to, and the logarithm of the signal's share, which must not be 0.
LOGARITHMIC = {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
LEVEL_1 = 1 - 1e-6  # what diffusers puts in place of level 1 there

# Everything that would move the planned times or noise levels.
NEUTRAL: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
    "shift": 1.0,
    "shift_terminal": None,
    "interpolation_type": "linear",
    "timestep_spacing": "linspace",
}


def kind_of(name: str, config: dict[str, Any]) -> Kind | None:
    """How a plan is laid out for a scheduler; None if it cannot follow one."""
    if misfit(name, config):
        return None
    return "flow" if name in LOGARITHMIC and config.get("use_flow_sigmas") else KINDS.get(name)


def misfit(name: str, config: dict[str, Any]) -> str | None:
    """Why a scheduler of KINDS cannot follow a plan with the config it has; None if it can."""
    if config.get("timestep_type") == "continuous":
        return "with timestep_type='continuous' its times are log-sigmas, not timesteps"
    if name == "PNDMScheduler" and not config.get("skip_prk_steps"):
        return "with skip_prk_steps=False it begins with Runge-Kutta steps between the planned timesteps; True can be followed"
    if name == "DEISMultistepScheduler" and config.get("use_flow_sigmas"):
        return "with use_flow_sigmas it ends at its last noise level and leaves the noise in the images"
    if name == "UniPCMultistepScheduler":
        if config.get("solver_p"):
            return "with solver_p it leaves its steps to another scheduler"
        endless = config.get("solver_type") == "bh1" or config.get("predict_x0") is False
        if endless and config.get("final_sigmas_type", "zero") == "zero":
            return "with solver_type='bh1' or predict_x0=False its last step is infinite; add final_sigmas_type='sigma_min'"
    return None


def entries(name: str, steps: int) -> list[int]:
    """Index of the planned timestep that each call of a scheduler's `step` is made at.

    >>> entries("DDIMScheduler", 3), entries("HeunDiscreteScheduler", 3), entries("PNDMScheduler", 3)
    ([0, 1, 2], [0, 1, 1, 2, 2], [0, 1, 1, 2])
    """
    if name in TWICE:
        return [0, *(i for i in range(1, steps) for _ in range(2))]
    if name == "PNDMScheduler" and steps > 1:
        return [0, 1, *range(1, steps)]
    return list(range(steps))


def evaluations(plan: SamplingPlan) -> tuple[int, ...]:
    """Evaluations of the denoiser per planned step, (K,): what `Run.where` comes to over a whole run.

    1 for most solvers. Heun's method makes 2 in every step but the last, 2K - 1 in all; PLMS 2 in the first, K + 1 in all.
    Guidance is inside an evaluation, whether it doubles the batch or calls the denoiser again.
    """
    counts = Counter(intervals(entries(plan.scheduler.name, len(plan.steps))))
    return tuple(counts[i] for i in range(len(plan.steps)))


def build(planned: Scheduler, **overrides: Any) -> Any:
    """The diffusers scheduler that a plan describes. What its class does not know is left out of config and `overrides`.

    JSON has no infinity, so that a config read from a file may hold null where the default is a number
    (`lambda_min_clipped`): such keys fall back to the default.
    """
    stock: Any = getattr(diffusers, planned.name)
    defaults = inspect.signature(stock.__init__).parameters
    config = {k: v for k, v in planned.config.items() if k in defaults and (v is not None or defaults[k].default is None)}
    return stock.from_config(config | {k: v for k, v in overrides.items() if k in defaults})


def follower(planned: Scheduler, run: Run) -> Any:
    """A scheduler that is a `planned.name` to everyone who asks, and follows `run.plan`."""
    scheduler = build(planned)
    cls: Any = type(scheduler)
    scheduler.__dict__["_lissom"] = run
    scheduler.__class__ = following(cls)  # only now: some classes set their timesteps while they are built
    scheduler.set_timesteps()  # so that init_noise_sigma is the plan's even where the latents are drawn first
    run.started = 0
    return scheduler


@functools.cache
def following(cls: Any) -> Any:
    """The subclass of a scheduler class that follows the plan of its instance's run. One class per class: see `steering`."""

    def set_timesteps(
        self: Any,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        **kwargs: Any,
    ) -> None:
        # Pipelines read this signature to see what they may pass, hence the names; the plan overrules all but the device.
        plan = self._lissom.plan
        LAY_OUT[kind_of(plan.scheduler.name, plan.scheduler.config)](self, plan, device)
        self._lissom.begin([float(t) for t in self.timesteps.tolist()])

    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        run: Run = self._lissom
        assert run.plan is not None
        _expect(run, timestep)
        kwargs = _known(cls, kwargs)
        if KINDS[cls.__name__] == "table":
            full, count = self.alphas_cumprod, self.num_inference_steps
            self.alphas_cumprod, self.num_inference_steps = self._lissom_alphas, self.config.num_train_timesteps  # stride 1
            # Of the planned timestep, ascending; rank -1 is the final alpha.
            rank = len(self._lissom_alphas) - 1 - run.plan.timesteps.index(run.times[run.evals])
            try:
                return watched_step(self, model_output, rank, sample, *args, **kwargs)
            finally:
                self.alphas_cumprod, self.num_inference_steps = full, count
        return watched_step(self, model_output, timestep, sample, *args, **kwargs)

    watched_step = watching(cls).step
    setattr(step, "__signature__", inspect.signature(cls.step))  # noqa: B010  pipelines look for `eta` and `generator`
    return disguised(cls, {"set_timesteps": set_timesteps, "step": step})


@functools.cache
def watching(cls: Any) -> Any:
    """The subclass of a scheduler class that follows its own schedule, hands on the run's generators and counts steps."""
    names = inspect.signature(cls.step).parameters

    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        run: Run = self._lissom
        if run.generators and "generator" in names and not args and kwargs.get("generator") is None:
            # DiT hands no generator on, and steps a batch that guidance has doubled.
            kwargs["generator"] = run.generators * max(1, len(sample) // len(run.generators))
        out = cls.step(self, model_output, timestep, sample, *args, **kwargs)
        run.stepped(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    setattr(step, "__signature__", inspect.signature(cls.step))  # noqa: B010
    return disguised(cls, {"step": step})


def disguised(cls: Any, namespace: dict[str, Any]) -> Any:
    """A subclass that isinstance, type names and save_pretrained take for the class itself."""
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {**named, **namespace})


def noise_levels(scheduler: Any, plan: SamplingPlan) -> np.ndarray:
    """sigma of each step, (K,) float64: the planned one, else that of the timestep. `scheduler`: as `build` gives it."""
    times = np.array(plan.timesteps)
    if _is_flow(plan):
        levels = times / scheduler.config.num_train_timesteps
        if plan.scheduler.name in LOGARITHMIC:
            levels = np.minimum(levels, LEVEL_1)
    else:
        table = (((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5).numpy()  # (N,)
        levels = np.interp(times, np.arange(len(table)), table)
    return np.array([level if step.sigma is None else step.sigma for step, level in zip(plan.steps, levels, strict=True)])


def _expect(run: Run, timestep: Any) -> None:
    """The pipeline must step at the planned time; pipelines in half precision may have rounded it."""
    if run.evals >= len(run.times):
        raise CannotFollow(f"the pipeline steps on after the {len(run.times)} evaluations of the plan.")
    got = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
    want = run.times[run.evals]
    if abs(got - want) > 0.01 * max(want, 1.0):
        raise CannotFollow(
            f"step {run.steps + 1} of the plan is at timestep {want:g}, but the pipeline steps at {got:g}: its loop does not "
            "take the timesteps of its scheduler, so that lissom cannot drive it."
        )


def _known(cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Pipelines written for one scheduler pass its options to any: DDIMPipeline always passes `eta`. Off, they mean nothing.

    Nor does a generator to a solver that draws no noise.
    """
    names = inspect.signature(cls.step).parameters
    foreign = {key: value for key, value in kwargs.items() if key not in names and value and key != "generator"}
    if foreign:
        given = ", ".join(f"{key}={value}" for key, value in foreign.items())
        raise CannotFollow(
            f"the pipeline asks each step for {given}, which {cls.__name__} does not know. Leave it at its default."
        )
    return {key: value for key, value in kwargs.items() if key in names}


def _lay_out_table(self: Any, plan: SamplingPlan, device: Any) -> None:
    _reset(self, plan, device)
    times = _whole(plan)
    self._lissom_alphas = self.alphas_cumprod[times.flip(0)].cpu()  # ascending, as in the full table
    self.timesteps = times[entries(plan.scheduler.name, len(times))].to(device)
    self.num_inference_steps = len(times)


def _lay_out_list(self: Any, plan: SamplingPlan, device: Any) -> None:
    self.timesteps = _whole(plan).to(device)
    self.num_inference_steps = len(self.timesteps)
    self.custom_timesteps = True
    self._step_index = self._begin_index = None  # LCM's; DDPM has none


def _lay_out_sigmas(self: Any, plan: SamplingPlan, device: Any) -> None:
    twin = _reset(self, plan, device)
    times, levels = np.array(plan.timesteps), noise_levels(twin, plan)
    if self.config.get("invert_sigmas"):  # Mochi counts from data (0) to noise (1)
        levels, times = 1 - levels, (1 - levels) * self.config.num_train_timesteps
    order = entries(plan.scheduler.name, len(times))
    sigmas = torch.from_numpy(levels[order]).to(twin.sigmas.dtype)
    # UniPC's "sigma_min" of flow matching is the last level of the list itself.
    repeats = (
        plan.scheduler.name == "UniPCMultistepScheduler" and _is_flow(plan) and self.config.final_sigmas_type == "sigma_min"
    )
    terminal = sigmas[-1:] if repeats else twin.sigmas[-1:].to("cpu")
    self.sigmas = torch.cat([sigmas, terminal]).to(twin.sigmas.device)
    self.timesteps = torch.from_numpy(times[order]).to(twin.timesteps.dtype).to(device)
    self.num_inference_steps = len(times)
    self._step_index = self._begin_index = None


def _reset(self: Any, plan: SamplingPlan, device: Any) -> Any:
    """Give a follower the state of a scheduler that has just set its timesteps. Returns that scheduler."""
    twin = build(plan.scheduler, **NEUTRAL)
    twin.set_timesteps(len(plan.steps), device=device)
    for key, value in vars(twin).items():
        if key not in ("_internal_dict", "_shift"):  # the config stays the planned one
            setattr(self, key, list(value) if isinstance(value, list) else value)
    return twin


def _whole(plan: SamplingPlan) -> torch.Tensor:
    return torch.tensor([int(t) for t in plan.timesteps], dtype=torch.int64)


def _is_flow(plan: SamplingPlan) -> bool:
    return kind_of(plan.scheduler.name, plan.scheduler.config) == "flow"


LAY_OUT: dict[Kind | None, Callable[[Any, SamplingPlan, Any], None]] = {
    "table": _lay_out_table,
    "list": _lay_out_list,
    "sigma": _lay_out_sigmas,
    "flow": _lay_out_sigmas,
}
