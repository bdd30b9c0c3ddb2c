"""The plots of what can be picked, of what each part gained, and of predicted times, as inline SVG, deterministic."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import _words, plots, search_front, search_parts
from ._canvas import DOT, FIXED, INK, SEARCHED, SURFACE, legend, log_where_wide, new_figure, new_rows, to_svg
from .schema import Ratio, Scored, SearchReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 15.0  # points between two numbers at least; closer ones are left out, the table has them all


def front(report: SearchReport) -> str | None:
    """The members with their intervals, the fixed schedules beside them. None with one objective, or where nothing is known."""
    name = search_front.axis(report)
    placed = [(n, one, *place) for n, one in enumerate(report.front, 1) if (place := _place(report, one, name))]
    if not search_front.several(report) or not placed:
        return None
    figure, axes = new_figure(3.6)
    fixed = [(i, one, *place) for i, one in enumerate(report.baselines) if (place := _place(report, one, name))]
    for i, one, x, y in fixed:
        _cross(axes, report, one, name, FIXED)
        mark = plots.MARKS[i % len(plots.MARKS)]
        axes.scatter([x], [y], s=44, color=FIXED, marker=mark, label=one.name, zorder=3, edgecolors=SURFACE, linewidths=0.8)
    line = sorted((x, y) for *_, x, y in placed)
    axes.plot([x for x, _ in line], [y for _, y in line], color=SEARCHED, linewidth=1, alpha=0.45, zorder=2)
    for number, one, *_ in placed:
        _cross(axes, report, one, name, SEARCHED, strong=number == report.picked)
    others = [(x, y) for number, _, x, y in placed if number != report.picked]
    chosen = [(x, y) for number, _, x, y in placed if number == report.picked]
    for points, mark, size, label in ((others, "o", 34, "can be picked"), (chosen, "*", 150, "picked")):
        if points:
            at = ([x for x, _ in points], [y for _, y in points])
            axes.scatter(*at, s=size, color=SEARCHED, marker=mark, label=label, zorder=4, edgecolors=SURFACE, linewidths=0.8)
    shown = [measured for _, one, *_ in (*placed, *fixed) if (measured := search_front.measured(report, one, report.objective))]
    log_where_wide(axes, "y", [end for one in shown for end in (one.interval() or (one.value, one.value))])
    axes.set_xlabel(plots.axis_label(report, name))
    axes.set_ylabel(report.objective_label + ("" if search_front.basis(report) == "report" else ", re-scored"))
    axes.margins(x=0.08, y=0.08)
    legend(axes)
    across = search_front.measured(report, placed[0][1], name)
    rightwards = across is not None and across.direction == "higher"
    upwards = _words.direction(report) == "higher"
    _numbers(axes, [(number, x, y) for number, _, x, y in placed], report.picked, rightwards, upwards)
    return to_svg(figure, "front")


def gained(report: SearchReport) -> str | None:
    """The objective after every part, with intervals, and the share of MACs on the right. None where no parts are told apart."""
    parts = [(one, m) for one in report.gained if (m := _words.find(one.scored, report.objective))]
    if not parts:
        return None
    figure, axes = new_rows([search_parts.named(one) for one, _ in parts], 0.42)
    axes.plot([m.value for _, m in parts], range(len(parts)), color=DOT, linewidth=1, alpha=0.6, zorder=1)
    for y, (one, measured) in enumerate(parts):
        color = FIXED if one.part == "fixed" else SEARCHED
        _bar(axes, measured.interval(), y, color)
        axes.scatter([measured.value], [y], s=30, color=color, marker="s" if one.part == "fixed" else "o", zorder=3)
        axes.text(
            1.03, y, f"{one.scored.macs_ratio:.3f}", transform=axes.get_yaxis_transform(), va="center", fontsize=10, color=INK
        )
    axes.text(1.03, 1.0, "MACs", transform=axes.transAxes, va="bottom", fontsize=9.5, color=INK)
    axes.set_xlabel(f"{report.objective_label}, 95 % interval")
    return to_svg(figure, "gained")


def ratios(report: SearchReport) -> str | None:
    """What each part did: the ratio to the part before, with its interval. None where no ratio is known."""
    parts = [(one, one.ratio) for one in report.gained if one.part != "fixed" and one.ratio is not None]
    if not parts:
        return None
    figure, axes = new_rows([f"+ {one.part}" for one, _ in parts], 0.42)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=0)
    for y, (_, ratio) in enumerate(parts):
        found = search_parts.outcome(ratio)
        color, mark = {"better": (SEARCHED, "o"), "worse": (FIXED, "X")}.get(found, (DOT, "D"))
        _bar(axes, _ends(ratio), y, color)
        axes.scatter([ratio.value], [y], s=60, color=color, marker=mark, zorder=3, edgecolors=SURFACE, linewidths=0.8)
        axes.text(1.03, y, search_parts.WORDS[found], transform=axes.get_yaxis_transform(), va="center", fontsize=10, color=INK)
    axes.margins(x=0.08)
    axes.set_xlabel("ratio to the part before (above 1: better)")
    return to_svg(figure, "ratios")


def latency(report: SearchReport) -> str | None:
    """Predicted against measured shares of the uncut run; on the diagonal they agree. None where nothing was timed."""
    found = search_parts.pairs(report.latency) if report.latency else []
    if not found:
        return None
    figure, axes = new_figure(3.2)
    ends = [share for pair in found for share in pair]
    own = report.winner.costs.get("latency")
    if own is not None:
        axes.axvline(own, color=SEARCHED, linewidth=1.4, linestyle=":", label="picked, predicted", zorder=1)
        ends.append(own)
    room = 0.08 * (max(ends) - min(ends)) or 0.02
    low, high = min(ends) - room, max(ends) + room
    axes.plot([low, high], [low, high], color=DOT, linewidth=1.2, linestyle="--", label="as predicted", zorder=1)
    at = ([x for x, _ in found], [y for _, y in found])
    axes.scatter(*at, s=34, color=FIXED, label="candidates", zorder=3, edgecolors=SURFACE, linewidths=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("predicted share of the uncut run's time")
    axes.set_ylabel("measured share")
    legend(axes)
    return to_svg(figure, "latency")


def _place(report: SearchReport, one: Scored, name: str) -> tuple[float, float] | None:
    x, measured = search_front.at(report, one, name), search_front.measured(report, one, report.objective)
    return None if x is None or measured is None else (x, measured.value)


def _cross(axes: "Axes", report: SearchReport, one: Scored, name: str, color: str, strong: bool = False) -> None:
    """The interval of the first objective, and that of the other one where it is a metric."""
    place, width = _place(report, one, name), 2.0 if strong else 1.3
    assert place is not None  # callers have placed it
    up, across = search_front.measured(report, one, report.objective), search_front.measured(report, one, name)
    for measured, horizontal in ((up, False), (across, True)):
        ends = measured.interval() if measured else None
        if ends:
            xs, ys = (ends, (place[1],) * 2) if horizontal else ((place[0],) * 2, ends)
            axes.plot(
                xs, ys, color=color, linewidth=width, marker="_" if not horizontal else "|", markersize=7, alpha=0.85, zorder=2
            )


def _bar(axes: "Axes", ends: tuple[float, float] | None, y: float, color: str) -> None:
    if ends is not None:
        axes.plot(ends, [y, y], color=color, linewidth=1.8, marker="|", markersize=9, markeredgewidth=1.8)


def _ends(ratio: Ratio) -> tuple[float, float] | None:
    return None if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)


def _numbers(axes: "Axes", points: Iterable[tuple[int, float, float]], picked: int, rightwards: bool, upwards: bool) -> None:
    """The members' numbers on the better side of their points, where nothing lies; none where another one's would be covered."""
    axes.figure.canvas.draw()  # fixes the limits that the places are computed from
    taken: list[tuple[float, float]] = []
    for number, x, y in sorted(points, key=lambda point: (point[0] != picked, point[0])):
        right, up = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        place = (float(right), float(up))
        if any(math.dist(place, other) < NEAR for other in taken):
            continue
        taken.append(place)
        text = axes.annotate(
            str(number),
            (x, y),
            (6 if rightwards else -6, 4 if upwards else -5),
            textcoords="offset points",
            ha="left" if rightwards else "right",
            va="bottom" if upwards else "top",
            fontsize=9.5,
            color=INK,
            zorder=5,
        )
        text.set_fontweight("bold" if number == picked else "normal")
