"""The slim U-Nets' grammar as choices: they apply, alone and together, and lose what they say."""

import random
from typing import Any

import pytest
from lissom.core import surgery
from lissom.core.errors import UserError
from lissom.prune._grammar import Move, moves
from lissom.tests.core import tiny


def paired() -> Any:
    """A U-Net of three stages of two pairs, the innermost without attention."""
    return tiny.unet(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def test_every_kind_of_move_is_there() -> None:
    names = [move.name for site in moves(paired()) for move in site]
    assert sum("a pair less" in name for name in names) == 3
    assert {"middle: one ResNet", "middle: none", "middle and innermost stage: none"} <= set(names)
    assert sum("0 of 1 blocks" in name for name in names) == 11  # 4 down, 6 up, 1 in the middle


def test_fewer_blocks_of_deep_attentions_the_first_stay() -> None:
    deep = tiny.sdxl().unet
    (site,) = [s for s in moves(deep) if s[0].name.startswith("up_blocks.0.attentions.0")]
    assert [move.name.partition(": ")[2] for move in site] == ["1 of 2 blocks", "0 of 2 blocks"]
    assert site[0].lost == {"up_blocks.0.attentions.0.transformer_blocks.1"} and site[1].lost == {"up_blocks.0.attentions.0"}


def test_moves_that_exclude_each_other_nowhere_fit_together() -> None:
    """Random choices, one option a site, as the space keeps them consistent: what is lost is lost once."""
    unet, rng = paired(), random.Random(0)
    sites, whole = moves(unet), surgery.parameters(unet)
    for _ in range(60):
        taken: list[Move] = []
        for site in sites:
            move = rng.choice([None, *site])
            if move and not any(_nested(a, b) for other in taken for a in move.lost for b in other.lost):
                taken.append(move)
        cuts = [cut for move in taken for cut in move.cuts]
        with surgery.applied(unet, cuts):  # raises where they do not fit
            assert (surgery.parameters(unet) < whole) == bool(cuts)


def test_parameters_saved_add_up_over_sites() -> None:
    unet = paired()
    whole = surgery.parameters(unet)

    def saved(cuts: Any) -> int:
        with surgery.applied(unet, cuts):
            return whole - surgery.parameters(unet)

    chosen = [moves(unet)[0][0], next(m for s in moves(unet) for m in s if m.name == "middle: none")]
    assert saved([c for m in chosen for c in m.cuts]) == sum(saved(m.cuts) for m in chosen) > 0


def test_other_denoisers_are_refused() -> None:
    with pytest.raises(UserError, match="is no U-Net"):
        moves(tiny.dit().transformer)


def _nested(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")
