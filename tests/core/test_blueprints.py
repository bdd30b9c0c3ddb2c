"""Structures without weights, against what is known of the public models; inputs for every class of denoiser.

Parameter counts, percentages and MACs are those of an inventory made beforehand, independently of this code.
"""

import copy
import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from lissom.core import blueprints, cost
from lissom.core.anatomy import layers
from lissom.core.blueprints import Blueprint, example_inputs
from lissom.core.driving.steering import steered
from lissom.core.errors import UserError
from lissom.core.models import DENOISERS
from lissom.tests.core import tiny

load = functools.cache(blueprints.load)

PARAMETERS = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd3": 2_028_328_000,
    "sd3.5-medium": 2_243_171_520,
    "flux": 11_901_408_320,
    "pixart": 611_349_152,
    "dit-xl": 749_826_464,
}

# sites (a stage, then indices), parameters of each, of which in conv_shortcut, % of the MACs, side of the feature map
Row = tuple[str, str, int, int, float, int]
SD15: list[Row] = [
    ("down_blocks.0.resnets", "01", 2_255_040, 0, 1.88, 64),
    ("down_blocks.0.attentions", "01", 2_546_240, 0, 4.82, 64),
    ("down_blocks.1.resnets", "0", 6_558_080, 205_440, 1.46, 32),
    ("down_blocks.1.resnets", "1", 8_196_480, 0, 1.88, 32),
    ("down_blocks.1.attentions", "01", 9_188_480, 0, 2.47, 32),
    ("down_blocks.2.resnets", "0", 24_584_960, 820_480, 1.46, 16),
    ("down_blocks.2.resnets", "1", 31_138_560, 0, 1.88, 16),
    ("down_blocks.2.attentions", "01", 34_760_960, 0, 2.18, 16),
    ("down_blocks.3.resnets", "01", 31_138_560, 0, 0.47, 8),
    ("mid_block.resnets", "01", 31_138_560, 0, 0.47, 8),
    ("mid_block.attentions", "0", 34_760_960, 0, 0.57, 8),
    ("up_blocks.0.resnets", "012", 49_164_800, 3_278_080, 0.76, 8),
    ("up_blocks.1.resnets", "01", 49_164_800, 3_278_080, 3.03, 16),
    ("up_blocks.1.resnets", "2", 40_971_520, 2_458_880, 2.51, 16),
    ("up_blocks.1.attentions", "012", 34_760_960, 0, 2.18, 16),
    ("up_blocks.2.resnets", "0", 16_801_280, 1_229_440, 4.07, 32),
    ("up_blocks.2.resnets", "1", 12_704_000, 819_840, 3.03, 32),
    ("up_blocks.2.resnets", "2", 10_655_360, 615_040, 2.51, 32),
    ("up_blocks.2.attentions", "012", 9_188_480, 0, 2.47, 32),
    ("up_blocks.3.resnets", "0", 4_407_040, 307_520, 4.07, 64),
    ("up_blocks.3.resnets", "12", 3_382_400, 205_120, 3.03, 64),
    ("up_blocks.3.attentions", "012", 2_546_240, 0, 4.82, 64),
]
SDXL: list[Row] = [
    ("down_blocks.0.resnets", "01", 2_255_040, 0, 0.89, 128),
    ("down_blocks.1.resnets", "0", 6_558_080, 205_440, 0.69, 64),
    ("down_blocks.1.resnets", "1", 8_196_480, 0, 0.89, 64),
    ("down_blocks.1.attentions", "01", 20_832_000, 0, 3.19, 64),
    ("down_blocks.2.resnets", "0", 24_584_960, 820_480, 0.69, 32),
    ("down_blocks.2.resnets", "1", 31_138_560, 0, 0.89, 32),
    ("down_blocks.2.attentions", "01", 350_840_320, 0, 10.01, 32),
    ("mid_block.resnets", "01", 31_138_560, 0, 0.89, 32),
    ("mid_block.attentions", "0", 350_840_320, 0, 10.01, 32),
    ("up_blocks.0.resnets", "01", 49_164_800, 3_278_080, 1.44, 32),
    ("up_blocks.0.resnets", "2", 40_971_520, 2_458_880, 1.19, 32),
    ("up_blocks.0.attentions", "012", 350_840_320, 0, 10.01, 32),
    ("up_blocks.1.resnets", "0", 16_801_280, 1_229_440, 1.94, 64),
    ("up_blocks.1.resnets", "1", 12_704_000, 819_840, 1.44, 64),
    ("up_blocks.1.resnets", "2", 10_655_360, 615_040, 1.19, 64),
    ("up_blocks.1.attentions", "012", 20_832_000, 0, 3.19, 64),
    ("up_blocks.2.resnets", "0", 4_407_040, 307_520, 1.94, 128),
    ("up_blocks.2.resnets", "12", 3_382_400, 205_120, 1.44, 128),
]


