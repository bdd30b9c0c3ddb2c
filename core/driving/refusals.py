"""What cannot be driven, said before any work, with what to do instead."""

import inspect
import sys
from typing import Any

import diffusers
import numpy as np

from ..anatomy import layers, stages
from ..candidate import SamplingPlan, Step
from ..methods import suggest
from .run import CannotFollow
from .schedulers import KINDS, WHOLE, build, kind_of, misfit, noise_levels
from .skip import find
from .steering import DENOISERS, denoisers
from .switch import lent

REASONS = {
    "CMStochasticIterativeScheduler": "consistency models take noise levels of their own",
    "CogVideoXDPMScheduler": "its step takes both times from the pipeline, not from its list",
    "CosineDPMSolverMultistepScheduler": "its times are log-sigmas, not timesteps",
    "DDPMWuerstchenScheduler": "its times are ratios, not timesteps",
    "EDMDPMSolverMultistepScheduler": "its times are log-sigmas, not timesteps",
    "EDMEulerScheduler": "its times are log-sigmas, not timesteps",
    "KDPM2AncestralDiscreteScheduler": "it inserts mid-points between the planned timesteps",
    "KDPM2DiscreteScheduler": "it inserts mid-points between the planned timesteps",
    "RePaintScheduler": "its times are not descending",
    "SCMScheduler": "its times are angles, not timesteps",
    "UnCLIPScheduler": "the pipeline computes the previous timestep itself",
}
TOKENS = "its steps fill in tokens, there are no noise levels"
EDM = "its noise levels run to 80, where those of a plan end at 1"
FRAMES = "it steps every frame with a copy of the scheduler, each from another time"
# By pipeline: what a model was trained with does not change with the scheduler that it is given.
UNDRIVABLE = {
    "AmusedImg2ImgPipeline": TOKENS,
    "AmusedInpaintPipeline": TOKENS,
    "AmusedPipeline": TOKENS,
    "BriaPipeline": "it compares the exact class of its scheduler, and that of a plan is a subclass",
    "ConsistencyModelPipeline": REASONS["CMStochasticIterativeScheduler"],
    "Cosmos2TextToImagePipeline": EDM,
    "Cosmos2VideoToWorldPipeline": EDM,
    "CosmosTextToWorldPipeline": REASONS["EDMEulerScheduler"],
    "CosmosVideoToWorldPipeline": REASONS["EDMEulerScheduler"],
    "CycleDiffusionPipeline": "it computes its own stride beside the scheduler",
    "KandinskyPriorPipeline": REASONS["UnCLIPScheduler"],
    "KandinskyV22PriorEmb2EmbPipeline": REASONS["UnCLIPScheduler"],
    "KandinskyV22PriorPipeline": REASONS["UnCLIPScheduler"],
    "KarrasVePipeline": "its loop takes noise levels from its scheduler's own schedule, beside the timesteps",
    "LEditsPPPipelineStableDiffusion": "it computes its own stride beside the scheduler",
    "LEditsPPPipelineStableDiffusionXL": "it computes its own stride beside the scheduler",
    "RePaintPipeline": REASONS["RePaintScheduler"],
    "SanaSprintImg2ImgPipeline": REASONS["SCMScheduler"],
    "SanaSprintPipeline": REASONS["SCMScheduler"],
    "ScoreSdeVePipeline": "it corrects every step at noise levels of its own",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": FRAMES,
    "SkyReelsV2DiffusionForcingPipeline": FRAMES,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": FRAMES,
    "StableCascadeDecoderPipeline": REASONS["DDPMWuerstchenScheduler"],
    "StableCascadePriorPipeline": REASONS["DDPMWuerstchenScheduler"],
    "StableDiffusionPanoramaPipeline": "it steps every part of the picture with a copy of the scheduler's state",
    "StableDiffusionParadigmsPipeline": "it steps many timesteps at once, with a scheduler made for that",
    "StableVideoDiffusionPipeline": "its model is told log-sigmas, not timesteps",
    "VQDiffusionPipeline": TOKENS,
    "WuerstchenDecoderPipeline": REASONS["DDPMWuerstchenScheduler"],
    "WuerstchenPriorPipeline": REASONS["DDPMWuerstchenScheduler"],
}


