"""report.md and report.html say what report.json holds, and nothing better than it holds."""

import html as standard_html
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lissom.core.candidate import Step
from lissom.core.measurement import Measurement
from lissom.report import _words, html, markdown, plots
from lissom.report.schema import Ratio, Scored, SearchReport
from lissom.report.sheets import sheet
from lissom.tests.report.parsed import Page
from PIL import Image

Make = Callable[..., SearchReport]


def test_json_round_trip(make_report: Make) -> None:
    report = make_report()
    text = report.model_dump_json()
    again = SearchReport.model_validate_json(text)
    assert again == report
    assert json.loads(text)["schema_version"] == 1
    assert markdown.render(again) == markdown.render(report)


def test_first_line_of_a_gain(make_report: Make) -> None:
    first = markdown.render(make_report()).splitlines()[0]
    assert first.startswith("Searched 4-step plan: FD[zoo:judge] 12.3 [1")
    for part in ("against 20.1 [1", "(trailing)", "ratio 1.63 [1.55, 1.71]", "2,048 unseen images", "0.85 of the fixed"):
        assert part in first


@pytest.mark.parametrize(
    ("ratio", "start"),
    [
        (Ratio(value=1.05, low=0.98, high=1.12), "The search did not beat the best fixed schedule (the interval"),
        (Ratio(value=0.8, low=0.7, high=0.9), "The search did not beat the best fixed schedule, it is worse"),
        (Ratio(value=1.5), "Whether the search beat the best fixed schedule is not known"),
        (None, "Whether the search beat the best fixed schedule is not known"),
    ],
)
def test_first_line_without_a_gain(ratio: Ratio | None, start: str, make_report: Make, tmp_path: Path) -> None:
    report = make_report(ratio=ratio, trials=5)
    assert markdown.render(report).startswith(start)
    assert start in standard_html.unescape(html.render(report, tmp_path))


def test_a_costlier_plan_is_called_costlier(make_report: Make) -> None:
    first = markdown.render(make_report(winner_macs=1.2)).splitlines()[0]
    assert first.startswith("Costlier searched")
    assert "1.20 times the fixed schedule's MACs" in first
    assert "at equal MACs" in markdown.render(make_report(skips=False)).splitlines()[0]


def test_every_value_with_its_interval_and_never_a_speed(make_report: Make) -> None:
    text = markdown.render(make_report())
    row = next(line for line in text.splitlines() if line.startswith("| searched |"))
    assert re.fullmatch(r"\| searched \| [\d.]+ \[[\d.]+, [\d.]+\] \| [\d.]+ \[[\d.]+, [\d.]+\] \| 0\.850 \| [\d ]+ \|", row)
    assert "speed" not in text and "faster" not in text
    bare = make_report().winner.measurements[0].model_copy(update={"replicates": ()})
    assert _words.quoted(bare) == "12.3 (no interval)"


def test_overfitting_is_named_when_nothing_else_was_measured(make_report: Make) -> None:
    report = make_report()
    alone = report.winner.model_copy(update={"measurements": report.winner.measurements[:1]})
    assert "alone may be overfitting" in markdown.render(report.model_copy(update={"winner": alone}))
    assert "overfitting" not in markdown.render(report)


def test_markdown_tables_are_whole(make_report: Make) -> None:
    rows = list(make_report().candidates)
    rows[3] = rows[3].model_copy(update={"origin": "a | b\nc <img src=x>", "value": 0.001, "state": "complete"})
    text = markdown.render(make_report(candidates=tuple(rows)))
    assert "a \\| b c &lt;img" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_ranking_follows_the_direction(make_report: Make) -> None:
    report = make_report()
    best = [row.value for row in _words.ranked(report)]
    assert best == sorted(best)  # type: ignore[type-var]
    upward = report.winner.measurements[1].model_copy(update={"metric": "fid"})
    flipped = report.model_copy(update={"winner": report.winner.model_copy(update={"measurements": (upward,)})})
    assert [row.value for row in _words.ranked(flipped)] == best[::-1]


def test_fixed_schedules_are_not_counted_as_candidates(make_report: Make) -> None:
    rows = make_report(trials=8).candidates
    fixed = [
        rows[0].model_copy(update={"number": 8 + i, "plan": b.plan, "value": 1.0})
        for i, b in enumerate(make_report().baselines)
    ]
    report = make_report(trials=8, candidates=(*rows, *fixed))
    assert "8 of 8 asked" in dict(_words.spent(report))["candidates"]
    assert min(row.value or 0 for row in _words.ranked(report)) > 1.0


def test_unknown_best_fixed(make_report: Make) -> None:
    with pytest.raises(ValueError, match="'nobody'.*leading, trailing, linspace"):
        markdown.render(make_report(best_fixed="nobody"))


