"""Workflow commands of a comparison: what GitHub Actions shows on top of a run, one line each on standard output."""

from collections.abc import Sequence

from . import compare_words as words
from .compare_schema import CompareReport

MOST = 10  # of one kind in a step; GitHub drops the others without a word


def annotations(report: CompareReport) -> list[str]:
    """An error for every limit that fails the job, a warning for what is undecided and allowed, a notice where all is kept."""
    report = words.readable(report)
    if report.verdict == "PASS":
        return [_command("notice", "lissom compare: PASS", words.headline(report))]
    errors: list[tuple[str, str]] = []
    warnings: list[tuple[str, str]] = []
    for one in words.asked(report):
        verdict = one.check.verdict
        allowed = verdict == "INCONCLUSIVE" and report.allow_inconclusive
        if verdict != "PASS":
            (warnings if allowed else errors).append((f"lissom compare: {verdict}, {one.check.label}", words.explained(one)))
    if not errors and not warnings:
        errors.append((f"lissom compare: {report.verdict}", words.headline(report)))
    return [*_commands("error", errors), *_commands("warning", warnings)]


def _commands(kind: str, found: Sequence[tuple[str, str]]) -> list[str]:
    """As many as GitHub shows; the last one says how many more there are."""
    if len(found) <= MOST:
        return [_command(kind, *one) for one in found]
    more = f"{len(found) - MOST + 1} more limits did not pass; the report has them all."
    return [*(_command(kind, *one) for one in found[: MOST - 1]), _command(kind, "lissom compare: more", more)]


def _command(kind: str, title: str, message: str) -> str:
    """'::error title=…::…'; the text of either can neither end the line nor the property."""
    return f"::{kind} title={_escaped(title).replace(':', '%3A').replace(',', '%2C')}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
