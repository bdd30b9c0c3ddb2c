"""report.html: one file that shows everything, needs nothing else, and asks the network for nothing."""

from pathlib import Path
from typing import Any

from ..core.candidate import Step
from . import _page, _words, plots, search_front, search_parts, search_plots, search_verdict
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
        "front": search_plots.front(report),
        "gained": search_plots.gained(report),
        "ratios": search_plots.ratios(report),
        "latency": search_plots.latency(report),
    }
    return _page.fill(
        "search.html.jinja",
        report=report,
        words=_words,
        front=search_front,
        parts=search_parts,
        verdict=search_verdict.verdict(report),
        not_plain=search_verdict.not_plain(report),
        best=best,
        keys=_keys(report, best),
        columns=columns,
        costs=[_words.RATIOS[name] for name in _words.priced(report)],
        results=[_result(scored, report, [m.metric for m in columns]) for scored in (report.winner, *report.baselines)],
        equal_costs=plots.equal_costs(report),
        plots=_page.trusted(drawn),
        sheets=[_page.sheet(scored.name, scored.sheet, folder) for scored in (best, report.winner) if scored.sheet],
        other_metrics=_other_metrics(report),
        cutting=any(row.cuts for row in report.candidates),
        early=sum(_words.dropped(row, report) for row in report.candidates),
        candidates=[_candidate(row, report) for row in report.candidates],
    )


def _keys(report: SearchReport, best: Scored) -> list[_page.Key]:
    label, winner = report.objective_label, report.winner
    found = [
        ("searched", f"{label}, searched", _words.quoted(_words.find(winner, report.objective))),
        ("fixed", f"{label}, {best.name} (best fixed)", _words.quoted(_words.find(best, report.objective))),
        ("", f"gain over {best.name} (1: none)", _words.ratio_words(report.ratio).removeprefix("ratio ")),
    ]
    work = _page.Key("", "MACs ratio, searched", f"{winner.macs_ratio:.3f}", f"of {_words.uncut(report)}; work, not seconds")
    beside = {"latency": f"of {_words.uncut(report)}'s time", "params": "of the uncut model's"}
    costs = [_page.Key("", _words.COSTS[n], _words.share(winner, n), beside[n]) for n in _words.priced(report)]
    return [*(_page.key(*one) for one in found), work, *costs]


def _result(scored: Scored, report: SearchReport, names: list[str]) -> dict[str, Any]:
    return {
        "name": scored.name,
        "values": [_words.quoted(_words.find(scored, name)) for name in names],
        "costs": [_words.share(scored, name) for name in ("macs", *_words.priced(report))],
        "times": _words.timesteps(scored.plan),
    }


def _candidate(row: Row, report: SearchReport) -> dict[str, Any]:
    """Texts of one row of the big table, each with the number it is sorted by."""
    early = _words.dropped(row, report)
    return {
        "number": row.number,
        "origin": row.origin,
        "cells": [
            (_words.short(row.value), None if early else row.value),  # what does not compare is not sorted among the others
            (_words.short(row.rescored), row.rescored),
            *((_words.short(v := row.others.get(name)), None if early else v) for name in _other_metrics(report)),
            *((_words.share(row, name), _words.cost(row, name)) for name in ("macs", *_words.priced(report))),
        ],
        "images": row.samples or report.samples,
        "early": early,
        "times": _words.timesteps(row.plan),
        "first": row.plan.timesteps[0],
        "skips": _words.left_out(row.plan),
        "skipped": sum(len(step.left_out) for step in row.plan.steps),
        "layers": "; ".join(f"{step.timestep:g}: {_layers(step)}" for step in row.plan.steps if step.left_out),
        "cuts": [search_front.cut_words(cut) for cut in row.cuts],
        "calls": row.calls,
        "seconds": row.seconds,
        "error": row.error or "",
        "won": (row.plan, row.cuts) == (report.winner.plan, report.winner.cuts),
    }


def _layers(step: Step) -> str:
    return ", ".join([*step.skip, *(f"{address} (reused)" for address in step.reuse)])


def _other_metrics(report: SearchReport) -> list[str]:
    """Metrics that candidates carry besides the objective."""
    return sorted({name for row in report.candidates for name in row.others})
