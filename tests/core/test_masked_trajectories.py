"""Hard-concrete gates through a whole trajectory: the same bits however little is kept of it, and what keeping it costs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from lissom.core.candidate import SamplingPlan
from lissom.core.driving import follow
from lissom.core.masking import masked
from lissom.core.saved_bytes import Live, saved
from lissom.core.trajectory import differentiable
from lissom.core.widths import Width, widths
from lissom.prune import _hard_concrete, masks
from lissom.tests.core import tiny
from lissom.tests.core.test_driving_checkpoint import FULL, WAYS, arguments, evenly, plan, same
from torch import Tensor

# The four solvers that are named in 5.5, items 1 and 2, on each kind of denoiser.
SOLVERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ddim": ("sd", lambda own: own),
    "ddim, transformer": ("dit", lambda own: own),
    "euler": ("sd", lambda own: EulerDiscreteScheduler(**tiny.SD_BETAS)),
    "flow euler": ("sd3", lambda own: own),
    "flow euler, single blocks": ("flux", lambda own: own),
    "dpm++ 2m": ("sd", lambda own: DPMSolverMultistepScheduler(**tiny.SD_BETAS)),
    "dpm++ 2m, transformer": ("dit", lambda own: DPMSolverMultistepScheduler()),
}


@pytest.fixture(autouse=True)
def frozen_weights() -> Iterator[None]:
    """As where gates are learned."""
    asking = [p for family in ("sd", "dit", "sd3", "flux") for p in tiny.denoiser(tiny.shared(family)).parameters()]
    for parameter in asking:
        parameter.requires_grad_(False)
    yield
    for parameter in asking:
        parameter.requires_grad_(True)


def setting(solver: str) -> tuple[Any, str, Callable[[int], SamplingPlan]]:
    family, scheduler = SOLVERS[solver]
    pipe = tiny.shared(family)
    return pipe, family, lambda length: plan(scheduler(pipe.scheduler), evenly(length))


def gates(denoiser: Any) -> tuple[dict[Width, Tensor], dict[Width, Tensor]]:
    """Logits of all that can be masked, and their noise, drawn once: in between, but for a shut and an open one of many."""
    drawn = torch.Generator().manual_seed(0)
    logits = {w: 2 * torch.rand(len(w.groups), generator=drawn) - 1 for w in widths(denoiser)}
    for values in logits.values():
        if len(values) > 8:
            values[:2] = torch.tensor([-9.0, 9.0])
    noise = {w: 0.3 + 0.4 * torch.rand(len(w.groups), generator=drawn) for w in logits}
    return {w: values.requires_grad_() for w, values in logits.items()}, noise


def learned(pipe: Any, family: str, one: SamplingPlan, whole: Tensor, **how: Any) -> list[Tensor]:
    """The last latent under masks and the gradient of each width's logits."""
    logits, noise = gates(tiny.denoiser(pipe))
    factors = masks.masks({w: _hard_concrete.gate(logits[w], noise[w], 1e-8) for w in logits})
    with masked(tiny.denoiser(pipe), factors):
        last = differentiable(pipe, one, arguments(family), **how)
        return [last.detach(), *torch.autograd.grad((last - whole).square().mean(), list(logits.values()))]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_way_gives_the_logits_the_bits_of_the_full_graph(solver: str) -> None:
    """5.5, item 1: full graph, step by step, block by block, both, and with latents off the device."""
    pipe, family, planned = setting(solver)
    with follow(pipe, planned(4)) as run, torch.no_grad():
        pipe(**arguments(family))
    assert run.last is not None
    full = learned(pipe, family, planned(4), run.last, **FULL)
    for name, way in WAYS.items():
        assert same(learned(pipe, family, planned(4), run.last, **way), full), name
    for slope in full[1:]:
        shut = 2 if len(slope) > 8 else 0
        assert not slope[:shut].any() and bool(slope[shut:].all())
    assert not torch.equal(full[0], run.last)


def of_a_call(pipe: Any, family: str, one: SamplingPlan, factors: list[Tensor]) -> tuple[int, int]:
    """Bytes saved by the last call of the denoiser, without what all calls share; bytes of the sample that it is given."""
    seen: list[int] = []

    def look(call: Any, following: Any) -> Any:
        kwargs, args = dict(call.kwargs), call.args
        x = (args[0] if args else kwargs.pop("hidden_states" if "hidden_states" in kwargs else "sample")).detach()
        shared = [*factors, *call.module.parameters(), *call.module.buffers()]
        with torch.enable_grad(), saved([*shared, *(v for v in kwargs.values() if isinstance(v, Tensor))]) as count:
            out = call.execute(x.requires_grad_(), *args[1:], **kwargs)
            seen[:] = [count.held, x.nbytes]
        return out

    with follow(pipe, one, inside=[look]):
        pipe(**arguments(family))
    return seen[0], seen[1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_grows_by_a_call_or_by_one_latent(solver: str) -> None:
    """5.5, item 2: bytes a step, exactly; a history of several steps adds nothing, because its sums are linear."""
    pipe, family, planned = setting(solver)
    denoiser = tiny.denoiser(pipe)
    factors = {w.address: (w.what, torch.ones(w.count, requires_grad=True)) for w in widths(denoiser)}
    held = [one for _, one in factors.values()]

    def kept(length: int, **how: Any) -> int:
        with saved([*denoiser.parameters(), *held]) as count:
            last = differentiable(pipe, planned(length), arguments(family), **how)
        found = count.held
        last.sum().backward()
        assert count.held == 0 < found
        return found

    with masked(denoiser, factors):
        call, latent = of_a_call(pipe, family, planned(2), held)
        assert call > 10 * latent
        for way, slope in ((FULL, call), ({}, latent), (WAYS["nested"], latent), (WAYS["offload"], 0)):
            three, five, nine = (kept(length, **way) for length in (3, 5, 9))
            assert (nine - five) / 4 == (five - three) / 2
            assert (nine - five) / 4 == pytest.approx(slope, abs=64)  # numbers of the scheduler


def test_what_lives_at_the_peak_is_a_call_for_each_step_or_one_for_all() -> None:
    """5.5, item 2, and 3.1: W + T A of the full graph, W + T z' + A of the checkpointed one."""
    pipe, family, planned = setting("flow euler")
    denoiser, peaks = tiny.denoiser(pipe), {}
    factors = {w.address: (w.what, torch.ones(w.count, requires_grad=True)) for w in widths(denoiser)}
    held = [one for _, one in factors.values()]
    with masked(denoiser, factors):
        call, latent = of_a_call(pipe, family, planned(2), held)
        for name, way in {"full": FULL, "steps": {}}.items():
            for length in (4, 8):
                with Live() as live:
                    last = differentiable(pipe, planned(length), arguments(family), **way)
                    found = torch.autograd.grad(last.sum(), held)
                peaks[name, length] = live.peak
                del last, found
    full, steps = ((peaks[name, 8] - peaks[name, 4]) / 4 for name in ("full", "steps"))
    assert full == pytest.approx(call, rel=0.05) and latent <= steps <= 2 * latent + 64
    # Both at no step at all: what one call takes beyond what is kept of it, with the checkpointed one's single call.
    rest = {name: peaks[name, 8] - 8 * slope for name, slope in (("full", full), ("steps", steps))}
    assert rest["steps"] - rest["full"] == pytest.approx(call, rel=0.1)
