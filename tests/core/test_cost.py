"""MACs against hand-computed values, and that a skip saves what it is said to save."""

from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from lissom.core import cost
from lissom.core.anatomy import layers, stages
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.cost import Costs, measure, plan_macs
from lissom.core.driving import CannotFollow, Run
from lissom.core.driving.drive import drive
from lissom.core.driving.reuse import reuse
from lissom.core.driving.skip import skip
from lissom.core.driving.steering import Call, Next
from lissom.tests.core import tiny


def arguments(family: str) -> dict[str, Any]:
    return {k: v for k, v in tiny.FAMILIES[family][1](1).items() if k != "output_type"}


def dit_by_hand(width: int, tokens: int, batch: int) -> int:
    """One forward of the tiny DiT: patches, per block (embeddings, modulation, attention, feed-forward), output head."""
    patches = tokens * (4 * 2 * 2) * width
    embed = 256 * width + width * width  # timestep MLP
    head = width * width * 2 + tokens * width * (8 * 2 * 2) + embed
    modulation = width * 6 * width
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    feed_forward = 2 * tokens * width * 4 * width
    blocks = 2 * (embed + modulation + attention + feed_forward)
    return batch * (patches + blocks + head)


def test_dit_by_hand() -> None:
    guided = measure(tiny.shared("dit"), {"class_labels": [1], "guidance_scale": 3.0})
    plain = measure(tiny.shared("dit"), {"class_labels": [1], "guidance_scale": 1.0})
    assert guided.total == 2 * plain.total  # guidance doubles the batch
    assert plain.total == dit_by_hand(width=16, tokens=16, batch=1)
    assert plain.layers["transformer_blocks.0.attn1"] == 4 * 16 * 16 * 16 + 2 * 16 * 16 * 16
    assert plain.layers["transformer_blocks.0.ff"] == 2 * 16 * 16 * 64
    assert plain.params == sum(p.numel() for p in tiny.denoiser(tiny.shared("dit")).parameters())


def test_resnet_is_net_of_its_shortcut() -> None:
    costs = measure(tiny.shared("ddim"), {})
    unet = tiny.denoiser(tiny.shared("ddim"))
    block = unet.down_blocks[1].resnets[0]  # 8 -> 16 channels at 4 x 4 pixels
    assert block.conv_shortcut is not None
    time = block.time_emb_proj.in_features * 16
    assert costs.layers["down_blocks.1.resnets.0"] == 16 * 9 * (8 * 16 + 16 * 16) + time


@pytest.mark.parametrize("family", ["sd", "ddim", "dit", "sd3", "flux"])
def test_skipping_saves_what_is_said(family: str) -> None:
    """Count again with the layer skipped: an independent measurement of every class."""
    pipe, costs = tiny.shared(family), measure(tiny.shared(family), arguments(family))
    found = layers(tiny.denoiser(pipe))
    assert set(costs.layers) == {layer.address for layer in found}
    for layer in {(layer.kind, layer.removal): layer for layer in found}.values():
        counter = cost._Counter()
        plan = SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=(Step(timestep=500, skip=(layer.address,)),))
        with drive(pipe, Run(plan), [counter, skip]):
            pipe(**arguments(family), num_inference_steps=1)
        assert costs.total - counter.flops // 2 == costs.layers[layer.address] > 0


@pytest.mark.parametrize("family", ["sd", "ddim", "dit", "sd3", "flux"])
def test_reusing_saves_what_is_said(family: str) -> None:
    """Count a second step in which the layer, or the block of a U-Net, is reused."""
    pipe, costs = tiny.shared(family), measure(tiny.shared(family), arguments(family))
    found = layers(tiny.denoiser(pipe))
    assert set(costs.stages) == set(stages(tiny.denoiser(pipe)))
    for address in (*costs.stages, *{(layer.kind, layer.removal): layer.address for layer in found}.values()):
        counted: list[int] = []

        def count(call: Call, following: Next, counted: list[int] = counted) -> Any:
            counter = cost._Counter()
            out = counter(call, following)
            counted.append(counter.flops // 2)
            return out

        steps = (Step(timestep=900), Step(timestep=500, reuse=(address,)))
        plan = SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps)
        with drive(pipe, Run(plan), [count, reuse]):
            pipe(**arguments(family))
        assert costs.total - counted[1] == (costs.layers | costs.stages)[address] > 0
        assert plan_macs(costs, plan) == costs.total + counted[1]


def test_plan_counts_nested_skips_once() -> None:
    costs = Costs(total=100, layers={"a": 30, "a.b": 10, "ab": 5}, params=0)
    steps = (Step(timestep=9), Step(timestep=5, skip=("a.b", "ab")), Step(timestep=2, skip=("a", "a.b", "ab")))
    assert plan_macs(costs, SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=steps)) == 100 + 85 + 65


def test_plan_counts_every_evaluation_of_a_step() -> None:
    costs = Costs(total=100, layers={"a": 30}, params=0)
    steps = (Step(timestep=9, skip=("a",)), Step(timestep=5), Step(timestep=2, skip=("a",)))

    def macs(name: str) -> int:
        return plan_macs(costs, SamplingPlan(scheduler=Scheduler(name=name), steps=steps))

    assert macs("HeunDiscreteScheduler") == macs("FlowMatchHeunDiscreteScheduler") == 2 * 70 + 2 * 100 + 70
    assert macs("PNDMScheduler") == 2 * 70 + 100 + 70
    assert macs("UniPCMultistepScheduler") == macs("LCMScheduler") == 70 + 100 + 70


def test_any_scheduler_can_be_measured() -> None:
    pipe = tiny.sd(scheduler=PNDMScheduler(**tiny.SD_BETAS, skip_prk_steps=True))
    assert measure(pipe, arguments("sd")).total == measure(tiny.shared("sd"), arguments("sd")).total


def test_measuring_leaves_nothing_behind() -> None:
    pipe = tiny.shared("sd")
    before = {name: type(module) for name, module in pipe.unet.named_modules()}
    measure(pipe, arguments("sd"))
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in pipe.unet.modules())
    with pytest.raises(CannotFollow):
        measure(torch.nn.Linear(1, 1), {})
