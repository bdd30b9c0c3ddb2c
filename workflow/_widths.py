"""What a stage whose method makes layers narrower asks of a denoiser: which widths may be cut, and what that saves."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut
from ..core.errors import UserError
from ..core.stages import PruneStage
from ._gauge import Gauge

if TYPE_CHECKING:
    from ..core.anatomy import Layer
    from ..core.widths import Width
    from ..prune._task import Space

# of layers that are not listed
KINDS = {"keep_heads": "attention", "keep_units": "feed_forward", "keep_channels": "resnet", "keep_modulation": "norm"}


def chosen(stage: PruneStage, gauge: Gauge, name: str, config: Any) -> "tuple[Width, ...]":
    """The widths that may be cut: those matching the patterns. UserError for what narrower layers cannot give.

    config: of the method, whose `what` names the kinds of widths. Where it has none, modulations are not among them.
    """
    from ..core import surgery
    from ..core.widths import widths

    _check(stage)
    kinds = counted(config)
    found = [width for width in widths(gauge.denoiser) if width.what.removeprefix("keep_") in kinds]
    if not found:
        raise UserError(
            f"{name}: {type(gauge.denoiser).__name__} has no {' or '.join(kinds)} that can be cut exactly (docs/pruning.md, widths). "
            "laptop cuts whole layers."
        )
    addresses = list(dict.fromkeys([*(layer.address for layer in gauge.known), *(width.address for width in found)]))
    allowed = surgery.matching(stage.include, addresses) if stage.include else set(addresses)
    forbidden = surgery.matching(stage.exclude, addresses) if stage.exclude else set()
    left = [
        width
        for width in found
        if any(_within(width.address, a) for a in allowed)
        and not any(_within(width.address, a) or _within(a, width.address) for a in forbidden)
    ]
    if not left:
        raise UserError(f"{name}: include and exclude leave none of the {len(found)} layers that can get narrower. Allow some.")
    return tuple(left)


def counted(config: Any) -> tuple[str, ...]:
    """What a method makes fewer, in words: its `what`."""
    return tuple(getattr(config, "what", ("heads", "units", "channels")))


def _check(stage: PruneStage) -> None:
    narrower = f"{stage.method}: makes layers narrower"
    if stage.require_plain_load:
        raise UserError(f"{narrower}, which no stock config expresses. Leave require_plain_load out, or cut layers: laptop.")
    if stage.units:
        raise UserError(f"{narrower} and removes none, so that units choose nothing. Leave them out; see its setting `what`.")
    if not stage.shortcuts:
        raise UserError(f"{narrower} and removes none, so that shortcuts=false spares nothing. Leave it out.")
    if stage.of == "latency":
        raise UserError(
            f"{narrower}; how their time shrinks with their width is not in the table of layer times. Use of: params or macs, "
            "and round_to: 8 or more for widths that kernels are fast with."
        )


def saves(gauge: Gauge, of: str) -> "Callable[[tuple[Cut, ...]], float]":
    """What such cuts save of the parameters or MACs. Exact; see `macs_of` for what a single one saves."""

    def params(cuts: tuple[Cut, ...]) -> float:
        return float(gauge.params_saved(cuts))

    def macs(cuts: tuple[Cut, ...]) -> float:
        if len(cuts) == 1:
            return macs_of(gauge, cuts[0])
        return float(gauge.macs - gauge.after(cuts)[1])

    return macs if of == "macs" else params


def space(widths: "Sequence[Width]", saves: "Callable[[tuple[Cut, ...]], float]") -> "Space":
    """The most that can go: of each width all but one group."""
    from ..prune._task import Option, Space

    options = [Option((cut,), saves((cut,))) for cut in (_keeping(width, width.groups[:1]) for width in widths)]
    return Space(tuple((option,) for option in options if option.saved > 0))


def listed(gauge: Gauge, widths: "Sequence[Width]") -> "list[Layer]":
    """The layers that may get narrower, with what all of their heads, units or channels weigh and compute."""
    from dataclasses import replace

    from ..core.anatomy import Layer

    known, found = {layer.address: layer for layer in gauge.known}, []
    for width in widths:
        size = gauge.params_saved((_keeping(width, width.groups[1:]),)) * len(width.groups)
        plain = Layer(width.address, KINDS[width.what], 0, None, "zero")
        layer = known.get(width.address, plain)
        found.append(replace(layer, params=size, kept=0, macs=gauge.table.layers.get(width.address)))
    return found


def _keeping(width: "Width", groups: Sequence[Sequence[int]]) -> Cut:
    stay = tuple(i for group in groups for i in group)
    return Cut.model_validate({"address": width.address, "what": width.what, "value": stay})


def macs_of(gauge: Gauge, cut: Cut) -> float:
    """MACs that one narrower layer saves, read off the table, or off one count: all that is computed is, head by head, unit by unit."""
    from ..core import narrowing
    from ..core.widths import Width, width

    assert isinstance(cut.value, tuple)
    layer, macs = gauge.denoiser.get_submodule(cut.address), gauge.table.layers.get(cut.address)
    if macs is not None and not (cut.what == "keep_heads" and narrowing.norms_all(layer)):
        return macs * (1 - len(cut.value) / narrowing.width(layer, cut.what)[0])
    found = Width(cut.address, cut.what, *width(gauge.denoiser, cut.address, cut.what))
    if not cut.value or len(found.groups) == 1:
        return float(gauge.macs - gauge.after((cut,))[1])
    most = float(gauge.macs - gauge.after((_keeping(found, found.groups[:1]),))[1])
    return most * (found.count - len(cut.value)) / (found.count - found.granule)


def _within(address: str, other: str) -> bool:
    return address == other or address.startswith(other + ".")
