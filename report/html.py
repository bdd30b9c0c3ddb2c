"""report.html: one file that shows everything, needs nothing else, and asks the network for nothing."""

from pathlib import Path
from typing import Any

from . import _page, _words, plots
from .schema import Row, Scored, SearchReport


def render(report: SearchReport, folder: Path) -> str:
    """The page. `folder` holds the contact sheets that the report names; a missing one is said to be missing.

    Raises ValueError when `best_fixed` names none of the baselines.
    """
    best, columns = _words.best_fixed(report), _words.metrics(report)
    drawn = {
        "intervals": plots.intervals(report),
        "tradeoff": plots.tradeoff(report) if _words.ranked(report) else None,
        "progress": plots.progress(report) if report.candidates else None,
        "schedules": plots.schedules(report),
        "skipped": plots.skipped(report),
    }
    return _page.fill(
        "search.html.jinja",
        report=report,
        words=_words,
        verdict=_words.verdict(report),
        best=best,
        keys=_keys(report, best),
        columns=columns,
        results=[_result(scored, [m.metric for m in columns]) for scored in (report.winner, *report.baselines)],
        equal_macs=plots.equal_macs(report),
        plots=_page.trusted(drawn),
        sheets=[_page.sheet(scored.name, scored.sheet, folder) for scored in (best, report.winner) if scored.sheet],
        other_metrics=_other_metrics(report),
        candidates=[_candidate(row, report) for row in report.candidates],
    )


def _keys(report: SearchReport, best: Scored) -> list[_page.Key]:
    label = report.objective_label
    found = [
        ("searched", f"{label}, searched", _words.quoted(_words.find(report.winner, report.objective))),
        ("fixed", f"{label}, {best.name} (best fixed)", _words.quoted(_words.find(best, report.objective))),
        ("", f"gain over {best.name} (1: none)", _words.ratio_words(report.ratio).removeprefix("ratio ")),
    ]
    work = _page.Key("", "MACs ratio, searched", f"{report.winner.macs_ratio:.3f}", "of the uncut run; work, not seconds")
    return [*(_page.key(*one) for one in found), work]


def _result(scored: Scored, names: list[str]) -> dict[str, Any]:
    values = [_words.quoted(_words.find(scored, name)) for name in names]
    return {"name": scored.name, "values": values, "macs": f"{scored.macs_ratio:.3f}", "times": _words.timesteps(scored.plan)}


def _candidate(row: Row, report: SearchReport) -> dict[str, Any]:
    """Texts of one row of the big table, each with the number it is sorted by."""
    return {
        "number": row.number,
        "origin": row.origin,
        "cells": [
            (_words.short(row.value), row.value),
            (_words.short(row.rescored), row.rescored),
            *((_words.short(row.others.get(name)), row.others.get(name)) for name in _other_metrics(report)),
            (f"{row.macs_ratio:.3f}", row.macs_ratio),
        ],
        "times": _words.timesteps(row.plan),
        "first": row.plan.timesteps[0],
        "skips": _words.skips(row.plan),
        "skipped": sum(len(step.skip) for step in row.plan.steps),
        "layers": "; ".join(f"{step.timestep:g}: {', '.join(step.skip)}" for step in row.plan.steps if step.skip),
        "calls": row.calls,
        "seconds": row.seconds,
        "error": row.error or "",
        "won": row.plan == report.winner.plan,
    }


def _other_metrics(report: SearchReport) -> list[str]:
    """Metrics that candidates carry besides the objective."""
    return sorted({name for row in report.candidates for name in row.others})
