"""The two ways to run a pipeline's own `__call__` under watch: along a plan, or as it is."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..candidate import SamplingPlan
from .memo import Memo, Remember
from .refusals import check, check_watched
from .reuse import reuse
from .run import Run
from .schedulers import follower, watching
from .skip import skip
from .steering import Interceptor, counted, steered
from .switch import lent, switch


@contextlib.contextmanager
def follow(
    pipe: Any, plan: SamplingPlan, *, memo: Memo | None = None, context: str = "", inside: Sequence[Interceptor] = ()
) -> Iterator[Run]:
    """Inside this context every call of `pipe` runs along `plan`, whatever `num_inference_steps` or `strength` it is given.

    The plan's scheduler takes the place of the pipeline's, so that a plan found with one solver is not run with another.
    Image-to-image pipelines start at the plan's first timestep: it is the strength.

        with follow(pipe, plan) as run:
            image = pipe("a photo of a sneaker").images[0]
        run.calls, run.last.shape

    pipe: a diffusers pipeline with a scheduler and a denoiser (unet, transformer, ...), on any device, compiled or offloaded.
    memo: shares denoiser results with other plans that begin with the same steps; `context` names everything else that the
        results depend on and the inputs do not show (weights, adapters).
    inside: further interceptors (`checkpoint`), which see the model that makes the step, with all its layers.
    Raises CannotFollow before any work if the plan does not fit, and at the end if the pipeline left planned steps out.
    Everything is put back at the end, also after an exception.
    """
    check(pipe, plan)
    first: list[Interceptor] = [Remember(memo, context)] if memo is not None else []
    # The order is fixed: memo > reuse > another model > checkpoint > skip.
    with drive(pipe, Run(plan, lent(pipe)), [*first, counted, reuse, switch, *inside, skip]) as run:
        yield run
    run.verify()


@contextlib.contextmanager
def watch(pipe: Any) -> Iterator[Run]:
    """Inside this context calls of `pipe` run as they are, with any scheduler; the run counts them and keeps the last sample."""
    check_watched(pipe)
    scheduler, run = pipe.scheduler, Run()
    cls: Any = type(scheduler)
    try:
        scheduler.__dict__["_lissom"] = run
        scheduler.__class__ = watching(cls)
        with steered(pipe, [counted]):
            yield run
    finally:
        scheduler.__class__ = cls
        scheduler.__dict__.pop("_lissom", None)


@contextlib.contextmanager
def drive(pipe: Any, run: Run, interceptors: Sequence[Interceptor]) -> Iterator[Run]:
    """`follow` without its checks, with any interceptors: for measuring."""
    assert run.plan is not None
    scheduler, original = follower(run.plan.scheduler, run), pipe.scheduler
    try:
        pipe.__dict__["scheduler"] = scheduler  # plain assignment would write the follower into pipe.config
        if hasattr(type(pipe), "get_timesteps"):
            pipe.__dict__["get_timesteps"] = lambda *args, **kwargs: _whole_plan(scheduler)
        with steered(pipe, interceptors):
            yield run
    finally:
        pipe.__dict__["scheduler"] = original
        pipe.__dict__.pop("get_timesteps", None)
        run.features = {}  # the run may be looked at for longer


def _whole_plan(scheduler: Any) -> tuple[torch.Tensor, int]:
    """What image-to-image pipelines take for the part of the schedule that their strength leaves: all of the plan."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler.timesteps, len(scheduler.timesteps)
