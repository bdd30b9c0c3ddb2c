"""The plots of a distilled model's report as inline SVG, deterministic."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from ._canvas import DOT, FIXED, INK, MUTED, SEARCHED, SURFACE, legend, log_where_wide, new_figure, new_panels, to_svg
from ._words import short
from .distill_recovered import Trio, trios
from .distill_schema import DistillReport, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 200  # of a line at most
PANELS = 6  # metrics drawn; the table has all of them
LONGEST = 44  # letters of a name that a plot has room for
# A colour and a dash pattern each, so that the lines can be told apart without colours too.
STYLES = (
    (FIXED, "-"),
    (SEARCHED, (0, (5, 1.5))),
    (DOT, "-"),
    (MUTED, (0, (1.5, 1.5))),
    (FIXED, (0, (1.5, 1.5))),
    (SEARCHED, "-"),
)
MODELS = (("teacher", FIXED, "s"), ("before", DOT, "D"), ("after", SEARCHED, "o"))


def losses(report: DistillReport) -> str | None:
    """Every loss before its weight, and the weighted sum, over the iterations. None where no curve was kept."""
    lines = _thinned(report.curve)
    if not lines:
        return None
    names = list(dict.fromkeys(name for line in lines for name in line.terms))
    figure, axes = new_figure(3.1 + 0.1 * len(names))  # room for the legend
    shown: list[float] = []
    if len(names) > 1 or any(weight != 1 for weight in report.losses.values()):  # else the sum is the loss
        for name, (color, dashes) in zip(names, cycle(STYLES), strict=False):
            points = [(line.iteration, line.terms[name]) for line in lines if name in line.terms]
            axes.plot(*_columns(points), color=color, linestyle=dashes, linewidth=1.5, label=_cut(name))
            shown += [value for _, value in points]
    label = "weighted sum" if shown else _cut(names[0] if names else "weighted sum")
    points = [(line.iteration, line.total) for line in lines]
    axes.plot(
        *_columns(points), color=INK, linewidth=2.4, label=label, zorder=1.9
    )  # a loss that is nearly all of it stays in sight
    log_where_wide(axes, "y", [*shown, *(value for _, value in points)])
    _iterations(axes)
    axes.set_ylabel("loss")
    legend(axes)
    return to_svg(figure, "losses")


def checks(report: DistillReport) -> str | None:
    """The checks along the way. Neither teacher nor student before are drawn: they were measured on other samples."""
    if not report.checks:
        return None
    figure, axes = new_figure(3.0)
    at, values = [check.iteration for check in report.checks], [check.value for check in report.checks]
    axes.plot(at, values, color=SEARCHED, linewidth=1.6, zorder=2)
    axes.scatter(at, values, s=30, color=SEARCHED, zorder=3, edgecolors=SURFACE, linewidths=0.8)
    best = values.index(min(values))
    axes.scatter(at[best], values[best], s=120, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=4, label="best")
    log_where_wide(axes, "y", values)
    axes.margins(x=0.06, y=0.12)
    _iterations(axes)
    axes.set_ylabel("lower is better")
    legend(axes)
    return to_svg(figure, "checks")


def recovered(report: DistillReport) -> str | None:
    """Teacher, student before and after with their intervals, each metric on its own linear scale. None without measurements.

    Linear, so that the share that came back is a share of a length.
    """
    found = trios(report)[:PANELS]
    if not found:
        return None
    figure, panels = new_panels(len(found), 1.6)
    for axes, trio in zip(panels, found, strict=True):
        _panel(axes, trio)
    return to_svg(figure, "recovered")


def _panel(axes: "Axes", trio: Trio) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_yticks(range(len(MODELS)), [name for name, _, _ in MODELS], color=INK, fontsize=10)
    axes.set_ylim(len(MODELS) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for y, (measured, (_, color, mark)) in enumerate(zip(trio, MODELS, strict=True)):
        value = None if measured is None else measured.value
        axes.text(1.02, y, short(value), transform=axes.get_yaxis_transform(), va="center", fontsize=10, color=INK)
        if measured is None or value is None:
            continue
        if (ends := measured.interval()) is not None:
            axes.plot(ends, [y, y], color=color, linewidth=1.8, marker="|", markersize=9, markeredgewidth=1.8)
        axes.scatter([value], [y], s=34, color=color, marker=mark, zorder=3, edgecolors=SURFACE, linewidths=0.8)
    if trio.teacher is not None:
        axes.axvline(trio.teacher.value, color=INK, linewidth=1, linestyle="--", zorder=0)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(_cut(f"{trio.known.label} ({trio.known.direction} is better)"), loc="left", fontsize=10, color=INK)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _thinned(curve: Sequence[Line]) -> list[Line]:
    """At most POINTS lines, each the mean of a few neighbours."""
    size = -(-len(curve) // POINTS) or 1
    found = []
    for start in range(0, len(curve), size):
        some = curve[start : start + size]
        names = dict.fromkeys(name for line in some for name in line.terms)
        terms = {name: _mean(line.terms[name] for line in some if name in line.terms) for name in names}
        total = _mean(line.total for line in some)
        found.append(some[-1].model_copy(update={"terms": terms, "total": total}))
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _iterations(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("iteration")


def _cut(name: str) -> str:
    """A name in one line that leaves the plot its room."""
    whole = " ".join(name.split())
    return whole if len(whole) <= LONGEST else whole[: LONGEST - 1] + "…"