def check(pipe: Any, plan: SamplingPlan) -> None:
    """Raise CannotFollow if `plan` cannot be followed with `pipe`: pipeline, scheduler, times, noise levels, layers, models.

    Loads the models that its steps name.
    """
    check_pipeline(pipe)
    check_scheduler(pipe, plan)
    check_times(plan)
    check_layers(pipe, plan)
    check_reuse(plan.steps)
    check_models(pipe, plan)


def check_pipeline(pipe: Any) -> None:
    """Raise CannotFollow for a pipeline that follows no plan, whatever it is."""
    check_watched(pipe)
    name = type(pipe).__name__
    if name in UNDRIVABLE:
        raise CannotFollow(f"lissom cannot drive a {name}: {UNDRIVABLE[name]}.")
    slicing = getattr(type(pipe), "get_timesteps", None)
    if slicing is not None and "num_inference_steps" not in list(inspect.signature(slicing).parameters)[:2]:
        raise CannotFollow(f"lissom cannot drive a {name}: its get_timesteps{inspect.signature(slicing)} cuts sigmas itself.")


def check_watched(pipe: Any) -> None:
    """Raise CannotFollow for a pipeline that cannot even be watched as it runs its own schedule."""
    name = type(pipe).__name__
    inner = [attribute for attribute, value in vars(pipe).items() if isinstance(value, diffusers.DiffusionPipeline)]
    if inner:
        raise CannotFollow(f"{name} only calls other pipelines. Drive the inner pipeline ({', '.join(inner)}).")
    found = denoisers(pipe)
    if not found or getattr(pipe, "scheduler", None) is None:
        wanted = f"a scheduler and one of {', '.join(DENOISERS)} that is a torch module"
        raise CannotFollow(f"lissom cannot drive a {name}: it has not {wanted}.")
    if any("_lissom" in vars(thing) for thing in (pipe.scheduler, *found.values())):
        raise CannotFollow("this pipeline (or one that shares its denoiser) is already following a plan. Leave that first.")


def check_scheduler(pipe: Any, plan: SamplingPlan) -> None:
    name = plan.scheduler.name
    kind = kind_of(name, plan.scheduler.config)
    if kind is None:
        known = hasattr(diffusers, name)
        unknown = "it is not among the tested ones" if known else "diffusers has no such class"
        reason = (name in KINDS and misfit(name, plan.scheduler.config)) or REASONS.get(name, unknown)
        flow = type(pipe.scheduler).__name__.startswith("FlowMatch")
        instead = "FlowMatchEulerDiscreteScheduler" if flow else "DPMSolverMultistepScheduler"
        others = "" if flow else " (or DDIMScheduler, EulerDiscreteScheduler)"
        raise CannotFollow(
            f"lissom cannot follow a plan with {name}: {reason}. Use --scheduler {instead}{others}, in Python "
            f"pipe.scheduler = {instead}.from_config(pipe.scheduler.config)."
            f"{'' if known else suggest(name, KINDS)}"
        )
    if kind == "sigma" and build(plan.scheduler).init_noise_sigma != 1 and not _scales(pipe):
        raise CannotFollow(
            f"{type(pipe).__name__} does not scale noise and input as {name} needs. "
            f"Use a plan with DDIMScheduler or DPMSolverMultistepScheduler."
        )
    own = kind_of(type(pipe.scheduler).__name__, dict(pipe.scheduler.config))
    if own is not None and (own == "flow") != (kind == "flow"):
        trained = "flow matching" if own == "flow" else "a variance-preserving schedule"
        raise CannotFollow(f"the plan's {name} does not fit the pipeline, whose model was trained with {trained}.")
    if "scheduler.scale_noise(" in (_source(pipe) or "") and not hasattr(getattr(diffusers, name), "scale_noise"):
        raise CannotFollow(
            f"{type(pipe).__name__} noises its images with scale_noise, which {name} does not have. "
            "Use a plan with FlowMatchEulerDiscreteScheduler."
        )


def _scales(pipe: Any) -> bool:
    """Whether the pipeline works in a scheduler's own scale, where noise is sigma times larger (Euler's is not 0..1)."""
    source = _source(pipe)
    if source is None:
        return True  # nothing to go by
    return "scale_model_input" in source and ("init_noise_sigma" in source or "add_noise" in source)


