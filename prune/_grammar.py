"""The slim U-Nets' grammar as choices that a search can make: which pairs, middles, stages and transformer blocks stay.

The same moves as the maps of `slim_unet` (BK-SDM, SSD-1B, Vega, KOALA), each a site with its options.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.anatomy import uncompiled
from ..core.candidate import Cut
from ._spaces import lost_layers, preferred_pairs, smaller_middles
from .slim_unet import first_blocks, is_made_of_pairs

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Move:
    """One option of a site."""

    name: str
    cuts: tuple[Cut, ...]
    lost: frozenset[str]  # addresses of the layers and stages that it takes out


def moves(denoiser: "nn.Module") -> list[list[Move]]:
    """Sites with their options, of a U-Net of ResNet and attention pairs. UserError for other denoisers.

    Per stage: lose one pair, down and up, as in BK-SDM. The middle: one ResNet, none, or none and the innermost stage gone too
    (BK-SDM's tiny; without that stage a middle would work at twice the size, and cost more). Every attention: fewer transformer
    blocks, the first ones stay. Moves that do not fit the U-Net by themselves are left out.
    """
    unet: Any = uncompiled(denoiser)
    is_made_of_pairs(unet)
    sites = []
    for way in preferred_pairs(unet):
        sites.append([_move(unet, f"{way[0].address} and {way[1].address}: a pair less", way)])
    sites.append([_move(unet, f"middle: {name}", cuts) for name, cuts in smaller_middles(unet)] + _innermost(unet))
    for address, module in unet.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            count = len(module.transformer_blocks)
            sites.append([_shallower(address, module, keep) for keep in range(count - 1, -1, -1)])
    fitting = [[move for move in site if _applies(unet, move.cuts)] for site in sites]
    return [site for site in fitting if site]


def _move(unet: Any, name: str, cuts: Sequence[Cut]) -> Move:
    return Move(name, tuple(cuts), frozenset(lost_layers(unet, cuts)))


def _innermost(unet: Any) -> list[Move]:
    last = len(unet.down_blocks) - 1
    if last < 1 or unet.mid_block is None:
        return []
    gone = [f"down_blocks.{last}", "mid_block", "up_blocks.0"]
    if unet.down_blocks[last - 1].downsamplers is not None:
        gone.append(f"down_blocks.{last - 1}.downsamplers.0")
    return [Move("middle and innermost stage: none", tuple(Cut(address=a, what="remove") for a in gone), frozenset(gone))]


def _shallower(address: str, attention: Any, keep: int) -> Move:
    cuts = tuple(first_blocks(address, attention, keep))
    lost = {address} if keep == 0 else {cut.address for cut in cuts}
    return Move(f"{address}: {keep} of {len(attention.transformer_blocks)} blocks", cuts, frozenset(lost))


def _applies(unet: Any, cuts: Sequence[Cut]) -> bool:
    from ..core import surgery

    with suppress(surgery.CannotCut), surgery.applied(unet, cuts):
        return True
    return False
