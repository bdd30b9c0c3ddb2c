"""What a prune method is given and what it answers. A method never sees the pipeline: it asks what a cut costs and loses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.candidate import Cut

if TYPE_CHECKING:
    from torch import nn

    from ..core.anatomy import Layer

SLACK = 1e-9  # of the target: (1 - 0.7) * 1000 is a little more than 300


@dataclass(frozen=True)
class Option:
    """Something that can be cut, alone or with others."""

    cuts: tuple[Cut, ...]
    saved: float  # of the cost that the target is set in

    @property
    def name(self) -> str:
        return (
            " + ".join(cut.address if cut.what == "remove" else f"{cut.address} ({cut.what})" for cut in self.cuts) or "nothing"
        )


@dataclass(frozen=True)
class Space:
    """A set of choices that fit together in any combination: for each site at most one of its options."""

    sites: tuple[tuple[Option, ...], ...]
    base: Option = Option((), 0.0)  # cut in any case: the choice that makes this space one of several

    @property
    def most(self) -> float:
        """The most that can be saved."""
        return self.base.saved + sum(max(option.saved for option in site) for site in self.sites)


@dataclass(frozen=True)
class Additivity:
    """Random subsets: the sum of their scores beside what they really lose together."""

    sums: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Pruned:
    """A method's answer."""

    cuts: tuple[Cut, ...]
    scores: dict[str, float] = field(default_factory=dict)  # name of an option -> what the method thinks it loses
    label: str = ""  # what the scores are
    predicted: float | None = None  # the sum of the scores of what is cut
    additivity: Additivity | None = None


@dataclass(frozen=True)
class Task:
    """A denoiser and how much of it must go."""

    denoiser: "nn.Module"  # to be read, not changed
    layers: tuple["Layer", ...]  # that may be cut
    spaces: tuple[Space, ...]  # every one can reach the target
    need: float  # to be saved at least
    losses: Callable[[Sequence[tuple[Cut, ...]]], list[float]]  # E|eps(cut) - eps|^2 of each, on the calibration calls
    say: Callable[[str], None] = lambda text: None


def enough(saved: float, need: float) -> bool:
    """Whether the target is met, but for rounding."""
    return saved >= need * (1 - SLACK)


def until_met(order: Sequence[Option], base: Option, need: float) -> list[Option]:
    """Options in order until enough is saved; then those given back, latest first, that are not needed for it."""
    taken: list[Option] = []
    saved = base.saved
    for option in order:
        if enough(saved, need):
            break
        taken.append(option)
        saved += option.saved
    return needed(taken, base, need)


def needed(taken: Sequence[Option], base: Option, need: float) -> list[Option]:
    """The options without which too little would be saved: the others are given back, latest first."""
    kept, saved = list(taken), base.saved + sum(option.saved for option in taken)
    for option in reversed(taken):
        if enough(saved - option.saved, need):
            kept.remove(option)
            saved -= option.saved
    return kept


def within(spaces: Sequence[Space], need: float) -> list[Space]:
    """Spaces whose base does not go beyond the target by itself, or, if there is none, the one that goes least beyond it."""
    modest = [space for space in spaces if space.base.saved <= need * (1 + SLACK)]
    return modest or [min(spaces, key=lambda space: space.base.saved)]


def gathered(base: Option, taken: Sequence[Option]) -> tuple[Cut, ...]:
    """All cuts of a choice, those inside a removed layer left out."""
    from ..core.surgery import outermost

    return tuple(outermost(list(dict.fromkeys(cut for option in (base, *taken) for cut in option.cuts))))
