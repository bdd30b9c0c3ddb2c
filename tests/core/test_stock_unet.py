"""Cut U-Nets as stock configs: each computes what the cut one computes, and has the parameters that are known of it."""

import functools
import json
import random
from typing import Any

import pytest
import torch
from lissom.core import anatomy, blueprints, cost, export, stock, surgery
from lissom.core.candidate import Cut
from lissom.core.stock import Stock
from lissom.tests.core import cutting
from lissom.tests.core.cutting import cut_output, keep, output, remove

load = functools.cache(blueprints.load)


def empty(*addresses: str) -> list[Cut]:
    return [Cut(address=a, what="replace", value="empty") for a in addresses]


def inside(attention: str, *blocks: int) -> list[Cut]:
    return remove(*(f"{attention}.transformer_blocks.{i}" for i in blocks))


HEADS: dict[str, Any] = {"attention_head_dim": (2, 4, 8)}  # in truth the numbers of heads: shapes do not show them
BASE = [*(keep(f"down_blocks.{k}", 0) for k in range(3)), *(keep(f"up_blocks.{k}", 0, 2) for k in range(3))]
TIED = [*inside("down_blocks.2.attentions.0", 1), *inside("mid_block.attentions.0", 0)]
RAGGED = [
    *inside("down_blocks.1.attentions.1", 0),
    *inside("up_blocks.0.attentions.2", 0, 1),
    *inside("up_blocks.1.attentions.1", 0, 1),
]

