"""report.md of a comparison, as GitHub-flavoured Markdown: what is posted in a pull request. The verdict is in its first line."""

from collections.abc import Iterator

from . import compare_sides
from . import compare_words as words
from ._gfm import bullets, cell, facts, fence, line, picture, table
from .compare_schema import CompareReport

PAIRS = 4  # pictured; the HTML page has all of them
CAPTION, HASH = 120, 12  # letters


def render(report: CompareReport, pictures: bool = True) -> str:
    """The whole report as GFM text.

    pictures: False for a comment or a job summary, where the paths of the pairs lead nowhere.
    """
    report = words.readable(report)
    why = [words.explained(one) for one in words.asked(report) if one.check.verdict != "PASS"]
    sections = [
        f"# {line(words.headline(report))}",
        *_table(report),
        *bullets("What did not pass", why),
        *bullets("Warnings", words.warnings(report)),
        *_pairs(report, pictures),
        *_conditions(report),
        "## Compare again",
        fence("sh", report.command),
    ]
    return "\n\n".join(sections) + "\n"


def _table(report: CompareReport) -> list[str]:
    if not report.rows:
        return ["Neither evaluation holds a number."]
    rows = (row for one in words.lines(report) for row in _rows(one))
    return [table(words.COLUMNS, rows), line(words.table_note(report))]


def _rows(one: words.Line) -> Iterator[list[str]]:
    """A row for each limit of a number, so that a status stands beside its limit."""
    said = ", ".join(text for text in (one.difference, one.meaning, one.paired) if text)
    limits = [(words.limit(check), _status(words.status(check))) for check in one.checks] or [("–", "not asked")]
    for limit, status in limits:
        yield [one.name, one.base, one.candidate, said, one.ratio, limit, status]


def _status(status: str) -> str:
    """All but PASS stand out."""
    mark, _, verdict = status.partition(" ")
    return status if verdict == "PASS" else f"{mark} **{verdict}**"


def _pairs(report: CompareReport, pictures: bool) -> list[str]:
    title = "## Pairs of samples, the largest change first"
    if not report.pairs:
        return [title, line(f"None: {report.pairs_missing or 'no images were kept.'}")]
    head = ["image", "caption", "change", *(["baseline", "candidate"] if pictures else [])]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for pair in report.pairs[:PAIRS]:
        caption = pair.caption if len(pair.caption) <= CAPTION else pair.caption[: CAPTION - 1] + "…"
        cells = [f"{pair.index:,}", cell(caption), f"{pair.change:.3f}"]
        if pictures:
            cells += [
                picture(f"baseline, image {pair.index}", pair.base),
                picture(f"candidate, image {pair.index}", pair.candidate),
            ]
        rows.append(f"| {' | '.join(cells)} |")
    most = f"The {PAIRS} of {len(report.pairs):,} pairs that changed most. " if len(report.pairs) > PAIRS else ""
    return [title, "\n".join(rows), most + words.CHANGE]


def _conditions(report: CompareReport) -> list[str]:
    """Both sides; of libraries and machine only what differs."""
    shown = [one for one in compare_sides.conditions(report) if one.differs or not one.version]
    rows = [[one.name, _short(one, one.base), _short(one, one.candidate), "differs" if one.differs else ""] for one in shown]
    head, *common = facts("Conditions", compare_sides.common(report))
    return [head, table(["", "baseline", "candidate", ""], rows), *common]


def _short(one: compare_sides.Condition, text: str) -> str:
    """A whole hash would make the table wider than a comment; report.json has it."""
    return (text[:HASH] if one.name == "weights hash" else text) or "–"
