"""report.html of a pruned model: one file that shows everything, needs nothing else, and asks the network for nothing."""

from pathlib import Path
from typing import Any

from . import _page, _words, prune_layers, prune_network, prune_plots
from . import prune_words as words
from .prune_schema import LayerScore, PruneReport


def render(report: PruneReport, folder: Path) -> str:
    """The page. `folder` holds the contact sheets that the report names; a missing one is said to be missing."""
    drawn = {
        "shares": prune_plots.shares(report),
        "network": prune_network.network(report),
        "ranking": prune_plots.ranking(report),
        "bargains": prune_plots.bargains(report),
        "additivity": prune_plots.additivity(report),
    }
    partly = prune_layers.reduced(report)
    return _page.fill(
        "prune.html.jinja",
        report=report,
        words=words,
        verdict=words.verdict(report),
        keys=_keys(report),
        quality=words.quality_rows(report),
        plots=_page.trusted(drawn),
        sheets=[_page.sheet(scored.name, scored.sheet, folder) for scored in report.scored],
        score=prune_layers.scores_are(report),
        cuts=prune_layers.cut_rows(report),
        layers=[_layer(layer, place, prune_layers.fate(layer, partly)) for place, layer in enumerate(report.layers)],
    )


def _keys(report: PruneReport) -> list[_page.Key]:
    """The boxes on top: size, work, time, quality."""
    sizes = [
        ("parameters kept", report.before.params, report.after.params),
        ("MACs kept", report.before.macs, report.after.macs),
    ]
    boxes = [
        _page.Key("", title, words.share(after, before), f"{words.scaled(after)} of {words.scaled(before)}")
        for title, before, after in sizes
    ]
    slowest, pairs = words.worst(report), words.quality(report)
    if slowest is None:
        boxes.append(_page.Key("", "latency", "–", _words.NOT_MEASURED))
    else:  # the worst batch size, so that the big figure never looks better than the first line
        title = f"latency, batch {slowest.batch}"
        boxes.append(_page.key(words.pace(slowest), title, words.latency_ratio(slowest), " of the time before"))
    if not pairs:
        boxes.append(_page.Key("", "quality", "–", _words.NOT_MEASURED))
    else:
        before, after = (_words.quoted(one) for one in pairs[0])
        boxes.append(_page.key("", f"{pairs[0].known.label} after", after, f", before {before}"))
    return boxes


def _layer(layer: LayerScore, place: int, fate: str) -> dict[str, Any]:
    """One row of the big table: texts, each with what it is sorted by."""
    macs = None if layer.macs is None else words.scaled(layer.macs)
    return {
        "address": layer.address,
        "place": place,
        "kind": prune_layers.kind(layer),
        "cells": [
            (_words.short(layer.score), layer.score),
            (f"{layer.params:,}", layer.params),
            (macs or "–", layer.macs),
        ],
        "fate": fate,
        "cut": layer.cut,
    }
