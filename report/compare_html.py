"""report.html of a comparison: one file that shows everything, needs nothing else, and asks the network for nothing."""

from pathlib import Path
from typing import Any

from . import _page, compare_marks, compare_plots, compare_sides
from . import compare_words as words
from .compare_schema import CompareReport, Pair

BOXES = 8  # on top of the page; the table has every limit
REASONS = 10  # shown; the others unfold
PAIRS = 12  # shown; the others unfold


def render(report: CompareReport, folder: Path) -> str:
    """The page. `folder` holds the PNGs that the pairs name; a missing one is said to be missing."""
    report = words.readable(report)
    every = words.asked(report)
    why = [one for one in every if one.check.verdict != "PASS"]
    pairs = [_pair(pair, folder) for pair in report.pairs]
    _, _, sentence = words.headline(report).partition(": ")
    return _page.fill(
        "compare.html.jinja",
        report=report,
        words=words,
        sides=compare_sides,
        sentence=sentence,
        boxes=[(one, *_figure(one)) for one in every[:BOXES]],
        asked=every,
        why=why[:REASONS],
        more_why=why[REASONS:],
        lines=words.lines(report),
        plots=_page.trusted({"limits": compare_plots.limits(report), "values": compare_plots.values(report)}),
        icons=_page.trusted({verdict: compare_marks.icon(verdict) for verdict in words.MARKS}),
        shown=pairs[:PAIRS],
        folded=pairs[PAIRS:],
    )


def _figure(one: words.Asked) -> tuple[str, str]:
    """The figure of a box, which is what the limit is about, and its interval."""
    figure, bracket, interval = words.quantity(one).partition(" [")
    return figure, bracket.strip() + interval


def _pair(pair: Pair, folder: Path) -> dict[str, Any]:
    images = [_page.picture(name, file, folder) for name, file in (("baseline", pair.base), ("candidate", pair.candidate))]
    return {"images": images, "caption": pair.caption, "index": pair.index, "change": f"{pair.change:.3f}"}
