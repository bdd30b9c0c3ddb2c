"""What takes a layer's place, and the class that carries cuts: both also as text, where lissom is not."""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from lissom.core import anatomy, export, standins, stock, surgery
from lissom.core.candidate import Cut
from lissom.core.opening import open_cut
from lissom.core.standins import Absent
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import keep, output, remove

CUTS: dict[str, list[Cut]] = {
    "sd": [
        *remove("down_blocks.1.resnets.0", "up_blocks.1.attentions.1", "up_blocks.2.attentions.0.transformer_blocks.0.attn1"),
        *(keep("down_blocks.0", 1), keep("up_blocks.2", 0, 2)),
        Cut(address="mid_block.attentions.0", what="replace", value="empty"),
        Cut(address="up_blocks.1.attentions.2.transformer_blocks.0.attn2", what="keep_heads", value=(1, 3)),
    ],
    "pixels": [
        *remove("mid_block.resnets.0", "down_blocks.1.attentions.0"),
        Cut(address="up_blocks.0.resnets.1", what="keep_channels", value=(0, 1, 2, 3, 12, 13, 14, 15)),
    ],
    "resampling": remove("down_blocks.0.downsamplers.0", "up_blocks.1.resnets.1"),
    "sd3": remove("transformer_blocks.0", "transformer_blocks.2", "transformer_blocks.1.ff"),
    "flux": remove("transformer_blocks.1", "single_transformer_blocks.0", "transformer_blocks.0.ff_context"),
    "dit": [
        *remove("transformer_blocks.0", "transformer_blocks.2.ff"),
        Cut(address="transformer_blocks.1.ff", what="keep_units", value=tuple(range(0, 64, 3))),
    ],
    "pixart": remove("transformer_blocks.0", "transformer_blocks.1.attn1"),
    "wan": remove("blocks.2", "blocks.0.ffn"),
}


def plain(cuts: list[Cut]) -> list[dict[str, Any]]:
    return [cut.plain() for cut in cuts]


@pytest.mark.parametrize("kind", CUTS)
def test_a_class_with_cuts_is_saved_and_opened_like_any_other(kind: str, tmp_path: Path) -> None:
    denoiser = cutting.shared(kind)
    build = standins.pruned(type(denoiser))
    made = build.from_config(denoiser.config, cuts=[plain(CUTS[kind])]).eval()
    with surgery.applied(denoiser, CUTS[kind]):
        made.load_state_dict(denoiser.state_dict(), strict=True)
        cut = output(denoiser)
    assert torch.equal(output(made), cut)
    made.save_pretrained(tmp_path)
    for low_memory in (True, False) if not denoiser._keep_in_fp32_modules else (True,):
        opened = open_cut(tmp_path, low_cpu_mem_usage=low_memory)
        assert type(opened).__name__ == f"Pruned{type(denoiser).__name__}" and isinstance(opened, type(denoiser))
        assert torch.equal(output(opened), cut)
    own = {k: v for k, v in opened.config.items() if not k.startswith("_")}
    assert own.pop("cuts") == [plain(CUTS[kind])]
    assert {k: _lists(v) for k, v in own.items()} == {k: _lists(v) for k, v in denoiser.config.items() if not k.startswith("_")}


def _lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("sequential", [False, True])
def test_an_emptied_layer_does_not_run_the_one_it_was_copied_from(sequential: bool) -> None:
    """accelerate sets the forward on the instance, bound to the original; sequential offload keeps the weights elsewhere."""
    unet = cutting.sd()
    empty = [Cut(address="mid_block.attentions.0", what="replace", value="empty")]
    wanted, whole = cutting.cut_output(unet, empty), output(unet)
    assert not torch.equal(wanted, whole)
    if sequential:
        accelerate.cpu_offload(unet, execution_device="cpu")
    else:
        add_hook_to_module(unet.mid_block.attentions[0], ModelHook())
    assert torch.equal(cutting.cut_output(unet, empty), wanted)
    assert torch.equal(output(unet), whole)


def test_groups_of_cuts_follow_one_another() -> None:
    """The addresses of the second group are those that the first one left."""
    unet = cutting.shared("sd")
    first = [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)]
    second = remove("up_blocks.1.resnets.1")
    with surgery.applied(unet, first), surgery.applied(unet, second):
        twice = output(unet)
    assert torch.equal(twice, cutting.cut_output(unet, [*first, *remove("up_blocks.1.resnets.2")]))
    made = standins.pruned(type(unet)).from_config(unet.config, cuts=[plain(first), plain(second)]).eval()
    with surgery.applied(unet, first), surgery.applied(unet, second):
        made.load_state_dict(unet.state_dict(), strict=True)
    assert torch.equal(output(made), twice)


