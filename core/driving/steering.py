"""Steering a denoiser: its class is swapped for a subclass whose `__call__` passes a stack of interceptors.

Swapping the class, rather than wrapping `forward`, survives the hooks of offloading (which reset `forward`) and stays outside
the graph of torch.compile. The subclasses are cached: a new class for every run would compile the model again.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..opening import DENOISERS
from .run import CannotFollow, Run
from .schedulers import disguised


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, on its way through the interceptors."""

    execute: Callable[..., Any]  # the untouched module
    module: nn.Module
    name: str  # of the pipeline's component, e.g. "unet"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run: Run


Next = Callable[[Call], Any]
Interceptor = Callable[[Call, Next], Any]


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline that predict noise, each once, by component name."""
    found: dict[str, nn.Module] = {}
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module) and all(module is not other for other in found.values()):
            found[name] = module
    return found


@contextmanager
def steered(pipe: Any, interceptors: Sequence[Interceptor]) -> Iterator[None]:
    """Pass every call of the pipeline's denoisers through the interceptors, the first one outermost."""
    chain: Next = _execute
    for interceptor in reversed(interceptors):
        chain = functools.partial(_through, interceptor, chain)
    found = denoisers(pipe)
    originals: dict[str, Any] = {name: type(module) for name, module in found.items()}
    try:
        for name, module in found.items():
            module.__dict__["_lissom"] = functools.partial(_enter, pipe, name, chain)
            module.__class__ = steerable(originals[name])
        yield
    finally:
        for name, module in found.items():
            module.__class__ = originals[name]
            module.__dict__.pop("_lissom", None)


@functools.cache
def steerable(cls: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_lissom"](functools.partial(cls.__call__, self), self, args, kwargs)

    return disguised(cls, {"__call__": __call__})


def _enter(pipe: Any, name: str, chain: Next, execute: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    # The run is read from the pipeline's scheduler, not remembered: a pipeline may step a copy of it beside the original.
    run: Run = pipe.scheduler._lissom
    if run.plan is not None and run.evals >= len(run.where):
        raise CannotFollow(f"the pipeline calls its {name} again after the last of the {len(run.plan.steps)} planned steps.")
    out = chain(Call(execute, module, name, args, kwargs, run))
    run.ordinal += 1
    return out


def _through(interceptor: Interceptor, following: Next, call: Call) -> Any:
    return interceptor(call, following)


def _execute(call: Call) -> Any:
    return call.execute(*call.args, **call.kwargs)


def counted(call: Call, following: Next) -> Any:
    """Count the denoiser forwards that are executed. Not part of the innermost body, which may run twice."""
    call.run.calls += 1
    return following(call)
