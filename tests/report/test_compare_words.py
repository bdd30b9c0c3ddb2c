"""What a comparison says in words: the headline names what decided, limits are sentences, warnings follow from the figures."""

import re
from typing import Any

import pytest
from lissom.core.gates import Gate, Rule, check
from lissom.report import compare_numbers as numbers
from lissom.report import compare_sides
from lissom.report import compare_words as words
from lissom.report.compare_schema import CompareReport, Row
from lissom.tests.report import compare_reports as reports
from lissom.tests.report.compare_reports import LIMITS, OTHER, build, measured, row

INTERVAL = r"-?[\d.,]+ \[-?[\d.,]+, -?[\d.,]+\]"


def said(metric: str, base: float, candidate: float, **limit: Any) -> str:
    """The sentence about the one limit of a number."""
    (one,) = words.asked(build((row(metric, base, candidate, Gate(**limit)),)))
    return words.explained(one)


def test_headline_names_the_verdict_and_what_decided_it() -> None:
    assert words.headline(reports.passed()) == "PASS: 5 limits kept"
    broken = words.headline(reports.regression())
    assert re.fullmatch(
        rf"REGRESSION: FD\[zoo:judge\] rose by {INTERVAL}, allowed is at most 0\.5; 2 of 5 limits are broken", broken
    )
    undecided = words.headline(reports.inconclusive())
    assert undecided.startswith(
        "INCONCLUSIVE: FD[zoo:judge] rose by 0.55 [0.43, 0.67], allowed is at most 0.5: the interval holds"
    )
    assert re.search(r"about [\d,]+ images would decide it if the value stays; 1 of 5 limits is undecided$", undecided)
    apart = words.headline(reports.incomparable_features())
    assert apart.startswith("INCOMPARABLE: FID: the two differ in features (zoo:judge against inception)")
    assert apart.endswith("; 3 of 5 limits are not comparable")


def test_undecided_and_allowed_is_said() -> None:
    report = reports.inconclusive(allow_inconclusive=True)
    assert report.exit_code == 0 and words.headline(report).endswith("(allowed: the exit code is 0)")
    assert "allowed (--allow-inconclusive)" in dict(compare_sides.common(report)).values()
    assert "(allowed" not in words.headline(reports.regression(allow_inconclusive=True))


def test_a_pass_of_nothing_says_so() -> None:
    report = reports.without_limits()
    assert words.headline(report) == "PASS: no limit was asked for, so nothing was decided"
    assert any("nothing is decided" in text for text in words.warnings(report))
    empty = build((), {}, verdict="INCOMPARABLE")
    assert words.headline(empty) == "INCOMPARABLE: nothing that both evaluations measured can be compared"


def test_a_pass_says_what_became_worse_within_its_limits() -> None:
    report = build((row("fid", 12.3, 12.7, Gate(max_increase=1)),))
    assert words.headline(report) == "PASS: 1 limit kept; measurably worse, within what is allowed: FD[zoo:judge]"


@pytest.mark.parametrize(
    ("metric", "base", "candidate", "limit", "sentence"),
    [
        ("fid", 12.3, 13.9, {"max_increase": 0.5}, "rose by <>, allowed is at most 0.5."),
        ("fid", 12.3, 11.9, {"max_increase": 0.5}, "fell by <>, a rise of at most 0.5 is allowed."),
        ("fid", 12.3, 13.9, {"max_increase": 0}, "rose by <>, no rise is allowed."),
        ("clip_score", 0.32, 0.30, {"max_decrease": 0.01}, "fell by <>, allowed is at most 0.01."),
        ("clip_score", 0.30, 0.32, {"max_decrease": 0.01}, "rose by <>, a fall of at most 0.01 is allowed."),
        ("latency", 10.0, 12.0, {"max_ratio": 1.05}, "is <> times the baseline's, allowed is at most 1.05."),
        ("clip_score", 0.32, 0.30, {"min": 0.35}, "is <>, asked is at least 0.35."),
        ("fid", 12.3, 13.9, {"max": 11}, "is <>, asked is at most 11."),
        ("params", 1000, 900, {"max_increase": 0}, "fell by 100, no rise is allowed."),
        ("params", 859_520_964, 601_664_675, {"max_ratio": 0.75}, "is 0.7 times the baseline's, allowed is at most 0.75."),
        ("params", 1000, 1000, {"max_increase": 0}, "did not change, no rise is allowed."),
    ],
)
def test_limits_are_sentences(metric: str, base: float, candidate: float, limit: dict[str, float], sentence: str) -> None:
    label = measured(metric, base, "base").label
    pattern = re.escape(f"{label} {sentence}").replace("<>", INTERVAL)
    assert re.fullmatch(pattern, said(metric, base, candidate, **limit))


