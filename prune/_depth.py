"""Depth blocks in local groups, of which so many stay: N of M that follow one another (TinyFusion, arXiv 2412.01199).

A depth block takes and gives the same, so that any of them may go. Those of one list of a transformer are a sequence (FLUX has
two); the transformer blocks of a U-Net are one sequence in the order in which they run.
"""

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..core.candidate import Cut
from ..core.errors import UserError

if TYPE_CHECKING:
    from ._task import Task

KINDS = ("transformer_block", "block")  # `units` of methods that remove depth blocks
MOST = 5000  # ways to keep N of M: what is learned for each, or counted, has to end


def _pattern(value: object) -> str:
    """YAML 1.1 reads 1:2 as one hour and two minutes, 62: that is undone.

    >>> _pattern(62), _pattern("1:2"), _pattern(434)
    ('1:2', '1:2', '7:14')
    """
    is_time = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    text = f"{value // 60}:{value % 60}" if is_time else value  # type: ignore[operator]
    found = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
    if not found or not int(found[1]) <= int(found[2]) or int(found[2]) < 1:
        raise ValueError(f"{text!r}: write N:M, N blocks of M that stay, N at most M, e.g. 1:2")
    return found[0]


def _patterns(value: object) -> object:
    if value is None:
        return None
    return [_pattern(one) for one in value] if isinstance(value, list | tuple) else _pattern(value)


Patterns = Annotated[str | list[str] | None, BeforeValidator(_patterns)]


