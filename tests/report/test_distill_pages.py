"""The pages of a distilled model say what report.json holds, and nothing better: WORSE is first, shares are rare."""

import html as standard_html
import re
from pathlib import Path

import pytest
from lissom.core.intervals import spread, t_95
from lissom.core.measurement import difference
from lissom.report import distill_html, distill_markdown, distill_plots, distill_words, model_card
from lissom.report.distill_recovered import Trio, lost, recovered, trios
from lissom.report.distill_schema import DistillReport
from lissom.tests.report import distill_reports
from lissom.tests.report.distill_reports import CLIP, build, checks, curve, scored, swinging
from lissom.tests.report.parsed import Page, tables

EXAMPLES = ("better", "worse", "many_sites", "empty", "hostile")
Values = tuple[float | None, float | None, float | None]


def first_line(report: DistillReport) -> str:
    return distill_markdown.render(report).splitlines()[0]


def shown(page: str, selector: str) -> str:
    """The text of the first element with this class."""
    found = re.search(rf'<(\w+) class="{selector}[^"]*"[^>]*>(.*?)</\1>', page, re.DOTALL)
    assert found is not None, selector
    return standard_html.unescape(re.sub(r"<[^>]+>", "", found[2]))


def trio(values: Values, direction: str = "lower", spread: bool = True) -> Trio:
    (found,) = trios(build(scored=swinging("m", values, direction, spread)))
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_report_survives_json_and_is_drawn(name: str, tmp_path: Path) -> None:
    """Whatever is missing: no sheet is in the folder here, and the empty report has no curve, checks, scores or data."""
    report = getattr(distill_reports, name)()
    again = DistillReport.model_validate_json(report.model_dump_json())
    assert again == report
    text, page = distill_markdown.render(again), distill_html.render(again, tmp_path)
    assert (text, page) == (distill_markdown.render(report), distill_html.render(report, tmp_path))
    plain = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "None" not in text.replace("None were made.", "").replace("None are listed.", "")
    assert "None" not in plain.replace("None were made.", "").replace("None are listed.", "")
    parsed = Page(page)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids)) and parsed.references <= set(parsed.ids)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed.loaded)
    assert "@import" not in page and "url(http" not in page and "default-src 'none'" in page
    assert all(len(table) > 1 for table in tables(text))


@pytest.mark.parametrize(
    ("direction", "values", "outcome", "lead", "word"),
    [
        ("lower", (10.0, 14.0, 11.0), "better", "Better: ", "better"),
        ("higher", (0.33, 0.30, 0.32), "better", "Better: ", "better"),
        ("lower", (10.0, 14.0, 16.0), "worse", "WORSE: ", "worse"),
        ("higher", (0.33, 0.30, 0.28), "worse", "WORSE: ", "worse"),
        ("higher", (-0.1, -0.3, -0.2), "better", "Better: ", "better"),  # ImageReward and its like go below zero
        ("lower", (10.0, 14.0, 14.001), "unclear", "No measurable change: ", "no measurable change"),
        ("lower", (10.0, 14.0, None), "unmeasured", "Change not measured: ", "not measured"),
        ("lower", (10.0, None, 11.0), "unmeasured", "Change not measured: ", "not measured"),
    ],
)
def test_the_verdict_comes_first(direction: str, values: Values, outcome: str, lead: str, word: str, tmp_path: Path) -> None:
    report = build(scored=swinging("m", values, direction))
    first, page = first_line(report), distill_html.render(report, tmp_path)
    assert first.startswith(lead) and f"({direction} is better)" in first and "on 2,048 images" in first
    assert "; the teacher has " in first and first.endswith("; opens in plain diffusers.")
    assert distill_words.verdict(report).outcome == outcome
    assert f'class="verdict {outcome}"' in page and shown(page, "verdict").startswith(lead)
    assert distill_words.quality_rows(report)[0][1] == word
    assert ("WORSE" in first) == (outcome == "worse") == ("better one there" in distill_markdown.render(report))


def test_intervals_are_needed_for_a_claim() -> None:
    report = build(scored=swinging("m", (10.0, 14.0, 11.0), spread=False))
    first = first_line(report)
    assert first.startswith("Not known whether better or worse: m (lower is better) from 14 (no interval) to 11 (no interval)")
    assert "came back" not in first and distill_words.verdict(report).outcome == "unclear"


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    report = build(scored=(), samples=0)
    text, page = distill_markdown.render(report), distill_html.render(report, tmp_path)
    assert first_line(report).startswith(
        "Quality not measured: 500 iterations of laptop were done, whether they helped is not known;"
    )
    for said in (text, page):
        assert "whether training gave any quality back is not known" in said and "came back" not in said
    assert "<dt>quality</dt><dd>–<small>not measured" in page and "<dt>recovered</dt><dd>–<small>not measured" in page
    assert 'data-plot="recovered"' not in page