@pytest.mark.parametrize(
    ("rule", "limit", "text"),
    [
        ("max_increase", 0.5, "increase at most 0.5"), ("max_increase", 0, "no increase"), ("max_decrease", 0, "no decrease"),
        ("max_ratio", 1.05, "ratio at most 1.05"), ("min", 0.8, "at least 0.8"), ("max", 2_000_000, "at most 2,000,000"),
    ],
)  # fmt: skip
def test_limits_in_the_table(rule: Rule, limit: float, text: str) -> None:
    assert words.limit(check("fid", rule, limit, None, None)) == text


def test_what_has_no_interval_keeps_its_reason() -> None:
    one, two = (measured("fid", value, "x", replicates=()) for value in (12.3, 14.0))
    (asked,) = words.asked(build((row("fid", one, two, Gate(max_increase=0.5)),)))
    assert words.explained(asked).startswith("FD[zoo:judge]: increase 1.7 has no interval (too few images for an interval)")
    assert words.quantity(asked) == "1.7 (no interval)" and numbers.meaning(asked.row) == "not known"


def test_what_is_timed_needs_repetitions_not_images() -> None:
    sentence = said("latency", 10.0, 10.4, max_increase=0.5)
    assert sentence.endswith("the interval holds the limit. More repetitions make it narrower.")


def test_the_worst_comes_first_whatever_its_unit() -> None:
    found = (
        row("accuracy", 0.9, 0.85),
        row("fid", 12.0, 13.0, Gate(max_increase=0.2)),  # 7 % of the baseline beyond the limit
        row("clip_score", 0.30, 0.31, Gate(max_decrease=0.01)),
        row("latency", 1000.0, 1500.0, Gate(max_ratio=1.1)),  # 40 % beyond
    )
    report = build(found)
    assert [one.row.metric for one in words.asked(report)] == ["latency", "fid", "clip_score"]
    assert [line.row.metric for line in words.lines(report)] == ["latency", "fid", "clip_score", "accuracy"]
    assert words.headline(report).startswith("REGRESSION: latency is")


@pytest.mark.parametrize(
    ("one", "meaning"),
    [
        (row("fid", 12.0, 13.0), "worse"), (row("fid", 13.0, 12.0), "better"), (row("fid", 12.0, 12.01), "no measurable change"),
        (row("accuracy", 0.8, 0.9), "better"), (row("accuracy", 0.9, 0.8), "worse"), (row("params", 10, 9), "better"),
        (row("params", 10, 10), "the same"), (row("fid", 12.0, None), "not measured"),
        (row("fid", 12.0, measured("fid", 12.0, "candidate", n=8)), "not comparable"),
    ],
)  # fmt: skip
def test_what_became_of_a_number(one: Row, meaning: str) -> None:
    assert numbers.meaning(one) == meaning


def test_numbers_keep_the_digits_that_their_intervals_support() -> None:
    fid, params, macs = row("fid", 12.3, 13.9), row("params", 859_520_964, 601_664_675), row("macs", 1000, 1000)
    assert numbers.difference(fid) == "+1.60 [1.47, 1.73]" and numbers.difference(row("fid", 13.9, 12.3)).startswith("-1.60 [")
    assert (numbers.value(params.base), numbers.difference(params), numbers.ratio(params)) == ("859.5 M", "-257.9 M", "0.7")
    assert (numbers.value(macs.base), numbers.difference(macs), numbers.ratio(macs)) == ("1,000", "0", "1")
    assert numbers.ratio(row("psnr", -3.0, -2.0)) == "–" and numbers.difference(row("fid", 12.3, None)) == "–"
    assert numbers.difference(row("higher", 0.3, 0.3001)).startswith("0.000 [")  # no sign before what rounds to zero


