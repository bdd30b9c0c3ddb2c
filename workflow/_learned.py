"""Searches that start from learned scores: gates of heads and units (`masks`), chances of depth blocks to stay (`tinyfusion`).

`--space masks` makes of every width that was learned a site with a ladder of narrower ones, the least open groups go first;
`--space depth` makes one of every block. What the scores would choose by themselves opens the search.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import artifact
from ..core.candidate import Cut, SamplingPlan
from ..core.errors import UserError, one_line
from ..core.stages import SearchStage
from ..core.widths import Width
from ._gauge import Gauge
from ._kept import kept
from ._lesson import GATES
from .context import Context

if TYPE_CHECKING:
    from ..search._space import Choice, Genome, Space

    Sites = tuple[tuple[Choice, ...], ...]
    Opening = list[tuple[str, Genome]]

RUNGS = 8  # a width may lose so many eighths


@dataclass(frozen=True)
class Rung:
    """One option of a site: the cut of a block, or one more step down the ladder of a width."""

    name: str
    cut: Cut
    lost: str  # what cannot be removed then, nor narrowed another time
    score: float  # of what this rung takes beyond the one before; the lowest go first


@dataclass(frozen=True)
class Learned:
    """What was learned, as sites of a space: each a ladder of rungs."""

    masks: tuple[tuple[Rung, ...], ...] = ()
    depth: tuple[tuple[Rung, ...], ...] = ()

    @property
    def ladders(self) -> tuple[tuple[Rung, ...], ...]:
        """Blocks first: of two choices that exclude each other a search keeps the earlier one, and the whole is more than a part."""
        return self.depth + self.masks

    def sites(self) -> "Sites":
        from ..search._space import Choice

        return tuple(
            tuple(Choice(rung.name, (rung.cut,), frozenset({rung.lost})) for rung in ladder) for ladder in self.ladders
        )


def learned(stage: SearchStage, gauge: Gauge, context: Context, folder: Path | None) -> Learned:
    """What the runs that the stage names have learned of this denoiser. UserError where they have not, or of another.

    Kept in `folder`: a search that goes on has the space that it had, whatever has become of the runs.
    """

    def make() -> Any:
        facts = [_facts(name, context) for name in stage.learned]
        _fitting(stage, gauge, facts)  # what does not fit is not kept
        return facts

    return _fitting(stage, gauge, make() if folder is None else kept(folder / "learned-scores.json", stage.learned, make))


def _fitting(stage: SearchStage, gauge: Gauge, facts: list[Any]) -> Learned:
    """UserError where they are not of this denoiser."""
    wanted = stage.learning
    widths: dict[str, tuple[Width, list[float]]] = {}
    blocks: dict[str, float] = {}
    for run, found in zip(stage.learned, facts, strict=True):
        if found["widths"] and "masks" in wanted:
            widths |= {f"{w.address} {w.what}": (w, scores) for w, scores in _widths(run, found["widths"], gauge)}
        if found["stays"] and "depth" in wanted:
            blocks |= _blocks(run, found["stays"], gauge)
    said = ", ".join(stage.learned)
    if "masks" in wanted and not widths:
        raise UserError(
            f"space: masks: nothing that {said} holds are gates of heads and units. Name a run of masks (--learned RUN)."
        )
    if "depth" in wanted and not blocks:
        raise UserError(
            f"space: depth: nothing that {said} holds are chances of blocks to stay. Name a run of tinyfusion (--learned RUN)."
        )
    return Learned(
        tuple(_ladder(w, scores) for w, scores in widths.values()),
        tuple((Rung(a, Cut(address=a, what="remove"), a, chance),) for a, chance in blocks.items()),
    )


def _facts(run: str, context: Context) -> dict[str, Any]:
    """[[address, what, count, granule, scores], …] of the widths, and {address: chance} of the blocks that a run learned."""
    from safetensors import SafetensorError, safe_open

    place = Path(context.file(run))
    place = artifact.finished(place) / GATES if place.is_dir() else place
    try:
        with safe_open(place, framework="pt") as file:
            said = file.metadata() or {}
            widths = [[*w, file.get_tensor(f"{w[0]} {w[1]}").tolist()] for w in json.loads(said.get("widths", "[]"))]
            return {"widths": widths, "stays": json.loads(said.get("stays", "{}"))}
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(
            f"learned: {place}: cannot be read ({one_line(e)}). Name the folder of a run that learned gates: masks or tinyfusion."
        ) from e


def _widths(run: str, found: list[Any], gauge: Gauge) -> list[tuple[Width, list[float]]]:
    from ..core.widths import width

    widths = []
    for address, what, count, granule, scores in found:
        try:
            there: object = width(gauge.denoiser, address, what)
        except (ValueError, AttributeError):
            there = None
        if there != (count, granule):
            here = there[0] if isinstance(there, tuple) else "none that can be cut"
            raise UserError(
                f"learned: {run}: learned of another model: {count} {what.removeprefix('keep_')} of {address}, and here there are {here}. "
                "Name a run on the model that is searched."
            )
        if len(Width(address, what, count, granule).groups) > 1:
            widths.append((Width(address, what, count, granule), scores))
    return widths


def _blocks(run: str, stays: dict[str, float], gauge: Gauge) -> dict[str, float]:
    here = {layer.address for layer in gauge.known}
    if foreign := next((a for a in stays if a not in here), None):
        raise UserError(
            f"learned: {run}: learned of another model: there is no {foreign} here. Name a run on the model that is searched."
        )
    return stays


def _ladder(width: Width, scores: list[float]) -> tuple[Rung, ...]:
    """Ever fewer groups, the most open ones stay; one at least.

    >>> [r.cut.value for r in _ladder(Width("a", "keep_heads", 3, 1), [2.0, -1.0, 0.5])]
    [(0, 2), (0,)]
    """
    total, order = len(scores), sorted(range(len(scores)), key=lambda k: (scores[k], k))
    found, before = [], 0
    for gone in sorted({round(total * n / RUNGS) for n in range(1, RUNGS)} | ({*range(1, total)} if total <= RUNGS else set())):
        if not 0 < gone < total:
            continue
        stay = tuple(i for k in sorted(order[gone:]) for i in width.groups[k])
        counted = f"{len(stay)} of {width.count} {width.what.removeprefix('keep_')}"
        cut = Cut.model_validate({"address": width.address, "what": width.what, "value": stay})
        part = order[before:gone]
        found.append(
            Rung(f"{width.address}: {counted}", cut, f"{width.address}.{width.what}", sum(scores[k] for k in part) / len(part))
        )
        before = gone
    return tuple(found)


def shares(goal: float | None) -> tuple[float, ...]:
    """Shares of the MACs that openings leave: the budget's and half-way there, or several where there is none."""
    return (0.9, 0.8, 0.7, 0.6) if goal is None else ((1 + goal) / 2, goal)


