"""The plots of a pruned model's report as inline SVG, deterministic. The picture of the network is in prune_network.py.

Orange and a cross say "cut", blue and a dot "kept": the pair is safe for the common kinds of colour blindness.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import prune_layers
from . import prune_words as words
from ._canvas import DOT, FIXED, INK, LINE, SEARCHED, SURFACE, legend, log_where_wide, new_figure, new_rows, to_svg
from .prune_schema import LayerScore, PruneReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("o", "s", "^", "D", "v", "P", "p", "h")  # markers of the kinds of layers, in the order in which they come


class Share(NamedTuple):
    """A row of the plot of what is left."""

    name: str
    value: float
    text: str
    interval: tuple[float, float] | None
    time: bool = False


def shares(report: PruneReport) -> str:
    """What is left of parameters, MACs, disk and time: right of the line at 1 is worse than before."""
    sizes = {
        "parameters": (report.after.params, report.before.params),
        "MACs": (report.after.macs, report.before.macs),
        "disk": (report.after.disk, report.before.disk),
    }
    rows = [Share(name, after / before, f"{after / before:.3f}", None) for name, (after, before) in sizes.items() if before]
    for one in report.latency:
        figure, _, _ = words.latency_ratio(one).partition(" ")
        low, high = one.ratio.low, one.ratio.high
        interval = None if low is None or high is None else (low, high)
        rows.append(Share(f"latency, batch {one.batch}", one.ratio.value, figure, interval, time=True))
    drawing, axes = new_rows([row.name for row in rows], 0.36)
    for y, row in enumerate(rows):
        color = SEARCHED if row.time else FIXED
        axes.plot([0, row.value], [y, y], color=color, linewidth=2.4 if row.time else 5, alpha=0.45, solid_capstyle="butt")
        axes.scatter([row.value], [y], s=34, color=color, marker="D" if row.time else "o", zorder=3)
        if row.interval:
            axes.plot(row.interval, [y, y], color=color, linewidth=1.4, marker="|", markersize=10, markeredgewidth=1.6)
        axes.text(1.02, y, row.text, transform=axes.get_yaxis_transform(), va="center", fontsize=10, color=INK)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=0)
    ends = [1.0, *(end for row in rows for end in (row.value, *(row.interval or ())))]
    axes.set_xlim(0, max(ends) * 1.05)
    axes.set_xlabel("after / before (dashed: as before)")
    return to_svg(drawing, "shares")


def ranking(report: PruneReport) -> str | None:
    """The scores from the cheapest layer to the dearest. None when nothing was scored."""
    ranked = prune_layers.cheapest(report)
    if not ranked:
        return None
    figure, axes = new_figure(3.2)
    places, signed = {layer.address: place for place, layer in enumerate(ranked, 1)}, prune_layers.signed(ranked)
    for layers, color, mark, size, name in _groups(ranked):
        at = [places[layer.address] for layer in layers]
        _points(axes, at, [layer.score or 0.0 for layer in layers], color, mark, size, name, signed=signed)
    _score_axis(axes, ranked)
    axes.set_xlabel("layers, the cheapest first")
    axes.set_ylabel(prune_layers.scores_are(report))
    legend(axes)
    return to_svg(figure, "ranking")


def bargains(report: PruneReport) -> str | None:
    """Score against the parameters that a cut frees: below and to the right are the bargains. None without scores."""
    scored = [layer for _, layer in prune_layers.scored(report.layers)]
    if not scored:
        return None
    figure, axes = new_figure(3.2)
    kinds, signed = list(dict.fromkeys(map(prune_layers.kind, scored))), prune_layers.signed(scored)
    for layers, color, _, size, name in _groups(scored):
        for kind in kinds:
            some = [layer for layer in layers if prune_layers.kind(layer) == kind]
            mark = KINDS[kinds.index(kind) % len(KINDS)]
            xs, ys = [layer.params for layer in some], [layer.score or 0.0 for layer in some]
            _points(axes, xs, ys, color, mark, size, None, signed=signed)
            if name == "cut":  # the kind's own marker, crossed out
                _points(axes, xs, ys, SURFACE, "x", 13, None, zorder=4, signed=signed)
    for kind, mark in zip(kinds, itertools.cycle(KINDS), strict=False):  # one entry for a kind, whether kept or cut
        axes.scatter([], [], s=26, color=FIXED, marker=mark, label=kind)
    if any(layer.cut for layer in scored):
        axes.scatter([], [], s=52, color=SEARCHED, marker="X", label="cut")
    axes.set_xlabel("parameters freed")
    axes.set_ylabel(prune_layers.scores_are(report))
    sizes = [layer.params for layer in scored]
    log_where_wide(axes, "x", sizes)
    _prefixes(axes, sizes)
    _score_axis(axes, scored)
    legend(axes)
    return to_svg(figure, "bargains")


def additivity(report: PruneReport) -> str | None:
    """The sum of single scores against the real loss of the same layers left out together; on the diagonal they agree."""
    found = report.additivity
    if found is None or not found.sums:
        return None
    figure, axes = new_figure(3.2)
    values = [*found.sums, *found.losses]
    if report.loss is not None and report.predicted_loss is not None:
        values += [report.loss, report.predicted_loss]
    axes.scatter(found.sums, found.losses, s=26, color=FIXED, label="random sets", alpha=0.8, linewidths=0)
    if report.loss is not None and report.predicted_loss is not None:
        axes.scatter([report.predicted_loss], [report.loss], s=60, color=SEARCHED, marker="X", label="what was cut", zorder=3)
    log_where_wide(axes, "x", values)
    log_where_wide(axes, "y", values)  # of the same values: with one scale for both the diagonal means something
    log = axes.get_xscale() == "log"
    low, high = (min(values) / 1.4, max(values) * 1.4) if log else (min(0.0, *values), max(values) * 1.06 or 1.0)
    axes.plot([low, high], [low, high], color=DOT, linewidth=1.2, linestyle="--", label="as predicted", zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("sum of the single scores")
    axes.set_ylabel("real loss together")
    legend(axes)
    return to_svg(figure, "additivity")


def _groups(layers: Sequence[LayerScore]) -> list[tuple[list[LayerScore], str, str, int, str]]:
    """(layers, colour, marker, area, name) of what stays and of what is cut."""
    kept, cut = [one for one in layers if not one.cut], [one for one in layers if one.cut]
    return [(kept, FIXED, "o", 26, "kept"), (cut, SEARCHED, "X", 52, "cut")]


def _points(
    axes: "Axes", xs: Sequence[float], ys: Sequence[float], color: str, mark: str, size: int, name: str | None, zorder: int = 3,
    *, signed: bool,
) -> None:  # fmt: skip
    """Points at their values; unless they are signed, a score of zero or less, which a log axis cannot show, lies on the lower edge."""
    shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0 or signed]
    edge = [x for x, y in zip(xs, ys, strict=True) if y <= 0 and not signed]
    lines = {"linewidths": 1.3} if mark == "x" else {"edgecolors": SURFACE, "linewidths": 0.6}
    if shown:
        at = ([x for x, _ in shown], [y for _, y in shown])
        axes.scatter(*at, s=size, color=color, marker=mark, label=name, zorder=zorder, **lines)
    if edge:
        low, label = axes.get_xaxis_transform(), None if shown else name
        at = (edge, [0.03] * len(edge))
        axes.scatter(*at, s=size, color=color, marker=mark, label=label, zorder=zorder, transform=low, **lines)


def _score_axis(axes: "Axes", layers: Sequence[LayerScore]) -> None:
    """A log axis upwards where scores span much, and a word about those that it cannot show. Signed ones it shows as they are."""
    if prune_layers.signed(layers):
        return
    positive = [score for score, _ in prune_layers.scored(layers) if score > 0]
    log_where_wide(axes, "y", positive)
    if len(positive) < len(layers):
        axes.margins(y=0.12)  # room on the lower edge
        text = "lower edge: 0 or less"
        axes.text(0.99, 0.03, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=DOT)
        axes.plot([0, 1], [0.07, 0.07], color=LINE, linewidth=1, linestyle=":", transform=axes.transAxes)


def _prefixes(axes: "Axes", values: Sequence[float]) -> None:
    """Ticks such as 2 M for two millions, few enough to stand side by side."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if axes.get_xscale() == "log":
        span = max(values) / min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if span > 1000 else (1, 3) if span > 100 else (1, 2, 5)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.scaled(value)))
