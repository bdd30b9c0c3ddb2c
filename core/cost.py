"""What a step of a pipeline computes: multiply-accumulates (MACs) of its denoiser, in all and per layer that can be skipped.

Counted on the operators that really run: matrix products, convolutions and both products of attention. Normalisation,
activations and additions are not counted, as is the custom.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from . import anatomy
from .candidate import SamplingPlan, Scheduler, Step
from .driving.drive import drive
from .driving.refusals import check_pipeline
from .driving.run import Run
from .driving.schedulers import evaluations, kind_of
from .driving.steering import Call, Next, denoisers
from .driving.switch import lent, switch
from .sampling import silent


@dataclass(frozen=True)
class Costs:
    """The arithmetic of one image, or of the batch that `count` was given."""

    total: int  # MACs per image and evaluation of the denoiser, guidance's second half of the batch included
    layers: dict[str, int]  # address -> MACs per image and evaluation that skipping the layer saves, or reusing it
    params: int  # numbers in the parameters of the denoiser(s)
    stages: dict[str, int] = field(default_factory=dict)  # the same of what can be reused but not skipped (`anatomy.stages`)
    models: dict[str, int] = field(default_factory=dict)  # name -> MACs per image and evaluation of a step that it makes


def measure(pipe: Any, arguments: dict[str, Any], models: Iterable[str] = ()) -> Costs:
    """Run one real step of the pipeline with a batch of one, and count.

    arguments: of `pipe.__call__` for one image (a prompt or class label, guidance_scale, height, ...): costs depend on them.
    models: of those that were lent to the pipeline (`driving.switch`), which to count too, by a step of theirs.
    That is one evaluation of the denoiser, whatever the solver: a plan of a single step has no more.
    Raises CannotFollow for a pipeline that cannot be driven.
    """
    check_pipeline(pipe)
    costs = _one(pipe, arguments, None).costs(denoisers(pipe).values())
    others = {name: _one(pipe, arguments, name).costs(lent(pipe)[name].values()).total for name in models}
    return replace(costs, models=others)


def _one(pipe: Any, arguments: dict[str, Any], model: str | None) -> "_Counter":
    """One step, counted."""
    counter, plan = _Counter(), _one_step(pipe, model)
    accepted = set(inspect.signature(pipe.__call__).parameters)
    extra = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator("cpu").manual_seed(0)}
    with silent(pipe), drive(pipe, Run(plan, lent(pipe)), [switch, counter]):
        pipe(**{**{k: v for k, v in extra.items() if k in accepted}, **arguments})
    return counter


@torch.no_grad()
def count(denoiser: nn.Module, *args: Any, **kwargs: Any) -> Costs:
    """Run one bare forward of a denoiser with these arguments, and count it: MACs of the whole batch, no guidance added.

    On torch's meta device nothing is computed, so that a model of any size can be counted without its weights
    (`blueprints`); the counts are those of a real device.
    """
    counter = _Counter()
    counter.run(denoiser, functools.partial(denoiser, *args, **kwargs))
    return counter.costs([denoiser])


def plan_macs(costs: Costs, plan: SamplingPlan) -> int:
    """MACs per image of a whole plan, all evaluations of each step counted (`evaluations`).

    A layer that is reused costs as little as one that is skipped. One left out inside another counts once. A step that another
    model makes costs what that model does: `costs` must have been measured with it.

    >>> costs = Costs(total=100, layers={"a": 30, "a.b": 10, "c": 5}, params=0)
    >>> plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"),
    ...                     steps=(Step(timestep=9), Step(timestep=5, skip=("a", "a.b"), reuse=("c",))))
    >>> plan_macs(costs, plan)
    165
    """
    saved = costs.layers | costs.stages

    def one(step: Step) -> int:
        whole = costs.total if step.model is None else costs.models[step.model]
        return whole - sum(saved[a] for a in outermost(step.left_out))

    return sum(count * one(step) for count, step in zip(evaluations(plan), plan.steps, strict=True))


def outermost(addresses: tuple[str, ...]) -> list[str]:
    """Addresses that lie in no other one of the list."""
    return [a for a in addresses if not any(a.startswith(b + ".") for b in addresses)]


@dataclass
class _Counter:
    """What was counted so far. Also the interceptor that counts while a pipeline is driven."""

    flops: int = 0
    layers: dict[str, int] = field(default_factory=dict)  # address -> flops that skipping the layer saves
    stages: dict[str, int] = field(default_factory=dict)  # address -> flops of the block

    def __call__(self, call: Call, following: Next) -> Any:
        return self.run(call.module, functools.partial(following, call))

    def run(self, denoiser: nn.Module, forward: Callable[[], Any]) -> Any:
        """Count one forward of a denoiser, and pass on what it returns."""
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as mode, self._layers(denoiser, mode) as clock:
            output = forward()
        self.flops += clock.now()
        return output

    def costs(self, denoisers: Iterable[nn.Module]) -> Costs:
        """In MACs: two flops each, a multiplication and an addition."""
        params = sum(p.numel() for module in denoisers for p in module.parameters())
        layers, stages = ({a: flops // 2 for a, flops in found.items()} for found in (self.layers, self.stages))
        return Costs(self.flops // 2, layers, params, stages)

    @contextlib.contextmanager
    def _layers(self, denoiser: nn.Module, mode: FlopCounterMode) -> Iterator["_Clock"]:
        """Time every skippable layer by the count of flops; then run its substitute, whose flops a skip does not save."""
        clock, hooks = _Clock(mode), []
        skippable = [layer.address for layer in anatomy.layers(denoiser)]
        for address in (*skippable, *anatomy.stages(denoiser)):
            module = anatomy.uncompiled(denoiser).get_submodule(address)
            started: list[int] = []

            def start(module: nn.Module, args: Any, kwargs: Any, started: list[int] = started) -> None:
                started.append(clock.now())

            def stop(
                module: nn.Module,
                args: Any,
                kwargs: Any,
                output: Any,
                address: str = address,
                started: list[int] = started,
            ) -> None:
                spent = clock.now() - started.pop()
                if address not in skippable:
                    self.stages[address] = self.stages.get(address, 0) + spent
                    return
                kept = clock.aside(lambda: anatomy.substitute(module)(module, *args, **kwargs))
                self.layers[address] = self.layers.get(address, 0) + spent - kept

            hooks.append(module.register_forward_pre_hook(start, with_kwargs=True))
            hooks.append(module.register_forward_hook(stop, with_kwargs=True))
        try:
            yield clock
        finally:
            for hook in hooks:
                hook.remove()


class _Clock:
    """The flops counted so far, without those of substitutes that were only run to be measured."""

    def __init__(self, mode: FlopCounterMode) -> None:
        self.mode, self.excluded = mode, 0

    def now(self) -> int:
        return self.mode.get_total_flops() - self.excluded

    def aside(self, function: Callable[[], Any]) -> int:
        """The flops of a function that is none of the model's."""
        before = self.mode.get_total_flops()
        function()
        spent = self.mode.get_total_flops() - before
        self.excluded += spent
        return spent


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the fused attention kernels of CUDA, not those of the CPU and of MPS. Meta tensors take none: there attention
# falls apart into two batched matrix products, which are counted as such, to the same number.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_attention_math_for_mps: _attention_flops,
}


def _one_step(pipe: Any, model: str | None) -> SamplingPlan:
    """A plan of one step with the pipeline's scheduler, or a stand-in where that cannot follow: the arithmetic is the same."""
    scheduler = pipe.scheduler
    kind = kind_of(type(scheduler).__name__, dict(scheduler.config))
    if kind is None:
        flow = type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas")
        stand_in: Any = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler
        scheduler = stand_in.from_config(scheduler.config)
    middle = Step(timestep=scheduler.config.num_train_timesteps // 2, model=model)
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=(middle,))