def opening(found: Learned, space: "Space", best: SamplingPlan, seed: int) -> "Opening":
    """The best fixed schedule on the model as the scores would cut it: by masks, by depth, half by each; to the
    `shares` of the MACs. Sizes that cannot be reached are passed over."""
    from ..search._space import Genome

    goal = space.budget.get("macs")
    opened: Opening = []
    for keep in shares(goal):
        ways = {"masks": [(found.masks, keep)], "depth": [(found.depth, keep)]}
        if found.masks and found.depth:
            ways["masks and depth"] = [(found.depth, (1 + keep) / 2), (found.masks, keep)]
        for name, parts in ways.items():
            genome: Genome | None = Genome(best.steps, (0,) * len(space.sites))
            for ladders, share in parts:
                genome = genome and _taken(space, genome, found, ladders, share)
            if genome and goal in (None, keep):
                genome = space.fill(genome, random.Random(seed))  # budgets of time and parameters hold too
            if genome:
                opened.append((f"learned {name}, {keep:.0%} of the MACs", genome))
    return opened


def _taken(
    space: "Space", genome: "Genome", found: Learned, ladders: tuple[tuple[Rung, ...], ...], share: float
) -> "Genome | None":
    """The genome with one rung after the other, the least score first, until this share of the MACs is left; None if it never is."""
    place = {rung.name: (site, pick) for site, ladder in enumerate(found.ladders) for pick, rung in enumerate(ladder, 1)}
    offset = len(space.sites) - len(found.ladders)  # sites of other kinds come first
    rungs = sorted((rung.score, *place[rung.name]) for ladder in ladders for rung in ladder)
    for _, site, pick in rungs:
        if space.share(genome) <= share + 1e-9:
            return genome
        if pick > genome.shape[offset + site]:  # a mean may tie with the rung before
            genome = space.recut(genome, offset + site, pick)
    return genome if space.share(genome) <= share + 1e-9 else None