def test_a_metric_that_became_worse_is_said_before_one_that_became_better(tmp_path: Path) -> None:
    report = build(scored=scored({"fid": (12.3, 15.1, 13.2), "clip_score": (0.3121, 0.3004, 0.2902)}))
    first = first_line(report)
    assert re.match(
        r"WORSE in clip_score from 0\.300 \[.*?\] to 0\.290 \[.*?\], ratio .*?; better: FD\[zoo:judge\] \(lower", first
    )
    assert 'class="verdict worse"' in distill_html.render(report, tmp_path)
    both = first_line(build(scored=scored({"fid": (12.3, 13.2, 15.1), "clip_score": (0.3121, 0.3004, 0.2902)})))
    assert both.startswith("WORSE: FD[zoo:judge]") and "; also worse: clip_score;" in both
    assert "worse" not in first_line(build(scored=scored({"fid": (12.3, 15.1, 13.2), "clip_score": CLIP}))).lower()


@pytest.mark.parametrize(
    ("values", "before", "said"),
    [
        ((10.0, 14.0, 11.0), "lost", r"75 % \[\d+, \d+\] of what was lost against the teacher came back"),
        ((10.0, 14.0, 9.0), "lost", r"125 % \[\d+, \d+\] .* came back, so that it is ahead of the teacher"),
        ((10.0, 14.0, 16.0), "lost", r"what was lost against the teacher grew by 50 % \[\d+, \d+\]"),
        ((10.0, 14.0, 14.001), "lost", r"no measurable part of .* came back \(0\.?\d* % \[-.*\]\)"),
        ((10.0, 14.0, None), "lost", ""),
        ((10.0, 10.001, 9.0), "unclear", "nothing was measurably lost against the teacher before training"),
        ((10.0, 8.0, 7.0), "ahead", "the student was ahead of its teacher before training"),
        ((None, 14.0, 11.0), "unknown", ""),
    ],
)
def test_a_share_came_back_only_where_something_was_lost(values: Values, before: str, said: str) -> None:
    found = trio(values)
    assert lost(found) == before
    assert re.fullmatch(said, distill_words.came_back(found)), distill_words.came_back(found)
    assert (recovered(found) is not None) == ("%" in said)
    assert recovered(trio(values, spread=False)) is None


def test_the_box_on_top_claims_no_more_than_the_sentence(tmp_path: Path) -> None:
    def box(values: Values) -> str:
        page = distill_html.render(build(scored=swinging("m", values)), tmp_path)
        found = re.search(r"<div class=\"(\w*)\"><dt>recovered</dt><dd>([^<]*)<small>([^<]*)", page)
        assert found is not None
        return " | ".join(found.groups())

    assert re.fullmatch(r"better \| 75 % \| \[\d+, \d+\] of what m had lost against the teacher", box((10.0, 14.0, 11.0)))
    assert box((10.0, 14.0, 16.0)).startswith("worse | -50 % | ")
    assert box((10.0, 14.0, 14.001)).startswith(" | – | nothing measurable: ")
    assert box((10.0, 10.001, 9.0)) == " | – | nothing was measurably lost before"
    assert box((10.0, 8.0, 7.0)) == " | – | it was ahead of the teacher before"
    assert box((None, 14.0, 11.0)) == " | – | not known"


@pytest.mark.parametrize("after", [9.7, 9.98, 10.0, 10.02, 11.0, 13.9, 13.97, 14.0, 14.03, 15.0])
def test_the_interval_of_the_share_agrees_with_those_of_the_differences(after: float) -> None:
    """It holds 0 just where before and after do not differ measurably, 1 just where after and teacher do not."""
    found = trio((10.0, 14.0, after))
    share = recovered(found)
    assert share is not None and found.teacher and found.before and found.after
    assert share.value == pytest.approx((14.0 - after) / 4.0) and share.low < share.value < share.high
    for edge, other in ((0.0, found.before), (1.0, found.teacher)):
        _, ends = difference(found.after, other)
        assert ends is not None
        assert (share.low <= edge <= share.high) == (ends[0] <= 0 <= ends[1])
    for edge in (share.low, share.high):  # Fieller: at its ends, before - after - s (before - teacher) is just measurably not 0
        rows = zip(found.teacher.replicates, found.before.replicates, found.after.replicates, strict=True)
        error = spread([b - a - edge * (b - t) for t, b, a in rows])
        assert error is not None
        assert abs(14.0 - after - edge * 4.0) == pytest.approx(t_95(2048) * error, rel=1e-6)