# what: (U-Net, its settings, cuts, what changes in the config)
STOCK: dict[str, tuple[str, dict[str, Any], list[Cut], dict[str, Any]]] = {
    "a pair of every stage": ("sd", {}, BASE, {"layers_per_block": 1}),
    "the other pairs": (
        "sd",
        {},
        [keep("down_blocks.2", 1), keep("up_blocks.0", 1, 2)],
        {"layers_per_block": [2, 2, 1]},
    ),
    "no middle": ("sd", {}, remove("mid_block"), {"mid_block_type": None}),
    "nothing in the middle": (
        "sd",
        {},
        remove("mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"),
        {"mid_block_type": None},
    ),
    "the middle's first ResNet": (
        "sd",
        {},
        remove("mid_block.attentions.0", "mid_block.resnets.1"),
        {"mid_block_type": "UNetMidBlock2D"},
    ),
    "the middle's second ResNet": (
        "sd",
        {},
        remove("mid_block.attentions.0", "mid_block.resnets.0"),
        {"mid_block_type": "UNetMidBlock2D"},
    ),
    "a middle without blocks": (
        "sd",
        {},
        inside("mid_block.attentions.0", 0),
        {"transformer_layers_per_block": [1, 1, 0]},
    ),
    "no attention on a stage's way down": (
        "sd",
        {},
        remove("down_blocks.0.attentions.0", "down_blocks.0.attentions.1"),
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]},
    ),
    "no attention on a stage's way up": (
        "sd",
        HEADS,
        remove(*(f"up_blocks.1.attentions.{i}" for i in range(3))),
        {"up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]},
    ),
    "an emptied attention": (
        "sd",
        {},
        empty("down_blocks.1.attentions.1"),
        {"transformer_layers_per_block": [1, [1, 0], 1], "reverse_transformer_layers_per_block": [1, 1, 1]},
    ),
    "emptied and renumbered": (
        "sd",
        {},
        [*empty("up_blocks.1.attentions.2"), keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)],
        {"layers_per_block": [2, 1, 2]},
    ),
    "without the innermost stage": (
        "sd",
        {},
        remove("down_blocks.2", "down_blocks.1.downsamplers.0", "up_blocks.0"),
        {"block_out_channels": [8, 16], "mid_block_type": "UNetMidBlock2DCrossAttn"},
    ),
    "without the innermost stage and the middle": (
        "sd",
        HEADS,
        remove("down_blocks.2", "down_blocks.1.downsamplers.0", "up_blocks.0", "mid_block"),
        {"block_out_channels": [8, 16], "attention_head_dim": [2, 4]},
    ),
    "as BK-SDM's tiny": (
        "sd",
        {},
        [*BASE, *remove("down_blocks.2", "down_blocks.1.downsamplers.0", "up_blocks.0", "mid_block")],
        {"layers_per_block": 1, "mid_block_type": None, "down_block_types": ["CrossAttnDownBlock2D"] * 2},
    ),
    "the same fewer blocks everywhere": (
        "sdxl",
        {},
        [
            *inside("mid_block.attentions.0", 0),
            *(c for a in ("down_blocks.2.attentions.%d", "up_blocks.0.attentions.%d") for i in range(2) for c in inside(a % i, 1)),
            *inside("up_blocks.0.attentions.2", 2),
        ],
        {"transformer_layers_per_block": [1, 2, 2], "reverse_transformer_layers_per_block": None},
    ),
    "tied to the middle": (
        "sdxl",
        {},
        TIED,
        {"transformer_layers_per_block": [1, 2, [2, 3]], "reverse_transformer_layers_per_block": [3, 2, 1]},
    ),
    "every attention its own number": (
        "sdxl",
        HEADS,
        RAGGED,
        {"transformer_layers_per_block": [1, [2, 1], 3], "reverse_transformer_layers_per_block": [[3, 3, 1], [2, 0, 2], 1]},
    ),
    "untied, one ResNet in the middle": (
        "sdxl",
        {},
        [*inside("down_blocks.2.attentions.0", 0, 2), *remove("mid_block.attentions.0", "mid_block.resnets.1")],
        {"transformer_layers_per_block": [1, 2, [1, 3]], "mid_block_type": "UNetMidBlock2D"},
    ),
    "pairs and depths": (
        "sdxl",
        {},
        [*BASE, *TIED, *inside("up_blocks.0.attentions.2", 1)],
        {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 2], "reverse_transformer_layers_per_block": [[3, 2], 2, 1]},
    ),
    "pixels, pairs": (
        "pixels",
        {},
        BASE,
        {"layers_per_block": 1},
    ),
    "pixels, the middle's attention": ("pixels", {}, remove("mid_block.attentions.0"), {"add_attention": False}),
    "pixels, no middle": ("pixels", {}, remove("mid_block"), {"mid_block_type": None}),
    "pixels, no attention in a stage": (
        "pixels",
        {},
        remove(*(f"{a}.attentions.{i}" for a, n in (("down_blocks.1", 2), ("up_blocks.1", 3)) for i in range(n))),
        {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3},
    ),
    "pixels, without the innermost stage": (
        "pixels",
        {},
        remove("down_blocks.2", "down_blocks.1.downsamplers.0", "up_blocks.0"),
        {"block_out_channels": [8, 16], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_model_computes_what_the_cut_one_computes(name: str) -> None:
    kind, settings, cuts, changes = STOCK[name]
    unet = getattr(cutting, kind)(**settings)
    with surgery.applied(unet, cuts):
        cut, found = output(unet), stock.express(unet)
        assert isinstance(found, Stock), found
        stocked = cutting.stock_model(unet, found)
    assert not torch.equal(cut, output(unet))
    torch.testing.assert_close(output(stocked), cut, rtol=0, atol=1e-6)
    config = json.loads(json.dumps(found.config))
    assert {k: config[k] for k in changes} == changes and config == found.config
    assert surgery.parameters(stocked) == export.structure(unet, cuts).params


def test_any_cuts_that_a_config_can_express_are_expressed_exactly() -> None:
    """Drawn at random: pairs, blocks, the middle, and ResNets or attentions alone, which no config has."""
    unet, rng, kinds = cutting.sdxl(), random.Random(0), {Stock: 0, str: 0}
    blocks = [layer.address for layer in anatomy.layers(unet) if layer.kind == "transformer_block"]
    pairs = surgery.pairs(unet)
    for _ in range(14):
        ways = {two[0].address: two for two in rng.sample(pairs, len(pairs))}
        cuts = [cut for two in ways.values() if rng.random() < 0.4 for cut in two]
        cuts += remove(*rng.sample(blocks, rng.randrange(8)), *rng.choice([["mid_block"], []]))
        cuts += remove(*rng.sample(["down_blocks.1.resnets.0", "up_blocks.0.attentions.1"], rng.random() < 0.4))
        with surgery.applied(unet, cuts):
            found = stock.express(unet)
            kinds[type(found)] += 1
            if isinstance(found, Stock):
                torch.testing.assert_close(output(cutting.stock_model(unet, found)), output(unet), rtol=0, atol=1e-6)
            else:
                assert "_block" in found  # an address
    assert min(kinds.values()) > 2, kinds


REASONS: dict[str, tuple[str, list[Cut], str]] = {
    "a ResNet alone": ("sd", remove("down_blocks.1.resnets.0"), "down_blocks.1.resnets.0 is left out alone"),
    "an attention alone": ("sd", remove("up_blocks.2.attentions.1"), "up_blocks.2.attentions.1 is left out alone"),
    "a part of a block": (
        "sdxl",
        remove("up_blocks.0.attentions.1.transformer_blocks.2.attn2"),
        "up_blocks.0.attentions.1.transformer_blocks.2.attn2: no stock config leaves out a layer inside a block",
    ),
    "the middle's attention": ("sd", remove("mid_block.attentions.0"), "mid_block.attentions.0 is left out and other parts"),
    "a ResNet of the middle": ("sd", remove("mid_block.resnets.1"), "mid_block.resnets.1 is left out and other parts"),
    "of the middle of pixels": ("pixels", remove("mid_block.resnets.0"), "mid_block.resnets.0 is left out and other parts"),
    "tied depths": (
        "sdxl",
        inside("mid_block.attentions.0", 0),
        "mid_block.attentions.0 has 2 blocks and down_blocks.2.attentions.0 3: a stock config ties them",
    ),
    "uneven pairs of pixels": (
        "pixels",
        [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)],
        "down_blocks.1 has 1 layers and down_blocks.0 2: this class has one number",
    ),
    "a sampler that is a ResNet": ("resampling", remove("down_blocks.0.downsamplers.0"), "down_blocks.0.downsamplers.0 is left out"),
    "attention of another class": (
        "resampling",
        [Cut(address=f"down_blocks.1.attentions.{i}", what="remove", value="hidden_states") for i in range(2)],
        "down_blocks.1: a SimpleCrossAttnDownBlock2D without attention has no stock class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_where_no_config_reaches_the_reason_names_the_address(name: str) -> None:
    kind, cuts, says = REASONS[name]
    unet = cutting.shared(kind)
    with surgery.applied(unet, cuts):
        found = stock.express(unet)
    assert isinstance(found, str) and says in found
    with pytest.raises(surgery.UserError, match="cannot be saved as a model that plain diffusers opens: .*_block"):
        export.structure(unet, cuts, plain_only=True)
    assert export.structure(unet, cuts).opens == "remote_code"


def test_numbers_of_heads_which_no_shape_shows_are_compared() -> None:
    """The middle has the heads of the last stage; once another stage is the last, a stock middle would have that one's."""
    unet = cutting.sd(**HEADS)
    with surgery.applied(unet, remove("down_blocks.2", "down_blocks.1.downsamplers.0", "up_blocks.0")):
        found = stock.express(unet)
    assert isinstance(found, str) and "mid_block.attentions.0: num_attention_heads is 8 and would be 4" in found


def test_emptying_equals_removing_an_attention_but_keeps_its_projections() -> None:
    unet = cutting.shared("sd")
    address = "down_blocks.1.attentions.1"
    assert torch.equal(cut_output(unet, empty(address)), cut_output(unet, remove(address)))
    layer = unet.get_submodule(address)
    kept = sum(p.numel() for part in (layer.norm, layer.proj_in, layer.proj_out) for p in part.parameters())
    with surgery.applied(unet, remove(address)):
        bare = surgery.parameters(unet)
    assert export.structure(unet, empty(address)).params == bare + kept
    assert layer.proj_out.weight.abs().sum() > 0  # the zeros are a copy's


def pairs(stages: int) -> list[Cut]:
    return [*(keep(f"down_blocks.{k}", 0) for k in range(stages)), *(keep(f"up_blocks.{k}", 0, 2) for k in range(stages))]


def depth(unet: Any, side: str, stage: int, *wanted: int) -> list[Cut]:
    """Only the first blocks of a stage's attentions stay."""
    block = unet.get_submodule(side if side == "mid_block" else f"{side}.{stage}")
    at = side if side == "mid_block" else f"{side}.{stage}"
    return [
        cut
        for i, n in enumerate(wanted)
        for cut in inside(f"{at}.attentions.{i}", *range(n, len(block.attentions[i].transformer_blocks)))
    ]


TINY = remove("down_blocks.3", "down_blocks.2.downsamplers.0", "up_blocks.0", "mid_block")
SIMPLE = remove("mid_block.attentions.0", "mid_block.resnets.1")
OUTER = [f"{side}.attentions.{i}" for side, n in (("down_blocks.0", 2), ("up_blocks.3", 3)) for i in range(n)]


def deep(unet: Any, *numbers: tuple[int, ...]) -> list[Cut]:
    """Depths of SDXL: down.1, down.2, up.0, up.1."""
    places = (("down_blocks", 1), ("down_blocks", 2), ("up_blocks", 0), ("up_blocks", 1))
    return [cut for (side, k), wanted in zip(places, numbers, strict=True) for cut in depth(unet, side, k, *wanted)]


# structure, cuts, parameters to the last digit or in % of the whole, % of the MACs
LADDER: dict[str, tuple[str, Any, int | float, float | None]] = {
    "bk_base": ("sd15", lambda u: pairs(4), 579_384_964, 65.1),
    "bk_small": ("sd15", lambda u: [*pairs(4), *remove("mid_block")], 482_346_884, 63.6),
    "bk_tiny": ("sd15", lambda u: [*pairs(4), *TINY], 323_384_964, 60.4),
    "sd15, three pairs": ("sd15", lambda u: [keep("down_blocks.3", 0), keep("up_blocks.0", 0, 2)], 90.7, 98.8),
    "sd15, one ResNet in the middle": ("sd15", lambda u: SIMPLE, 92.3, None),
    "sd15, no middle": ("sd15", lambda u: remove("mid_block"), 88.7, None),
    "sd15, no block in the middle": ("sd15", lambda u: inside("mid_block.attentions.0", 0), 96.3, None),
    "sd15, outer stage without attention": ("sd15", lambda u: remove(*OUTER), 98.5, 75.9),
    "sd15, no blocks": (
        "sd15",
        lambda u: remove(*(x.address for x in anatomy.layers(u) if x.kind == "transformer_block")),
        71.8,
        55.3,
    ),
    "sdxl, a pair less": ("sdxl", lambda u: pairs(3), 1_717_277_764, None),
    "sdxl, a pair less, no middle": ("sdxl", lambda u: [*pairs(3), *remove("mid_block")], 1_304_160_324, None),
    "koala-1b": (
        "sdxl",
        lambda u: [*pairs(3), *deep(u, (2, 2), (6, 6), (6, 6, 6), (2, 2, 2)), *depth(u, "mid_block", 0, 6)],
        1_161_184_324,
        50.8,
    ),
    "koala-700m": (
        "sdxl",
        lambda u: [*pairs(3), *deep(u, (2, 2), (5, 5), (5, 5, 5), (2, 2, 2)), *remove("mid_block")],
        782_822_724,
        None,
    ),
    "ssd-1b": ("sdxl", lambda u: [*deep(u, (2, 2), (4, 4), (4, 4, 10), (2, 1, 1)), *SIMPLE], 51.9, 62.2),
    "vega": ("sdxl", lambda u: [*deep(u, (1, 1), (2, 2), (2, 2, 2), (1, 1, 1)), *SIMPLE], 29.0, None),
    "sdxl, five blocks": (
        "sdxl",
        lambda u: [*deep(u, (2, 2), (5, 5), (5, 5, 5), (2, 2, 2)), *depth(u, "mid_block", 0, 5)],
        59.4,
        None,
    ),
    "sdxl, five blocks and a ResNet": ("sdxl", lambda u: [*deep(u, (2, 2), (5, 5), (5, 5, 5), (2, 2, 2)), *SIMPLE], 51.3, None),
    "sdxl, ragged": (
        "sdxl",
        lambda u: [*deep(u, (2, 1), (4, 6), (6, 5, 3), (2, 1, 1)), *depth(u, "mid_block", 0, 4)],
        55.5,
        63.7,
    ),
    "sdxl, one ResNet in the middle": ("sdxl", lambda u: SIMPLE, 85.1, None),
    "sdxl, no blocks": ("sdxl", lambda u: [*deep(u, (0, 0), (0, 0), (0, 0, 0), (0, 0, 0)), *SIMPLE], 13.5, None),
}  # fmt: skip
WHOLE = {"sd15": (859_520_964, 401.6e9), "sdxl": (2_567_463_684, 3_380.6e9)}


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_of_slim_unets(name: str) -> None:
    """Published students and their like, from an inventory made beforehand, on structures without weights."""
    kind, cuts, wanted, macs = LADDER[name]
    blueprint = load(kind)
    plan = export.structure(blueprint.denoiser, cuts(blueprint.denoiser))
    assert plan.opens == "stock", plan.reason
    share = 100 * plan.params / WHOLE[kind][0]
    assert plan.params == wanted if isinstance(wanted, int) else share == pytest.approx(wanted, abs=0.05)
    if macs is not None:
        with surgery.applied(blueprint.denoiser, cuts(blueprint.denoiser)):
            counted = cost.count(blueprint.denoiser, **blueprint.example()).total
        assert 100 * counted / WHOLE[kind][1] == pytest.approx(macs, abs=0.06)
