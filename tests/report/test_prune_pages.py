"""The pages of a pruned model say what report.json holds, and nothing better: slower is called SLOWER, unknown unknown."""

import html as standard_html
import re
from pathlib import Path

import pytest
from lissom.core.candidate import Cut
from lissom.core.measurement import Measurement
from lissom.report import model_card, prune_html, prune_layers, prune_markdown, prune_words
from lissom.report.prune_schema import Additivity, Latency, PruneReport, Scored
from lissom.report.schema import Ratio
from lissom.tests.report import prune_reports
from lissom.tests.report.parsed import tables
from lissom.tests.report.prune_reports import FAST, LEVEL, NETWORKS, SLOW, build, measured
from pydantic import ValidationError


def first_line(report: PruneReport) -> str:
    return prune_markdown.render(report).splitlines()[0]


def shown(page: str, selector: str) -> str:
    """The text of the first element with this class."""
    found = re.search(rf'<(\w+) class="{selector}[^"]*"[^>]*>(.*?)</\1>', page, re.DOTALL)
    assert found is not None, selector
    return standard_html.unescape(re.sub(r"<[^>]+>", "", found[2]))


@pytest.mark.parametrize("network", NETWORKS)
def test_json_round_trip(network: str) -> None:
    report = build(network)
    again = PruneReport.model_validate_json(report.model_dump_json())
    assert again == report
    assert prune_markdown.render(again) == prune_markdown.render(report)
    with pytest.raises(ValidationError, match="speedup"):
        PruneReport.model_validate({**report.model_dump(), "speedup": 2})


@pytest.mark.parametrize("latency", [SLOW, SLOW[::-1], SLOW[:1]])
def test_slower_at_any_batch_is_said_first(latency: tuple[Latency, ...], tmp_path: Path) -> None:
    report = build(latency=latency)
    first, page = first_line(report), prune_html.render(report, tmp_path)
    assert first.startswith("SLOWER: a denoiser call takes")
    assert "1.12 [1.08, 1.16] times as long at batch 1" in first
    assert 'class="verdict slower"' in page and shown(page, "verdict").startswith("SLOWER")
    assert "slower than its parent at batch 1 (1.12 [1.08, 1.16])" in prune_markdown.render(report)
    assert re.search(r'<div class="slower"><dt>latency, batch 1</dt><dd>1.12<', page)
    if len(latency) > 1:  # the faster batch size is not passed over
        assert "0.731 [0.722, 0.740] times as long at batch 64 (faster)" in first


@pytest.mark.parametrize(
    ("latency", "start"),
    [
        (FAST, "Faster: "),
        (LEVEL, "Not measurably faster: "),
        ((), "Speed not measured; "),
        ((FAST[0].model_copy(update={"ratio": Ratio(value=0.7)}),), "Not measurably faster: "),  # no interval, no claim
        ((FAST[0].model_copy(update={"ratio": Ratio(value=1.2)}),), "SLOWER: "),
    ],
)
def test_faster_needs_intervals_below_one(latency: tuple[Latency, ...], start: str, tmp_path: Path) -> None:
    report = build(latency=latency)
    assert first_line(report).startswith(start)
    assert shown(prune_html.render(report, tmp_path), "verdict").startswith(start)
    assert ("slower" in prune_markdown.render(report).lower()) == start.startswith("SLOWER")


def test_the_box_on_top_shows_the_batch_that_the_first_line_speaks_of(tmp_path: Path) -> None:
    unclear = Latency(batch=8, before=10.0, after=13.0, ratio=Ratio(value=1.3, low=0.9, high=1.7))
    slower = Latency(batch=64, before=10.0, after=10.5, ratio=Ratio(value=1.05, low=1.02, high=1.08))
    page = prune_html.render(build(latency=(*FAST, unclear, slower)), tmp_path)
    assert re.search(r'<div class="slower"><dt>latency, batch 64</dt><dd>1.05<', page)


def test_what_plain_diffusers_does_not_open_is_said_loudly(tmp_path: Path) -> None:
    report = build(opens_plain=False, not_plain_because="the stages differ.")
    loud = "NOT PLAIN DIFFUSERS: it opens only with trust_remote_code=True"
    text, page = prune_markdown.render(report), prune_html.render(report, tmp_path)
    assert loud in first_line(report)
    assert text.split("\n\n")[1] == f"> [!WARNING]\n> **{loud}. Why: the stages differ.**"
    assert f"> **{loud}" in model_card.render(report, {}, origin=report.model)
    before_any_heading = page[: page.index("<h2>")]
    assert f'role="alert">{loud}. Why: the stages differ.</p>' in before_any_heading
    assert "no stock config" in prune_markdown.render(build(opens_plain=False))  # a reason even where none is recorded
    plain = build()
    assert first_line(plain).endswith("; opens in plain diffusers.")
    assert "NOT PLAIN" not in prune_markdown.render(plain) + prune_html.render(plain, tmp_path)