def test_other_seeds_and_shares_of_images_have_a_wider_interval() -> None:
    one = trio((10.0, 14.0, 11.0))
    assert one.teacher and one.before and one.after
    apart = Trio(distill_reports.unpaired(one.teacher), one.before, one.after)
    counts = trio((0.9, 0.5, 0.8), "higher")
    shares = Trio(*(m.model_copy(update={"unit": "share"}) for m in counts if m))
    tight, far, counted = recovered(one), recovered(apart), recovered(shares)
    assert tight and far and counted
    assert tight.value == far.value and far.low < tight.low and far.high > tight.high
    assert counted.value == pytest.approx(0.75) and counted.low < 0.75 < counted.high


def test_warnings_that_follow_from_the_figures() -> None:
    def found(**changes: object) -> str:
        return " ".join(distill_words.warnings(build(**changes)))

    assert found() == "The teacher's images repeat after 32 iterations."  # the run's own
    assert "stopped early, after 300 of 500 iterations: the checks no longer" in found(iterations=300, stopped_early=True)
    assert "Only 300 of 500 iterations were done." in found(iterations=300)
    assert "became NaN or infinite once: training went back" in found(restarts=1)
    assert "No loss reaches 12,480 parameters (0.7 %)" in found(frozen=12_480)
    assert "The weighted sum of the losses did not fall: " in found(curve=curve(30, end=1.3))
    assert "did not fall" not in found(curve=curve(1, end=1.3)) + found(curve=())
    assert "After reloading, outputs differ by 0.02" in found(reload_difference=0.02)
    assert "became NaN" in first_bullets(distill_markdown.render(distill_reports.worse()))


def first_bullets(text: str) -> str:
    return text.partition("## Warnings")[2].partition("##")[0]


def test_what_plain_diffusers_does_not_open_is_said_loudly(tmp_path: Path) -> None:
    report = build(opens_plain=False, not_plain_because="the stages differ.")
    loud = "NOT PLAIN DIFFUSERS: it opens only with trust_remote_code=True"
    text, page = distill_markdown.render(report), distill_html.render(report, tmp_path)
    assert (
        first_line(report).endswith(f"; {loud}.")
        and f"> **{loud}. Why: the stages differ.**" == text.split("\n\n")[1].splitlines()[1]
    )
    assert f'role="alert">{loud}. Why: the stages differ.</p>' in page[: page.index("<h2>")]
    assert "NOT PLAIN" not in distill_markdown.render(build()) + distill_html.render(build(), tmp_path)


def test_losses_beside_their_weights() -> None:
    (table,) = (t for t in tables(distill_markdown.render(build())) if t[0][0] == "loss")
    assert [row[:4] for row in table[1:]] == [
        ["task", "1", "0.21", "30.3 %"],
        ["output", "1", "0.034", "4.9 %"],
        ["normalized_features", "0.5", "0.9", "64.8 %"],
        ["weighted sum", "", "0.694", ""],
    ]
    last = build().curve[-5:]  # a tenth of the lines
    assert float(table[1][4]) == pytest.approx(sum(line.terms["task"] for line in last) / 5, rel=1e-3)
    assert float(table[4][4]) == pytest.approx(sum(line.total for line in last) / 5, rel=1e-3)
    bare = distill_words.loss_rows(build(scales={}, curve=()))
    assert bare[0] == ("task", "1", "–", "–", "–") and bare[-1] == ("weighted sum", "", "–", "", "–")
    assert distill_words.averaged(build(scales={}, curve=())) == ""
    assert distill_words.loss_rows(build(scales={"task": 0.2}))[0][3] == "–"  # of a sum that is not known there is no share


def test_checks_are_thinned_and_never_compared_with_the_table(tmp_path: Path) -> None:
    report = distill_reports.many_sites()
    assert [check.iteration for check in distill_words.pictured(report)] == [50, 1050, 1850, 1900, 1950, 2000]
    text, page = distill_markdown.render(report), distill_html.render(report, tmp_path)
    (table,) = (t for t in tables(text) if t[0][0] == "iteration")
    assert len(table) == 1 + distill_words.MOST and (table[1][0], table[-1][0]) == ("50", "2,000")
    assert page.count("missing from the folder or cannot be read") == 3 + 6
    for said in (text, page):
        assert "their values do not compare with the table of quality" in said and "the last weights were saved" in said
    assert [c.iteration for c in distill_words.pictured(build(checks=checks(6)))] == [50, 100, 150, 200, 250, 300]
    plain = build(checks=checks(3, sheets=False))
    assert distill_words.pictured(plain) == [] and "## Checks along the way" in distill_markdown.render(plain)
    assert "at iteration 150, the last one." in distill_words.course(plain)
    drawn = distill_plots.checks(report)
    assert drawn is not None and "teacher" not in drawn and "before" not in drawn


