"""Bayesian optimisation: a model of all scores so far says which candidate to score next. One objective or several.

The samplers are Optuna's (Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019,
https://arxiv.org/abs/1907.10902):
- tpe: Watanabe, "Tree-Structured Parzen Estimator: Understanding Its Algorithm Components and Their Roles for Better Empirical
  Performance", https://arxiv.org/abs/2304.11127; multivariate, with the constant liar for candidates that are still being scored.
- gp: a Gaussian process with log expected improvement, of the hypervolume where there are several objectives (Ament et al.,
  "Unexpected Improvements to Expected Improvement for Bayesian Optimization", https://arxiv.org/abs/2310.20708).

What is done around them, and why:
- The sampler sees a point of a box (`_vector`), for it knows nothing of sets.
- Costs are known before anything is scored: a point over budget is repaired, and the sampler is told the repaired one. Fixed
  schedules that break a budget are told as infeasible.
- Its study is in memory and fed by what this method proposed and was answered, so that a resumed search proposes the same again.
- The first candidates are fixed schedules with a few parameters drawn anew, not random points: half of the layers would be off
  in those.
- A proposal that was there before is drawn again, then moved until it is new.
"""

import logging
import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Request
from ..core.measurement import Trial
from ._operators import tightened
from ._space import Genome
from ._task import Fresh, Task
from ._vector import Layout, Point

several = True
varies = frozenset({"timesteps", "skips", "reuse", "models", "cuts"})

GP_PARAMETERS, GP_TRIALS = 4, 150  # up to which `auto` takes the Gaussian process, for one objective (why: docs/methods.md)
DRAWS, MOVES = 5, 200  # of a proposal that is not new


class Config(BaseModel):
    """Bayesian optimisation with Optuna's samplers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2304.11127"

    sampler: Literal["auto", "tpe", "gp"] = "auto"  # auto: gp, slow but thrifty, for 4 parameters at most; else tpe
    startup: int = Field(default=10, ge=1)  # candidates before the sampler is asked
    batch: int = Field(default=4, ge=1)  # candidates proposed before answers; more keeps more workers busy, and learns later


def search(task: Task, config: Config, rng: random.Random) -> Generator[list[Request], list[Trial], None]:
    """Yield small batches, and tell the sampler what they scored."""
    fresh, left = Fresh(), task.trials
    layout = Layout.of(task.space)
    model = _Model(task, layout, config, rng)
    uniform = []
    for genome, values in task.scored(task.known):
        fresh.take(genome)
        model.add(genome, values)
        uniform.append(layout.encode(genome))
    batch = task.opening(fresh)
    while left > 0:
        numbers = [model.add(started) for request in batch if (started := task.space.genome(request.candidate))]
        while len(batch) < min(config.batch, left):
            startup = task.trials - left + len(batch) < config.startup or not model.scored
            points = _first(task, layout, uniform, rng) if startup else _asked(model, layout, rng)
            new = ((origin, layout.decode(point)) for origin, point in points)
            found = next(((o, genome) for o, genome in new if task.space.fits(genome) and fresh.take(genome)), None)
            if found is None:
                break  # the space is exhausted
            numbers.append(model.add(found[1]))
            batch.append(task.request(found[1], found[0]))
        if not batch:
            return
        left -= len(batch)
        for number, trial in zip(numbers, (yield batch), strict=True):
            model.tell(number, task.values(trial))
        batch = []


def _first(task: Task, layout: Layout, uniform: list[Point], rng: random.Random) -> Iterator[tuple[str, Point]]:
    """Fixed schedules with a few parameters drawn anew, or random timesteps; where costs are objectives, of various costs."""
    for _ in range(MOVES):
        point = layout.moved(rng.choice(uniform), rng) if uniform else layout.uniform(rng)
        yield "mutant of uniform" if uniform else "random", replace(layout, space=tightened(task, rng)).filled(point, rng)


def _asked(model: "_Model", layout: Layout, rng: random.Random) -> Iterator[tuple[str, Point]]:
    """What the sampler asks for; then, for as long as nothing of it is new, points further and further away."""
    for _ in range(DRAWS):
        point = layout.filled(model.ask(), rng)
        yield model.name, point
    for _ in range(MOVES):
        point = layout.filled(layout.moved(point, rng), rng)
        yield "mutation", point


class _Model:
    """A sampler and the study that it learns from: in memory, and fed by this method alone."""

    def __init__(self, task: Task, layout: Layout, config: Config, rng: random.Random) -> None:
        import optuna  # here, because `lissom search bayes --help` reads this file too

        logging.getLogger("optuna").setLevel(logging.ERROR)
        self.layout = layout
        few = len(layout.gaps) + len(layout.choices) <= GP_PARAMETERS and task.trials <= GP_TRIALS
        thrifty = few and len(task.objectives) == 1
        self.name = config.sampler if config.sampler != "auto" else "gp" if thrifty else "tpe"
        seed = rng.getrandbits(32)
        sampler: optuna.samplers.BaseSampler
        if self.name == "gp":
            sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)
        else:
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
        self.study = optuna.create_study(directions=["minimize"] * len(task.objectives), sampler=sampler)
        self.parameters: dict[str, optuna.distributions.BaseDistribution] = {
            **{name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in layout.gaps},
            **{name: optuna.distributions.CategoricalDistribution(range(n)) for name, n in layout.choices.items()},
        }
        self.scored = 0
        self._next = 0  # number of the study's next trial

    def ask(self) -> Point:
        """The point to score next. It is not what will be told: that is repaired first."""
        import optuna

        trial = self.study.ask(self.parameters)
        self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        self._next = trial.number + 1
        return dict(trial.params)

    def add(self, genome: Genome, values: Sequence[float] | None = None) -> int:
        """Put in a candidate, scored or being scored; its number."""
        import optuna

        space, state = self.layout.space, optuna.trial.TrialState
        over = {name: space.share(genome, name) - most for name, most in space.budget.items()}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state.RUNNING if values is None else state.COMPLETE,
                values=None if values is None else [float(value) for value in values],
                params=dict(self.layout.encode(genome)),
                distributions=self.parameters,
                constraints=over or None,  # at most zero where the budget holds
            )
        )
        self.scored += values is not None
        self._next += 1
        return self._next - 1

    def tell(self, number: int, values: Sequence[float]) -> None:
        import optuna

        if all(map(math.isfinite, values)):
            self.study.tell(number, [float(value) for value in values])
            self.scored += 1
        else:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
