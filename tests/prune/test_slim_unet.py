"""The block maps of the papers: sizes to the last number, and every weight from where the papers take it."""

import random
import re
from typing import Any

import pytest
import torch
from lissom.core import export, surgery
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.prune import slim_unet
from lissom.prune._task import Task
from lissom.tests.prune import given

SIZES = {
    ("config:sd15", "bk-base"): 579_384_964,
    ("config:sd15", "bk-small"): 482_346_884,
    ("config:sd15", "bk-tiny"): 323_384_964,
    ("config:sdxl", "ssd-1b"): 1_331_334_404,
    ("config:sdxl", "vega"): 745_225_604,
    ("config:sdxl", "koala-1b"): 1_161_184_324,
    ("config:sdxl", "koala-700m"): 782_822_724,
}
ALL = pytest.mark.parametrize(("name", "preset"), SIZES)


def cuts(name: str, **settings: Any) -> tuple[Cut, ...]:
    task = Task(given.gauge(name).denoiser, (), (), 0.0, given.added)
    return slim_unet.prune(task, slim_unet.Config.model_validate(settings), random.Random(0)).cuts


@ALL
def test_a_preset_has_the_size_of_the_paper_and_a_stock_config(name: str, preset: str) -> None:
    found = export.structure(given.gauge(name).denoiser, cuts(name, preset=preset), plain_only=True)
    assert (found.params, found.opens) == (SIZES[name, preset], "stock")


def test_every_preset_is_sized_here() -> None:
    assert {preset for _, preset in SIZES} == set(slim_unet.PRESETS)


@ALL
def test_every_weight_is_inherited_by_the_map_of_the_paper(name: str, preset: str) -> None:
    """Student <- teacher, BK-SDM 3.2: pairs 0 down, 0 and 2 up; the tiny one lacks the innermost stage; first blocks stay."""
    found = export.structure(given.gauge(name).denoiser, cuts(name, preset=preset))
    bk = preset.startswith(("bk", "koala"))
    for key, source in found.sources.items():
        expected = key
        if preset == "bk-tiny":
            expected = re.sub(r"^up_blocks\.(\d)", lambda m: f"up_blocks.{int(m[1]) + 1}", expected)
        if bk:
            expected = re.sub(r"^(up_blocks\.\d\.\w+)\.1\.", r"\1.2.", expected)
        assert (source.key, source.rows, source.columns) == (expected, (), ())


def test_the_configs_are_those_that_are_published() -> None:
    def config(name: str, preset: str) -> dict[str, Any]:
        return export.structure(given.gauge(name).denoiser, cuts(name, preset=preset)).config

    tiny = config("config:sd15", "bk-tiny")
    assert (tiny["layers_per_block"], tiny["mid_block_type"]) == (1, None)
    assert tiny["block_out_channels"] == [320, 640, 1280] and tiny["down_block_types"] == ["CrossAttnDownBlock2D"] * 3
    ssd = config("config:sdxl", "ssd-1b")
    assert ssd["transformer_layers_per_block"][1:] == [2, 4] and ssd["mid_block_type"] == "UNetMidBlock2D"
    assert ssd["reverse_transformer_layers_per_block"][:2] == [[4, 4, 10], [2, 1, 1]]
    koala = config("config:sdxl", "koala-1b")
    assert koala["layers_per_block"] == 1 and koala["transformer_layers_per_block"][1:] == [2, 6]
    assert koala["mid_block_type"] == "UNetMidBlock2DCrossAttn"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd", {"layers_per_block": [1, 2, 1], "middle": "none"}),
        ("sd", {"layers_per_block": 1, "stages": 2}),
        ("sd", {"stages": 2, "middle": "resnet"}),
        ("sd", {"down_depths": [0, 1, 0], "up_depths": [0, [1, 0, 1], 0], "middle_depth": 0}),
        ("sd, three pairs", {"layers_per_block": 2}),
        ("sd, two blocks", {"down_depths": [1, [2, 0], 0], "middle_depth": 1}),
        (
            "xl",
            {"layers_per_block": [2, 1, 2], "down_depths": [0, 1, [2, 3]], "up_depths": [[3, 1, 2], 2, 0], "middle_depth": 2},
        ),
        ("xl", {"down_depths": [0, 0, 0], "up_depths": [0, 0, 0], "middle_depth": 0}),
        ("pixel", {"middle": "none"}),
    ],
)
def test_a_map_of_ones_own_runs_and_says_what_it_leaves(name: str, settings: dict[str, Any]) -> None:
    gauge = given.gauge(name)
    found = cuts(name, **settings)
    with surgery.applied(gauge.denoiser, found), torch.no_grad():
        out = gauge.denoiser(**gauge.probe(), return_dict=False)[0]
        small = gauge.params - surgery.parameters(gauge.denoiser)
        unet = gauge.denoiser
        if isinstance(settings.get("layers_per_block"), list):
            assert [len(block.resnets) for block in unet.down_blocks] == settings["layers_per_block"]
            assert [len(block.resnets) - 1 for block in unet.up_blocks] == settings["layers_per_block"][::-1]
        if "stages" in settings:
            assert len(unet.down_blocks) == len(unet.up_blocks) == settings["stages"]
    assert bool(torch.isfinite(out).all()) and small > 0
    if name != "pixel":  # every map whose middle goes with its last stage has a stock config
        assert export.structure(gauge.denoiser, found).opens == "stock"