def test_other_seeds_are_said_to_be_unpaired_and_what_that_means() -> None:
    report = reports.unpaired()
    note = words.unpaired_note(report)
    assert (
        note.startswith("Other seeds: unpaired, wider intervals (FD[zoo:judge], clip_score[zoo:judge]).")
        and "would cancel" in note
    )
    assert note in words.warnings(report)
    assert {line.paired for line in words.lines(report)} == {"unpaired"}
    other = (row("latency", 10.0, 12.0), row("params", 10, 9))  # what has no seeds is not called unpaired
    assert words.unpaired_note(build(other)) == words.unpaired_note(reports.passed()) == ""
    pair, single = (row("fid", 12.3, measured("fid", 12.6, "candidate", seeds=seeds)) for seeds in (reports.REPORT, OTHER))
    assert pair.difference and single.difference and pair.difference.low and single.difference.low
    assert pair.difference.low > single.difference.low  # the wider interval


def test_warnings_that_follow_from_the_figures() -> None:
    def found(*rows: Row, **changes: Any) -> str:
        return " ".join(words.warnings(build(rows, **changes)))

    fid, clip, params = reports.rows()[1], reports.rows()[2], reports.rows()[4]
    assert found(fid, clip, warnings=("The run's own.",)) == "The run's own."
    assert "Only FD[zoo:judge] has a limit" in found(fid) and "Only" not in found(fid, gates={})
    assert "Only counted numbers have a limit" in found(params)
    assert "Measurably worse, but nothing is asked of it: accuracy." in found(fid, clip, row("accuracy", 0.87, 0.85))
    text = " ".join(words.warnings(reports.unpaired()))
    assert "Other device or data type (cpu, float32 against cuda, float16)" in text
    assert "torch 2.14 against 2.6; python 3.13 against 3.11; gpu H200 against A100" in text and "diffusers" not in text
    assert "40 limits allow no change" in " ".join(words.warnings(reports.many())) and "up to 64 %" in " ".join(
        words.warnings(reports.many())
    )
    same = reports.side("base", source="other.json")
    assert "same weights and the same plan" in found(fid, clip, candidate=same)


def test_conditions_of_both_sides_are_marked_where_they_differ() -> None:
    found = {one.name: one for one in compare_sides.conditions(reports.unpaired())}
    assert {name for name, one in found.items() if one.differs} == {
        "model", "weights hash", "sampled by", "seeds", "device, dtype", "torch", "python", "gpu"
    }  # fmt: skip
    assert found["torch"][1:3] == ("2.14", "2.6") and found["source"].base == "runs/base.json" and not found["time"].differs


def test_every_measurement_is_listed_in_full() -> None:
    taken = compare_sides.measurements(reports.incomparable_features())
    assert [(one.label, one.side) for one in taken][:2] == [("FD[zoo:judge]", "baseline"), ("FID", "candidate")]
    assert len(taken) == 7  # one number was not measured of the candidate
    fid, *_, params = taken
    assert "1,024 images; seeds report 0, from 0; reference ab12ab12ab12; prompts cd34cd34cd34" in fid.under
    assert (params.value, params.interval) == ("601,664,675", "counted") and "images" not in params.under
    latency = next(one for one in taken if one.label.startswith("latency"))
    assert "20 repetitions" in latency.under and "batch 1; threads 2" in latency.under


def test_texts_that_turn_or_colour_what_is_read_are_cleaned() -> None:
    report = words.readable(reports.hostile())
    text = report.model_dump_json()
    assert not re.search(r"[\x00-\x1f\u202e]|\\u00(0[0-8]|1)|\\u202e", text)
    assert CompareReport.model_validate_json(text) == report
    assert words.readable(reports.regression()) == reports.regression()  # nothing else is changed
    assert "\n" not in words.headline(reports.hostile()) and "\x1b" not in words.headline(reports.hostile())


def test_the_builders_decide_by_the_real_gates() -> None:
    assert {name: make().verdict for name, make in reports.EVERY.items()} == {
        "pass": "PASS", "regression": "REGRESSION", "inconclusive": "INCONCLUSIVE", "incomparable": "INCOMPARABLE",
        "unpaired": "REGRESSION", "many": "REGRESSION", "without_limits": "PASS", "hostile": "REGRESSION",
    }  # fmt: skip
    assert set(LIMITS) == {"fid", "clip_score", "latency", "params"}
