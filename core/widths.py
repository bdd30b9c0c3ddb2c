"""What can be made narrower inside a denoiser: heads of attentions, units of feed-forwards, channels of ResNets and norms."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import narrowing
from .anatomy import uncompiled
from .candidate import Cut

COMPILED = 8  # versions of a class that torch.compile makes (torch._dynamo.config.recompile_limit)

Shape = tuple[int, ...]  # what stays of each width in a block


@dataclass(frozen=True)
class Width:
    """The width of one layer, of which a cut may leave a part."""

    address: str
    what: str  # keep_heads, keep_units, keep_channels, keep_modulation: `Cut.what`
    count: int  # heads, units, channels or modulation channels there are
    granule: int  # how many in a row go together: 1, or the channels in a group of the ResNet's GroupNorm

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices that go together. Any of the groups may go, as long as one stays; all but channels may go altogether.

        >>> Width("mid_block.resnets.0", "keep_channels", 6, 2).groups
        ((0, 1), (2, 3), (4, 5))
        """
        return tuple(tuple(range(start, start + self.granule)) for start in range(0, self.count, self.granule))


Classes = Mapping[str, Sequence[Sequence[Width]]]  # name of a class of blocks -> the widths in each of them


def widths(denoiser: Any) -> list[Width]:
    """Every width that can be cut so that what stays computes what it would with the rest masked, in the order of `named_modules()`.

    Channels may go from inside the groups of a ResNet too, equally many from each (`narrowing.narrowed`); that changes the
    groups' statistics and is not listed. Nor is a layer with a single head, unit or group. The units of a single block of Flux
    are listed as those of its `proj_mlp`, its heads as those of its `attn`.
    """
    found = []
    for address, _ in (denoiser := uncompiled(denoiser)).named_modules():
        for what in narrowing.NARROWS:
            try:
                count, granule = width(denoiser, address, what)
            except ValueError:
                continue
            if count > granule:
                found.append(Width(address, what, count, granule))
    return found


def width(denoiser: Any, address: str, what: str) -> tuple[int, int]:
    """`narrowing.width` of a layer where it is: some have to be looked at together with the block that reads them.

    Raises ValueError with the reason where nothing can be cut.
    """
    layer = denoiser.get_submodule(address)
    block = beside(denoiser, address)
    if what == "keep_units" and narrowing.kind(layer) in narrowing.PARALLEL:
        raise ValueError("its units are those of its proj_mlp")
    if what == "keep_units" and block is not None and address.endswith("proj_mlp"):
        return narrowing.width(denoiser.get_submodule(block), what)
    count, granule = narrowing.width(layer, what)
    if what == "keep_heads" and not narrowing.readers(layer, what):
        if block is None:
            raise ValueError("nothing is known of what reads its heads")
        narrowing.width(denoiser.get_submodule(block), "keep_units")
    return count, granule


def beside(denoiser: Any, address: str) -> str | None:
    """The block of `narrowing.PARALLEL` that a layer is the attention or the feed-forward of; None for any other layer."""
    above, _, name = address.rpartition(".")
    known = name in ("attn", "proj_mlp") and narrowing.kind(denoiser.get_submodule(above)) in narrowing.PARALLEL
    return above if known else None


def shares(denoiser: Any, address: str, what: str, stay: Iterable[int]) -> dict[str, narrowing.Picked]:
    """Which rows and columns of which operators of a denoiser belong to these heads, units or channels: address -> `picked`."""
    stay, block = list(stay), beside(denoiser, address)
    layer, home = denoiser.get_submodule(address), address
    if block is not None and what == "keep_units":
        layer, home = denoiser.get_submodule(block), block
    found = {f"{home}.{name}".lstrip("."): parts for name, parts in narrowing.picked(layer, what, stay).items()}
    if block is not None and what == "keep_heads":
        found[f"{block}.proj_out"] = ((), found[f"{address}.to_v"][0])  # its first columns
    return found


def spelled(denoiser: Any, cuts: Sequence[Cut]) -> list[dict[str, Any]]:
    """Cuts as `standins.cut` takes them and an artifact's config holds them.

    A block of `narrowing.PARALLEL` is narrowed as one, after its attention: the cut of its `proj_mlp` becomes one of the block,
    and where only the attention is cut, one is added that keeps all units, so that its `proj_out` follows.
    """
    found, blocks = [], []
    for cut in cuts:
        plain, block = cut.plain(), beside(denoiser, cut.address) if cut.what in narrowing.NARROWS else None
        if block is not None:
            blocks += [block] * (cut.what == "keep_heads")
            plain["address"] = block if cut.what == "keep_units" else cut.address
        found.append(plain)
    there = {plain["address"] for plain in found}
    for block in blocks:
        if block not in there:  # nor is it removed itself
            units, _ = narrowing.width(denoiser.get_submodule(block), "keep_units")
            found.append({"address": block, "what": "keep_units", "value": list(range(units))})
    return found


