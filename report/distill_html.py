"""report.html of a distilled model: one file that shows everything, needs nothing else, and asks the network for nothing."""

from pathlib import Path

from . import _page, _words, distill_plots, prune_words
from . import distill_words as words
from .distill_recovered import lost, recovered, trios
from .distill_schema import DistillReport


def render(report: DistillReport, folder: Path) -> str:
    """The page. `folder` holds the contact sheets that the report names; a missing one is said to be missing."""
    drawn = {
        "losses": distill_plots.losses(report),
        "checks": distill_plots.checks(report),
        "recovered": distill_plots.recovered(report),
    }
    pictured = [(f"iteration {c.iteration:,}: {_words.short(c.value)}", c.sheet) for c in words.pictured(report)]
    return _page.fill(
        "distill.html.jinja",
        report=report,
        words=words,
        verdict=words.verdict(report),
        not_plain=prune_words.not_plain(report),
        spent=prune_words.spent(report),
        keys=_keys(report),
        quality=words.quality_rows(report),
        losses=words.loss_rows(report),
        plots=_page.trusted(drawn),
        sheets=[_page.sheet(scored.name, scored.sheet, folder) for scored in report.scored],
        pictured=[_page.sheet(name, sheet, folder) for name, sheet in pictured],
    )


def _keys(report: DistillReport) -> list[_page.Key]:
    """The boxes on top: quality, what came back, iterations, time."""
    asked = f"of {report.asked:,} asked" + (", stopped early" if report.stopped_early else "")
    spent, here = words.seconds(report), report.spent.get("iterations")
    did = "" if here is None else f"for {_words.counted(round(here), 'iteration')}, in this session"
    return [
        *_first(report),
        _page.Key("", "iterations", f"{report.iterations:,}", asked),
        _page.Key("", "time", "–", _words.NOT_MEASURED)
        if spent is None
        else _page.Key("", "time", _words.duration(spent), did),
    ]


def _first(report: DistillReport) -> list[_page.Key]:
    """The first metric, and the share of its loss that came back: no figure where none can be claimed."""
    found = trios(report)
    if not found:
        return [_page.Key("", name, "–", _words.NOT_MEASURED) for name in ("quality", "recovered")]
    first, title = found[0], "recovered"
    meaning, teacher, before = words.change(first), _words.quoted(first.teacher), _words.quoted(first.before)
    kind = meaning if meaning in ("better", "worse") else ""
    quality = _page.key(kind, f"{first.known.label} after", _words.quoted(first.after), f", before {before}, teacher {teacher}")
    share = recovered(first)
    if share is None:
        why = {"unclear": "nothing was measurably lost before", "ahead": "it was ahead of the teacher before"}
        return [quality, _page.Key("", title, "–", why.get(lost(first), "not known"))]
    said = words.share(share)
    if share.low <= 0 <= share.high:
        return [quality, _page.Key("", title, "–", f"nothing measurable: {said}")]
    figure, _, interval = said.rpartition(" % ")
    of_what = f"of what {first.known.label} had lost against the teacher"
    return [quality, _page.Key("worse" if share.high < 0 else "better", title, f"{figure} %", f"{interval} {of_what}")]
