"""From scores of heads, units and channels to cuts: what all methods share that make layers narrower."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Cut
from ..core.errors import UserError
from ..core.widths import COMPILED, Classes, Width, by_class, limited, rounded, variety
from ._task import enough

if TYPE_CHECKING:
    from ._task import Task

Scores = Mapping[Width, Sequence[float]]  # of each of a width's groups
Ladders = Mapping[Width, tuple[int, ...]]  # how many heads, units or channels may stay, all of them first
What = Literal["heads", "units", "channels", "modulation"]
WHAT: tuple[What, ...] = ("heads", "units", "channels")


class Narrowing(BaseModel):
    """Settings of every method that makes layers narrower."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    what: tuple[What, ...] = Field(default=WHAT, min_length=1)  # of attentions, of feed-forwards, of ResNets, of norms
    scope: Literal["local", "global"] = "local"  # the same share of every layer, or the least score per saved unit first
    least: float = Field(default=0.0, ge=0, le=1)  # share of every layer that stays; one head, unit or group in any case
    round_to: int = Field(default=1, ge=1)  # what stays of all but heads is a multiple of this: fast kernels want 8 or 64
    shapes: int | None = Field(default=None, ge=1)  # different widths at most in the blocks of one class; torch.compile makes 8


@dataclass(frozen=True)
class Rung:
    """One step of a layer towards fewer heads, units or channels."""

    width: Width
    stays: int
    saved: float
    key: tuple[float, float, int]  # lowest first


def ladders(method: str, task: "Task", config: Narrowing) -> Ladders:
    """How far each width may go. UserError where that is not far enough, before anything is scored."""
    found = {width: ladder(width, config) for width in task.widths}
    most = task.saves(tuple(_kept(width, range(steps[-1])) for width, steps in found.items() if len(steps) > 1))
    if not enough(most, task.need):
        raise UserError(
            f"{method}: with what={', '.join(config.what)}, least={config.least:g} and round_to={config.round_to} only "
            f"{most / task.need:.0%} of what has to go can go. Allow more of them, or raise keep."
        )
    return found


def ladder(width: Width, config: Narrowing) -> tuple[int, ...]:
    """What may stay of a width: whole groups, and of all but heads multiples of `round_to`.

    >>> ladder(Width("r", "keep_channels", 32, 4), Narrowing(least=0.3))
    (32, 28, 24, 20, 16, 12)
    >>> [ladder(Width("a", what, n, 1), Narrowing(round_to=32)) for what, n in (("keep_heads", 3), ("keep_units", 100))]
    [(3, 2, 1), (100, 96, 64, 32)]
    >>> ladder(Width("r", "keep_channels", 30, 10), Narrowing(round_to=8))
    (30,)
    """
    multiple = 1 if width.what == "keep_heads" else config.round_to
    found = {rounded(stay, multiple, width.count) for stay in range(width.granule, width.count, width.granule)}
    whole = (n for n in found if n % width.granule == 0 and config.least * width.count <= n < width.count)
    return (width.count, *sorted(whole, reverse=True))


def chosen(task: "Task", ladders: Ladders, scores: Scores, config: Narrowing) -> tuple[Cut, ...]:
    """Cuts that save enough: of each width the groups of least score go, as many as `scope` says, no more than are needed."""
    scope, classes = config.scope, {} if config.shapes is None else by_class(task.denoiser)

    def cuts(taken: Sequence[Rung]) -> tuple[Cut, ...]:
        return _cuts(_stays(taken, classes, config.shapes), orders)

    orders = {width: [k for _, k in sorted((_finite(value), k) for k, value in enumerate(s))] for width, s in scores.items()}
    rungs = sorted(_rungs(task, ladders, scores, orders, scope), key=lambda rung: rung.key)
    saved, taken = 0.0, list[Rung]()
    for rung in rungs:
        # What single cuts save adds up (nearly); whether all of them together save enough is counted.
        if enough(saved, task.need) and enough(task.saves(cuts(taken)), task.need):
            break
        taken.append(rung)
        saved += rung.saved
    fewer = _needed(taken, saved, task.need)
    return cuts(fewer if enough(task.saves(cuts(fewer)), task.need) else taken)


def many_shapes(task: "Task", cuts: Sequence[Cut]) -> tuple[str, ...]:
    """A warning for each class of blocks that comes in more widths than torch.compile makes versions of it."""
    left: dict[tuple[str, str], int] = {(c.address, c.what): len(c.value) for c in cuts if isinstance(c.value, tuple)}
    kept = {w: left[w.address, w.what] for w in task.widths if (w.address, w.what) in left}
    return tuple(
        f"the {name}s come in {count} different widths: compiled block by block (compile_repeated_blocks), torch makes {COMPILED} "
        f"versions of a class and runs the rest uncompiled. --set shapes={COMPILED} keeps to that"
        for name, count in variety(by_class(task.denoiser), kept).items()
        if count > COMPILED
    )


def means(scores: Scores) -> dict[str, float]:
    """The mean score of each layer, by its address: for the report."""
    return {width.address: math.fsum(found) / len(found) for width, found in scores.items() if all(map(math.isfinite, found))}


def _rungs(task: "Task", ladders: Ladders, scores: Scores, orders: Mapping[Width, list[int]], scope: str) -> list[Rung]:
    found = []
    for place, (width, steps) in enumerate(ladders.items()):
        groups, order = len(width.groups), orders[width]
        price = task.saves((_kept(width, range(width.granule, width.count)),)) if len(steps) > 1 else 0.0  # of one group
        if price <= 0:
            continue  # what saves nothing is no choice
        worth = 0.0
        for before, stays in itertools.pairwise(steps):
            gone = order[groups - before // width.granule : groups - stays // width.granule]
            # The most important go last; rounding must not turn that round.
            worth = max(worth, sum(_finite(scores[width][k]) for k in gone) / (price * len(gone)))
            share = 1 - stays / width.count if scope == "local" else 0.0
            found.append(Rung(width, stays, price * len(gone), (share, worth, place)))
    return found


def _needed(taken: Sequence[Rung], saved: float, need: float) -> list[Rung]:
    """Rungs without those that are not needed, latest first; of a width only the last can be given back."""
    kept, spent = list[Rung](), saved
    fixed: set[Width] = set()
    for rung in reversed(taken):
        if rung.width not in fixed and enough(spent - rung.saved, need):
            spent -= rung.saved
        else:
            fixed.add(rung.width)
            kept.append(rung)
    return kept[::-1]


def _stays(taken: Sequence[Rung], classes: Classes, shapes: int | None) -> dict[Width, int]:
    stays: dict[Width, int] = {}
    for rung in taken:
        stays[rung.width] = min(rung.stays, stays.get(rung.width, rung.width.count))
    return stays if shapes is None else limited(classes, stays, shapes)


def _cuts(stays: Mapping[Width, int], orders: Mapping[Width, list[int]]) -> tuple[Cut, ...]:
    found = []
    for width, order in orders.items():  # in the order of the network
        if stays.get(width, width.count) < width.count:
            groups = width.groups
            left = sorted(order[len(order) - stays[width] // width.granule :])
            found.append(_kept(width, [i for k in left for i in groups[k]]))
    return tuple(found)


def _kept(width: Width, stay: Sequence[int]) -> Cut:
    return Cut.model_validate({"address": width.address, "what": width.what, "value": tuple(stay)})


def _finite(score: float) -> float:
    """What cannot be told apart is kept as long as anything else can go."""
    return score if math.isfinite(score) else math.inf
