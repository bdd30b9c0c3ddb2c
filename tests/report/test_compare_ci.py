"""What CI reads of a comparison: junit.xml and the workflow commands of GitHub Actions."""

import re
from xml.etree import ElementTree

import pytest
from lissom.report import compare_github, compare_junit
from lissom.report import compare_words as words
from lissom.report.compare_schema import CompareReport
from lissom.tests.report import compare_reports as reports
from lissom.tests.report.compare_reports import EVERY, build


def suite(report: CompareReport) -> ElementTree.Element:
    root = ElementTree.fromstring(compare_junit.render(report))
    assert root.tag == "testsuites"
    (found,) = root
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        key: found.get(key) for key in ("tests", "failures", "errors", "skipped")
    }
    return found


def counts(found: ElementTree.Element) -> tuple[int, ...]:
    """(tests, failures, errors, skipped) as the suite says; the cases must say the same."""
    cases = found.findall("testcase")
    by_hand = (len(cases), *(len(found.findall(f"testcase/{tag}")) for tag in ("failure", "error", "skipped")))
    assert by_hand == tuple(int(found.get(key, "")) for key in ("tests", "failures", "errors", "skipped"))
    return by_hand


@pytest.mark.parametrize("name", EVERY)
def test_junit_has_a_case_for_every_limit(name: str) -> None:
    report = EVERY[name]()
    text = compare_junit.render(report)
    assert text == compare_junit.render(report) and text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites ')
    found = suite(report)
    verdicts = [check.verdict for check in report.checks]
    failures = verdicts.count("REGRESSION") + verdicts.count("INCONCLUSIVE")
    assert counts(found) == (len(verdicts), failures, verdicts.count("INCOMPARABLE"), 0)
    cases = found.findall("testcase")
    assert {case.get("classname") for case in cases} <= {"lissom.compare"}
    assert len({case.get("name") for case in cases}) == len(cases)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", text)


def test_junit_of_every_verdict() -> None:
    found = suite(reports.regression())
    cases = {case.get("name"): case for case in found.findall("testcase")}
    broken = cases["FD[zoo:judge] max_increase 0.5"].find("failure")
    assert broken is not None and broken.get("type") == "REGRESSION"
    assert (broken.get("message") or "").startswith("FD[zoo:judge] rose by 1.60 [1.47, 1.73]")
    assert "baseline: 12.3 [12.0, 12.6]" in (broken.text or "") and "(worse)" in (broken.text or "")
    undecided = cases["clip_score[zoo:judge] max_decrease 0.01"].find("failure")
    assert undecided is not None and undecided.get("type") == "INCONCLUSIVE"
    kept = cases["params max_ratio 0.75"]
    assert [child.tag for child in kept] == ["properties", "system-out"]
    error = suite(reports.incomparable_features()).find("testcase/error")
    assert error is not None and error.get("type") == "INCOMPARABLE" and "inception" in (error.get("message") or "")


def test_undecided_is_skipped_where_it_is_allowed() -> None:
    found = suite(reports.regression(allow_inconclusive=True))
    assert counts(found) == (5, 2, 0, 1)
    skipped = found.find("testcase/skipped")
    assert skipped is not None and "clip_score" in (skipped.get("message") or "")


def test_junit_properties_hold_the_numbers_in_full() -> None:
    found = suite(reports.regression())
    outer = {one.get("name"): one.get("value") for one in found.findall("properties/property")}
    assert (outer["verdict"], outer["limits from"], outer["allow inconclusive"]) == ("REGRESSION", "gates.yaml", "false")
    assert outer["baseline source"] == "runs/base.json" and outer["candidate seconds"] == "41.9"
    case = next(one for one in found.findall("testcase") if (one.get("name") or "").startswith("FD"))
    inner = {one.get("name"): one.get("value") or "" for one in case.findall("properties/property")}
    assert (inner["metric"], inner["rule"], inner["paired"]) == ("fid", "max_increase", "true")
    assert float(inner["limit"]) == 0.5 and float(inner["baseline"]) == 12.3
    assert float(inner["low"]) < float(inner["value"]) < float(inner["high"])
    missing = suite(reports.incomparable_features()).findall("testcase")
    latency = next(one for one in missing if (one.get("name") or "").startswith("latency"))
    assert "candidate" not in {one.get("name") for one in latency.findall("properties/property")}


def test_junit_without_limits_is_empty_and_valid() -> None:
    found = suite(reports.without_limits())
    assert counts(found) == (0, 0, 0, 0) and "nothing was decided" in (found.findtext("system-out") or "")


COMMAND = re.compile(r"::(error|warning|notice) title=([^:,\r\n]*)::([^\r\n]*)")


def commands(report: CompareReport) -> list[tuple[str, str, str]]:
    """(kind, title, message), with what was escaped put back."""
    found = []
    for line in compare_github.annotations(report):
        match = COMMAND.fullmatch(line)
        assert match is not None, line
        for text in match.groups()[1:]:
            assert not re.search(r"%(?!25|0D|0A|3A|2C)", text)
        title, message = match[2].replace("%3A", ":").replace("%2C", ","), match[3]
        title, message = (text.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%") for text in (title, message))
        found.append((match[1], title, message))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_annotations_are_commands_of_one_line(name: str) -> None:
    report = EVERY[name]()
    found = commands(report)
    assert found and len(found) <= 2 * compare_github.MOST
    assert ("notice" in {kind for kind, *_ in found}) == (report.verdict == "PASS")


def test_annotations_of_every_verdict() -> None:
    assert commands(reports.passed()) == [("notice", "lissom compare: PASS", "PASS: 5 limits kept")]
    broken = commands(reports.regression())
    assert [kind for kind, *_ in broken] == ["error"] * 3
    assert broken[0][1] == "lissom compare: REGRESSION, FD[zoo:judge]" and "rose by 1.60 [1.47, 1.73]" in broken[0][2]
    allowed = commands(reports.regression(allow_inconclusive=True))
    assert [kind for kind, *_ in allowed] == ["error", "error", "warning"]
    assert [kind for kind, *_ in commands(reports.inconclusive(allow_inconclusive=True))] == ["warning"]
    assert [kind for kind, *_ in commands(reports.incomparable_features())] == ["error"] * 3
    nothing = build((), {}, verdict="INCOMPARABLE")
    assert commands(nothing) == [("error", "lissom compare: INCOMPARABLE", words.headline(nothing))]


def test_no_more_annotations_than_are_shown() -> None:
    failing = sum(one.verdict != "PASS" for one in reports.many().checks)
    found = commands(reports.many())
    assert len(found) == compare_github.MOST and found[0][1].startswith("lissom compare: REGRESSION")
    assert found[-1][2] == f"{failing - compare_github.MOST + 1} more limits did not pass; the report has them all."


def test_hostile_texts_end_neither_the_command_nor_its_title() -> None:
    lines = compare_github.annotations(reports.hostile())
    assert len(lines) == 3 and all(len(line.splitlines()) == 1 for line in lines)
    assert all("%250A::error" in line and "\x1b" not in line for line in lines)
    assert all("::" not in line.split("::")[1] and line.startswith("::error title=") for line in lines)
