"""What a run along a plan counts and remembers, and the error for what cannot be driven."""

import copy
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..candidate import SamplingPlan, Step
from ..errors import UserError


class CannotFollow(UserError):
    """The plan cannot be followed with this pipeline or scheduler, or the pipeline left it. Says what to do instead."""


class Ended(Exception):
    """Stops a pipeline after the last planned step (`Run.ends`), before it decodes or converts what it has."""


@dataclass
class Run:
    """The state of a pipeline on its way along a plan. It lives on the scheduler, so that a copied scheduler has its own.

    Pipelines that copy their scheduler (one for pictures, one for sound) step both: the copy must not advance the original.
    """

    plan: SamplingPlan | None = None  # None: the pipeline's own schedule, only watched
    models: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)  # that steps name: denoisers by component
    generators: list[torch.Generator] | None = None  # one per image, for pipelines that hand none to `scheduler.step`
    calls: int = 0  # denoiser forwards executed, over all calls of the pipeline
    served: int = 0  # denoiser forwards answered from the memo
    evals: int = 0  # calls of `scheduler.step` since the pipeline last set the timesteps
    ordinal: int = 0  # denoiser calls since the last `scheduler.step`
    last: Tensor | None = None  # sample after the last step, in the shape that the pipeline gave: (B, C, H, W) or packed
    started: int = 0  # how often the pipeline set the timesteps
    times: list[float] = field(default_factory=list)  # timestep of each eval
    where: list[int] = field(default_factory=list)  # index of the planned step of each eval
    short: int | None = None  # planned steps done by an earlier call that ended too soon
    ends: bool = False  # raise Ended after the last planned step
    # What layers did that later steps reuse, since the timesteps were set: by (denoiser, ordinal) and address.
    features: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    _prefixes: list[str] = field(default_factory=list)
    _kept: list[tuple[str, ...]] = field(default_factory=list)

    def begin(self, times: list[float]) -> None:
        """The timesteps are set (again): `times` holds one entry per eval, equal neighbours where one timestep is shown twice."""
        if 0 < self.evals < len(self.times):
            self.short = self.steps
        shown = [i for i, (_, same) in enumerate(itertools.groupby(times)) for _ in same]
        self.times, self.where = times, intervals(shown)
        self.evals = self.ordinal = 0
        self.last = None
        self.features = {}
        self.started += 1

    def stepped(self, sample: Tensor) -> None:
        self.last = sample
        self.evals += 1
        self.ordinal = 0
        if self.ends and self.evals == len(self.times):
            raise Ended

    def still(self) -> Self:
        """A copy that stays where the run is now, for what computes the same call again later.

        Without the sample, which would be kept for as long. (Whatever keeps the run itself keeps the last sample, with a graph
        that holds whatever will compute the call again: it would never be freed.)
        """
        return replace(self, last=None, features={})

    @property
    def index(self) -> int:
        """Index of the planned step that the denoiser is called for."""
        return self.where[self.evals]

    @property
    def step(self) -> Step:
        assert self.plan is not None
        return self.plan.steps[self.index]

    @property
    def steps(self) -> int:
        """Planned steps completed since the pipeline last set the timesteps."""
        if self.evals < len(self.where):
            return self.where[self.evals]
        return self.where[-1] + 1 if self.where else self.evals

    def prefix(self) -> str:
        """Digest of the planned steps up to and including the current one."""
        if not self._prefixes:
            assert self.plan is not None
            digest = hashlib.sha256()
            for step in self.plan.steps:
                digest.update(step.canonical().encode())
                self._prefixes.append(digest.copy().hexdigest())
        return self._prefixes[self.index]

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers executed in the current step that a later one reuses, before they are executed again."""
        if not self._kept:
            assert self.plan is not None
            self._kept = kept(self.plan.steps)
        return self._kept[self.index]

    def verify(self) -> None:
        """Raise CannotFollow if the pipeline was run and left planned steps out."""
        if self.plan is None or not (self.started or self.calls or self.served):
            return
        done = self.steps if self.short is None else self.short
        if self.short is not None or self.evals != len(self.times):
            total = len(self.plan.steps)
            raise CannotFollow(
                f"the pipeline ran {done} of {total} planned steps (denoising_end, an interrupt, or a loop that does not "
                "follow its scheduler?). Remove the argument that shortens the loop; the plan sets the steps."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = copy.copy(self)  # own counters; the plan, the last sample and the generators are shared
        copied.ends = False  # it is the original's last step that ends the pipeline
        return copied


def kept(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """Of every step, the layers that it executes and that a later one reuses before any other executes them.

    >>> kept([Step(timestep=9), Step(timestep=5, skip=("a",)), Step(timestep=2, reuse=("a", "b"))])
    [('a',), ('b',), ()]
    """
    found: list[tuple[str, ...]] = []
    wanted: set[str] = set()
    for step in reversed(steps):
        here = {a for a in wanted if step.executes(a)}
        found.append(tuple(sorted(here)))
        wanted = wanted - here | set(step.reuse)
    return found[::-1]


def intervals(shown: Sequence[int]) -> list[int]:
    """Index of the planned step that each eval belongs to, from the index of the planned timestep it is made at.

    A step leads from one planned timestep to the next. The first of two evals at one timestep ends the step before: it is the
    corrector of Heun's method, or PLMS taking its first step again with the slope at its end.

    >>> intervals([0, 1, 1, 2, 2]), intervals([0, 1, 1, 2, 3])
    ([0, 0, 1, 1, 2], [0, 0, 1, 2, 3])
    """
    return [now - (now == after) for now, after in itertools.zip_longest(shown, shown[1:])]