@functools.cache
def counted(name: str) -> cost.Costs:
    return cost.count(load(name).denoiser, **load(name).example())


def size(name: str, address: str) -> int:
    return sum(p.numel() for p in load(name).denoiser.get_submodule(address).parameters())


def test_the_names() -> None:
    assert blueprints.names() == sorted(PARAMETERS)
    with pytest.raises(UserError, match="there are dit-xl, .* Did you mean 'sd15'"):
        blueprints.load("sd-15")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_to_the_last_digit(name: str) -> None:
    blueprint = load(name)
    assert isinstance(blueprint, Blueprint) and not blueprint.denoiser.training
    assert sum(p.numel() for p in blueprint.denoiser.parameters()) == PARAMETERS[name]
    tensors = [*blueprint.denoiser.parameters(), *blueprint.denoiser.buffers()]
    assert all(t.is_meta for t in tensors)  # nothing of the seven models was ever in memory


@pytest.mark.parametrize("name", PARAMETERS)
def test_configs_are_what_diffusers_takes(name: str) -> None:
    entry = json.loads((blueprints.FOLDER / f"{name}.json").read_text())
    taken = inspect.signature(getattr(diffusers, entry["denoiser"]).__init__).parameters
    assert set(entry["config"]) <= set(taken)
    pipeline = inspect.signature(getattr(diffusers, entry["pipeline"]).__init__).parameters
    assert entry["component"] in pipeline and entry["component"] in DENOISERS
    assert entry["source"].endswith(", config only")


@pytest.mark.parametrize(("name", "gmacs", "table"), [("sd15", 401.6, SD15), ("sdxl", 3380.6, SDXL)])
def test_unets_site_by_site(name: str, gmacs: float, table: list[Row]) -> None:
    blueprint, costs = load(name), counted(name)
    found = {layer.address: layer for layer in layers(blueprint.denoiser)}
    assert round(costs.total / 1e9, 1) == gmacs
    sites = [(f"{stage}.{i}", *row) for stage, indices, *row in table for i in indices]
    for address, params, shortcut, percent, side in sites:
        assert found[address].params == params, address
        kept = 0
        if shortcut:
            conv = blueprint.denoiser.get_submodule(f"{address}.conv_shortcut")
            assert sum(p.numel() for p in conv.parameters()) == shortcut
            kept = conv.weight.numel() * side**2  # the inventory counts whole sites, a skip keeps the shortcut
        assert 100 * (costs.layers[address] + kept) / costs.total == pytest.approx(percent, abs=0.005), address
    slots = {a for a in found if a.rpartition(".")[0].endswith((".resnets", ".attentions"))}
    assert slots == {site[0] for site in sites}  # the inventory is complete


