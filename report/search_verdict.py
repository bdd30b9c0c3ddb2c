"""What a search found, in its first line. Only an interval that lies wholly above 1 counts as a gain."""

from typing import Literal, NamedTuple

from . import _words
from ._words import EQUAL
from .prune_words import NOT_PLAIN, Quality, compared
from .schema import Ratio, SearchReport

Outcome = Literal["better", "unclear", "worse", "unmeasured"]


class Verdict(NamedTuple):
    outcome: Outcome
    sentence: str


def verdict(report: SearchReport) -> Verdict:
    """The whole result: against the best fixed schedule by the first objective, then what else was asked for, then the cuts."""
    found = outcome(report.ratio)
    first = _lead(report, found) + _figures(report)
    return Verdict(found, " ".join([first[0].upper() + first[1:], *_objectives(report), *_cuts(report)]))


def outcome(ratio: Ratio | None) -> Outcome:
    """What a ratio supports: its interval must lie wholly on one side of 1."""
    if ratio is None or ratio.low is None or ratio.high is None:
        return "unmeasured"
    return "better" if ratio.low > 1 else "worse" if ratio.high < 1 else "unclear"


def not_plain(report: SearchReport) -> str:
    """The loud sentence about a cut model that stock diffusers does not open; empty for all others."""
    if report.opens != "remote_code":
        return ""
    reason = report.not_plain_because.strip().rstrip(".") or "no stock config describes its cuts"
    return f"{NOT_PLAIN}. Why: {reason}."


def _lead(report: SearchReport, found: Outcome) -> str:
    if len(report.objectives) < 2:
        return {
            "better": "",
            "unclear": "The search did not beat the best fixed schedule (the interval of the ratio includes 1); ",
            "worse": "The search did not beat the best fixed schedule, it is worse; ",
            "unmeasured": "Whether the search beat the best fixed schedule is not known (the ratio has no interval); ",
        }[found]
    by = f"the best fixed schedule by {report.objective_label}"  # one objective of several: what is picked may be worth its price
    return {
        "better": "",
        "unclear": f"What was picked is not better than {by} (the interval of the ratio includes 1); ",
        "worse": f"What was picked is worse than {by}; ",
        "unmeasured": f"Whether what was picked is better than {by} is not known (the ratio has no interval); ",
    }[found]


def _figures(report: SearchReport) -> str:
    best, winner = _words.best_fixed(report), report.winner
    relative = winner.macs_ratio / best.macs_ratio
    dearer = "costlier " if relative > 1 + EQUAL else ""  # said up front: it may not hide in a table
    measured = _words.find(winner, report.objective)
    images = f", on {measured.n:,} unseen images" if measured else ""
    return (
        f"{dearer}searched {len(winner.plan.steps)}-step plan: {report.objective_label} {_words.quoted(measured)} against "
        f"{_words.quoted(_words.find(best, report.objective))} of the best fixed schedule ({best.name}), "
        f"{_words.ratio_words(report.ratio)}{images}, {_cost(relative)}."
    )


def _objectives(report: SearchReport) -> list[str]:
    """The other objectives of the winner, and costs that had a budget: metrics against the best fixed schedule, costs as shares."""
    best, winner, found = _words.best_fixed(report), report.winner, []
    several = len(report.objectives) > 1
    if several and 1 <= report.picked <= len(report.front):
        found.append(f"It is number {report.picked} of {len(report.front)} on the front.")
    for name in report.objectives[1:]:
        pair = Quality(_words.find(best, name), _words.find(winner, name))
        if pair.before is not None or pair.after is not None:
            *_, meaning = compared(pair)
            against = f"{_words.quoted(pair.after)} against {_words.quoted(pair.before)}"
            found.append(f"{pair.known.label} ({pair.known.direction} is better) is {against}, {_meaning(meaning)}.")
        elif name not in _words.COSTS:
            found.append(f"{name} is {_words.NOT_MEASURED}.")
    asked = [name for name in _words.COSTS if name in report.objectives or (name in report.budget and name != "macs")]
    shares = {name: _words.cost(winner, name) for name in asked}
    known = [f"{_words.COSTS[name]} {share:.3f}" for name, share in shares.items() if share is not None]
    unknown = [_words.COSTS[name] for name, share in shares.items() if share is None]
    found += [f"As shares of {_words.uncut(report)}: {_words.listed(known)}."] if known else []
    found += [f"Not known of it: {_words.listed(unknown)}."] if unknown else []
    return found


def _cuts(report: SearchReport) -> list[str]:
    winner = report.winner
    if not winner.cuts:
        return []
    params = winner.costs.get("params")
    kept = "" if params is None else f", {100 * params:.1f} % of the parameters stay"
    text = f"It cuts the model ({_words.counted(len(winner.cuts), 'cut')}{kept})"
    return {
        "stock": [f"{text} and opens in plain diffusers."],
        "remote_code": [f"{text}.", f"{NOT_PLAIN}."],
        "": [f"{text}; how it opens is not recorded."],
    }[report.opens]


def _meaning(found: str) -> str:
    return {
        "better": "better",
        "worse": "worse",
        "no measurable change": "which cannot be told apart",
    }.get(found, "of which nothing more is known")


def _cost(relative: float) -> str:
    if abs(relative - 1) <= EQUAL:
        return "at equal MACs"
    return f"at {relative:.2f} {'of' if relative < 1 else 'times'} the fixed schedule's MACs"
