"""Convolutions of several experts: begin as what was there, mix for each image, are saved, and cost one convolution."""

import random
from typing import Any

import pytest
import torch
from lissom.core import cost, export, stock, surgery, weights
from lissom.core.candidate import Cut
from lissom.core.experts import Experts, mixed
from lissom.core.surgery import CannotCut
from lissom.prune import slim_unet
from lissom.prune._task import Task
from lissom.tests.core import tiny
from lissom.tests.prune import given
from torch import nn

INPUT = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def convolutions(count: int = 3, **changes: Any) -> list[nn.Conv2d]:
    torch.manual_seed(0)
    return [nn.Conv2d(4, 6, 3, **{"padding": 1, **changes}) for _ in range(count)]


@pytest.mark.parametrize("changes", [{}, {"stride": 2}, {"bias": False}])
def test_they_begin_as_the_convolution_that_was_there(changes: dict[str, Any]) -> None:
    several = convolutions(**changes)
    torch.testing.assert_close(mixed(several[0], several[1:])(INPUT), several[0](INPUT), atol=1e-6, rtol=1e-5)


def test_every_image_has_a_mixture_of_its_own() -> None:
    first, second, third = several = convolutions()
    made = Experts(several)
    with torch.no_grad():
        made.router.weight.normal_(), made.router.bias.normal_()
    for image, out in zip(INPUT, made(INPUT), strict=True):
        r = torch.tanh(made.router(image.mean((1, 2))))
        weight = first.weight + r[0] * (second.weight - first.weight) + r[1] * (third.weight - first.weight)
        bias = first.bias + r[0] * (second.bias - first.bias) + r[1] * (third.bias - first.bias)
        torch.testing.assert_close(out, nn.functional.conv2d(image[None], weight, bias, padding=1)[0], atol=1e-5, rtol=1e-4)


def test_router_and_experts_learn() -> None:
    made = Experts(convolutions())
    made(INPUT).square().mean().backward()
    assert made.router.weight.grad is not None and float(made.router.weight.grad.abs().max()) > 0
    with torch.no_grad():
        made.router.bias.fill_(0.5)
    made.zero_grad()
    made(INPUT).square().mean().backward()
    assert all(float(e.weight.grad.abs().max()) > 0 for e in made.experts)


def test_they_cost_about_one_convolution() -> None:
    several = convolutions()
    one = cost.count(several[0], INPUT[:1]).total
    extra = cost.count(mixed(several[0], several[1:]), INPUT[:1]).total - one
    assert 0 <= extra < 20  # the router


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (nn.Conv2d(4, 5, 3), r"experts have to have one shape, not \(6, 4, 3, 3\) and \(5, 4, 3, 3\)"),
        (nn.Linear(4, 6), "a Linear is no plain convolution"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "a Conv2d is no plain convolution"),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), "experts have to have one shape"),
    ],
)
def test_what_cannot_be_an_expert(other: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mixed(convolutions(1)[0], [other])


def slim(unet: Any, **settings: Any) -> tuple[Cut, ...]:
    task = Task(unet, (), (), 0.0, given.added)
    return slim_unet.prune(task, slim_unet.Config(**settings), random.Random(0)).cuts


def test_a_slim_unet_inherits_what_it_loses_and_computes_what_it_did() -> None:
    unet = tiny.unet(layers_per_block=2)
    arguments = (torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, tiny.WIDTH))
    plain, rich = slim(unet, layers_per_block=1), slim(unet, layers_per_block=1, experts=True)
    extra = [cut for cut in rich if cut not in plain]
    assert extra and all(cut.what == "replace" and str(cut.value).startswith("experts ") for cut in extra)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    with surgery.applied(unet, plain), torch.no_grad():
        expected, small = unet(*arguments).sample, surgery.parameters(unet)
    with surgery.applied(unet, rich), torch.no_grad():
        torch.testing.assert_close(unet(*arguments).sample, expected, atol=1e-5, rtol=1e-4)
        assert surgery.parameters(unet) > small
        assert "has convolutions of several experts" in str(stock.express(unet))
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items()) and before.keys() == unet.state_dict().keys()
    found = export.structure(unet, rich)
    kept = next(key for key in found.sources if ".experts.1." in key)
    address, _, rest = kept.partition(".experts.1.")
    cut = next(
        cut
        for cut in extra
        if cut.address.endswith(address.rpartition(".")[2]) and cut.address.split(".")[0] == address.split(".")[0]
    )
    assert found.opens == "remote_code" and found.sources[kept].key == f"{str(cut.value).split()[1]}.{rest}"
    assert any(key.endswith("router.weight") and source.key is None for key, source in found.sources.items())


def test_an_expert_that_is_still_there_is_refused() -> None:
    unet = tiny.unet(layers_per_block=2)
    address = "down_blocks.0.resnets.0.conv2"
    cut = Cut(address=address, what="replace", value="experts down_blocks.0.resnets.1.conv2")
    with pytest.raises(CannotCut, match=r"down_blocks.0.resnets.1.conv2: is an expert of another layer and still there itself"):
        surgery.apply(unet, [cut])
    assert isinstance(unet.get_submodule(address), nn.Conv2d)
    with pytest.raises(CannotCut, match=r"down_blocks.0.resnets.9.conv2: the denoiser has no such layer"):
        surgery.apply(unet, [cut.model_copy(update={"value": "experts down_blocks.0.resnets.9.conv2"})])


def test_weights_that_are_rounded_for_saving_are_so_inside_experts_too() -> None:
    """Experts read the weights of convolutions that they do not run."""
    made = Experts(convolutions())
    with torch.no_grad():
        made.router.weight.normal_(), made.router.bias.normal_()
    saved = Experts(convolutions())
    saved.load_state_dict({name: value.half().float() for name, value in made.state_dict().items()})
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with weights.rounded(made, torch.float16), torch.no_grad():
        assert torch.equal(made(INPUT), saved(INPUT))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(made(INPUT), saved(INPUT))