def rounded(kept: int, multiple: int, most: int) -> int:
    """The multiple nearest to a count of what stays (the larger one in between), but not zero and not more than there are.

    Kernels are fast for widths that are multiples of 8 or 64.

    >>> rounded(100, 64, 320), rounded(96, 64, 320), rounded(3, 64, 320), rounded(300, 64, 310)
    (128, 128, 64, 310)
    """
    return min(max((2 * kept + multiple) // (2 * multiple), 1) * multiple, most)


def by_class(denoiser: Any) -> Classes:
    """The widths of each block, by the class of the block: an entry of a list of blocks, or a layer that is in none."""
    target, blocks = uncompiled(denoiser), dict[str, list[Width]]()
    for width in widths(target):
        inside = re.match(r".*(?:^|\.)\d+(?=\.|$)", width.address)  # up to the last number: an entry of a list of blocks
        blocks.setdefault(inside[0] if inside else width.address, []).append(width)
    classes: dict[str, list[list[Width]]] = {}
    for address, inner in blocks.items():
        classes.setdefault(type(target.get_submodule(address)).__name__, []).append(inner)
    return classes


def limited(classes: Classes, kept: Mapping[Width, int], most: int = COMPILED) -> dict[Width, int]:
    """Counts of what stays, some of them raised, so that the blocks of each class come in at most so many shapes.

    torch.compile makes one version of a class for every shape that its blocks have, and beyond 8 of them runs the rest as it
    is. Of a width that is not in `kept` all stays; blocks that differed before the cuts stay different.
    """
    found = dict(kept)
    for members in classes.values():
        for inner, shape in zip(members, alike(_shapes(members, kept), most), strict=True):
            found |= {w: -(-stays // w.granule) * w.granule for w, stays in zip(inner, shape, strict=True) if w in kept}
    return found


def variety(classes: Classes, kept: Mapping[Width, int]) -> dict[str, int]:
    """In how many shapes the blocks of each class come."""
    return {name: len(set(_shapes(members, kept))) for name, members in classes.items()}


def _shapes(members: Sequence[Sequence[Width]], kept: Mapping[Width, int]) -> list[tuple[Shape, Shape]]:
    return [(tuple(kept.get(w, w.count) for w in inner), tuple(w.count for w in inner)) for inner in members]


def alike(blocks: Sequence[tuple[Shape, Shape]], most: int) -> list[Shape]:
    """Shapes of the blocks of one class, some of them raised: at most so many are different.

    blocks: what stays of each of a block's widths, and what there is. Those that are raised to one shape are those for which
    that brings back the least; blocks of which there is not the same are never raised to one.

    >>> alike([((3, 64), (4, 64)), ((4, 60), (4, 64)), ((1, 8), (4, 64)), ((1, 9), (4, 64))], most=2)
    [(4, 64), (4, 64), (1, 9), (1, 9)]
    """
    members: dict[tuple[Shape, Shape], list[int]] = {}
    for i, (stays, there) in enumerate(blocks):
        members.setdefault((there, stays), []).append(i)
    while len(members) > most:
        pairs = [(a, b) for a, b in itertools.combinations(members, 2) if a[0] == b[0]]
        if not pairs:
            break
        one, other = min(pairs, key=lambda pair: _regained(members, *pair))
        both = (one[0], tuple(map(max, one[1], other[1])))
        raised = members.pop(one) + members.pop(other)
        members[both] = members.get(both, []) + raised
    found = {i: stays for (_, stays), indices in members.items() for i in indices}
    return [found[i] for i in range(len(blocks))]


def _regained(
    members: Mapping[tuple[Shape, Shape], Sequence[int]], one: tuple[Shape, Shape], other: tuple[Shape, Shape]
) -> float:
    """What raising two shapes to one that holds both brings back, in shares of their widths."""
    return sum(
        len(members[each]) * (max(a, b) - stays) / there
        for each in (one, other)
        for a, b, stays, there in zip(one[1], other[1], each[1], one[0], strict=True)
    )