def pair(direction: str, before: float, after: float, spread: bool = True) -> PruneReport:
    """A report with one metric: half-samples that swing by 5 % in common and by 0.1 % apart."""
    wave = [1 + 0.05 * (-1) ** i for i in range(40)]  # common to both: it cancels in pairs
    one = measured("m", before).model_copy(update={"direction": direction, "value": before})
    found = []
    for name, value, own in (("before", before, 0.0), ("after", after, 0.001)):
        values = tuple(value * (w + own * (-1) ** (i // 2)) for i, w in enumerate(wave)) if spread else ()
        found.append(Scored(name=name, measurements=(one.model_copy(update={"value": value, "replicates": values}),)))
    return build(scored=tuple(found))


@pytest.mark.parametrize(
    ("direction", "before", "after", "word"),
    [
        ("lower", 10.0, 12.0, "worse"),
        ("lower", 12.0, 10.0, "better"),
        ("higher", 0.30, 0.33, "better"),
        ("higher", 0.33, 0.30, "worse"),
        ("higher", 0.30, 0.30, "no measurable change"),
        ("lower", 10.0, 10.001, "no measurable change"),
        ("higher", -0.3, -0.5, "worse"),  # ImageReward and its like go below zero
    ],
)
def test_what_became_of_a_metric(direction: str, before: float, after: float, word: str) -> None:
    report = pair(direction, before, after)
    (row,) = prune_words.quality_rows(report)
    assert row[1] == word
    assert f"({word}) on 2,048 images" in first_line(report)
    assert f"{direction} is better" in row[0]


def test_worse_stands_out_on_the_page(tmp_path: Path) -> None:
    page = prune_html.render(build(), tmp_path)  # FD up, CLIP score the same
    assert page.count('<td class="slow">worse</td>') == 1 and page.count("<td>no measurable change</td>") == 1


def test_a_metric_below_zero_has_a_difference_and_no_ratio() -> None:
    report = pair("higher", -0.3, -0.5)
    (row,) = prune_words.quality_rows(report)
    assert row[4] == "–" and row[5].startswith("-0.2")
    assert f", difference {row[5]} (worse)" in first_line(report) and "ratio –" not in first_line(report)


def test_a_metric_without_intervals_is_not_called_better_or_worse() -> None:
    report = pair("lower", 10.0, 12.0, spread=False)
    assert prune_words.quality_rows(report)[0][1] == "not known"
    first = first_line(report)
    assert "from 10 (no interval) to 12 (no interval), ratio 1.2 (no interval) on" in first
    assert "worse" not in first


def test_a_metric_of_one_model_only_is_not_compared(tmp_path: Path) -> None:
    before, after = build().scored
    extra = Measurement(metric="accuracy", value=0.9, direction="higher", n=2048)
    more = before.model_copy(update={"measurements": (*before.measurements, extra)})
    rows = prune_words.quality_rows(build(scored=(more, after)))
    assert rows[-1][1:] == ("not measured", "0.9 (no interval)", "not measured", "–", "–")
    alone = build(scored=(more.model_copy(update={"measurements": (extra,)}),))
    assert "to not measured on" in first_line(alone)
    assert "<dd>not measured<small>before 0.9 (no interval)</small>" in prune_html.render(alone, tmp_path)


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    report = build(latency=(), scored=(), samples=0, loss=None, predicted_loss=None)
    text, page = prune_markdown.render(report), prune_html.render(report, tmp_path)
    assert "Speed not measured" in first_line(report) and "quality not measured" in first_line(report)
    for said in (text, page):
        assert "does not make it faster" in said and "what the cuts cost in quality is not known" in said
        assert "Loss of all cuts" not in said
    assert text.count("Not measured.") == 2
    assert "<dt>quality</dt><dd>–<small>not measured" in page and "<dt>latency</dt><dd>–<small>not measured" in page
    assert "latency, batch" not in page


@pytest.mark.parametrize("network", NETWORKS)
def test_a_method_without_scores(network: str, tmp_path: Path) -> None:
    report = prune_reports.unscored(network)
    text, page = prune_markdown.render(report), prune_html.render(report, tmp_path)
    assert "random_cuts gave single layers no scores" in text and "random_cuts gave single layers no scores" in page
    assert set(re.findall(r'data-plot="(\w+)"', page)) == {"shares", "network"}
    assert "coloured by score" not in page and "Do the scores add up" not in text + page
    assert "None" not in text and "None" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    (cuts,) = (t for t in tables(text) if t[0][0] == "address")
    assert all(row[-1] == "–" for row in cuts[1:])


def test_the_cheapest_layers_come_first_and_unscored_ones_not_at_all() -> None:
    found = list(build("sdxl").layers)
    found[5] = found[5].model_copy(update={"score": None})
    report = build("sdxl", layers=tuple(found))
    (listed,) = (t for t in tables(prune_markdown.render(report)) if t[0][0] == "layer")
    scores = sorted(layer.score for layer in found if layer.score is not None)
    assert [float(row[2]) for row in listed[1:]] == pytest.approx(scores[: prune_markdown.TOP], rel=1e-3)
    assert "The 20 cheapest of 86 scored layers" in prune_markdown.render(report)


def test_every_kind_of_cut_says_what_went() -> None:
    gone = ("down_blocks.0.resnets.1", "down_blocks.0.attentions.1", "down_blocks.0.attentions.0", "up_blocks.2.resnets.0")
    found = tuple(
        layer.model_copy(update={"cut": layer.address in gone or layer.address.startswith("mid_block.")})
        for layer in prune_reports.layers("sd15")
    )
    cuts = (
        Cut(address="mid_block", what="remove"),
        Cut(address="down_blocks.0", what="keep_layers", value=(0,)),
        Cut(address="down_blocks.0.attentions.0", what="remove"),  # beside the pair that the stage loses: counted once
        Cut(address="up_blocks.1.attentions.0", what="replace", value="empty"),
        Cut(address="up_blocks.1.attentions.1.transformer_blocks.0", what="remove"),
        Cut(address="up_blocks.2.resnets.0", what="remove"),
    )
    report = build(layers=found, cuts=cuts)
    params = {layer.address: layer.params for layer in found}
    rows = {row[0]: row[1:] for row in prune_layers.cut_rows(report)}
    middle = sum(n for address, n in params.items() if address.startswith("mid_block."))
    assert rows["mid_block"] == ("3 layers", "remove", f"≥ {middle:,}", "–")
    both = params["down_blocks.0.resnets.1"] + params["down_blocks.0.attentions.1"]
    assert rows["down_blocks.0"] == ("2 layers", "keep layers 0 (1 stays)", f"≥ {both:,}", "–")
    assert rows["down_blocks.0.attentions.0"][2] == f"{params['down_blocks.0.attentions.0']:,}"
    assert rows["up_blocks.1.attentions.0"] == ("attention", "replace by empty", "–", "–")
    assert rows["up_blocks.1.attentions.1.transformer_blocks.0"] == ("", "remove", "–", "–")
    kind, change, freed, score = rows["up_blocks.2.resnets.0"]
    assert (kind, change, freed) == ("resnet", "remove", f"{params['up_blocks.2.resnets.0']:,}") and float(score) > 0
    # A layer that stays, but not whole, is neither kept nor cut.
    assert prune_layers.reduced(report) == {"up_blocks.1.attentions.0", "up_blocks.1.attentions.1"}


@pytest.mark.parametrize(
    ("rank", "ratio", "parts"),
    [
        (0.965, 1.02, ("rank correlation (Spearman) of 0.965", "1.02 times", "about what their scores say", "is sound here")),
        (0.7, 1.9, ("roughly", "more than their scores say", "may miss better")),
        (0.1, 0.5, ("hardly ranks", "less than their scores say", "little better than a guess")),
        (-0.9, 1.0, ("hardly ranks",)),
    ],
)
def test_whether_scores_add_up(rank: float, ratio: float, parts: tuple[str, ...], tmp_path: Path) -> None:
    found = Additivity(sums=(0.1, 0.2, 0.3), losses=(0.1, 0.3, 0.2), rank_correlation=rank, ratio=ratio)
    report = build(additivity=found)
    for said in (prune_markdown.render(report), standard_html.unescape(prune_html.render(report, tmp_path))):
        assert all(part in said for part in ("Over 3 random sets", *parts))


def test_warnings_that_follow_from_the_figures() -> None:
    def found(**changes: object) -> str:
        return " ".join(prune_words.warnings(build(**changes)))

    assert found() == "The calibration prompts are few."  # the run's own
    assert "cost 3 times what the sum of their scores predicted" in found(loss=0.03, predicted_loss=0.01)
    assert "cost 0.25 times" in found(loss=0.01, predicted_loss=0.04)
    assert "After reloading, outputs differ by 0.02" in found(reload_difference=0.02)
    assert "60.0 % of the parameters were asked for, 70.0 % are left" in found(keep=0.6)
    assert "are left" not in found(keep=None) + found(keep=0.8)
    assert "80.0 % of the MACs were asked for, 81.2 % are left" in found(keep=0.8, of="macs")
    assert "70.0 % of the latency were asked for, 78.8 % are left" in found(keep=0.7, of="latency")


def test_markdown_escapes_what_it_is_given() -> None:
    text = prune_markdown.render(prune_reports.hostile())
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)  # code is shown as it is
    assert "<script" not in outside and "![d](" not in outside
    assert not re.search(r"^# c", outside, flags=re.MULTILINE)
    assert "a\\|b&lt;/title>" in outside
    for found in tables(text):
        assert len(found) > 1
    ticks = prune_markdown.render(build(open_with="a = 1\n````\n# b"))
    assert "`````python\na = 1\n````\n# b\n`````" in ticks


@pytest.mark.parametrize("network", NETWORKS)
def test_markdown_tables_are_whole(network: str) -> None:
    report = build(network, latency=SLOW)
    found = {table[0][0]: table for table in tables(prune_markdown.render(report)) if table[0][0]}
    assert set(found) == {"batch", "metric", "before", "address", "layer"}
    assert [row[2] for row in found["batch"][1:]] == ["SLOWER", "faster"]
    assert len(found["address"]) == 1 + len(report.cuts)