def _source(pipe: Any) -> str | None:
    """The text of a pipeline's class and those that it builds on; None where there is none, as in a frozen application."""
    classes = [
        c for c in type(pipe).__mro__ if issubclass(c, diffusers.DiffusionPipeline) and c is not diffusers.DiffusionPipeline
    ]
    try:
        return "".join(inspect.getsource(sys.modules[c.__module__]) for c in classes)
    except OSError:
        return None


def check_times(plan: SamplingPlan) -> None:
    name, times = plan.scheduler.name, plan.timesteps
    kind = kind_of(name, plan.scheduler.config)
    scheduler = build(plan.scheduler)
    n = scheduler.config.num_train_timesteps
    if name in WHOLE and any(t != int(t) for t in times):
        raise CannotFollow(f"{name} takes whole timesteps, got {next(t for t in times if t != int(t)):g}.")
    if kind == "flow" and not 0 < times[-1] <= times[0] <= n:
        raise CannotFollow(f"{name} takes timesteps above 0 and up to {n}, got {times[0]:g} to {times[-1]:g}.")
    if kind != "flow" and not 0 <= times[-1] <= times[0] <= n - 1:
        raise CannotFollow(f"{name} takes timesteps from 0 to {n - 1}, got {times[0]:g} to {times[-1]:g}.")
    if len(np.unique(np.array(times, np.float32))) < len(times):
        raise CannotFollow("some timesteps of the plan are equal in single precision, in which the pipeline takes them.")
    if kind in ("table", "list"):
        if any(step.sigma is not None for step in plan.steps):
            raise CannotFollow(f"{name} has no noise levels of its own: leave `sigma` out of the plan's steps.")
        return
    levels = noise_levels(scheduler, plan).astype(np.float32)
    if levels[-1] <= 0 or np.any(np.diff(levels) >= 0) or (kind == "flow" and levels[0] > 1):
        bound = " and start at 1 or below" if kind == "flow" else ""
        raise CannotFollow(f"the plan's noise levels must strictly descend, stay above 0{bound}, got {levels.tolist()}.")


def check_layers(pipe: Any, plan: SamplingPlan) -> None:
    skipped = {(address, "skipped") for step in plan.steps for address in step.skip}
    reused = {(address, "reused") for step in plan.steps for address in step.reuse}
    if not skipped | reused:
        return
    found = denoisers(pipe)
    able = {"skipped": {layer.address for module in found.values() for layer in layers(module)}}
    able["reused"] = able["skipped"] | {address for module in found.values() for address in stages(module)}
    for address, how in sorted(skipped) + sorted(reused):
        if address not in able[how]:
            names, known = " or ".join(found), able[how]
            exists = any(find(module, address) is not None for module in found.values())
            why = f"the layer {address!r} of {names} cannot be {how}" if exists else f"{names} has no layer {address!r}"
            raise CannotFollow(f"{why}.{suggest(address, known) or f' {len(known)} layers can be {how}.'}")


def check_models(pipe: Any, plan: SamplingPlan) -> None:
    """Raise CannotFollow for a step of a model that was not lent to the pipeline, or that lacks a denoiser."""
    known, own = lent(pipe), denoisers(pipe)
    for name in plan.models:
        if name not in known:
            first = next(i for i, step in enumerate(plan.steps, 1) if step.model == name)
            raise CannotFollow(
                f"step {first} of the plan is made by another model, {name!r}, which was not given. Say which one it is: "
                f"--models {name}=MODEL, in a recipe `models: {{{name}: MODEL}}`.{suggest(name, known)}"
            )
        if missing := [part for part in own if part not in known[name]]:
            raise CannotFollow(f"the plan's model {name!r} has no {missing[0]}, which {type(pipe).__name__} calls.")


def check_reuse(steps: tuple[Step, ...]) -> None:
    """Raise CannotFollow for a step that reuses what no earlier one has executed."""
    for i, step in enumerate(steps):
        for address in step.reuse:
            if not any(earlier.executes(address) for earlier in steps[:i]):
                why = "the first step has nothing to reuse" if not i else "no earlier step executes it"
                raise CannotFollow(
                    f"step {i + 1} of the plan reuses {address!r}, but {why}. Take it out of that step's `reuse`, or skip it."
                )