class Structured(BaseModel):
    """What all methods that keep N of M blocks can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    structure: Patterns = None  # N:M of every group, or one for each; by default what `keep` asks for
    group: int = Field(default=2, ge=1)  # M where no structure is given: blocks in a group


@dataclass(frozen=True)
class Group:
    """Blocks that follow one another, and how many of them stay."""

    blocks: tuple[str, ...]  # addresses
    stay: int

    @property
    def ways(self) -> list[tuple[int, ...]]:
        """Every choice of what stays, by place in the group, in lexicographic order.

        >>> Group(("a", "b", "c"), 2).ways
        [(0, 1), (0, 2), (1, 2)]
        """
        return list(itertools.combinations(range(len(self.blocks)), self.stay))

    def without(self, stay: Iterable[int]) -> tuple[str, ...]:
        """Addresses of those that do not stay."""
        kept = set(stay)
        return tuple(block for i, block in enumerate(self.blocks) if i not in kept)


def groups(task: "Task", config: Structured, name: str) -> list[Group]:
    """The groups of a structure, or of the target. UserError where the structure does not divide the blocks."""
    runs = sequences([layer.address for layer in task.layers])
    if not runs:
        raise UserError(
            f"{name}: {type(task.denoiser).__name__} has no transformer blocks that follow one another. laptop cuts its layers."
        )
    found = _given(runs, config.structure, name) if config.structure is not None else _targeted(task, runs, config.group, name)
    if config.structure is not None and sum(g.stay for g in found) in (0, sum(len(g.blocks) for g in found)):
        said = config.structure if isinstance(config.structure, str) else ", ".join(config.structure)
        what = "every block, so that there is nothing to choose" if found[0].stay else "no block"
        raise UserError(f"{name}: structure {said}: keeps {what}. Let some go and some stay, e.g. 1:2.")
    for group in found:
        if (ways := math.comb(len(group.blocks), group.stay)) > MOST:
            raise UserError(
                f"{name}: there are {ways:,} ways to keep {group.stay} of {len(group.blocks)} blocks, more than {MOST:,}. Take smaller "
                "groups: 1:2 and 2:4 are what the paper found to converge."
            )
    return found


def sequences(addresses: Sequence[str]) -> list[list[str]]:
    """Blocks by the list that they are in; those of a U-Net in one sequence, in the order in which they run.

    >>> sequences(["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"])
    [['transformer_blocks.0', 'transformer_blocks.1'], ['single_transformer_blocks.0']]
    >>> sequences(["up_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"])
    [['mid_block.attentions.0.transformer_blocks.0', 'up_blocks.0.attentions.0.transformer_blocks.0']]
    """
    ways = ("down_blocks", "mid_block", "up_blocks")
    if addresses and all(a.partition(".")[0] in ways for a in addresses):
        return [sorted(addresses, key=lambda a: ways.index(a.partition(".")[0]))]  # stable: within, as they are listed
    lists: dict[str, list[str]] = {}
    for address in addresses:
        lists.setdefault(address.rpartition(".")[0], []).append(address)
    return list(lists.values())


def _given(runs: list[list[str]], structure: str | list[str], name: str) -> list[Group]:
    total = sum(map(len, runs))
    patterns = [structure] if isinstance(structure, str) else list(structure)
    pairs = [tuple(map(int, pattern.split(":"))) for pattern in patterns]
    found, at = [], 0
    for run in runs:
        start = 0
        while start < len(run):
            if isinstance(structure, str):
                at = 0
            if at == len(pairs) or start + pairs[at][1] > len(run):
                said = ", ".join(patterns)
                lengths = " + ".join(str(len(r)) for r in runs)
                raise UserError(
                    f"{name}: structure {said}: does not divide the {total} blocks ({lengths}). Let the groups add up."
                )
            found.append(Group(tuple(run[start : start + pairs[at][1]]), pairs[at][0]))
            start += pairs[at][1]
            at += 1
    if not isinstance(structure, str) and at < len(pairs):
        raise UserError(
            f"{name}: structure {', '.join(patterns)}: speaks of more than the {total} blocks. Let the groups add up."
        )
    return found


def _targeted(task: "Task", runs: list[list[str]], size: int, name: str) -> list[Group]:
    """As few blocks less as the target needs whichever they are, spread evenly over groups of `size`."""
    saved = savings(task)
    blocks = [block for run in runs for block in run]
    cheapest = sorted(saved.get(block, 0.0) for block in blocks)
    sums = list(itertools.accumulate(cheapest))
    fewer = next((n for n, total in enumerate(sums, 1) if total >= task.need * (1 - 1e-9)), None) if task.need > 0 else 0
    if fewer is None or fewer >= len(blocks):
        raise UserError(f"{name}: the target takes all {len(blocks)} blocks. Raise keep.")
    found, before = [], 0
    for run in runs:
        for start in range(0, len(run), size):
            part = tuple(run[start : start + size])
            gone = _share(before + len(part), fewer, len(blocks)) - _share(before, fewer, len(blocks))
            found.append(Group(part, len(part) - gone))
            before += len(part)
    return found


def _share(done: int, fewer: int, total: int) -> int:
    """How many of the first blocks go, so that they go evenly."""
    return (2 * done * fewer + total) // (2 * total)


def savings(task: "Task") -> dict[str, float]:
    """What removing each block alone saves of the target's cost."""
    return {
        option.cuts[0].address: option.saved
        for space in task.spaces
        for site in space.sites
        for option in site
        if len(option.cuts) == 1 and option.cuts[0].what == "remove"
    }


def cuts(gone: Iterable[str]) -> tuple[Cut, ...]:
    return tuple(Cut(address=address, what="remove") for address in gone)


def drawn(found: Sequence[Group], rng: random.Random) -> tuple[str, ...]:
    """Blocks that go, of a structure drawn uniformly."""
    return tuple(block for group in found for block in group.without(rng.sample(range(len(group.blocks)), group.stay)))


def distinct(found: Sequence[Group], count: int, rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Different structures, `count` of them or all there are."""
    there = math.prod(math.comb(len(group.blocks), group.stay) for group in found)
    if there <= count:
        for ways in itertools.product(*(group.ways for group in found)):
            yield tuple(block for group, stay in zip(found, ways, strict=True) for block in group.without(stay))
        return
    seen: set[tuple[str, ...]] = set()
    while len(seen) < count:
        gone = drawn(found, rng)
        if gone not in seen:
            seen.add(gone)
            yield gone
