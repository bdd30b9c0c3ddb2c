"""Which cuts a method may choose from, and what each saves: any layer, or only what a stock config can express."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.anatomy import uncompiled
from ..core.candidate import Cut
from ..core.errors import UserError
from ._task import Option, Space

if TYPE_CHECKING:
    from torch import nn

    from ..core.anatomy import Layer

Saves = Callable[[tuple[Cut, ...]], float]  # what cuts save of the cost that the target is set in


def remove(address: str, returns: str | None = None) -> Cut:
    return Cut(address=address, what="remove", value=returns)


def any_layer(layers: "Sequence[Layer]", saves: Saves) -> list[Space]:
    """One space: every layer is a site of its own."""
    options = [Option((cut,), saves((cut,))) for cut in (remove(layer.address, layer.returns) for layer in layers)]
    return [Space(tuple((o,) for o in options if o.saved > 0))]


def plain_only(denoiser: "nn.Module", layers: "Sequence[Layer]", saves: Saves) -> list[Space]:
    """Spaces in which every choice has a stock config. layers: those that may be cut; others are left alone.

    U-Nets: one space for every set of stages that lose a (ResNet, attention) pair, down and up, times the three middles; its
    sites are the transformer blocks, or, where attentions hold one block each, the attentions (emptied: their projections
    stay). The block depth of SDXL's middle is tied to that of the last stage's first attention, so those blocks go together.
    Transformers: their blocks. UserError for a denoiser that holds cuts already which no stock config has.
    """
    from ..core import stock, surgery

    target: Any = uncompiled(denoiser)
    if isinstance(reason := stock.express(target), str):
        raise UserError(f"require_plain_load: no stock config has the shape of this denoiser even before it is cut: {reason}.")
    if not surgery.stages(target)[0]:
        return _blocks(target, layers, saves)
    if stock.base_class(target).__name__ != "UNet2DConditionModel":
        return [Space(())]  # the configs of other U-Nets express no cut that is offered here
    allowed = _all_of(target, {layer.address for layer in layers})
    spaces = []
    for parts in itertools.product(*_stages(target, allowed), _middles(target, allowed)):
        base = tuple(cut for part in parts for cut in part)
        sites = [tuple(Option(cuts, saves(cuts)) for cuts in site) for site in _sites(target, allowed, base)]
        useful = tuple(tuple(o for o in site if o.saved > 0) for site in sites)
        spaces.append(Space(tuple(s for s in useful if s), Option(base, sum((saves(part) for part in parts if part), 0.0))))
    return spaces


def _blocks(denoiser: Any, layers: "Sequence[Layer]", saves: Saves) -> list[Space]:
    """Blocks of a transformer. Of a list that may not be empty one block stays: a space for each that it may be."""
    from ..core import anatomy

    known = {layer.address: layer for layer in (*layers, *anatomy.layers(denoiser))}
    lists: dict[str, list[Option]] = {}
    inherited: set[str] = set()  # lists in which a block has an heir: one that stays
    stock: dict[Any, bool] = {}  # blocks between the first and the last that are of one shape are answered once
    for layer in layers:
        name, _, number = layer.address.partition(".")
        if "." in number or layer.kind not in ("transformer_block", "block"):
            continue  # no entry of the denoiser's own lists of blocks
        block, end = denoiser.get_submodule(layer.address), {f"{name}.{int(number) + n}" for n in (-1, 1)} - set(known)
        key = (name, number if end else "", tuple((k, v.shape) for k, v in block.state_dict().items()))
        if key not in stock:
            stock[key] = _one_embedder(denoiser, layer) and _fits(denoiser, [remove(layer.address, layer.returns)])
        if stock[key]:
            heirs = _heirs(layer, known)
            saved = max(saves((remove(a, known[a].returns),)) for a in (layer.address, *heirs))
            lists.setdefault(name, []).append(Option((remove(layer.address, layer.returns),), saved))
            inherited |= {name} if heirs else set()
    ways = []
    for name, options in lists.items():
        full = [option for option in options if option.saved > 0]
        some = len(full) < len(denoiser.get_submodule(name))
        if some or (name not in inherited and _fits(denoiser, [cut for option in full for cut in option.cuts])):
            ways.append([full])
        else:
            ways.append([[option for option in full if option is not stays] for stays in full])
    return [Space(tuple((option,) for part in chosen for option in part)) for chosen in itertools.product(*ways)]


def _one_embedder(denoiser: Any, layer: "Layer") -> bool:
    """The output layer of a DiT reads the embedder of its first block: that goes only if the next ones hold the same numbers."""
    import torch

    if not layer.kept:
        return True
    embedders = [block.norm1.emb.state_dict() for block in denoiser.get_submodule(layer.address.partition(".")[0])]
    return all(v.is_meta or torch.equal(v, other[k]) for other in embedders for k, v in embedders[0].items())


def _heirs(layer: "Layer", known: "Mapping[str, Layer]") -> list[str]:
    """The neighbour that takes over what is special in a first or last block, and then saves what it is larger by.

    The embedder of a DiT's first block stays somewhere, and whichever block of SD3 is the last one drops the text.
    """
    name, _, number = layer.address.partition(".")
    beside = [a for a in (f"{name}.{int(number) - 1}", f"{name}.{int(number) + 1}") if a in known]
    return [a for a in beside if len(beside) == 1 and known[a].freed > layer.freed]


def _fits(denoiser: Any, cuts: Sequence[Cut]) -> bool:
    """Whether a stock config has the denoiser with all of these cuts."""
    from ..core import stock, surgery

    with surgery.applied(denoiser, cuts):
        return not isinstance(stock.express(denoiser), str)


def _all_of(unet: Any, addresses: set[str]) -> set[str]:
    """What may go: with an attention its blocks, and with all of its blocks the attention."""
    found = set(addresses)
    for address, module in unet.named_modules():
        blocks = [f"{address}.transformer_blocks.{i}" for i in range(len(getattr(module, "transformer_blocks", ())))]
        if address in addresses:
            found |= set(blocks)
        elif blocks and set(blocks) <= addresses:
            found.add(address)
    return found


def _stages(unet: Any, allowed: set[str]) -> "list[list[tuple[Cut, ...]]]":
    """For each stage: to leave it whole, or to take a pair out.

    One way per stage: that of BK-SDM where there is one (the first pair stays down, the first and the last up), as its
    students show that it can be retrained; otherwise the one that leaves other skip connections in place.
    """
    return [[(), way] for way in preferred_pairs(unet, allowed)]


def preferred_pairs(unet: Any, allowed: set[str] | None = None) -> list[tuple[Cut, ...]]:
    """For each stage of a U-Net that can lose a (ResNet, attention) pair, the way to take it out. allowed: layers that may go."""
    from ..core import surgery

    pairs: dict[str, list[tuple[Cut, ...]]] = {}
    for two in surgery.pairs(unet):
        if allowed is None or lost_layers(unet, two) <= allowed:
            pairs.setdefault(two[0].address, []).append(two)
    return [_preferred(ways) for ways in pairs.values()]


def _preferred(ways: list[tuple[Cut, ...]]) -> tuple[Cut, ...]:
    def bk(way: tuple[Cut, ...]) -> bool:
        down, up = (cut.value for cut in way)
        return (
            isinstance(down, tuple)
            and isinstance(up, tuple)
            and down[-1] == len(down) - 1
            and up[:-1] == tuple(range(len(up) - 1))
        )

    return next((way for way in ways if bk(way)), ways[0])


def _middles(unet: Any, allowed: set[str]) -> list[tuple[Cut, ...]]:
    """To leave the middle whole, to leave one ResNet of it, to take it out."""
    everything = set(_of_middle(unet))
    return [
        (),
        *(
            cuts
            for name, cuts in smaller_middles(unet)
            if (everything if name == "none" else {cut.address for cut in cuts}) <= allowed
        ),
    ]


def smaller_middles(unet: Any) -> list[tuple[str, tuple[Cut, ...]]]:
    """To leave one ResNet of the middle, or to take it out, by name."""
    middle = unet.mid_block
    if middle is None:
        return []
    others = [a for a in _of_middle(unet) if a != "mid_block.resnets.0"]
    one = [("one ResNet", tuple(map(remove, others)))] if type(middle).__name__ == "UNetMidBlock2DCrossAttn" else []
    return [*one, ("none", (remove("mid_block"),))]


def _of_middle(unet: Any) -> list[str]:
    middle = unet.mid_block
    attentions = [f"mid_block.attentions.{i}" for i, m in enumerate(middle.attentions) if m is not None] if middle else []
    return attentions + [f"mid_block.resnets.{i}" for i in range(len(middle.resnets))] if middle else []


def lost_layers(unet: Any, cuts: Sequence[Cut]) -> set[str]:
    """Addresses of the ResNets and attentions that cuts take out."""
    lost = {cut.address for cut in cuts if cut.what == "remove"}
    for cut in cuts:
        for part in ("resnets", "attentions") if cut.what == "keep_layers" else ():
            entries = getattr(unet.get_submodule(cut.address), part, ())
            assert isinstance(cut.value, tuple)
            lost |= {f"{cut.address}.{part}.{i}" for i in range(len(entries)) if i not in cut.value}
    return lost


def _sites(unet: Any, allowed: set[str], base: Sequence[Cut]) -> Iterator[list[tuple[Cut, ...]]]:
    """Blocks of attentions, or attentions of one block, that a space's base leaves."""
    gone, centre = lost_layers(unet, base), "mid_block.attentions.0"
    found = {
        address: len(module.transformer_blocks)
        for address, module in unet.named_modules()
        if type(module).__name__ == "Transformer2DModel" and not any(address == g or address.startswith(g + ".") for g in gone)
    }
    # Where the last stage has attention, the middle's depth is that of the first one there.
    last = f"down_blocks.{len(unet.down_blocks) - 1}.attentions."
    first = next((address for address in found if address.startswith(last)), None) if centre in found else None
    for address, depth in found.items():
        if address == centre and first is not None:
            continue
        together = [address, centre] if address == first else [address]
        if depth == 1:
            if allowed.issuperset(together):
                yield [tuple(Cut(address=a, what="replace", value="empty") for a in together)]
            continue
        for i in range(depth):
            blocks = [f"{a}.transformer_blocks.{i}" for a in together]
            if allowed.issuperset(blocks):
                yield [tuple(remove(block) for block in blocks)]


def per_layer(table: Mapping[str, float], denoiser: "nn.Module", measured: Callable[[tuple[Cut, ...]], float]) -> Saves:
    """What cuts save: from the table where they are plain removals of listed layers, else measured (once for each)."""
    known: dict[tuple[Cut, ...], float] = {}

    def saves(cuts: tuple[Cut, ...]) -> float:
        if all(cut.what == "remove" and cut.address in table for cut in cuts):
            return sum(table[cut.address] for cut in cuts)
        if cuts not in known:
            known[cuts] = measured(cuts)
        return known[cuts]

    return saves