def test_what_a_map_says_overrules_its_preset() -> None:
    unet = given.gauge("config:sdxl").denoiser
    without = export.structure(unet, cuts("config:sdxl", preset="koala-1b", middle="none"))
    assert without.config["mid_block_type"] is None and without.opens == "stock"
    assert without.params < SIZES["config:sdxl", "koala-1b"]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (
            "config:sdxl",
            {"preset": "bk-base"},
            "preset bk-base is for a U-Net of Stable Diffusion 1 or 2's shape .* has none, 2, 10",
        ),
        ("config:sd15", {"preset": "vega"}, r"is for a U-Net of SDXL's shape \(transformer blocks per stage: none, 2, 10"),
        ("pixel", {"preset": "bk-tiny"}, "this one has none, none"),
        ("config:dit-xl", {"preset": "bk-tiny"}, "DiTTransformer2DModel is no U-Net. Use laptop"),
        ("config:sd15", {"preset": "bk-smal"}, "no preset 'bk-smal'.*Did you mean 'bk-small'"),
        ("config:sd15", {}, "say what stays"),
        ("sd", {"layers_per_block": 3}, "has 2 layers and would keep 3"),
        ("sd", {"layers_per_block": 0}, "has 2 layers and would keep 0"),
        ("sd", {"layers_per_block": [1, 1]}, r"layers_per_block: \[1, 1\] has 2 entries, 3 are needed"),
        ("sd", {"down_depths": [2, 1, 0]}, r"down_blocks\.0\.attentions\.0 has 1 transformer blocks and cannot keep 2"),
        ("sd", {"up_depths": [0, [1, 1], 1]}, r"depths of up_blocks\.1: \[1, 1\] has 2 entries, 3 are needed"),
        ("sd", {"stages": 4}, "stages: 4: the U-Net has 3"),
        ("sd", {"middle_depth": 2}, r"mid_block\.attentions\.0 has 1 transformer blocks and cannot keep 2"),
        ("sd", {"middle": "none", "middle_depth": 1}, "middle_depth=1: with middle=none no attention is left"),
        ("pixel", {"down_depths": [1, 1]}, "has 0 transformer blocks and cannot keep 1"),
    ],
)
def test_a_map_that_does_not_fit_is_one_clear_sentence(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as e:
        cuts(name, **settings)
    assert str(e.value).startswith("slim_unet: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("settings", [{"down_depths": [-1, 1, 1]}, {"layers_per_block": -1}, {"stages": 0}, {"midle": "none"}])
def test_settings_out_of_range_or_unknown_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="greater than or equal|Extra inputs"):
        slim_unet.Config.model_validate(settings)


def test_a_u_net_of_other_blocks_is_refused() -> None:
    from diffusers import UNet3DConditionModel

    types: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    unet = UNet3DConditionModel(
        **types, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4
    )
    with pytest.raises(UserError, match="has a CrossAttnDownBlock3D, which is not made of pairs"):
        slim_unet.prune(Task(unet, (), (), 0.0, given.added), slim_unet.Config(layers_per_block=1), random.Random(0))
