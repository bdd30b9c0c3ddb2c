"""A skipped layer is not executed, at no other step, and skipping it at all steps equals replacing it by its substitute."""

from typing import Any

import pytest
import torch
from lissom.core import anatomy
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import Run, follow
from lissom.core.driving.drive import drive
from lissom.core.driving.skip import absent, skip
from lissom.core.driving.steering import Call, Next
from lissom.tests.core import tiny

TIMES = (901, 640, 333)


def cases() -> list[tuple[str, str]]:
    """The last layer of each class and removal; the other families are made of the same classes."""
    found = {}
    for family in ("sd", "ddim", "dit", "sd3", "flux"):
        denoiser = tiny.denoiser(tiny.shared(family))
        for layer in anatomy.layers(denoiser):
            cls = type(denoiser.get_submodule(layer.address)).__name__
            found[family, cls, layer.kind, layer.removal] = (family, layer.address)
    return list(found.values())


def run(family: str, skips: list[tuple[str, ...]]) -> torch.Tensor:
    pipe = tiny.shared(family)
    steps = tuple(Step(timestep=t, skip=s) for t, s in zip(TIMES, skips, strict=True))
    with follow(pipe, SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps)) as state:
        pipe(**tiny.FAMILIES[family][1](1), generator=tiny.generators(1))
    assert state.last is not None
    return state.last


class Stub(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.__dict__["layer"]
        return anatomy.substitute(layer)(layer, *args, **kwargs)


@pytest.mark.parametrize(("family", "address"), cases())
def test_skip(family: str, address: str) -> None:
    denoiser = tiny.denoiser(tiny.shared(family))
    layer = denoiser.get_submodule(address)
    kept = getattr(layer, "conv_shortcut", None)
    leaves = [m for m in layer.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and m is not kept]
    executed: list[int] = []
    hook = leaves[-1].register_forward_hook(lambda *_: executed.append(1))
    whole = run(family, [(), (), ()])
    full = len(executed)
    executed.clear()
    once = run(family, [(), (address,), ()])
    assert full % 3 == 0 and len(executed) == full * 2 // 3
    executed.clear()
    always = run(family, [(address,)] * 3)
    assert not executed
    hook.remove()
    assert not torch.equal(once, whole) and not torch.equal(always, once)

    parent, _, name = address.rpartition(".")
    siblings = denoiser.get_submodule(parent)._modules
    siblings[name] = Stub(layer)
    try:
        assert torch.equal(run(family, [(), (), ()]), always)
    finally:
        siblings[name] = layer


def test_skipping_inside_a_skipped_layer_changes_nothing() -> None:
    outer = "transformer_blocks.1"
    both = run("dit", [(), (outer, f"{outer}.ff"), ()])
    assert torch.equal(both, run("dit", [(), (outer,), ()]))


def test_skips_live_only_inside_the_call() -> None:
    """Other interceptors, and whoever looks at the model between two calls, see all layers."""
    pipe = tiny.shared("dit")
    block = pipe.transformer.transformer_blocks[0]
    seen = []

    def look(call: Call, following: Next) -> Any:
        seen.append(type(block))
        out = following(call)
        seen.append(type(block))
        return out

    plan = SamplingPlan(
        scheduler=Scheduler.of(pipe.scheduler), steps=(Step(timestep=500, skip=("transformer_blocks.0",)), Step(timestep=2))
    )
    with drive(pipe, Run(plan), [look, skip]):
        pipe(class_labels=[1])
    assert set(seen) == {type(block)} and len(seen) == 4


def test_checkpointed_skips_recompute_after_the_run() -> None:
    """The body that a checkpoint runs twice applies and undoes its skips itself."""
    from torch.utils.checkpoint import checkpoint

    model = tiny.dit().transformer
    x, t, y = torch.randn(1, 4, 8, 8, requires_grad=True), torch.tensor([5]), torch.tensor([1])

    def body(x: torch.Tensor) -> Any:
        with absent(model, ("transformer_blocks.0", "transformer_blocks.1.ff")):
            return model(x, timestep=t, class_labels=y).sample

    (direct,) = torch.autograd.grad(body(x).square().sum(), x)
    loss = checkpoint(body, x, use_reentrant=False).square().sum()
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(direct, again)
