"""What can be picked, and the first line: every member with the values of report.json, no gain where none is shown."""

import html as standard_html
import re
from pathlib import Path

import pytest
from lissom.core.candidate import Cut
from lissom.report import _words, html, markdown, plots, search_front, search_plots, search_verdict
from lissom.report.schema import Ratio, SearchReport
from lissom.tests.report.parsed import Page, tables
from lissom.tests.report.search_reports import (
    CUTS,
    FRONT,
    build,
    hostile,
    measured,
    members,
    one_objective,
    scored,
    two_metrics,
    two_objectives,
)

UNCLEAR, WORSE = Ratio(value=1.02, low=0.97, high=1.07), Ratio(value=0.8, low=0.77, high=0.83)


def text_of(page: str) -> str:
    """What is read on a page, without its tags."""
    return " ".join(
        standard_html.unescape(
            re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", page.replace("<wbr>", ""), flags=re.DOTALL)
        ).split()
    )


def picks(report: SearchReport) -> list[list[str]]:
    return next(table for table in tables(markdown.render(report)) if table[0][0] == "pick")


@pytest.mark.parametrize("report", [two_objectives(), two_metrics(), one_objective()])
def test_every_member_is_listed_with_its_values(report: SearchReport, tmp_path: Path) -> None:
    head, *rows = picks(report)
    page = text_of(html.render(report, tmp_path))
    assert [row[0].split()[0] for row in rows] == [str(n) for n in range(1, len(report.front) + 1)]
    assert [n for n, row in enumerate(rows, 1) if "picked" in row[0]] == [report.picked]
    for one, row in zip(report.front, rows, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["MACs ratio"] == f"{one.macs_ratio:.3f}"
        assert cells["latency ratio (predicted)"] == f"{one.costs['latency']:.3f}"
        assert cells["parameters ratio"] == f"{one.costs['params']:.3f}"
        assert cells["timesteps"] == _words.timesteps(one.plan) and cells["skips per step"] == _words.skips(one.plan)
        assert cells["cuts"] == (str(len(one.cuts)) if one.cuts else "–")
        again = one.rescored
        assert again is not None
        expected = _words.quoted(one.measurements[0]) if len(report.objectives) > 1 else _words.short(again.value)
        assert row[1] == expected
        assert " ".join(row[1:-1]) in page
        assert all(cut.address in page for cut in one.cuts)
    if "clip_score" in report.objectives:
        assert [row[2] for row in rows] == [_words.quoted(one.measurements[1]) for one in report.front]


def test_cuts_of_every_member_are_listed_in_the_terminal() -> None:
    text = markdown.render(two_objectives())
    for number, (*_, count) in enumerate(FRONT, 1):
        line = next(line for line in text.splitlines() if line.startswith(f"- cuts of {number}: "))
        assert line.removeprefix(f"- cuts of {number}: ").split("; ") == [search_front.cut_words(cut) for cut in CUTS[:count]]


def test_how_to_export_another_is_said(tmp_path: Path) -> None:
    for report in (two_objectives(), one_objective()):
        for text in (markdown.render(report), text_of(html.render(report, tmp_path))):
            assert "--pick N --resume" in text and "pick: N in the search stage" in text


def test_elites_are_no_front(tmp_path: Path) -> None:
    report = one_objective()
    page = html.render(report, tmp_path)
    assert "What else could be picked" in page and 'data-plot="front"' not in page
    text = " ".join(search_front.notes(report))
    assert "4 candidates, the best re-scored value first." in text
    assert "without intervals, on 1,024 images of the re-scoring's seeds" in text and "do not compare" in text
    assert search_front.head(report)[1].endswith(", re-scored")


def test_values_of_different_seeds_are_never_mixed() -> None:
    """Of the winner alone the report's seeds are known: all members are then shown by their re-scored values."""
    report = one_objective()
    assert report.front[0].measurements and not report.front[1].measurements
    values = [one.cells[0] for one in search_front.members(report)]
    assert values == [_words.short(one.rescored.value) for one in report.front if one.rescored]
    whole = tuple(one.model_copy(update={"measurements": (measured("fid", 15.0),)}) for one in report.front)
    assert all("[" in one.cells[0] for one in search_front.members(report.model_copy(update={"front": whole})))


def test_members_that_fell_off_the_front_are_named() -> None:
    assert "no longer on the front" not in " ".join(search_front.notes(two_objectives()))
    front = [*members()]
    front[1] = scored("front 2", (900, 600, 300, 9), 16.5, costs={"latency": 0.8})
    assert "number 2 is no longer on the front" in " ".join(search_front.notes(two_objectives(front=tuple(front))))
    front[4] = scored("front 5", (901, 600, 300, 9), 30.0, costs={"latency": 0.9})
    assert "numbers 2 and 5 are no longer" in " ".join(search_front.notes(two_objectives(front=tuple(front))))


def test_a_second_metric_counts_in_its_direction() -> None:
    report = two_metrics()  # FD and CLIP score rise together: a front, since CLIP score is better when higher
    assert not any("no longer" in note for note in search_front.notes(report))
    assert any("numbers 2, 3, 4, 5 and 6 are" in note for note in search_front.notes(two_metrics(front=members())))
    assert search_front.axis(report) == "clip_score" and search_front.axis(two_objectives()) == "latency"
    assert search_front.axis(one_objective()) == "macs"


def test_a_member_without_a_value_is_listed_and_not_drawn() -> None:
    front = [*members()]
    front[5] = front[5].model_copy(update={"measurements": (), "rescored": None})
    report = two_objectives(front=tuple(front), picked=2)
    rows = picks(report)
    assert len(rows) == 7  # with basis "rescore" the others have values, this one has none
    assert rows[6][1] == "not measured" and rows[2][0] == "2 (picked)"
    drawn = search_plots.front(report)
    assert drawn is not None and re.findall(r">(\d)</text>", drawn) and ">6</text>" not in drawn


def test_numbers_in_the_plot_are_those_of_the_table() -> None:
    drawn = search_plots.front(two_objectives())
    assert drawn is not None
    assert sorted(re.findall(r">(\d)</text>", drawn)) == ["1", "2", "3", "4", "5", "6"]
    assert all(name in drawn for name in ("trailing", "picked", "latency (predicted) against the uncut run"))
    crowd = tuple(
        one.model_copy(update={"costs": {"latency": 0.7}, "measurements": members()[0].measurements}) for one in members()
    )
    close = search_plots.front(two_objectives(front=crowd, picked=4))
    assert close is not None and re.findall(r">(\d)</text>", close) == [
        "4"
    ]  # of numbers that would cover each other the picked


def test_no_front_is_said_not_hidden(tmp_path: Path) -> None:
    report = two_objectives(front=())
    assert search_plots.front(report) is None
    for text in (markdown.render(report), text_of(html.render(report, tmp_path))):
        assert "the report names no front" in text
        assert "number 3 of" not in text


def test_picked_that_is_not_in_the_front_breaks_nothing(tmp_path: Path) -> None:
    report = two_objectives().model_copy(update={"picked": 9})
    assert not any(one.picked for one in search_front.members(report))
    assert "on the front" not in search_verdict.verdict(report).sentence
    html.render(report, tmp_path)


# The first line


def test_first_line_with_a_cost(tmp_path: Path) -> None:
    report = two_objectives()
    first = markdown.render(report).splitlines()[0]
    assert first.startswith("Searched 4-step plan: FD[zoo:judge] 14.6 [14.2, 15.0] against 20.1 [19.5, 20.7] of the best fixed")
    for part in ("ratio 1.38 [", "2,048 unseen images", "It is number 3 of 6 on the front.", "latency (predicted) 0.764."):
        assert part in first
    assert first.endswith("It cuts the model (3 cuts, 81.7 % of the parameters stay) and opens in plain diffusers.")
    assert first in text_of(html.render(report, tmp_path))


def test_first_line_with_a_second_metric() -> None:
    first = search_verdict.verdict(two_metrics()).sentence
    assert (
        "clip_score[zoo:judge] (higher is better) is 0.66 [0.64, 0.68] against 0.66 [0.64, 0.68], which cannot be told apart."
        in first
    )
    assert "As shares" not in first  # no cost was an objective
    assert "], worse." in search_verdict.verdict(two_metrics(picked=1)).sentence
    better = search_verdict.verdict(two_metrics(picked=6)).sentence
    assert "], better." in better and "worse than the best fixed schedule by FD[zoo:judge]" in better
    bare = two_metrics(winner=scored("searched", (9, 7, 5, 3), 12.0, measurements=(measured("fid", 12.0),)))
    assert "is not measured against 0.66" in search_verdict.verdict(bare).sentence


@pytest.mark.parametrize(
    ("ratio", "outcome", "start"),
    [
        (
            UNCLEAR,
            "unclear",
            "What was picked is not better than the best fixed schedule by FD[zoo:judge] (the interval of the",
        ),
        (WORSE, "worse", "What was picked is worse than the best fixed schedule by FD[zoo:judge]; searched"),
        (
            Ratio(value=1.4),
            "unmeasured",
            "Whether what was picked is better than the best fixed schedule by FD[zoo:judge] is not",
        ),
        (None, "unmeasured", "Whether what was picked is better than the best fixed schedule by FD[zoo:judge] is not"),
    ],
)
def test_first_line_of_several_objectives_without_a_gain(ratio: Ratio | None, outcome: str, start: str, tmp_path: Path) -> None:
    report = two_objectives(ratio=ratio)
    assert search_verdict.verdict(report).outcome == outcome
    assert markdown.render(report).startswith(start)
    assert f'class="verdict {outcome}"' in html.render(report, tmp_path)
    assert search_verdict.verdict(one_objective(ratio=ratio)).sentence.startswith(("The search did not", "Whether the search"))


def test_a_model_that_is_not_plain_is_loud(tmp_path: Path) -> None:
    report = one_objective()
    text, page = markdown.render(report), html.render(report, tmp_path)
    assert text.splitlines()[0].endswith("NOT PLAIN DIFFUSERS: it opens only with trust_remote_code=True.")
    assert "> [!WARNING]\n> **NOT PLAIN DIFFUSERS" in text and 'class="loud" role="alert"' in page
    assert "Why: no stock config leaves single heads out." in text
    plain = two_objectives()
    assert "NOT PLAIN" not in markdown.render(plain) and 'class="loud"' not in html.render(plain, tmp_path)
    assert "how it opens is not recorded" in search_verdict.verdict(one_objective(opens="")).sentence


def test_a_cost_with_a_budget_is_in_the_first_line() -> None:
    winner = scored("searched", (951, 713, 391, 87), 14.0)
    assert "As shares" not in search_verdict.verdict(build(winner, budget={"macs": 0.8})).sentence
    assert "latency (predicted) 1.000." in search_verdict.verdict(build(winner, budget={"latency": 0.8})).sentence
    bare = winner.model_copy(update={"costs": {}})
    assert "Not known of it: latency (predicted)." in search_verdict.verdict(build(bare, budget={"latency": 0.8})).sentence


# The rest of the page


def test_candidates_with_the_same_plan_and_other_cuts_are_not_the_same(tmp_path: Path) -> None:
    report = two_objectives()
    fixed = report.baselines[1]
    row = report.candidates[0].model_copy(
        update={"plan": fixed.plan, "cuts": CUTS[:1], "number": 500, "state": "complete", "value": 1.0}
    )
    again = row.model_copy(update={"number": 501, "plan": report.winner.plan, "cuts": ()})
    more = report.model_copy(update={"candidates": (*report.candidates, row, again)})
    assert row in _words.candidates(more) and len(_words.candidates(more)) == len(_words.candidates(report)) + 2
    body = html.render(more, tmp_path)
    assert body[body.index('id="candidates"') :].count('<tr class="won">') == 1


def test_cuts_of_candidates_open_by_keyboard(tmp_path: Path) -> None:
    page = html.render(two_objectives(), tmp_path)
    table = page[page.index('id="candidates"') :].split("</table>")[0]
    report = two_objectives()
    cut = [row for row in report.candidates if row.cuts]
    assert table.count("<details><summary>") == len(cut)
    assert "<li>up_blocks.2: keep layers 0, 2 (2 stay)</li>" in table.replace("<wbr>", "")
    assert [int(n) for n in re.findall(r'<td data-v="(\d+)"><details>', table)] == [len(row.cuts) for row in cut]


def test_columns_only_where_there_is_something_to_say(tmp_path: Path) -> None:
    plain = build(scored("searched", (951, 713, 391, 87), 14.0), cutting=False, budget={}, candidates=())
    assert _words.priced(plain) == []
    page = html.render(plain, tmp_path)
    table = page[page.index('id="candidates"') :].split("</table>")[0]
    assert "parameters ratio" not in page and ">cuts<" not in table and ">images<" not in table
    assert "Schedule search by" in page and "Search of plan and cuts by" in html.render(one_objective(), tmp_path)


def test_values_of_fewer_images_are_told_apart(tmp_path: Path) -> None:
    report = one_objective()
    early = [row for row in report.candidates if _words.dropped(row, report)]
    assert len(early) > 10 and all(row.samples == 64 for row in early)
    cheap = early[0].model_copy(update={"value": 0.5})  # best by far, were it comparable
    report = report.model_copy(update={"candidates": tuple(cheap if row is early[0] else row for row in report.candidates)})
    assert cheap not in _words.ranked(report)
    page, text = html.render(report, tmp_path), markdown.render(report)
    assert page.count('<tr class="early">') == len(early)
    row = re.search(rf'<tr class="early"><td class="number" data-v="{cheap.number}">.*?</tr>', page, re.DOTALL)
    assert row is not None and '<td class="number" data-v="">0.5</td>' in row[0] and 'data-v="64">64</td>' in row[0]
    assert f"{len(early)} dropped after fewer images left out" in page and "dropped early" in plots.progress(report)
    assert "do not compare with these" in text and f"{len(early)} dropped after fewer images" in text
    assert "384 per candidate in the search (those dropped earlier: 64)" in text
    assert "dropped" not in markdown.render(two_objectives())


def test_what_was_varied_and_what_else_holds_is_in_the_conditions() -> None:
    found = dict(_words.conditions(one_objective()))
    assert found["varied"] == "timesteps, skips, cuts" and found["objective"] == "FD[zoo:judge]" and "objectives" not in found
    assert found["control"] == "values are corrected by what trailing does on the same seeds"
    several = dict(_words.conditions(two_objectives()))
    assert several["objectives"] == "FD[zoo:judge] and latency (predicted)" and "objective" not in several


def test_overfitting_of_several_metrics_is_named() -> None:
    assert any("metrics that the search optimised were measured" in text for text in _words.warnings(two_metrics()))
    assert not any("overfitting" in text for text in _words.warnings(two_objectives()))


def test_a_search_without_a_trade_off_to_show(tmp_path: Path) -> None:
    same = tuple(one.model_copy(update={"costs": {"latency": 1.0}}) for one in members())
    rows = tuple(row.model_copy(update={"costs": {"latency": 1.0}}) for row in two_objectives().candidates)
    page = html.render(two_objectives(front=same, candidates=rows), tmp_path)
    assert "All schedules take the same latency (predicted), so there is no trade-off to show" in page


def test_hostile_texts_do_not_break_out(tmp_path: Path) -> None:
    report = hostile()
    page = html.render(report, tmp_path)
    parsed = Page(page)
    assert parsed.open == [] and parsed.tags.count("script") == 1 and "<script>alert" not in page
    assert [link["href"] for link in parsed.links] == ["https://arxiv.org/abs/2309.10438"]
    text = markdown.render(report)
    assert "<script>" not in re.sub(r"(`{3,}).*?\1", "", text, flags=re.DOTALL)  # code stays as it is, in its fence
    tables(text)  # all whole


def test_plots_are_the_same_every_time() -> None:
    for report in (two_objectives(), two_metrics(), one_objective()):
        for draw in (search_plots.front, search_plots.gained, search_plots.ratios, search_plots.latency, plots.tradeoff):
            one = draw(report)
            assert one == draw(report)
            assert one is None or ("#00000" not in one and "var(--ink" in one)


def test_words_for_a_cut() -> None:
    assert search_front.cut_words(Cut(address="a.b", what="replace", value="empty")) == "a.b: replace by empty"
