"""The plots of the search report as inline SVG, deterministic.

The pair orange and blue is safe for the common kinds of colour blindness, and every series has its own marker too.
"""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _words, search_front
from ._canvas import DOT, FIXED, INK, SEARCHED, SURFACE, legend, log_where_wide, new_figure, new_rows, to_svg
from .schema import Row, Scored, SearchReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CROWD = 12  # labels that fit beside each other
MARKS = ("s", "D", "^", "v", "P", "p", "h", "d")  # one per baseline


def tradeoff(report: SearchReport) -> str:
    """Objective against what it is traded for (MACs, where nothing else was asked), all on the search's seeds.

    Where that is the same for all, one row of dots per schedule. Candidates that were dropped early are left out.
    """
    rows, name = _words.ranked(report), search_front.axis(report)
    if equal_costs(report):
        return _strips(report, rows)
    figure, axes = new_figure(3.2)
    at = _points(report, rows, name)
    axes.scatter([x for x, _ in at], [y for _, y in at], s=16, color=DOT, label="candidates", alpha=0.75)
    if search_front.several(report):
        at = _points(report, report.front, name)
        axes.scatter(
            [x for x, _ in at],
            [y for _, y in at],
            s=46,
            color="none",
            edgecolors=SEARCHED,
            linewidths=1.3,
            label="can be picked",
        )
    for scored, color, mark, size in _marked(report):
        if at := _points(report, [scored], name):
            label = "picked" if scored is report.winner and search_front.several(report) else scored.name
            axes.scatter(*at[0], s=size, color=color, marker=mark, label=label, zorder=3, edgecolors=SURFACE, linewidths=0.8)
    axes.set_xlabel(axis_label(report, name))
    axes.set_ylabel(f"{report.objective_label} (search seeds)")
    log_where_wide(axes, "y", [_known(r.value) for r in rows])
    legend(axes)
    return to_svg(figure, "tradeoff")


def equal_costs(report: SearchReport) -> bool:
    """Whether all schedules cost the same, so that a trade-off plot would be one vertical line."""
    name = search_front.axis(report)
    everyone: list[Row | Scored] = [*_words.ranked(report), report.winner, *report.baselines]
    shares = [share for one in everyone if (share := search_front.searched_at(report, one, name)) is not None]
    return not shares or max(shares) - min(shares) <= _words.EQUAL


def axis_label(report: SearchReport, name: str) -> str:
    """What lies along the axis of the trade-off."""
    if name not in _words.COSTS:
        measured = next((m for m in _words.metrics(report) if m.metric == name), None)
        return _words.heading(measured) if measured else name
    words = {"macs": "MACs ratio", "params": "parameters"}.get(name, _words.COSTS[name])
    return f"{words} against {_words.uncut(report)}" if name != "params" else "parameters against the uncut model"


def progress(report: SearchReport) -> str:
    """Objective of every candidate in order, the best so far, baselines as horizontal lines.

    On the lower edge: failures, and candidates that were dropped after fewer images, whose values do not compare.
    """
    figure, axes = new_figure(3.2)
    rows = _words.candidates(report)
    done = [row for row in rows if row.value is not None and not _words.dropped(row, report)]
    values = [_known(row.value) for row in done]
    best = min if _words.direction(report) == "lower" else max
    so_far = [best(values[: i + 1]) for i in range(len(values))]
    axes.scatter([r.number for r in done], values, s=12, color=DOT, alpha=0.75, label="candidate")
    axes.step([r.number for r in done], so_far, where="post", color=SEARCHED, linewidth=2, label="best so far")
    failed = [row.number for row in rows if row.state == "failed"]
    early = [row.number for row in rows if _words.dropped(row, report)]
    low_edge = axes.get_xaxis_transform()  # y in axes units: these trials have no value to show
    if early:
        axes.scatter(
            early,
            [0.02] * len(early),
            s=26,
            color=DOT,
            marker="|",
            linewidths=1,
            alpha=0.8,
            label="dropped early",
            transform=low_edge,
        )
    if failed:
        axes.scatter(
            failed, [0.02] * len(failed), s=22, color=INK, marker="x", linewidths=1.2, label="failed", transform=low_edge
        )
    lines = [(s.searched_value, s.name) for s in report.baselines if s.searched_value is not None]
    axes.margins(y=0.1)  # room for the failures below the best
    log_where_wide(axes, "y", values + [value for value, _ in lines])
    for value, name in lines:
        strong = name == report.best_fixed
        axes.axhline(value, color=FIXED, linewidth=1.6 if strong else 0.9, linestyle="--" if strong else ":")
    _label_right(axes, lines, report.best_fixed)
    axes.set_xlabel("candidate")
    axes.set_ylabel(f"{report.objective_label} (search seeds)")
    legend(axes)
    return to_svg(figure, "progress")


def intervals(report: SearchReport) -> str:
    """The objective of the winner and of every baseline on unseen seeds, with 95 % intervals."""
    entries = [(s, color) for s, color, *_ in _marked(report) if _words.find(s, report.objective)]
    figure, axes = new_rows([s.name for s, *_ in entries], 0.34)
    for y, (scored, color) in enumerate(entries):
        measured = _words.find(scored, report.objective)
        assert measured is not None  # filtered above
        low, high = measured.interval() or (measured.value, measured.value)
        axes.plot([low, high], [y, y], color=color, linewidth=1.8, marker="|", markersize=9, markeredgewidth=1.8)
        axes.scatter([measured.value], [y], s=24, color=color, marker="o", zorder=3)
    axes.set_xlabel(f"{report.objective_label} on {report.report_samples:,} unseen images, 95 % interval")
    return to_svg(figure, "intervals")