@pytest.fixture(scope="module")
def page(make_report: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    pixels = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    sheet(pixels, folder / "searched.png")
    return html.render(make_report(), folder)


def test_page_needs_nothing_else(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed.loaded)
    assert "@import" not in page and "url(http" not in page and "<link" not in page
    assert "default-src 'none'" in page


def test_page_shows_every_candidate_and_both_sheets(page: str, make_report: Make) -> None:
    report = make_report()
    body = page[page.index('<table id="candidates">') :]
    assert len(re.findall(r"<tr", body[: body.index("</table>")])) == 1 + len(report.candidates)
    assert page.count("data:image/png;base64,") == 1 and 'class="pixelated"' in page
    assert "missing from the folder" in page  # trailing.png was not written
    assert {name for name in re.findall(r'data-plot="(\w+)"', page)} == {
        "intervals", "tradeoff", "progress", "schedules", "skipped",
    }  # fmt: skip


def test_page_escapes_what_it_is_given(make_report: Make, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&$x$"
    report = make_report(trials=12)
    rows = tuple(r.model_copy(update={"origin": evil, "error": evil}) for r in report.candidates)
    named = report.baselines[0].model_copy(update={"name": evil})
    changes = {"candidates": rows, "baselines": (named, *report.baselines[1:]), "warnings": (evil,), "command": evil}
    hostile = report.model_copy(update={**changes, "model": evil, "stock_call": evil, "paper": "javascript:alert(1)"})
    text = html.render(hostile, tmp_path)
    assert "<script>alert" not in text and 'href="javascript' not in text
    assert Page(text).tags.count("script") == 1
    assert "&lt;script&gt;alert(1)" in text


def test_equal_macs_show_no_empty_trade_off(make_report: Make, tmp_path: Path) -> None:
    text = html.render(make_report(skips=False), tmp_path)
    assert "no trade-off to show" in text and "MACs ratio against" not in text
    assert 'data-plot="skipped"' not in text


def test_page_without_any_scored_candidate(make_report: Make, tmp_path: Path) -> None:
    report = make_report(trials=4)
    rows = tuple(r.model_copy(update={"value": None, "state": "failed", "error": "NaN"}) for r in report.candidates)
    for candidates in (rows, ()):
        assert "Every candidate" in html.render(make_report(candidates=candidates), tmp_path)
        assert "No candidate was scored." in markdown.render(make_report(candidates=candidates))


def test_plots_are_the_same_every_time(make_report: Make) -> None:
    report = make_report(trials=20)
    for draw in (plots.tradeoff, plots.progress, plots.intervals, plots.schedules, plots.skipped):
        one, two = draw(report), draw(report)
        assert one == two and one is not None
        assert "http" not in one and "<date" not in one and "var(--ink" in one
        assert "#00000" not in one  # every stand-in colour became a variable of the page
        assert re.search(r"<text[^>]*>", one)  # text stays text


def test_plots_leave_no_global_state(make_report: Make) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.progress(make_report(trials=5))
    assert dict(matplotlib.rcParams) == before


def test_labels_of_close_lines_do_not_overlap(make_report: Make) -> None:
    report = make_report(trials=10)
    close = [b.model_copy(update={"searched_value": 20 + i / 100}) for i, b in enumerate(report.baselines)]
    text = plots.progress(report.model_copy(update={"baselines": tuple(close)}))
    places = [float(y) for y, name in re.findall(r'y="([\d.]+)"[^>]*>(leading|trailing|linspace)<', text)]
    assert len(places) == 3
    assert min(abs(a - b) for a, b in itertools.pairwise(places)) > 9  # points; the text is 9.5


def test_sheet(tmp_path: Path) -> None:
    pixels = np.stack([np.full((32, 32, 3), 10 * i, np.uint8) for i in range(11)])
    sheet(pixels, tmp_path / "deep" / "a.png", columns=4)
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.size == (4 * 33 - 1, 3 * 33 - 1)
        assert image.getpixel((33 * 2 + 5, 33 * 1 + 5)) == (60, 60, 60, 255)  # the seventh image
        assert image.getpixel((32, 5)) == (0, 0, 0, 0)  # a gap
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="float64"):
        sheet(pixels / 255, tmp_path / "b.png")


def test_sigmas_have_a_column(make_report: Make) -> None:
    winner = make_report().winner
    steps = tuple(Step(timestep=step.timestep, sigma=0.5) for step in winner.plan.steps)
    plan = winner.plan.model_copy(update={"steps": steps})
    text = markdown.render(make_report(winner=Scored(**{**dict(winner), "plan": plan})))
    assert "| step | timestep | sigma | layers not executed |" in text


def test_a_metric_missing_on_a_baseline_is_said(make_report: Make) -> None:
    report = make_report()
    extra = Measurement(metric="accuracy", value=0.9, direction="higher", n=2048)
    winner = report.winner.model_copy(update={"measurements": (*report.winner.measurements, extra)})
    text = markdown.render(report.model_copy(update={"winner": winner}))
    assert "0.9 (no interval)" in text and "not measured" in text
