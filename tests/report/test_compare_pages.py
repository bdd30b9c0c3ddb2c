"""report.md and report.html of a comparison: the verdict first, every number, no hostile text gets out of its place."""

import html as standard_html
import re
from pathlib import Path

import numpy as np
import pytest
from lissom.core.gates import Gate, check
from lissom.report import compare_html, compare_markdown, compare_plots
from lissom.report import compare_words as words
from lissom.report.compare_schema import CompareReport, Row
from lissom.tests.report import compare_reports as reports
from lissom.tests.report.compare_reports import CAPTION, EVERY, build, row
from lissom.tests.report.parsed import Page, tables
from PIL import Image
from pydantic import ValidationError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the pairs: tiny ones, a large one in the third pair, one missing in the fourth."""
    found = tmp_path_factory.mktemp("run")
    (found / "pairs").mkdir()
    for place, pair in enumerate(reports.pairs()):
        size = 160 if place == 2 else 8
        for name in (pair.base, pair.candidate)[: 1 if place == 3 else 2]:
            Image.fromarray(np.full((size, size, 3), place * 8, np.uint8)).save(found / name)
    return found


def visible(page: str) -> str:
    """The text of a page, without scripts and styles."""
    body = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(standard_html.unescape(re.sub(r"<[^>]+>", " ", body.replace("<wbr>", ""))).split())


def prose(markdown: str) -> str:
    """Markdown without its blocks of code, which are shown as they are."""
    return re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", EVERY)
def test_json_round_trip_and_the_same_every_time(name: str, folder: Path) -> None:
    report = EVERY[name]()
    again = CompareReport.model_validate_json(report.model_dump_json())
    assert again == report
    assert compare_markdown.render(again) == compare_markdown.render(report)
    assert compare_html.render(again, folder) == compare_html.render(report, folder)
    with pytest.raises(ValidationError, match="score"):
        CompareReport.model_validate({**report.model_dump(), "score": 2})


@pytest.mark.parametrize("name", EVERY)
def test_the_verdict_is_in_the_first_line_and_on_top_of_the_page(name: str, folder: Path) -> None:
    report = EVERY[name]()
    text, page = compare_markdown.render(report), compare_html.render(report, folder)
    first = text.splitlines()[0]
    assert first.startswith(f"# {report.verdict}: ") and len(re.findall(r"^# ", prose(text), flags=re.MULTILINE)) == 1
    banner = page[page.index('<div class="banner') : page.index("<h2>")]
    assert f'class="banner {report.verdict}" role="status"' in banner and "<svg" in banner
    assert f"<strong>{report.verdict}</strong>" in banner and f"exit code {report.exit_code}" in banner
    assert visible(banner).startswith(words.headline(report).replace(": ", " ", 1))


@pytest.mark.parametrize("name", EVERY)
def test_the_table_has_every_limit_and_every_number(name: str, folder: Path) -> None:
    report = EVERY[name]()
    head, *rows = next(t for t in tables(compare_markdown.render(report)) if t[0][0] == "Metric")
    assert tuple(head) == words.COLUMNS
    assert len(rows) == sum(max(1, len(one.checks)) for one in report.rows)
    statuses = [cells[6].replace("**", "") for cells in rows]
    marked = {f"{mark} {verdict}": verdict for verdict, mark in words.MARKS.items()}
    assert sorted(marked[text] for text in statuses[: len(report.checks)]) == sorted(one.verdict for one in report.checks)
    assert set(statuses[len(report.checks) :]) <= {"not asked"}
    page = compare_html.render(report, folder)
    table = page[page.index('<tbody class="group">') : page.index("</table>")]
    assert table.count('scope="row"') == len(report.rows) and table.count('<span class="state') == len(report.checks)


def test_markdown_of_a_regression() -> None:
    text = compare_markdown.render(reports.regression())
    rows = next(t for t in tables(text) if t[0][0] == "Metric")
    assert rows[1] == [
        "FD[zoo:judge] (lower is better)", "12.3 [12.0, 12.6]", "13.9 [13.5, 14.3]", "+1.60 [1.47, 1.73], worse",
        "1.130 [1.120, 1.141]", "increase at most 0.5", "✗ **REGRESSION**",
    ]  # fmt: skip
    assert rows[5][:5] == ["params [parameters] (lower is better)", "859.5 M", "601.7 M", "-257.9 M, better", "0.7"]
    assert rows[6][5:] == ["–", "not asked"] and rows[6][0].startswith("accuracy")
    why = text[text.index("## What did not pass") : text.index("## Warnings")]
    assert why.count("\n- ") == 3 and "about" in why and "latency is 1.11" in why
    assert "| weights hash | ef56ef56ef56 | 0a1b0a1b0a1b | differs |" in text
    assert "lissom compare runs/base.json runs/candidate.json --gates gates.yaml\n```" in text
    assert "| model | zoo:fashion | runs/pruned/model | differs |" in text and "| python |" not in text
    assert "| torch | 2.14 | 2.6 | differs |" in compare_markdown.render(reports.unpaired())
    assert "## What did not pass" not in compare_markdown.render(reports.passed())


def test_unpaired_is_said_where_it_counts(folder: Path) -> None:
    report = reports.unpaired()
    text, page = compare_markdown.render(report), visible(compare_html.render(report, folder))
    for said in (text, page):
        assert "Other seeds: unpaired, wider intervals" in said and "worse, unpaired" in said
    assert "unpaired" not in compare_markdown.render(reports.passed())


def test_pairs_in_markdown() -> None:
    text = compare_markdown.render(reports.regression())
    head, *rows = next(t for t in tables(text) if t[0][0] == "image")
    assert head == ["image", "caption", "change", "baseline", "candidate"] and len(rows) == 4
    assert rows[0][3] == "![baseline, image 976](pairs/000-base.png)" and rows[0][1] == CAPTION[:119] + "…"
    assert "The 4 of 30 pairs that changed most." in text
    assert "that changed most" not in compare_markdown.render(reports.passed(pairs=reports.pairs(3)))
    plain = compare_markdown.render(reports.regression(), pictures=False)  # where the files are not beside the text
    assert "![" not in plain and next(t for t in tables(plain) if t[0][0] == "image")[0] == head[:3]
    assert "Other seeds on both sides." in compare_markdown.render(
        build((), pairs=(), pairs_missing="Other seeds on both sides.")
    )
    assert "None: no images were kept." in compare_markdown.render(build((), pairs=()))


def test_pairs_on_the_page(folder: Path, tmp_path: Path) -> None:
    page = compare_html.render(reports.regression(), folder)
    assert page.count("data:image/png;base64,") == 59 and page.count("missing from the folder or cannot be read") == 1
    assert page.count('class="pixelated"') == 57  # all but the large pair
    shown, folded = page[: page.index("more pairs</summary>")], page[page.index("more pairs</summary>") :]
    assert shown.count('class="both"') == compare_html.PAIRS and folded.count('class="both"') == 30 - compare_html.PAIRS
    first = page[page.index('<div class="both">') :].partition("</figcaption>")[0]
    assert first.index('alt="baseline, image 976"') < first.index('alt="candidate, image 976"')
    assert f'title="{CAPTION}"' in first and "image 976, change 0.393" in first
    assert "<details>" not in compare_html.render(reports.passed(pairs=reports.pairs(3)), folder)
    alone = compare_html.render(reports.passed(pairs=reports.pairs(1)), tmp_path)
    assert alone.count("missing from the folder") == 2
    none = compare_html.render(reports.passed(pairs=(), pairs_missing="other seeds."), folder)
    assert "<p>None: other seeds.</p>" in none


def test_pairs_come_from_the_folder_only(folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "run"
    inside.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "secret.png")
    names = ("../secret.png", str(tmp_path / "secret.png"), "a\0b.png", "", ".")
    pairs = tuple(reports.pairs(1)[0].model_copy(update={"base": name, "candidate": "none.png"}) for name in names)
    page = compare_html.render(reports.passed(pairs=pairs), inside)
    assert "data:image" not in page and page.count("missing from the folder") == 2 * len(names)


@pytest.mark.parametrize("name", EVERY)
def test_page_needs_nothing_else(name: str, folder: Path) -> None:
    page = compare_html.render(EVERY[name](), folder)
    parsed = Page(page)
    assert parsed.open == [] and parsed.tags.count("script") == 1 and parsed.links == []
    assert all(address.startswith("data:image/png;base64,") for address in parsed.loaded)
    assert "@import" not in page and "url(" not in page and "default-src 'none'" in page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "None" not in visible(page) and "nan" not in re.sub(r"data:[^\"]*", "", page)


def test_html_escapes_what_it_is_given(folder: Path) -> None:
    page = compare_html.render(reports.hostile(), folder)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search("[\x00\x1b\u202e]", page)


def test_markdown_escapes_what_it_is_given() -> None:
    text = compare_markdown.render(reports.hostile())
    outside = prose(text)
    assert "<script" not in outside and "![d](" not in outside and "@everyone" not in outside and "#1 " not in outside
    assert not re.search(r"^(# c|\[x\]:|::)", outside, flags=re.MULTILINE)
    assert not re.search("[\x00\x1b\u202e]", text)
    assert all(len(found) > 1 for found in tables(text))


def test_markdown_as_a_browser_gets_it() -> None:
    """Rendered: one heading of the first order, pictures from beside the text only, no links, no list, code or heading inside."""
    markdown_it = pytest.importorskip("markdown_it")
    page = markdown_it.MarkdownIt("commonmark").enable("table").render(compare_markdown.render(reports.hostile()))
    parsed = Page(page)
    assert parsed.open == [] and parsed.tags.count("h1") == 1 and parsed.links == [] and "script" not in parsed.tags
    assert parsed.loaded == ["http%3A//evil/e.png", *(one for one in parsed.loaded[1:] if one.startswith("../../"))]
    assert parsed.tags.count("pre") == 1 and parsed.tags.count("ol") == 0 and parsed.tags.count("ul") == 2
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "What did not pass", "Warnings", "Pairs of samples, the largest change first", "Conditions", "Compare again"
    ]  # fmt: skip


def test_long_lists_unfold(folder: Path) -> None:
    page = compare_html.render(reports.many(), folder)
    failing = sum(one.verdict != "PASS" for one in reports.many().checks)
    assert page.count('<dl class="keys">') == 1 and "The worst 8 of 40 limits; all are below." in page
    assert f"{failing - compare_html.REASONS} more limits</summary>" in page and page.count("<li class=") == failing
    assert len(compare_markdown.render(reports.many())) < 65_536  # what a comment may have


def test_nothing_at_all_is_still_a_page(folder: Path) -> None:
    report = build((), {}, pairs=(), verdict="INCOMPARABLE")
    text, page = compare_markdown.render(report), compare_html.render(report, folder)
    for said in (text, page):
        assert "Neither evaluation holds a number." in said
    assert Page(page).open == [] and "data-plot" not in page and '<dl class="keys">' not in page


def test_a_number_that_neither_side_has(folder: Path) -> None:
    """A gate may ask for what nobody measured."""
    asked = check("kid", "max_increase", 0.1, None, None)
    report = build((Row(metric="kid", label="kid", direction="lower", checks=(asked,)),), verdict="INCOMPARABLE")
    text, page = compare_markdown.render(report), visible(compare_html.render(report, folder))
    for said in (text, page):
        assert "kid was not measured of the baseline and the candidate: add it to --metrics" in said
    assert "| kid (lower is better) | not measured | not measured | –, not measured | – |" in text


@pytest.mark.parametrize(
    ("metric", "base", "candidate", "limit", "verdict"),
    [
        ("fid", 12.3, 13.9, {"max_increase": 0.5}, "REGRESSION"), ("fid", 12.3, 12.4, {"max_increase": 0.5}, "PASS"),
        ("fid", 12.3, 12.8, {"max_increase": 0.5}, "INCONCLUSIVE"), ("fid", 12.3, 12.0, {"max_increase": 0}, "PASS"),
        ("clip_score", 0.32, 0.30, {"max_decrease": 0.01}, "REGRESSION"), ("latency", 10.0, 12.0, {"max_ratio": 1.05}, "REGRESSION"),
        ("clip_score", 0.32, 0.30, {"min": 0.35}, "REGRESSION"), ("clip_score", 0.32, 0.30, {"min": 0.25}, "PASS"),
        ("fid", 12.3, 13.9, {"max": 11}, "REGRESSION"), ("fid", 12.3, 13.9, {"max": 20}, "PASS"),
    ],
)  # fmt: skip
def test_what_is_broken_lies_right_of_the_line(
    metric: str, base: float, candidate: float, limit: dict[str, float], verdict: str
) -> None:
    """Whichever way the metric points: an interval on the right breaks its limit, one across the line decides nothing."""
    report = build((row(metric, base, candidate, Gate.model_validate(limit)),))
    assert report.verdict == verdict
    drawn = compare_plots.limits(report) or ""
    low, high = map(float, re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)M', drawn)[0])
    line = compare_plots.LIMIT
    assert 0 < low < high < compare_plots.ACROSS
    assert {"REGRESSION": low > line, "PASS": high < line, "INCONCLUSIVE": low < line < high}[verdict]


def test_plots_take_the_colours_of_the_page_and_fit() -> None:
    report = reports.many()
    for draw in (compare_plots.limits, compare_plots.values):
        drawn = draw(report)
        assert drawn is not None and draw(report) == drawn and drawn.count("<svg") == 1
        assert "http" not in drawn and "var(--" in drawn and "nan" not in drawn and "inf" not in drawn
        places = [float(x) for x in re.findall(r'<text x="(-?[\d.]+)"', drawn)]
        assert places and 0 <= min(places) and max(places) <= compare_plots.ACROSS
    assert compare_plots.limits(reports.without_limits()) is None


def test_incomparable_values_share_no_axis() -> None:
    drawn = compare_plots.values(reports.incomparable_features()) or ""
    assert drawn.count(">not comparable<") == 2 and drawn.count(">not measured<") == 2  # once in the strip, once as the value
    assert (compare_plots.limits(reports.incomparable_features()) or "").count(">not measured<") == 1
