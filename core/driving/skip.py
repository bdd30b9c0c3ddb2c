"""Layers that are not executed in a step.

The innermost interceptor: it applies the skips and undoes them around the very call, so that whatever runs that call again
later (recomputation in a backward pass) finds the same layers left out, and everyone else finds the model whole.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import anatomy
from .schedulers import disguised
from .steering import Call, Next


def skip(call: Call, following: Next) -> Any:
    with absent(call.module, call.run.step.skip):
        return following(call)


@contextmanager
def absent(denoiser: nn.Module, addresses: tuple[str, ...]) -> Iterator[None]:
    """Leave out the layers at `addresses`; those of another denoiser of the same pipeline are passed over."""
    swapped: list[tuple[nn.Module, Any]] = []
    try:
        for address in addresses:
            layer = find(denoiser, address)
            if layer is not None:
                stand_in = anatomy.substitute(layer)
                swapped.append((layer, type(layer)))
                layer.__class__ = _absent(swapped[-1][1], stand_in)
        yield
    finally:
        for layer, cls in reversed(swapped):
            layer.__class__ = cls


def find(denoiser: nn.Module, address: str) -> nn.Module | None:
    """The layer at an address, of a compiled model too; None if there is none."""
    try:
        return anatomy.uncompiled(denoiser).get_submodule(address)
    except AttributeError:
        return None


@functools.cache
def _absent(cls: Any, substitute: anatomy.Substitute) -> Any:
    """Overrides `__call__`, not `forward`: hooks of offloading sit on the instance's `forward` and would win."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return substitute(self, *args, **kwargs)

    return disguised(cls, {"__call__": __call__})
