"""Cut transformers as stock configs: each computes what the cut one computes, and has the parameters that are known of it."""

import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from lissom.core import blueprints, export, stock, surgery
from lissom.core.artifact import renamed
from lissom.core.candidate import Cut
from lissom.core.driving.skip import absent
from lissom.core.driving.steering import steerable
from lissom.core.errors import UserError
from lissom.core.stock import Stock
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import output, remove


def blocks(*indices: int, of: str = "transformer_blocks") -> list[Cut]:
    return remove(*(f"{of}.{i}" for i in indices))


SINGLE = "single_transformer_blocks"
DUAL = "dual_attention_layers"

# (family, cuts, what changes in the config)
STOCK: dict[str, tuple[str, list[Cut], dict[str, Any]]] = {
    "sd3, a block": ("sd3", blocks(0), {"num_layers": 2}),
    "sd3, the last block": ("sd3", blocks(2), {"num_layers": 2}),
    "sd3, all but the first": ("sd3", blocks(1, 2), {"num_layers": 1}),
    "sd3, all": ("sd3", blocks(0, 1, 2), {"num_layers": 0}),
    "sd3.5, a block before": ("sd3.5", blocks(0), {"num_layers": 3, DUAL: [1]}),
    "sd3.5, a block between": ("sd3.5", blocks(1), {"num_layers": 3, DUAL: [0, 1]}),
    "sd3.5, the last two": ("sd3.5", blocks(2, 3), {"num_layers": 2, DUAL: [0]}),
    "sd3.5, no dual attention left": ("sd3.5", blocks(0, 2), {"num_layers": 2, DUAL: []}),
    "sd3.5, a last block with dual attention": ("sd3.5", blocks(1, 3), {"num_layers": 2, DUAL: [0, 1]}),
    "flux, a double block": ("flux", blocks(1), {"num_layers": 2, "num_single_layers": 2}),
    "flux, as many of both": ("flux", blocks(0), {"num_layers": 2, "num_single_layers": 2}),
    "flux, a single block": ("flux", blocks(0, of=SINGLE), {"num_layers": 3, "num_single_layers": 1}),
    "flux, of both": ("flux", [*blocks(0, 2), *blocks(1, of=SINGLE)], {"num_layers": 1, "num_single_layers": 1}),
    "flux, no double block left": ("flux", blocks(0, 1, 2), {"num_layers": 0, "num_single_layers": 2}),
    "flux, no single block left": ("flux", blocks(0, 1, of=SINGLE), {"num_layers": 3, "num_single_layers": 0}),
    "dit, not the first": ("dit", blocks(1), {"num_layers": 2}),
    "dit, not the first, twice": ("dit", blocks(1, 2), {"num_layers": 1}),
    "pixart, any": ("pixart", blocks(0, 2), {"num_layers": 1}),
    "pixart, all": ("pixart", blocks(0, 1, 2), {"num_layers": 0}),
    "sana, any": ("sana", blocks(0, 1), {"num_layers": 1}),
    "wan, any": ("wan", blocks(1, of="blocks"), {"num_layers": 2}),
}


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_model_computes_what_the_cut_one_computes(name: str) -> None:
    family, cuts, changes = STOCK[name]
    denoiser = cutting.shared(family)
    with surgery.applied(denoiser, cuts):
        cut, found = output(denoiser), stock.express(denoiser)
        assert isinstance(found, Stock), found
        stocked = cutting.stock_model(denoiser, found)
    with absent(denoiser, tuple(cut.address for cut in cuts)):
        assert torch.equal(output(denoiser), cut)
    assert not torch.equal(cut, output(denoiser))
    assert torch.equal(output(stocked), cut)
    config = json.loads(json.dumps(found.config))
    assert {k: config[k] for k in changes} == changes and config == found.config
    assert surgery.parameters(stocked) == export.structure(denoiser, cuts).params


def test_names_of_a_lists_own_numbers_are_not_mixed_up() -> None:
    """Ten and more blocks: `transformer_blocks.1` is no beginning of `transformer_blocks.10`."""
    dit = cutting.deeper("dit", num_layers=13)
    with surgery.applied(dit, blocks(1, 2, 11)):
        found = stock.express(dit)
        assert isinstance(found, Stock)
        assert torch.equal(output(cutting.stock_model(dit, found)), output(dit))
    assert renamed("transformer_blocks.12.ff", found.modules) == "transformer_blocks.9.ff"
    assert renamed("transformer_blocks.10.ff", found.modules) == "transformer_blocks.8.ff"


def test_the_first_block_of_a_dit_takes_its_embedder_along() -> None:
    """The output layer reads it: no stock config if the next block's is another, one if they are the same."""
    own, same = cutting.KINDS["dit"](), cutting.same_embedders(cutting.KINDS["dit"]())
    with surgery.applied(own, blocks(0, 2)):
        found = stock.express(own)
    assert isinstance(found, str) and "transformer_blocks.0, which is cut, and that of transformer_blocks.1" in found
    with surgery.applied(same, blocks(0, 1)):
        found = stock.express(same)
        assert isinstance(found, Stock)
        assert torch.equal(output(cutting.stock_model(same, found)), output(same))
    embedder = sum(p.numel() for p in own.transformer_blocks[0].norm1.emb.parameters())
    assert export.structure(own, blocks(0)).params - export.structure(same, blocks(0)).params == embedder