def schedules(report: SearchReport) -> str:
    """Where each schedule spends its steps, from noise on the left to the image on the right. Numbers: layers skipped (−), reused (r).
    Hollow: another model makes the step."""
    entries = _marked(report)
    figure, axes = new_rows([s.name for s, *_ in entries], 0.4)
    for y, (scored, color, mark, size) in enumerate(entries):
        times = scored.plan.timesteps
        axes.plot(times, [y] * len(times), color=color, linewidth=1, alpha=0.6)
        own = [step.timestep for step in scored.plan.steps if step.model is None]
        axes.scatter(own, [y] * len(own), s=size, color=color, marker=mark, zorder=3, edgecolors=SURFACE, linewidths=0.8)
        others = [step.timestep for step in scored.plan.steps if step.model]
        axes.scatter(others, [y] * len(others), s=size, color=SURFACE, marker=mark, zorder=3, edgecolors=color, linewidths=1.4)
        for step in scored.plan.steps:
            if step.left_out and len(times) <= CROWD:
                text = " ".join([f"−{len(step.skip)}"] * bool(step.skip) + [f"r{len(step.reuse)}"] * bool(step.reuse))
                axes.annotate(text, (step.timestep, y), (0, 9), textcoords="offset points", ha="center", fontsize=9, color=INK)
    total = _words.training_steps(s.plan for s, *_ in entries)
    axes.set_xlim(total * 1.03, -total * 0.03)
    axes.set_xlabel(f"timestep of {total:,} (noise left, image right)")
    return to_svg(figure, "schedules")


def skipped(report: SearchReport) -> str | None:
    """Layers against steps of the winner: a filled square is not executed, a hollow one reused. None when all are executed."""
    steps = report.winner.plan.steps
    layers = sorted({address for step in steps for address in step.left_out})
    if not layers:
        return None
    figure, axes = new_rows(layers, 0.24, mono=True)
    for way, filled in (("skip", SEARCHED), ("reuse", "none")):
        at = [(i, layers.index(address)) for i, step in enumerate(steps) for address in getattr(step, way)]
        if at:
            axes.scatter([x for x, _ in at], [y for _, y in at], s=70, marker="s", facecolors=filled, edgecolors=SEARCHED)
    axes.set_xlim(-0.6, len(steps) - 0.4)
    shown = range(0, len(steps), -(-len(steps) // CROWD))
    axes.set_xticks(shown, [f"{steps[i].timestep:g}" for i in shown])
    axes.set_xlabel("timestep of the step")
    return to_svg(figure, "skipped")


def _strips(report: SearchReport, rows: Sequence[Row]) -> str:
    entries = [e for e in _marked(report) if e[0].searched_value is not None]
    figure, axes = new_rows(["candidates", *(s.name for s, *_ in entries)], 0.36)
    rng = random.Random(0)  # spread only so that dots do not hide each other
    values = [_known(row.value) for row in rows]
    axes.scatter(values, [rng.uniform(-0.28, 0.28) for _ in rows], s=14, color=DOT, alpha=0.75)
    for y, (scored, color, mark, size) in enumerate(entries, 1):
        axes.scatter([_known(scored.searched_value)], [y], s=size, color=color, marker=mark, edgecolors=SURFACE, linewidths=0.8)
    log_where_wide(axes, "x", values + [_known(s.searched_value) for s, *_ in entries])
    axes.set_xlabel(f"{report.objective_label} on the search's seeds")
    return to_svg(figure, "tradeoff")


def _points(report: SearchReport, some: Sequence[Row | Scored], name: str) -> list[tuple[float, float]]:
    """(cost or second metric, objective) on the search's seeds of those that have both."""
    found = []
    for one in some:
        x, y = search_front.searched_at(report, one, name), one.value if isinstance(one, Row) else one.searched_value
        if x is not None and y is not None:
            found.append((x, y))
    return found


def _marked(report: SearchReport) -> list[tuple[Scored, str, str, int]]:
    """(schedule, colour, marker, area) in the order in which all plots show them."""
    others = [(s, FIXED, MARKS[i % len(MARKS)], 44) for i, s in enumerate(report.baselines)]
    return [(report.winner, SEARCHED, "*", 130), *others]


def _label_right(axes: "Axes", lines: Sequence[tuple[float, str]], best: str) -> None:
    """Names of the horizontal lines in the right margin, pushed apart where lines lie close."""
    axes.figure.canvas.draw()  # fixes the limits that the places are computed from
    to_axes = axes.transAxes.inverted()
    wanted = sorted((to_axes.transform(axes.transData.transform((1, value)))[1], name) for value, name in lines)
    gap, place = 0.062, -math.inf
    places = []
    for y, _ in wanted:
        place = max(y, place + gap)
        places.append(place)
    overflow = max(0.0, places[-1] - 1) if places else 0.0  # pushed beyond the top: shift the crowd down
    for (_, name), y in zip(wanted, places, strict=True):
        weight = "bold" if name == best else "normal"
        text = axes.text(
            1.015, y - overflow, name, color=FIXED, fontsize=9.5, va="center", transform=axes.transAxes, clip_on=False
        )
        text.set_fontweight(weight)


def _known(value: float | None) -> float:
    assert value is not None  # callers pass complete rows only
    return value
