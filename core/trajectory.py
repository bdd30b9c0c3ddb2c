"""Gradients through a whole sampling trajectory: the last latent of a pipeline's own loop, with the graph of all steps.

The pipeline's `__call__` runs as ever, along a plan, but without the `torch.no_grad` that it is decorated with, and stops after
the last step: nothing is decoded. Memory is what this costs; how little of it is told by `by_step`, `by_block` and `offload`
(core/driving/checkpoint.py), which change no bit of latents or gradients.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .candidate import SamplingPlan
from .driving import CannotFollow, follow
from .driving.checkpoint import checkpoint_blocks, checkpoint_steps
from .driving.run import Ended, Run
from .driving.steering import Interceptor, denoisers

if TYPE_CHECKING:
    from torch import Tensor


def differentiable(
    pipe: Any,
    plan: SamplingPlan,
    arguments: Mapping[str, Any],
    *,
    by_step: bool = True,
    by_block: bool = False,
    offload: bool = False,
) -> "Tensor":
    """The latent after the last step of `plan`, (B, C, h, w) or packed, to be differentiated by what its denoisers hold.

        for gate in gates: gate.requires_grad_()
        last = differentiable(pipe, plan, {"prompt": "a bag", "generator": [torch.Generator().manual_seed(0)]})
        (last - wanted).square().mean().backward()

    arguments: of the pipeline's `__call__`. Its generators are drawn from: hand in new ones each time. Where guidance doubles
        the batch that is stepped (DiT), the images come first.
    by_step: keep of each denoiser call its inputs alone, and compute it again in the backward pass.
    by_block: the same for the blocks of a call; with `by_step` for those of one call at a time.
    offload: keep the inputs of steps in the CPU's memory.
    Raises CannotFollow where the plan does not fit the pipeline, keeps features between steps, or leads to no gradient.
    """
    import torch

    inside = [*([checkpoint_steps(offload=offload)] if by_step else []), checkpoint_blocks(by_block)]
    with _others_frozen(pipe), torch.enable_grad():
        run = _followed(pipe, plan, arguments, inside)
    if run.last is None or not run.last.requires_grad:
        raise CannotFollow(
            f"no gradient reaches the last latent of {type(pipe).__name__}: nothing in its denoiser asks for one. "
            "Call requires_grad_() on the weights or gates that are to learn."
        )
    return run.last


def visited(pipe: Any, plan: SamplingPlan, arguments: Mapping[str, Any], each: Interceptor) -> None:
    """The same loop without a graph, and `each` around its denoiser calls: for what looks at steps one by one."""
    import torch

    with torch.no_grad():
        _followed(pipe, plan, arguments, [each])


def _followed(pipe: Any, plan: SamplingPlan, arguments: Mapping[str, Any], inside: Sequence[Interceptor]) -> Run:
    """The pipeline's own loop along a plan up to the last step."""
    call = inspect.unwrap(type(pipe).__call__)
    with follow(pipe, plan, inside=inside) as run, suppress(Ended):
        run.ends = True
        given = arguments.get("generator")
        run.generators = given if isinstance(given, list) else None
        call(pipe, **arguments)
    return run


@contextmanager
def _others_frozen(pipe: Any) -> Iterator[None]:
    """Inside, text encoders and all else but the denoisers ask for no gradients, so that they leave no graph."""
    import torch

    found = denoisers(pipe).values()
    others = [m for m in vars(pipe).values() if isinstance(m, torch.nn.Module) and all(m is not own for own in found)]
    asking = [p for module in others for p in module.parameters() if p.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
