"""Which layers are offered, by class and place."""

from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from lissom.core import anatomy, surgery
from lissom.core.anatomy import layers, traced
from lissom.core.candidate import Cut
from lissom.core.driving import watch
from lissom.tests.core import cutting, tiny

EXPECTED = {
    "sd": {
        ("resnet", "shortcut"): 8,
        ("attention", "input"): 4,
        ("transformer_block", "input"): 4,
        ("self_attention", "zero"): 4,
        ("cross_attention", "zero"): 4,
        ("feed_forward", "zero"): 4,
        ("middle", "input"): 1,
    },
    "ddim": {("resnet", "shortcut"): 8, ("attention", "input"): 4, ("middle", "input"): 1},
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


@pytest.mark.parametrize("kind", cutting.KINDS)
def test_what_stays_of_a_layer_is_what_its_stand_in_needs(kind: str) -> None:
    """A ResNet's 1x1 shortcut and resampling, the embedder in the first block of a DiT, of all others nothing."""
    denoiser = cutting.shared(kind)
    for layer in layers(denoiser):
        module = denoiser.get_submodule(layer.address)
        parts = (
            [getattr(module, n, None) for n in ("conv_shortcut", "upsample", "downsample")] if layer.kind == "resnet" else []
        )
        if kind == "dit" and layer.address == "transformer_blocks.0":
            parts = [module.norm1.emb]
        stays = sum(p.numel() for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters())
        assert (layer.kept, layer.freed) == (stays, layer.params - stays), layer.address


def ltx() -> tuple[Any, dict[str, Any]]:
    """A transformer of one stream whose class is not known here, and arguments of its forward."""
    torch.manual_seed(0)
    widths = {"attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 16}
    model = diffusers.LTXVideoTransformer3DModel(in_channels=4, num_attention_heads=4, num_layers=3, **widths)
    text = {"encoder_hidden_states": torch.randn(1, 6, 16), "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool)}
    shape = {"num_frames": 1, "height": 4, "width": 4, "timestep": torch.tensor([5])}
    return tiny._trained(model), {"hidden_states": torch.randn(1, 16, 4), **text, **shape}


def auraflow() -> tuple[Any, dict[str, Any]]:
    """The same of two streams, and of one, in two lists."""
    torch.manual_seed(0)
    widths = {"attention_head_dim": 8, "caption_projection_dim": 32, "joint_attention_dim": 32, "pos_embed_max_size": 64}
    model = diffusers.AuraFlowTransformer2DModel(num_mmdit_layers=2, num_single_dit_layers=3, num_attention_heads=4, **widths)
    image = torch.randn(1, 4, 8, 8)
    return tiny._trained(model), {
        "hidden_states": image, "encoder_hidden_states": torch.randn(1, 5, 32), "timestep": torch.tensor([0.5]),
    }  # fmt: skip


TRACED: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "one stream": (ltx, [(f"transformer_blocks.{i}", "hidden_states") for i in range(3)]),
    "two streams": (
        auraflow,
        [(f"joint_transformer_blocks.{i}", "encoder_hidden_states,hidden_states") for i in range(2)]
        + [(f"single_transformer_blocks.{i}", "hidden_states") for i in range(3)],
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_blocks_of_unknown_classes_are_found_by_watching_a_forward(name: str) -> None:
    make, wanted = TRACED[name]
    model, arguments = make()
    assert layers(model) == []
    before = dict(model.named_modules())

    def forward() -> Any:
        with torch.no_grad():
            return model(**arguments, return_dict=False)[0]

    whole, found = forward(), traced(model, forward)
    assert [(layer.address, layer.returns) for layer in found] == wanted
    assert not any(m._forward_hooks for m in before.values())
    for layer in found:
        block = model.get_submodule(layer.address)
        assert layer.kind == "transformer_block" and layer.params == sum(p.numel() for p in block.parameters())
        with surgery.applied(model, [Cut(address=layer.address, what="remove", value=layer.returns)]):
            cut = forward()
            assert layer.address not in [other.address for other in traced(model, forward)]
        hook = block.register_forward_hook(_passed_on, with_kwargs=True)  # what the block makes is thrown away
        assert torch.equal(forward(), cut) and not torch.equal(cut, whole)
        hook.remove()


def _passed_on(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    given = {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)), **kwargs}
    return (given["encoder_hidden_states"], given["hidden_states"]) if isinstance(output, tuple) else given["hidden_states"]


class Toy(torch.nn.Module):
    """A list of blocks that a forward passes x and a second tensor of its shape through."""

    def __init__(self, *blocks: torch.nn.Module) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)
        self.single = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    def forward(self, x: Any, guide: Any) -> Any:
        for block in self.blocks:
            x = block(guide, x) if isinstance(block, Mix) else block(x)
        return self.single[0](x)


class Mix(torch.nn.Module):
    """Adds a little of `guide` to x, and takes them in the order that misleads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, guide: Any, x: Any) -> Any:
        return x + 0.01 * self.inner(guide)


def layer_of(width: int, other: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(width, other), torch.nn.Tanh())


def test_of_two_arguments_the_one_is_passed_on_that_the_output_is_like() -> None:
    torch.manual_seed(0)
    toy = Toy(Mix(), layer_of(4, 4), layer_of(4, 8), layer_of(8, 4))  # nothing that the last two take is like what they return
    x, guide = torch.randn(3, 4), torch.randn(3, 4)
    assert [(layer.address, layer.kind, layer.returns) for layer in traced(toy, lambda: toy(x, guide))] == [
        ("blocks.0", "block", "x"),
        ("blocks.1", "block", "input"),
    ]
    ghost = toy.to("meta")  # shapes alone cannot tell x from guide
    assert [layer.address for layer in traced(ghost, lambda: ghost(x.to("meta"), guide.to("meta")))] == ["blocks.1"]


def test_tracing_leaves_alone_what_is_known_and_ends_well_if_the_forward_does_not() -> None:
    unet = cutting.shared("sd")
    assert traced(unet, lambda: cutting.output(unet)) == []
    toy = Toy(Mix())
    with pytest.raises(ZeroDivisionError):
        traced(toy, lambda: 1 // 0)
    assert not any(m._forward_hooks for m in toy.modules())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_everything_in_known_families_is_listed(family: str) -> None:
    assert anatomy.unlisted(tiny.denoiser(tiny.shared(family))) == []


def test_what_classes_do_not_explain_is_traced_beside_known_layers() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    class Odd(torch.nn.Module):
        """A residual block of nobody's."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0.1 * self.conv(x)

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resnets = torch.nn.ModuleList([ResnetBlock2D(in_channels=8, temb_channels=4, groups=4)])
            self.motion = torch.nn.ModuleList([Odd(), Odd()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.motion:
                x = layer(self.resnets[0](x, torch.zeros(1, 4)))
            return x

    net = Mixed().eval()
    assert [a for a, _ in anatomy.unlisted(net)] == ["motion.0", "motion.1"]
    found = anatomy.traced(net, lambda: net(torch.randn(1, 8, 4, 4)))
    assert [(x.address, x.kind, x.returns) for x in found] == [("motion.0", "block", "x"), ("motion.1", "block", "x")]
