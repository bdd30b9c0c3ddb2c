"""What can be picked: of several objectives the front, of one the elites. Their table, and what is said about them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..core.candidate import Cut
from ..core.measurement import Measurement
from . import _words, prune_layers
from .schema import Row, Scored, SearchReport

ANOTHER = (
    "Another one of them is exported by giving the command that made this run again with --pick N --resume, N from the first "
    "column (in a recipe: pick: N in the search stage, and --resume): no candidate is searched or scored again, at most images for "
    "the report are made."
)
Basis = Literal["report", "rescore"]


class Member(NamedTuple):
    """One row of the table."""

    number: int  # as --pick counts
    scored: Scored
    picked: bool
    cells: tuple[str, ...]  # under `head`, without the number
    cuts: tuple[str, ...]  # in words


def several(report: SearchReport) -> bool:
    """Whether more than one objective was searched, so that there is a front and no single best."""
    return len(report.objectives) > 1


def axis(report: SearchReport) -> str:
    """What the first objective is traded against: the first cost that was searched, else the second metric, else MACs."""
    others = report.objectives[1:]
    return next((name for name in others if name in _words.COSTS), next(iter(others), "macs"))


def basis(report: SearchReport) -> Basis:
    """Which seeds the members' values are of: those of the report where all have them, else of the re-scoring. Never mixed."""
    unseen = all(_words.find(one, report.objective) for one in report.front)
    again = any(one.rescored for one in report.front)
    return "report" if unseen or not again else "rescore"


def measured(report: SearchReport, scored: Scored, name: str) -> Measurement | None:
    """A metric of a member on the seeds of `basis`."""
    if basis(report) == "report":
        return _words.find(scored, name)
    return scored.rescored if name == report.objective else None


def at(report: SearchReport, scored: Scored, name: str) -> float | None:
    """A metric or a cost of a member."""
    if name in _words.COSTS:
        return _words.cost(scored, name)
    found = measured(report, scored, name)
    return found.value if found else None


def searched_at(report: SearchReport, one: Row | Scored, name: str) -> float | None:
    """A metric or a cost on the search's own seeds. A fixed schedule's further metrics stand in its row."""
    if name in _words.COSTS:
        return _words.cost(one, name)
    row = one if isinstance(one, Row) else own_row(report, one)
    return row.others.get(name) if row else None


def own_row(report: SearchReport, scored: Scored) -> Row | None:
    """The row of a schedule among the candidates."""
    return next((row for row in report.candidates if (row.plan, row.cuts) == (scored.plan, scored.cuts)), None)


def title(report: SearchReport) -> str:
    return f"The front: {_words.optimised(report)}" if several(report) else "What else could be picked"


def head(report: SearchReport) -> list[str]:
    """Column titles of `members`."""
    costs = [_words.RATIOS[name] for name in ("macs", *_words.priced(report))]
    return ["pick", *(_heading(report, name) for name in _metrics(report)), *costs, "timesteps", _words.left_out_head(report)]


def members(report: SearchReport) -> list[Member]:
    """The front in its order, which is what `--pick` counts."""
    found = []
    for number, one in enumerate(report.front, 1):
        values = [_value(measured(report, one, name)) for name in _metrics(report)]
        costs = [_words.share(one, name) for name in ("macs", *_words.priced(report))]
        cells = (*values, *costs, _words.timesteps(one.plan), _words.left_out(one.plan))
        found.append(Member(number, one, number == report.picked, cells, tuple(map(cut_words, one.cuts))))
    return found


def cut_words(cut: Cut) -> str:
    """
    >>> cut_words(Cut(address="mid_block.attentions.0", what="remove"))
    'mid_block.attentions.0'
    >>> cut_words(Cut(address="up_blocks.1", what="keep_layers", value=(0, 2)))
    'up_blocks.1: keep layers 0, 2 (2 stay)'
    """
    change = prune_layers.change(cut)
    return cut.address if change == "remove" else f"{cut.address}: {change}"


def notes(report: SearchReport) -> list[str]:
    """What has to be known to read the table, and how another member is exported."""
    if not report.front:
        return ["Several objectives were searched, but the report names no front."] if several(report) else []
    found = [_order(report), _where_from(report)]
    if several(report):
        found += _dominated(report)
    return [*found, ANOTHER]


def _metrics(report: SearchReport) -> list[str]:
    names = [name for name in report.objectives or (report.objective,) if name not in _words.COSTS]
    return names if report.objective in names else [report.objective, *names]


def _heading(report: SearchReport, name: str) -> str:
    found = next((m for one in report.front if (m := measured(report, one, name))), None)
    text = _words.heading(found) if found else _words.objective_name(report, name)
    return text if basis(report) == "report" else f"{text}, re-scored"


def _value(found: Measurement | None) -> str:
    """With its interval where there is one: images of the re-scoring have none, which is said once, below."""
    if found is None:
        return _words.NOT_MEASURED
    return _words.quoted(found) if found.interval() else _words.short(found.value)


def _order(report: SearchReport) -> str:
    count = _words.counted(len(report.front), "candidate")
    if several(report):
        return (
            f"{count}, none of them beaten by another in all objectives when it was chosen, the best by {report.objective_label} "
            "first."
        )
    return f"{count}, the best re-scored value first."


def _where_from(report: SearchReport) -> str:
    known = [m for one in report.front if (m := measured(report, one, report.objective))]
    if not known:
        return "None of them was measured again after the search."
    images = f"{known[0].n:,} images"
    ends = "with 95 % intervals" if any(m.interval() for m in known) else "without intervals"
    if basis(report) == "report":
        return f"Values {ends}, on {images} of seeds and a reference that the search never saw."
    return (
        f"Values {ends}, on {images} of the re-scoring's seeds, which the search never saw. One of them was chosen by these values, "
        "so its own is a little optimistic; they do not compare with those of the report's seeds."
    )


def _dominated(report: SearchReport) -> list[str]:
    """Members that another one beats or equals in every objective, now that all are measured again."""
    points = {number: _point(report, one) for number, one in enumerate(report.front, 1)}
    known = {number: point for number, point in points.items() if point is not None}
    beaten = [n for n, point in known.items() if any(_beats(other, point) for m, other in known.items() if m != n)]
    if not beaten:
        return []
    which = _words.listed([str(number) for number in beaten])
    what = f"number {which} is" if len(beaten) == 1 else f"numbers {which} are"
    return [f"By the values here, {what} no longer on the front: another one is as good or better in every objective."]


def _point(report: SearchReport, scored: Scored) -> tuple[float, ...] | None:
    """All objectives, to minimise; None where one is not known."""
    found = []
    for name in report.objectives:
        value = at(report, scored, name)
        if value is None:
            return None
        metric = measured(report, scored, name)
        found.append(-value if metric is not None and metric.direction == "higher" else value)
    return tuple(found)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
