"""A loaded pipeline as metrics of time, memory and size see it."""

import contextlib
import functools
import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import SamplingPlan, Seeds
from ..core.errors import SamplingError
from ._subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.cost import Costs
    from ..evaluate._sample import Rig


def rig_of(subject: Subject, plan: SamplingPlan | None, steps: int | None) -> "Rig":
    """The pipeline along this plan, or its stock schedule."""
    from ..core.driving.schedulers import entries
    from ..core.driving.steering import denoisers
    from ..core.driving.switch import lent
    from ..evaluate._sample import Rig

    model, count = subject.model, len(plan.steps) if plan else steps or subject.default_steps
    others = [part for other in (plan.models if plan else ()) for part in lent(model.pipe)[other].values()]
    name = plan.scheduler.name if plan else type(model.pipe.scheduler).__name__
    return Rig(
        plan=plan,
        evaluations=len(entries(name, count)),
        params=model.parameters + sum(p.numel() for part in others for p in part.parameters()),
        device=model.device,
        costs=functools.cache(lambda: _costs(subject, plan)),
        call=lambda batch: call_of(subject, plan, steps, batch),
        weights=lambda: itertools.chain(_weights(model.pipe), *(_all(part) for part in others)),
        compiled=lambda: _compiled([*denoisers(model.pipe).values(), *others]),
        conditions=machine(model.device, model.dtype),
    )


def _weights(pipe: Any) -> "Iterator[Tensor]":
    """Parameters and buffers of every component."""
    for part in pipe.components.values():
        if hasattr(part, "parameters"):
            yield from _all(part)


def _all(part: Any) -> "Iterator[Tensor]":
    yield from part.parameters()
    yield from part.buffers()


def _costs(subject: Subject, plan: SamplingPlan | None) -> "Costs":
    from ..core import cost

    with subject.asking():
        arguments = {**subject.conditions.arguments(range(1)), **subject.call}
        return cost.measure(subject.model.pipe, arguments, plan.models if plan else ())


def call_of(subject: Subject, plan: SamplingPlan | None, steps: int | None, batch: int) -> Callable[[], None]:
    """One run of the pipeline, over when the device has finished. Without a memo: everything is computed every time."""
    from ..core.sampling import Sampler

    sampler = Sampler(subject.model.pipe, subject.conditions, chunk=batch, call=subject.call)
    seeds = Seeds(role="calibrate", base=subject.context.recipe.seed, count=batch)

    def once() -> None:
        with subject.asking():
            for _ in sampler.images(plan, seeds, steps=steps):
                pass
        _synchronize(subject.model.device)
        if sampler.chunk != batch:
            raise SamplingError(
                f"batch {batch} does not fit into memory. Measure a smaller one (latency.batches, memory.batch)."
            )

    return once


@contextlib.contextmanager
def _compiled(modules: Sequence[Any]) -> Iterator[None]:
    """With torch.compile on the denoisers, for as long as it lasts; it happens at the first call."""
    before = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module.compile()
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            module._compiled_call_impl = kept


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def machine(device: str, dtype: str) -> dict[str, str]:
    """What a time depends on, beside the pipeline."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {"device": f"{device.partition(':')[0]} ({name})", "dtype": dtype, "threads": str(torch.get_num_threads())}


def _processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
