"""Which part gained what, the cuts, how far predicted times were off: in words and numbers those of report.json."""

import html as standard_html
import re
from pathlib import Path

import pytest
from lissom.report import _words, html, markdown, plots, search_parts, search_plots
from lissom.report.schema import Gained, Ratio
from lissom.tests.report.conftest import build as plain_report
from lissom.tests.report.parsed import tables
from lissom.tests.report.search_reports import CUTS, one_objective, timing, two_objectives
from lissom.tests.report.search_reports import LAYERS as EVERY


def table_of(text: str, first: str) -> list[list[str]]:
    return next(table for table in tables(text) if table[0][0] == first)


def text_of(page: str) -> str:
    return " ".join(standard_html.unescape(re.sub(r"<[^>]+>", " ", page.replace("<wbr>", ""))).split())


def test_every_part_with_its_values(tmp_path: Path) -> None:
    report = one_objective()
    head, *rows = table_of(markdown.render(report), "part")
    page = text_of(html.render(report, tmp_path))
    assert [row[0] for row in rows] == ["fixed (trailing)", "+ timesteps", "+ skips", "+ cuts"]
    for part, row in zip(report.gained, rows, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert row[1] == _words.quoted(part.scored.measurements[0])
        assert cells["ratio to the part before"] == ("–" if part.ratio is None else _words.ratio_words(part.ratio)[6:])
        assert cells["MACs ratio"] == f"{part.scored.macs_ratio:.3f}"
        assert cells["latency ratio (predicted)"] == f"{part.scored.costs['latency']:.3f}"
        assert " ".join(row) in page
    assert [row[3] for row in rows] == ["–", "gained", "unclear", "lost"]
    assert rows[-1][-1] == str(len(CUTS))


@pytest.mark.parametrize(
    ("ratio", "word", "sentence"),
    [
        (Ratio(value=1.2, low=1.1, high=1.3), "gained", "Skips made FD[zoo:judge] better, ratio 1.20 [1.10, 1.30]"),
        (Ratio(value=0.9, low=0.8, high=0.99), "lost", "Skips made FD[zoo:judge] worse, ratio 0.90 [0.80, 0.99]"),
        (Ratio(value=1.1, low=1.0, high=1.2), "unclear", "Skips made no difference to FD[zoo:judge] that can be told"),
        (Ratio(value=1.9), "not known", "What skips did to FD[zoo:judge] is not known, ratio 1.9 (no interval)"),
        (None, "not known", "What skips did to FD[zoo:judge] is not known, ratio not measured"),
    ],
)
def test_a_part_is_never_called_better_than_its_interval(ratio: Ratio | None, word: str, sentence: str) -> None:
    gained = list(one_objective().gained)
    gained[2] = gained[2].model_copy(update={"ratio": ratio})
    report = one_objective(gained=tuple(gained))
    assert search_parts.gained_rows(report)[2].cells[3] == word
    assert sentence in search_parts.gained_words(report)
    drawn = search_plots.ratios(report)
    assert drawn is not None and (f">{word}<" in drawn) == (ratio is not None)


def test_reuse_stands_beside_skips(tmp_path: Path) -> None:
    report = one_objective()
    assert "reuse" not in markdown.render(report) and "skips per step" in text_of(html.render(report, tmp_path))
    times, skips = report.winner.plan.timesteps, report.winner.plan.steps
    steps = tuple(s.model_copy(update={"reuse": (EVERY[i],) if i else ()}) for i, s in enumerate(skips))
    plan = report.winner.plan.model_copy(update={"steps": steps})
    gained = report.gained[-1]
    part = Gained(
        part="reuse", scored=gained.scored.model_copy(update={"plan": plan}), ratio=Ratio(value=1.2, low=1.1, high=1.3)
    )
    reusing = one_objective(winner=report.winner.model_copy(update={"plan": plan}), gained=(*report.gained, part))
    text, page = markdown.render(reusing), html.render(reusing, tmp_path)
    row = table_of(text, "part")[-1]
    assert row[0] == "+ reuse" and row[-2].endswith(f"reused 0{' 1' * (len(times) - 1)}")
    assert table_of(text, "part")[0][-2] == "skips, reuse per step" and "Reuse made FD[zoo:judge] better" in text
    assert table_of(text, "step")[0][-2:] == ["layers skipped", "layers reused"] and table_of(text, "step")[2][-1] == EVERY[1]
    for words in ("Layers left out by the searched plan", "hollow: what it did before", "r2 those that are reused", "+ reuse"):
        assert words in text_of(page)
    drawn = plots.skipped(reusing)
    assert (
        drawn is not None
        and EVERY[1].rpartition(".")[2] in drawn
        and plots.schedules(reusing).count(">r1<") + plots.schedules(reusing).count(" r1<") == len(times) - 1
    )


def test_what_a_part_saves_is_said() -> None:
    text = search_parts.gained_words(one_objective())
    assert "Timesteps made FD[zoo:judge] better" in text and "MACs from 1.000 to 0.979, latency (predicted) from" in text
    assert text.endswith("parameters from 1.000 to 0.695.")
    assert text.count("MACs from") == 2  # timesteps cost nothing


def test_parts_that_are_not_told_apart_are_not_shown(tmp_path: Path) -> None:
    report = two_objectives()
    assert search_plots.gained(report) is None and search_plots.ratios(report) is None
    assert "Which part gained what" not in markdown.render(report)
    assert "Which part gained what" not in html.render(report, tmp_path)
    only = one_objective(gained=one_objective().gained[:1])
    assert search_parts.gained_words(only) == "" and search_plots.ratios(only) is None
    assert "fixed (trailing)" in html.render(only, tmp_path)
    failed = tuple(one.model_copy(update={"scored": one.scored.model_copy(update={"measurements": ()})}) for one in only.gained)
    assert search_parts.gained_rows(one_objective(gained=failed))[0].cells[1] == "not measured"
    assert search_plots.gained(one_objective(gained=failed)) is None


def test_cuts_of_the_winner(tmp_path: Path) -> None:
    report = one_objective()
    text, page = markdown.render(report), html.render(report, tmp_path)
    assert table_of(text, "address")[1:] == [list(row) for row in search_parts.cut_rows(report)]
    assert [row[0] for row in search_parts.cut_rows(report)] == [cut.address for cut in CUTS]
    for part in ("69.5 % of the denoiser's parameters stay: about 597,367,070 of 859,520,964.", "trust_remote_code=True"):
        assert part in text and part in text_of(page)
    assert "keep layers 0, 2 (2 stay)" in text and report.open_with in standard_html.unescape(page)
    assert "opens it without trust_remote_code" in markdown.render(two_objectives())
    unknown = one_objective(opens="", open_with="")
    assert "How the cut model opens is not recorded." in markdown.render(unknown)
    bare = report.winner.model_copy(update={"costs": {}})
    assert search_parts.left(one_objective(winner=bare)) == ""


def test_how_far_predicted_times_were_off(tmp_path: Path) -> None:
    table = timing(3).model_copy(update={"predicted": (0.6, 0.7, 0.8), "measured": (0.61, 0.7, 0.85)})
    text = search_parts.off(table)
    assert "3 candidates" in text and "off by 1.0 points in the median, 5.0 at most" in text
    assert "on average it said 2.0 points shorter than was measured" in text
    report = two_objectives(latency=table)
    assert text in markdown.render(report) and text in text_of(html.render(report, tmp_path))
    one = table.model_copy(update={"predicted": (0.7,), "measured": (0.65,)})
    assert "1 candidate," in search_parts.off(
        one
    ) and "is off by 5.0 points; on average it said 5.0 points longer" in search_parts.off(one)
    exact = table.model_copy(update={"measured": table.predicted})
    assert search_parts.off(exact).endswith("off by 0.0 points in the median, 0.0 at most.")


def test_predicted_times_that_nobody_checked(tmp_path: Path) -> None:
    report = two_objectives(latency=timing(0))
    assert search_plots.latency(report) is None
    for text in (markdown.render(report), text_of(html.render(report, tmp_path))):
        assert "The predicted times were not checked against whole runs." in text


def test_conditions_and_layers_of_the_times(tmp_path: Path) -> None:
    table = timing()
    found = dict(search_parts.timed(table))
    assert found["batch"] == "8 images in one call" and found["latent"] == "4 x 64 x 64" and "H100" in found["device"]
    rows = search_parts.layer_rows(table)
    assert {name for name, *_ in rows} == set(table.layers)
    assert [float(ms) for _, ms, _ in rows] == sorted((float(ms) for _, ms, _ in rows), reverse=True)
    assert rows[0][2] == f"{100 * table.layers[rows[0][0]] / table.whole:.1f} %"
    listed = table_of(markdown.render(two_objectives()), "layer")
    assert listed[1:] == [list(row) for row in rows[:10]]
    page = html.render(two_objectives(), tmp_path)
    inside = page[page.index("Milliseconds of 38 layers") :].split("</details>")[0]
    assert inside.count("<tr><td>") == 38 and "<details open" not in page


def test_an_old_report_has_none_of_it(tmp_path: Path) -> None:
    report = plain_report()
    page, text = html.render(report, tmp_path), markdown.render(report)
    for title in ("front", "could be picked", "Which part", "The cuts", "Predicted latency", "NOT PLAIN"):
        assert title not in text_of(page.split("</style>")[1]) and title not in text
    heads = re.findall(r"<th>(.*?)</th>", page)
    assert heads[:5] == [
        "schedule",
        "FD[zoo:judge] (lower is better)",
        "clip_score (higher is better)",
        "MACs ratio",
        "timesteps",
    ]
    assert "<details" not in page