def test_sheets_are_part_of_the_page(tmp_path: Path) -> None:
    report = build()
    distill_reports.paint(report, tmp_path)
    page = distill_html.render(report, tmp_path)
    assert page.count("data:image/png;base64,") == 3 + 6 and "missing from the folder" not in page
    text = distill_markdown.render(report)
    assert "![samples of teacher](samples/teacher.png) | ![samples of before](samples/before.png)" in text
    bare = tuple(one.model_copy(update={"sheet": None}) for one in report.scored)
    assert "No sheet of samples was written." in distill_markdown.render(build(scored=bare))
    assert distill_html.render(build(scored=bare), tmp_path).count("No sheet of samples was written.") == 3


def test_sites_are_folded_away(tmp_path: Path) -> None:
    report = distill_reports.many_sites()
    page = distill_html.render(report, tmp_path)
    assert page.count("<details>") == 3 and page.count("compares 87 layers, named as in the student") == 3
    assert "- loss_0_of_features (87): down_blocks.0.resnets.0, " in distill_markdown.render(report)
    assert distill_markdown.render(report).count(" and 79 more") == 3


def test_pages_escape_what_they_are_given(tmp_path: Path) -> None:
    report = distill_reports.hostile()
    page = distill_html.render(report, tmp_path)
    parsed = Page(page)
    assert parsed.open == [] and parsed.tags.count("script") == 1 and parsed.links == []
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    for text in (distill_markdown.render(report), model_card.distilled(report, {"license": "a\nb: c"}, origin="zoo:fashion")):
        outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)  # code is shown as it is
        outside = re.sub(r"\A---\n.*?^---$", "", outside, flags=re.MULTILINE | re.DOTALL)  # JSON strings
        assert "<script" not in outside and "![d](" not in outside
        assert not re.search(r"^# c", outside, flags=re.MULTILINE)
        assert all(len(found) > 1 for found in tables(text))
    ticks = distill_markdown.render(build(open_with="a = 1\n````\n# b"))
    assert "`````python\na = 1\n````\n# b\n`````" in ticks


def test_plots_are_the_same_every_time_and_take_the_colours_of_the_page() -> None:
    for report in (build(), distill_reports.many_sites(), build(losses={"output": 1.0}, curve=curve(1), checks=checks(1))):
        for draw in (distill_plots.losses, distill_plots.checks, distill_plots.recovered):
            one, two = draw(report), draw(report)
            assert one == two and one is not None
            assert "http" not in one and "<date" not in one and "#00000" not in one and "var(--ink" in one
    assert len(distill_plots.losses(distill_reports.many_sites()) or "") < 60_000  # 400 lines of six losses, thinned


def test_a_single_loss_is_its_own_sum() -> None:
    lines = tuple(line.model_copy(update={"terms": {"output": line.total}}) for line in curve(20))
    alone, halved = (distill_plots.losses(build(losses={"output": w}, scales={}, curve=lines)) or "" for w in (1.0, 0.5))
    assert ">output<" in alone and "weighted sum" not in alone
    assert ">output<" in halved and "weighted sum" in halved


def test_the_card_names_the_teacher_and_the_training() -> None:
    card = model_card.distilled(build(), {"license": "mit"}, origin="stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe")
    head, _, body = card.partition("\n---\n")
    assert 'license: "mit"' in head and 'tags: ["lissom", "distilled", "laptop"]' in head
    assert 'base_model: "stable-diffusion-v1-5/stable-diffusion-v1-5"' in head
    assert "with training: 500 iterations in which it learned from `zoo:fashion` (weights 7a8b7a8b7a8b7a8b)" in body
    assert "without any training" not in body and '"distill": "laptop"' in body
    assert "Better: FD[zoo:judge]" in body and "of what was lost against the teacher came back" in body
    bare = model_card.distilled(distill_reports.empty(), {}, origin="zoo:fashion")
    assert "## Quality" not in bare and "base_model" not in bare and "No licence was found" in bare
