"""Denoiser calls whose insides are not kept for the backward pass, but computed again in it.

Two interceptors, for `follow(inside=...)`. `checkpoint_steps` keeps of a call its inputs alone: the memory of a trajectory is
then that of one call and a latent or two a step, for one more forward. `checkpoint_blocks` keeps the inputs of the blocks that
diffusers checkpoints; after `checkpoint_steps` only those of one call, for another forward.

Only the denoiser is computed again, never `scheduler.step`: schedulers count their steps and keep a history. Their arithmetic
stays in the graph, where it holds next to nothing, and noise that they draw is drawn once.

The recomputation comes when the run is over. It sees the step that the call belonged to (`Run.still`), leaves out its
layers again, and gets the same state of torch's own random generators. An explicit torch.Generator is *not* rewound, and torch
compares only shapes: noise for gates has to be drawn outside, once, and be handed in as a tensor. Weights, hooks and gates
have to stay as they are until the backward pass is done.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from .. import anatomy
from .run import CannotFollow
from .skip import absent
from .steering import Call, Interceptor, Next


def checkpoint_steps(*, offload: bool = False) -> Interceptor:
    """Keeps the inputs of a call, on its device or, with `offload`, in the CPU's memory; text embeddings stay where they are."""
    return functools.partial(_by_step, offload)


def checkpoint_blocks(on: bool) -> Interceptor:
    """Switches the checkpoints of diffusers' blocks on or off for every call, whatever they are set to outside."""
    return functools.partial(_by_block, on)


def _by_step(offload: bool, call: Call, following: Next) -> Any:
    if not torch.is_grad_enabled():
        return following(call)
    _refuse(call)
    # Flat, so that torch sees every tensor: it looks for devices, versions and hooks among positional arguments only.
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    bare = replace(call, args=(), kwargs={}, run=call.run.still())

    def body(*given: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(given, structure)
        return following(replace(bare, args=args, kwargs=kwargs))

    with _offloading(leaves) if offload else nullcontext():
        return checkpoint(body, *leaves, use_reentrant=False)


def _by_block(on: bool, call: Call, following: Next) -> Any:
    if not torch.is_grad_enabled():
        return following(call)
    _refuse(call)
    with recomputed(call.module, on, call.run.step.skip):
        return following(call)


@contextmanager
def recomputed(denoiser: nn.Module, on: bool = True, skipped: tuple[str, ...] = ()) -> Iterator[None]:
    """Inside, a backward pass computes the denoiser's blocks again one by one. diffusers' own switches, set and put back.

    skipped: layers that are left out, then too. CannotFollow where diffusers has no such switch.
    """
    if on and not can_recompute(denoiser):
        name = type(anatomy.uncompiled(denoiser)).__name__
        raise CannotFollow(f"{name} cannot be checkpointed block by block. Checkpoint whole steps only.")
    parts = _switches(denoiser)

    def compute(block: Any, *args: Any) -> Any:
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), absent(denoiser, skipped)))

    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: vars(part)[name] for name in names if name in vars(part)} for part in parts]
    try:
        for part in parts:
            part.gradient_checkpointing, part._gradient_checkpointing_func = on, compute
        yield
    finally:
        for part, values in zip(parts, before, strict=True):
            for name in names:
                vars(part).pop(name, None)
            vars(part).update(values)


def can_recompute(denoiser: nn.Module) -> bool:
    """Whether diffusers checkpoints the blocks of a denoiser."""
    whole = anatomy.uncompiled(denoiser)
    return bool(_switches(denoiser)) and bool(getattr(whole, "_supports_gradient_checkpointing", False))


def _switches(denoiser: nn.Module) -> list[Any]:
    return [m for m in anatomy.uncompiled(denoiser).modules() if hasattr(m, "gradient_checkpointing")]


def _offloading(leaves: Sequence[Any]) -> AbstractContextManager[Any]:
    """Inside, what autograd keeps of the trajectory's own tensors is moved to the CPU. What all steps share stays."""
    moving = {x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor) and x.requires_grad}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        moves = tensor.untyped_storage().data_ptr() in moving
        # A copy on the CPU too: with hooks, torch does not notice a pipeline that goes on writing into what it passed.
        return tensor.device, tensor.to("cpu", copy=True) if moves else tensor

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device)

    return saved_tensors_hooks(pack, unpack)


def _refuse(call: Call) -> None:
    """Raise CannotFollow for what would not be there, or not the same, when the call is computed again."""
    assert call.run.plan is not None
    for i, step in enumerate(call.run.plan.steps):
        if step.reuse:
            raise CannotFollow(
                f"step {i + 1} of the plan reuses {step.reuse[0]!r}: gradients through features kept between steps are not "
                "made. Take `reuse` out of the plan's steps."
            )
    if getattr(call.module, "is_cache_enabled", False):
        raise CannotFollow(
            f"the {call.name} keeps features between its calls, through which gradients are not made. "
            f"Call pipe.{call.name}.disable_cache() first."
        )