def test_a_config_that_was_read_from_json_or_cut_before_is_as_good() -> None:
    """Lists for tuples; a class that carries earlier cuts; a class that steers."""
    transformer = cutting.KINDS["sd3.5"]()
    transformer.register_to_config(dual_attention_layers=[0, 2])
    once = export.structure(transformer, blocks(0))
    transformer.__class__ = steerable(type(transformer))
    assert stock.base_class(transformer) is diffusers.SD3Transformer2DModel
    assert export.structure(transformer, blocks(0)).config == once.config


REASONS: dict[str, tuple[str, list[Cut], str]] = {
    "a feed-forward": ("dit", remove("transformer_blocks.1.ff"), "transformer_blocks.1.ff: no stock config leaves out"),
    "the text's feed-forward": ("sd3", remove("transformer_blocks.0.ff_context"), "transformer_blocks.0.ff_context: no stock"),
    "all of a DiT": ("dit", blocks(0, 1, 2), "transformer_blocks.0: a DiTTransformer2DModel needs at least one"),
    "all of a Sana": ("sana", blocks(0, 1, 2), "transformer_blocks.0: a SanaTransformer2DModel needs at least one"),
}


@pytest.mark.parametrize("name", REASONS)
def test_where_no_config_reaches_the_reason_names_the_address(name: str) -> None:
    family, cuts, says = REASONS[name]
    denoiser = cutting.shared(family)
    with surgery.applied(denoiser, cuts):
        found = stock.express(denoiser)
    assert isinstance(found, str) and found.startswith(says)
    with pytest.raises(UserError, match="cannot be saved as a model that plain diffusers opens: transformer_blocks"):
        export.structure(denoiser, cuts, plain_only=True)


def mochi() -> Any:
    """Its last block is of another shape, and no rule here turns another block into one like it."""
    settings = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "pooled_projection_dim": 16}
    return diffusers.MochiTransformer3DModel(in_channels=4, text_embed_dim=16, time_embed_dim=4, qk_norm="rms_norm", **settings)


def hunyuan() -> Any:
    """Its second half takes skip connections from the first: which block is whose partner goes by number."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "sample_size": 8, "num_layers": 6}
    return diffusers.HunyuanDiT2DModel(
        in_channels=4, patch_size=2, cross_attention_dim=8, cross_attention_dim_t5=8, text_len=4, **settings
    )


@pytest.mark.parametrize(
    ("make", "address", "says"),
    [
        (mochi, "transformer_blocks.1", "transformer_blocks.1: the stock model has a transformer_blocks.0.norm1_context"),
        (hunyuan, "blocks.1", "blocks.1: these blocks hand skip connections over by their numbers"),
    ],
)
def test_blocks_that_are_not_alike_are_not_renumbered(make: Callable[[], Any], address: str, says: str) -> None:
    transformer = make()
    returns = "hidden_states,encoder_hidden_states" if make is mochi else "hidden_states"
    with surgery.applied(transformer, [Cut(address=address, what="remove", value=returns)]):
        assert str(stock.express(transformer)).startswith(says)


def test_the_class_of_someone_else_is_not_saved_as_one_of_diffusers() -> None:
    class Own(diffusers.DiTTransformer2DModel):
        __module__ = "their.model"

    dit = tiny.dit().transformer
    dit.__class__ = Own
    with pytest.raises(UserError, match="Own: the denoiser's class is not one of diffusers"):
        export.structure(dit, blocks(1))


# structure, list, its blocks that stay, parameters (which the inventory rounds to the last digit that is given)
LADDER: list[tuple[str, str, int, float, float]] = [
    ("dit-xl", "transformer_blocks", 14, 376.3e6, 0.05e6),
    ("pixart", "transformer_blocks", 14, 313.8e6, 0.05e6),
    ("pixart", "transformer_blocks", 0, 16_193_696, 0),
    ("sd3", "transformer_blocks", 12, 1008.6e6, 0.05e6),
    ("sd3.5-medium", "transformer_blocks", 11, 19_476_544 + 10 * 84_980_992 + 54_294_784, 0),
    ("flux", "transformer_blocks", 8, 8.163e9, 0.5e6),
    ("flux", "single_transformer_blocks", 19, 9.211e9, 0.5e6),
]


@pytest.mark.parametrize(("name", "of", "stay", "wanted", "rounding"), LADDER)
def test_the_ladder_of_shallow_transformers(name: str, of: str, stay: int, wanted: float, rounding: float) -> None:
    """From an inventory made beforehand, on structures without weights."""
    denoiser = blueprints.load(name).denoiser
    count = len(denoiser.get_submodule(of))
    plan = export.structure(denoiser, blocks(*range(count - stay), of=of))
    assert plan.opens == "stock", plan.reason
    assert abs(plan.params - wanted) <= rounding


def test_sd3_without_its_last_block() -> None:
    """The block before it becomes a last one: no text output, two of six parts of its modulation."""
    sd3 = blueprints.load("sd3").denoiser
    assert export.structure(sd3, blocks(23)).params == 19_476_544 + 22 * 84_980_736 + 54_294_528
