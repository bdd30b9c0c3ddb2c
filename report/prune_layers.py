"""What the report of a pruned model says about single layers and cuts."""

from collections.abc import Sequence

from ..core.candidate import Cut
from ._words import short
from .prune_schema import LayerScore, PruneReport

RUNS = 8  # ranges of indices that are written out


def cheapest(report: PruneReport) -> list[LayerScore]:
    """The scored layers by rising score."""
    return [layer for _, layer in sorted(scored(report.layers), key=lambda pair: pair[0])]


def scored(layers: Sequence[LayerScore]) -> list[tuple[float, LayerScore]]:
    """Layers that have a score, behind it."""
    return [(layer.score, layer) for layer in layers if layer.score is not None]


def signed(layers: Sequence[LayerScore]) -> bool:
    """Whether the scores say something below zero (logits of gates), or nothing above it: then no log scale shows them."""
    found = [score for score, _ in scored(layers)]
    return bool(found) and (min(found) < 0 or max(found) <= 0)


def scores_are(report: PruneReport) -> str:
    """The heading of the scores."""
    return report.score_label or "score"


def kind(layer: LayerScore) -> str:
    """'transformer block': the kind as it is read."""
    return layer.kind.replace("_", " ")


def reduced(report: PruneReport) -> frozenset[str]:
    """Addresses of the layers that stay, but not whole: something is cut inside them, or what they did is taken out of them."""
    return frozenset(
        layer.address
        for layer in report.layers
        if not layer.cut and any(_inside(cut.address, layer.address) for cut in report.cuts)
    )


def fate(layer: LayerScore, partly: frozenset[str]) -> str:
    """'cut', 'in part', or nothing for a layer that stays whole. partly: the answer of `reduced`."""
    return "cut" if layer.cut else "in part" if layer.address in partly else ""


def cut_rows(report: PruneReport) -> list[tuple[str, str, str, str, str]]:
    """(address, kind, change, parameters freed, score) of every cut.

    The score is that of a layer that is gone as a whole; the parameters of a larger part are those of its listed layers.
    """
    known = {layer.address: layer for layer in report.layers}
    gone: dict[
        str, list[LayerScore]
    ] = {}  # address of a cut -> the listed layers that it takes out, itself or with what holds them
    addresses = sorted((cut.address for cut in report.cuts), key=len, reverse=True)
    for layer in report.layers:
        owner = next((address for address in addresses if _inside(layer.address, address)), None)
        if layer.cut and owner is not None:
            gone.setdefault(owner, []).append(layer)
    return [_cut_row(cut, known.get(cut.address), gone.get(cut.address, [])) for cut in report.cuts]


def change(cut: Cut, of: int | None = None) -> str:
    """What a cut does to a layer. of: how many heads, units or channels there were.

    >>> change(Cut(address="a", what="keep_units", value=tuple(range(0, 40, 2))), 40)
    'keep units 0, 2, 4, 6, 8, 10, 12, 14, … (20 of 40 stay)'
    >>> change(Cut(address="a", what="keep_heads", value=(0, 1, 2, 5))), change(Cut(address="a", what="remove"))
    ('keep heads 0-2, 5 (4 stay)', 'remove')
    >>> change(Cut(address="a", what="replace", value="empty")), change(Cut(address="a", what="remove", value="hidden_states"))
    ('replace by empty', 'remove (hidden_states passes through)')
    """
    words = cut.what.replace("_", " ")
    if isinstance(cut.value, tuple):
        left = f"{len(cut.value)} of {of}" if of else str(len(cut.value))
        return f"{words} {_ranges(cut.value)} ({left} {'stays' if len(cut.value) == 1 else 'stay'})"
    if not cut.value:
        return words
    return f"replace by {cut.value}" if cut.what == "replace" else f"{words} ({cut.value} passes through)"


def _cut_row(cut: Cut, layer: LayerScore | None, gone: Sequence[LayerScore]) -> tuple[str, str, str, str, str]:
    if layer is not None and layer.cut:
        return cut.address, kind(layer), change(cut), f"{layer.params:,}", short(layer.score)
    if layer is not None and layer.width and isinstance(cut.value, tuple):  # the same for every head, unit, channel
        params = round(layer.params * (1 - len(cut.value) / layer.width))
        return cut.address, kind(layer), change(cut, layer.width), f"{params:,}", short(layer.score)
    if layer is not None:  # it stays in part: what its parts weigh is not listed
        return cut.address, kind(layer), change(cut), "–", "–"
    inside = f"{len(gone)} layer{'' if len(gone) == 1 else 's'}" if gone else ""
    freed = f"≥ {sum(one.params for one in gone):,}" if gone else "–"  # with what the stage holds besides its layers
    return cut.address, inside, change(cut), freed, "–"


def _inside(address: str, outer: str) -> bool:
    return address == outer or address.startswith(outer + ".")


def _ranges(numbers: Sequence[int]) -> str:
    """
    >>> _ranges((5, 0, 1, 2)), _ranges(())
    ('0-2, 5', 'none')

    lissom.json has all of a long list.
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    more = ["…"] if len(runs) > RUNS else []
    return ", ".join([*(str(a) if a == b else f"{a}-{b}" for a, b in runs[:RUNS]), *more]) or "none"
