"""What a prune method is given and what it answers. A method never sees the pipeline: it asks what a cut costs and loses."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.candidate import Cut
from ..core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ..core.anatomy import Layer
    from ..core.widths import Width
    from ._learning import Lesson

    # (stride, counts) -> a context, inside which the gradients of the training loss L_t of `denoiser`, summed over noise levels
    # t, are in the `.grad` of its parameters, zero for what no loss reaches; the context gives L_t by t. Every stride-th level
    # is visited, from the lowest noise up. counts: told the losses so far, says whether the last of them is added; at the first
    # that is not, the visits end.
    Gradients = Callable[[int, Callable[[Sequence[float]], bool]], AbstractContextManager[Mapping[float, float]]]

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
    warnings: tuple[str, ...] = ()


def _no_gradients(stride: int, counts: Callable[[Sequence[float]], bool]) -> AbstractContextManager[Mapping[float, float]]:
    raise UserError('the method asks for gradients, but does not say `calibrated = "gradients"`.')


def _no_widths(cuts: tuple[Cut, ...]) -> float:
    raise UserError("the method asks what widths save, but does not say `narrows = True`.")


def _no_calls() -> None:
    raise UserError("the method asks for recorded calls, but does not say `calibrated = True`.")


def _no_lesson() -> "Lesson":
    raise UserError('the method asks for something to learn from, but does not say `calibrated = "learned"`.')


@dataclass(frozen=True)
class Task:
    """A denoiser and how much of it must go."""

    denoiser: "nn.Module"  # to be read, not changed
    layers: tuple["Layer", ...]  # that may be cut
    spaces: tuple[Space, ...]  # every one can reach the target
    need: float  # to be saved at least
    # What each choice of cuts loses: E|eps(cut) - eps|^2 on recorded calls; of a method that says `calibrated = "latents"`, its
    # own `measure` of the final latents of whole trajectories.
    losses: Callable[[Sequence[tuple[Cut, ...]]], list[float]]
    say: Callable[[str], None] = lambda text: None
    # Of a method that says `narrows = True`: what may get narrower, in the order of the network, and what such cuts save.
    widths: tuple["Width", ...] = ()
    saves: Callable[[tuple[Cut, ...]], float] = _no_widths
    gradients: "Gradients" = _no_gradients  # of a method that says `calibrated = "gradients"`
    run: Callable[[], None] = _no_calls  # runs the denoiser on all recorded calls, of a method that says `calibrated = True`
    lesson: "Callable[[], Lesson]" = _no_lesson  # of a method that says `calibrated = "learned"`; made when it is asked for


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


def usable(method: str, spaces: Sequence[Space], scores: Mapping[tuple[Cut, ...], float], need: float) -> tuple[Space, ...]:
    """Spaces without what breaks the output: those options whose score is not finite.

    Raises UserError where the others cannot reach the target.
    """
    found = []
    for space in spaces:
        sites = (tuple(option for option in site if math.isfinite(scores[option.cuts])) for site in space.sites)
        if math.isfinite(scores[space.base.cuts]):
            found.append(Space(tuple(site for site in sites if site), space.base))
    reach = tuple(space for space in found if enough(space.most, need))
    if not reach:
        raise UserError(
            f"{method}: too many cuts make the output infinite or NaN to choose enough of the others. Is the model broken?"
        )
    return reach


def rest(space: Space, taken: Sequence[Option]) -> Space:
    """The space after a choice: what is taken belongs to the base."""
    base = Option(gathered(space.base, taken), space.base.saved + sum(option.saved for option in taken))
    return Space(tuple(site for site in space.sites if not any(option in taken for option in site)), base)


def gathered(base: Option, taken: Sequence[Option]) -> tuple[Cut, ...]:
    """All cuts of a choice, those inside a removed layer left out."""
    from ..core.surgery import outermost

    return tuple(outermost(list(dict.fromkeys(cut for option in (base, *taken) for cut in option.cuts))))
