"""report.html: one file that shows everything, needs nothing else, and asks the network for nothing."""

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

from . import _words, plots
from .schema import Row, Scored, SearchReport

TEMPLATE = Path(__file__).with_name("search.html.jinja")
PIXELATED_BELOW = 128  # pixels a tile: smaller images are enlarged without smoothing, as they are


class Sheet(NamedTuple):
    name: str
    uri: str | None  # None: the file that report.json names is not there
    pixelated: bool


def render(report: SearchReport, folder: Path) -> str:
    """The page. `folder` holds the contact sheets that the report names; a missing one is said to be missing.

    Raises ValueError when `best_fixed` names none of the baselines.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    best, columns = _words.best_fixed(report), _words.metrics(report)
    drawn = {
        "intervals": plots.intervals(report),
        "tradeoff": plots.tradeoff(report) if _words.ranked(report) else None,
        "progress": plots.progress(report) if report.candidates else None,
        "schedules": plots.schedules(report),
        "skipped": plots.skipped(report),
    }
    return template.render(
        report=report,
        words=_words,
        verdict=_words.verdict(report),
        best=best,
        columns=columns,
        results=[_result(scored, [m.metric for m in columns]) for scored in (report.winner, *report.baselines)],
        equal_macs=plots.equal_macs(report),
        plots={name: Markup(svg) for name, svg in drawn.items() if svg},  # our own SVG: matplotlib has escaped its texts
        sheets=[_sheet(scored, folder) for scored in (best, report.winner) if scored.sheet],
        other_metrics=_other_metrics(report),
        candidates=[_candidate(row, report) for row in report.candidates],
    )


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


def _sheet(scored: Scored, folder: Path) -> Sheet:
    from PIL import Image, UnidentifiedImageError

    try:
        data = (folder / str(scored.sheet)).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            small, kind = image.width < 8 * PIXELATED_BELOW, Image.MIME[image.format or "PNG"]
    except (OSError, UnidentifiedImageError):
        return Sheet(scored.name, None, False)
    return Sheet(scored.name, f"data:{kind};base64,{base64.b64encode(data).decode()}", small)
