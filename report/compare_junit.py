"""junit.xml of a comparison: a test case for every limit, as GitHub, GitLab and Jenkins show them."""

from xml.etree import ElementTree

from . import compare_numbers as numbers
from . import compare_words as words
from .compare_schema import CompareReport
from .compare_words import Asked

SUITE = "lissom.compare"


def render(report: CompareReport) -> str:
    """The XML text. Undecided limits are failures, or skipped where that is allowed; what cannot be compared is an error."""
    report = words.readable(report)
    every = words.asked(report)
    cases = [_case(one, report.allow_inconclusive) for one in every]
    count = {"tests": len(cases)} | {
        plural: sum(case.find(tag) is not None for case in cases)
        for plural, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    counts = {name: str(number) for name, number in count.items()} | {"time": "0"}
    root = ElementTree.Element("testsuites", {"name": SUITE, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts})
    _properties(suite, _of_the_suite(report))
    suite.extend(cases)
    ElementTree.SubElement(suite, "system-out").text = words.headline(report)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(one: Asked, allowed: bool) -> ElementTree.Element:
    check, said = one.check, words.explained(one)
    name = f"{check.label} {check.rule} {check.limit:g}"
    case = ElementTree.Element("testcase", {"classname": SUITE, "name": name, "time": "0"})
    _properties(case, _of_the_case(one))
    if check.verdict == "INCONCLUSIVE" and allowed:
        ElementTree.SubElement(case, "skipped", {"message": said})
    elif check.verdict != "PASS":
        tag = "error" if check.verdict == "INCOMPARABLE" else "failure"
        ElementTree.SubElement(case, tag, {"type": check.verdict, "message": said}).text = _details(one)
    ElementTree.SubElement(case, "system-out").text = said
    return case


def _details(one: Asked) -> str:
    """What is shown when the failure is opened."""
    row = one.row
    lines = [
        words.explained(one),
        f"limit: {words.limit(one.check)}",
        f"baseline: {numbers.value(row.base)}",
        f"candidate: {numbers.value(row.candidate)}",
        f"difference: {numbers.difference(row)} ({numbers.meaning(row)})",
        f"ratio: {numbers.ratio(row)}",
    ]
    return "\n".join(" ".join(line.split()) for line in lines)


def _of_the_suite(report: CompareReport) -> dict[str, str]:
    sides = (("baseline", report.base), ("candidate", report.candidate))
    facts = {
        f"{name} {key}": text
        for name, side in sides
        for key, text in (
            ("source", side.source), ("model", side.model), ("weights hash", side.model_hash), ("sampled by", side.what),
            ("seeds", side.seeds), ("images", str(side.samples)), ("seconds", f"{side.seconds:g}"),
        )
    }  # fmt: skip
    return {
        "verdict": report.verdict,
        "limits from": report.gates_source,
        "allow inconclusive": str(report.allow_inconclusive).lower(),
        **facts,
        "command": report.command,
        "lissom": report.lissom,
    }


def _of_the_case(one: Asked) -> dict[str, str]:
    """Values as other tools read them: in full, with a point, without units."""
    row, check = one
    numbers: dict[str, float | None] = {"limit": check.limit, "value": check.value, "low": check.low, "high": check.high}
    for name, measured in (("baseline", row.base), ("candidate", row.candidate)):
        ends = measured.interval() if measured is not None else None
        numbers |= {
            name: measured.value if measured is not None else None,
            f"{name} low": ends[0] if ends else None,
            f"{name} high": ends[1] if ends else None,
        }
    facts = {"metric": check.metric, "rule": check.rule, "verdict": check.verdict, "unit": row.unit}
    return (
        facts
        | {name: repr(number) for name, number in numbers.items() if number is not None}
        | {"paired": str(row.paired).lower()}
    )


def _properties(parent: ElementTree.Element, facts: dict[str, str]) -> None:
    properties = ElementTree.SubElement(parent, "properties")
    for name, text in facts.items():
        if text:
            ElementTree.SubElement(properties, "property", {"name": name, "value": text})