def test_sd15_attention_is_counted_on_top_of_convolutions_and_linears() -> None:
    """The same number from the shapes that pass through the modules, and from those of the products of attention."""
    unet, macs = blueprints.load("sd15").denoiser, {"modules": 0, "attention": 0}

    def convolution(module: Any, args: Any, output: Any) -> None:
        macs["modules"] += module.weight.numel() * output.shape[-1] * output.shape[-2]

    def linear(module: Any, args: Any, output: Any) -> None:
        macs["modules"] += module.weight.numel() * output.numel() // output.shape[-1]

    def attention(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        text = kwargs.get("encoder_hidden_states")
        keys = output.shape[1] if text is None else text.shape[1]
        macs["attention"] += 2 * output.shape[1] * keys * output.shape[2]

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        unet(**load("sd15").example())
    assert round(macs["modules"] / 1e9, 1) == 338.6
    assert macs["modules"] + macs["attention"] == counted("sd15").total


def test_unet_parts() -> None:
    for name, part, params in [
        ("sd15", "conv_in", 11_840),
        ("sd15", "time_embedding", 2_050_560),
        ("sd15", "conv_norm_out", 640),
        ("sd15", "conv_out", 11_524),
        ("sd15", "mid_block.attentions.0.transformer_blocks.0", 31_479_040),
        ("sd15", "mid_block.attentions.0.transformer_blocks.0.attn1", 6_554_880),
        ("sd15", "mid_block.attentions.0.transformer_blocks.0.attn2", 5_244_160),
        ("sd15", "mid_block.attentions.0.transformer_blocks.0.ff", 19_672_320),
        ("sd15", "down_blocks.1.attentions.0.transformer_blocks.0", 8_366_720),
        ("sd15", "down_blocks.0.attentions.0.transformer_blocks.0", 2_340_160),
        ("sdxl", "add_embedding", 5_245_440),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.9", 34_755_840),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.9.attn1", 6_554_880),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.9.attn2", 8_520_960),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.9.ff", 19_672_320),
        ("sdxl", "down_blocks.1.attentions.0.transformer_blocks.0", 10_005_120),
    ]:
        assert size(name, part) == params, part
    stages = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"]
    millions = [round(size("sdxl", s) / 1e6, 2) for s in stages]
    assert millions == [5.43, 60.11, 757.40, 413.12, 1206.57, 106.34, 11.17]
    blocks = [m for m in load("sdxl").denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(blocks) == 70


# parameters of every block in order, and of all that is in none
TRANSFORMERS: dict[str, tuple[dict[str, list[int]], int]] = {
    "dit-xl": ({"transformer_blocks": 28 * [26_682_624]}, 2_712_992),
    "pixart": ({"transformer_blocks": 28 * [21_255_552]}, 16_193_696),
    "sd3": ({"transformer_blocks": [*23 * [84_980_736], 54_294_528]}, 19_476_544),
    "sd3.5-medium": ({"transformer_blocks": [*13 * [101_506_944], *10 * [84_980_992], 54_294_784]}, 19_476_544),
    "flux": ({"transformer_blocks": 19 * [339_831_296], "single_transformer_blocks": 38 * [141_591_808]}, 64_124_992),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_block_by_block(name: str) -> None:
    found = {layer.address: layer.params for layer in layers(load(name).denoiser)}
    lists, rest = TRANSFORMERS[name]
    for part, sizes in lists.items():
        assert len(load(name).denoiser.get_submodule(part)) == len(sizes)
        assert [found[f"{part}.{i}"] for i in range(len(sizes))] == sizes
    assert sum(sum(sizes) for sizes in lists.values()) + rest == PARAMETERS[name]


def test_dit_holds_an_embedder_per_block() -> None:
    assert size("dit-xl", "transformer_blocks.0.norm1.emb") == 2_777_472
    assert PARAMETERS["dit-xl"] - 27 * 2_777_472 == 674_834_720  # the "675M" of the paper, which has one
    assert counted("dit-xl").total / 1e9 == pytest.approx(118.6, abs=0.1)  # its "118.6 Gflops", which are MACs


def pixart(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "sample_size": tiny.SIDE,
        "num_layers": 2,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "in_channels": 4,
        "out_channels": 8,
        "caption_channels": tiny.WIDTH,
        "cross_attention_dim": 24,
    }
    return PixArtTransformer2DModel(**(config | changes)).eval()


def family(name: str) -> Callable[[], Any]:
    return lambda: tiny.denoiser(tiny.shared(name))


# a denoiser of every kind, the latent it takes and the channels it returns
DENOISER: dict[str, tuple[Callable[[], Any], tuple[int, int, int], int]] = {
    "sd": (family("sd"), (4, 8, 8), 4),
    "sdxl": (family("sdxl"), (4, 8, 8), 4),
    "sd with classes": (lambda: tiny.unet(num_class_embeds=7), (4, 16, 8), 4),
    "pixels": (family("ddim"), (3, 8, 8), 3),
    "pixels with classes": (
        lambda: diffusers.UNet2DModel.from_config(tiny.pixel_unet().config, num_class_embeds=7),
        (3, 8, 8),
        3,
    ),
    "sd3": (family("sd3"), (4, 8, 8), 4),
    "flux": (family("flux"), (1, 8, 12), 4),
    "pixart": (pixart, (4, 8, 8), 8),
    "pixart with sizes": (lambda: pixart(use_additional_conditions=True), (4, 8, 8), 8),
    "dit": (family("dit"), (4, 8, 8), 8),
}


def inputs(denoiser: Any, kind: str, **changes: Any) -> dict[str, Any]:
    given = {"batch": 2, "latent": DENOISER[kind][1], "text_tokens": 5, "device": "cpu", "dtype": torch.float32}
    return example_inputs(denoiser, **(given | changes))


def flat(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    nested = arguments.get("added_cond_kwargs", {})
    return {k: v for k, v in {**arguments, **nested}.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("kind", DENOISER)
def test_example_inputs_run(kind: str) -> None:
    make, (_, height, width), channels = DENOISER[kind]
    denoiser = make()
    with torch.no_grad():
        out = denoiser(**inputs(denoiser, kind)).sample
    expected = (2, height * width // 4, channels) if kind == "flux" else (2, channels, height, width)
    assert out.shape == expected and out.isfinite().all()
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("kind", DENOISER)
def test_an_image_has_the_same_inputs_in_any_batch_and_precision(kind: str) -> None:
    denoiser = DENOISER[kind][0]()
    two, one = flat(inputs(denoiser, kind)), flat(inputs(denoiser, kind, batch=1))
    half = flat(inputs(denoiser, kind, dtype=torch.bfloat16))
    for key, value in two.items():
        shared = key in ("img_ids", "txt_ids")  # Flux gives places once for the whole batch
        assert torch.equal(one[key], value if shared else value[:1]), key
        assert torch.equal(half[key], value.to(half[key].dtype)), key


@pytest.mark.parametrize("kind", DENOISER)
def test_meta_counts_as_the_cpu_does(kind: str) -> None:
    """Attention takes other operators there: the CPU's fused one here, batched products on meta."""
    denoiser = DENOISER[kind][0]()
    real = cost.count(denoiser, **inputs(denoiser, kind))
    assert set(real.layers) >= {layer.address for layer in layers(denoiser)}
    ghost = copy.deepcopy(denoiser).to("meta")
    assert cost.count(ghost, **inputs(ghost, kind, device="meta")) == real
    assert real.total == 2 * cost.count(denoiser, **inputs(denoiser, kind, batch=1)).total  # MACs are of the whole batch


def test_counting_a_forward_agrees_with_measuring_a_step() -> None:
    pipe, kwargs = tiny.shared("sd"), {"prompt": "a shoe", "guidance_scale": 1.0, **tiny.size()}
    bare = example_inputs(
        pipe.unet, batch=1, latent=(4, tiny.SIDE, tiny.SIDE), text_tokens=8, device="cpu", dtype=torch.float32
    )
    assert cost.count(pipe.unet, **bare) == cost.measure(pipe, kwargs)


def test_attention_of_other_devices_is_counted() -> None:
    """MPS runs an operator of its own, which can be called by name on meta tensors."""
    query, key = torch.empty(2, 4, 64, 16, device="meta"), torch.empty(2, 4, 77, 16, device="meta")
    mode = cost.FlopCounterMode(display=False, custom_mapping=cost._ATTENTION)
    with mode:
        torch.ops.aten._scaled_dot_product_attention_math_for_mps(query, key, key)
    assert mode.get_total_flops() // 2 == 2 * (2 * 4 * 64 * 77 * 16)


def test_inputs_for_a_steered_and_for_an_unknown_denoiser() -> None:
    pipe = tiny.shared("sd")
    plain = flat(inputs(pipe.unet, "sd"))
    with steered(pipe, []):
        assert flat(inputs(pipe.unet, "sd")).keys() == plain.keys()
    with pytest.raises(UserError, match="AutoencoderKL: .*UNet2DConditionModel"):
        inputs(pipe.vae, "sd")
    with pytest.raises(UserError, match="class_embed_type='timestep'"):
        inputs(tiny.unet(class_embed_type="timestep"), "sd")
