"""Which layers are offered, by class and place."""

from collections import Counter

import pytest
import torch
from lissom.core import anatomy
from lissom.core.anatomy import layers
from lissom.core.driving import watch
from lissom.tests.core import tiny

EXPECTED = {
    "sd": {
        ("resnet", "shortcut"): 8,
        ("attention", "input"): 4,
        ("transformer_block", "input"): 4,
        ("self_attention", "zero"): 4,
        ("cross_attention", "zero"): 4,
        ("feed_forward", "zero"): 4,
    },
    "ddim": {("resnet", "shortcut"): 8, ("attention", "input"): 4},
    "dit": {("transformer_block", "input"): 2, ("self_attention", "zero"): 2, ("feed_forward", "zero"): 2},
    "sd3": {("transformer_block", "input"): 2, ("feed_forward", "zero"): 3},  # the last block has no text feed-forward
    "flux": {("transformer_block", "input"): 4, ("feed_forward", "zero"): 4},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_layers_by_kind_and_removal(family: str) -> None:
    denoiser = tiny.denoiser(tiny.shared(family))
    found = layers(denoiser)
    assert Counter((layer.kind, layer.removal) for layer in found) == EXPECTED[family]
    for layer in found:
        assert layer.params == sum(p.numel() for p in denoiser.get_submodule(layer.address).parameters()) > 0
        assert layer.macs is None


def test_the_same_layers_while_driven() -> None:
    pipe = tiny.shared("sd")
    with watch(pipe):
        inside = layers(pipe.unet)
    assert inside == layers(pipe.unet)


def test_unknown_classes_and_places_are_not_listed() -> None:
    class Attention(torch.nn.Module):
        """Not diffusers' class: what it returns is anyone's guess."""

    from diffusers.models.attention import FeedForward

    odd = torch.nn.ModuleDict({"attn": Attention(), "ff": FeedForward(8)})
    assert layers(odd) == []
    with pytest.raises(KeyError):
        anatomy.substitute(odd["attn"])


def test_label_tables() -> None:
    assert anatomy.label_tables(tiny.denoiser(tiny.shared("dit"))) == 2 * 1001 * 16  # one per block, 1000 classes and none
    assert anatomy.label_tables(tiny.denoiser(tiny.shared("sd"))) == 0


@pytest.mark.parametrize("direction", ["up", "down", "plain"])
def test_resnet_shortcut_resizes_and_projects(direction: str) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=4, groups=4, up=direction == "up", down=direction == "down",
        output_scale_factor=2.0,
    )  # fmt: skip
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 4)
    for part in (block.conv2.weight, block.conv2.bias):
        torch.nn.init.zeros_(part)  # then nothing but the shortcut is left
    torch.testing.assert_close(anatomy.substitute(block)(block, x, temb), block(x, temb))