@pytest.mark.parametrize("kind", ["sd", "dit", "flux"])
def test_the_text_of_an_artifact_stands_alone(kind: str, tmp_path: Path) -> None:
    """It imports nothing of lissom, and its class does what ours does."""
    denoiser = cutting.shared(kind)
    name = f"Pruned{type(denoiser).__name__}"
    file = tmp_path / "alone.py"
    file.write_text(export.module_text(type(denoiser).__name__))
    spec = importlib.util.spec_from_file_location("alone", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    ours = {k: v for k, v in sys.modules.items() if k.partition(".")[0] == "lissom"}
    try:
        for loaded in ours:
            del sys.modules[loaded]
        spec.loader.exec_module(module)
        assert not [loaded for loaded in sys.modules if loaded.partition(".")[0] == "lissom"]
    finally:
        sys.modules.update(ours)
    made = getattr(module, name).from_config(denoiser.config, cuts=[plain(CUTS[kind])]).eval()
    with surgery.applied(denoiser, CUTS[kind]):
        made.load_state_dict(denoiser.state_dict(), strict=True)
        assert torch.equal(output(made), output(denoiser))


def test_every_listed_class_has_a_stand_in() -> None:
    assert set(anatomy.CLASSES) == set(standins.STAND_INS)


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_a_stand_in_holds_no_more_than_what_stays(kind: str) -> None:
    """Neither of the layer's weights nor, once the model is copied, of the layer itself."""
    denoiser = cutting.KINDS[kind]()
    addresses = ["down_blocks.1.resnets.0", "mid_block.attentions.0"] if kind == "sd" else ["transformer_blocks.0"]
    layers = {layer.address: layer for layer in anatomy.layers(denoiser)}
    with surgery.applied(denoiser, remove(*addresses)):
        alone = copy.deepcopy(denoiser)
    for address in addresses:
        absent = alone.get_submodule(address)
        assert isinstance(absent, Absent)
        assert sum(p.numel() for p in absent.parameters()) == layers[address].kept
        assert not any(isinstance(v, torch.nn.Module) for v in vars(absent).values())
        assert type(denoiser.get_submodule(address)).__name__ in repr(absent)


def test_gradients_pass_through_what_is_left() -> None:
    """A cut model is trained again: all that is left learns, what went does not."""
    unet = cutting.KINDS["sd"]()
    gone = {f"down_blocks.1.resnets.0.{name}" for name, _ in unet.get_submodule("down_blocks.1.resnets.0").named_parameters()}
    with surgery.applied(unet, remove("down_blocks.1.resnets.0", "mid_block.attentions.0")):
        names = {name for name, _ in unet.named_parameters()}
        unet(**cutting.inputs(unet)).sample.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    assert gone - names == {name for name in gone if ".conv_shortcut." not in name}
    assert not [n for n, p in unet.named_parameters() if n.startswith("mid_block.attentions.0") and p.grad is not None]


def test_a_traced_block_passes_on_the_arguments_that_it_names() -> None:
    """By position or by name, one or several."""

    class Block(torch.nn.Module):
        def forward(self, x: Any, temb: Any, *, text: Any = None) -> Any:
            raise AssertionError("not called")

    x, temb, text = (torch.randn(2) for _ in range(3))
    assert Absent(Block(), "x")(x, temb) is x
    assert Absent(Block(), "text,x")(x, temb=temb, text=text) == (text, x)
    assert Absent(Block(), "temb")(x=x, temb=temb) is temb


def test_samplers_decide_which_sizes_a_unet_takes() -> None:
    """A U-Net counts its samplers to know when sizes need care on the way up; a stock model of that shape counts the same."""
    unet = cutting.shared("sd")
    before = unet.num_upsamplers
    with surgery.applied(unet, remove("down_blocks.2", "down_blocks.1.downsamplers.0", "up_blocks.0")):
        found = stock.express(unet)
        assert isinstance(found, stock.Stock)
        assert unet.num_upsamplers == found.model.num_upsamplers == before - 1
        odd = torch.randn(1, 4, 6, 10)  # divisible by two, not by four
        assert unet(odd, 5, torch.randn(1, 5, tiny.WIDTH)).sample.shape == odd.shape
    assert unet.num_upsamplers == before
