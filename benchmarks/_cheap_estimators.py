"""Estimators of a candidate's quality, all from the same images, and the denoiser calls that each takes.

Shapes: C candidates, N images of D features each, R ways to draw what an estimator leaves to chance.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..core.candidate import Candidate, Request, Seeds
from ..core.measurement import Measurement, Trial, half_samples
from ..core.stages import SearchStage
from ..evaluate import _frechet, _kernels, kid
from ..evaluate._statistics import Statistics
from ..workflow._ladder import Ladder
from ..workflow._screen import METRIC, SCREENED, error
from ._cheap_candidates import FD, STEPS, Images

CHUNK = 64  # images of a denoiser call, as costs are told
DRAWS = 20  # R, where chance has a part
GENERATION = 20  # candidates of a batch, as the evolutionary methods propose them
KEPT = 2000  # reference images that the kernel distance is taken from


@dataclass(frozen=True)
class Estimator:
    name: str
    values: np.ndarray  # (R, C), lower is better; infinite where it does not say
    calls: float  # denoiser calls of CHUNK images for one candidate, its share of teacher and reference included


@dataclass
class Trials:
    """All that was generated on the search's seeds."""

    candidates: list[Candidate]
    images: list[Images]
    usual: Images  # of the best fixed schedule
    fixed: Candidate
    teacher: Images
    teacher_steps: int
    reference: Statistics  # of the training images
    period: int  # after how many images the conditions repeat

    @property
    def count(self) -> int:
        """N"""
        return len(self.usual.features)

    def fd(self, features: Tensor) -> float:
        return _frechet.distance(features, self.reference.mean, self.reference.root).item()

    def full(self, n: int) -> np.ndarray:
        """(1, C): the distances of everybody's first n images."""
        return np.array([[self.fd(one.features[:n]) for one in self.images]])

    def calls(self, images: float, steps: int = STEPS) -> float:
        return images / CHUNK * steps

    def shared(self, images: float, steps: int = STEPS) -> float:
        """The share of one candidate in images that are made once for all."""
        return self.calls(images, steps) / len(self.candidates)

    def estimators(self) -> list[Estimator]:
        return [
            *(Estimator(f"FD, {n} images", self.full(n), self.calls(n)) for n in self._sizes(64, 128, 256, 512, self.count)),
            *(self._own_seeds(n) for n in self._sizes(256)),
            *(self._teacher_error(n) for n in (SCREENED, 64)),
            *(self._relative(n) for n in self._sizes(256)),
            *(self._kernel(n) for n in self._sizes(256)),
            *(self._control(n) for n in self._sizes(64, 256)),
            self._halving(),
            *(self._screening(n) for n in self._sizes(256)),
        ]

    def _sizes(self, *wanted: int) -> list[int]:
        return sorted({n for n in wanted if n <= self.count})

    def _own_seeds(self, n: int) -> Estimator:
        """Every candidate on seeds of its own, as far as there are enough: two candidates share n / N of them by chance."""
        rng, values = np.random.default_rng(0), []
        for _ in range(DRAWS):
            values.append([self.fd(one.features[self._some(n, rng)]) for one in self.images])
        return Estimator(f"FD, {n} images, own seeds", np.array(values), self.calls(n))

    def _some(self, n: int, rng: np.random.Generator) -> Tensor:
        """n of the N images, as many of each condition as there are in the first n."""
        order = [rng.permutation(np.arange(start, self.count, self.period)) for start in range(self.period)]
        return torch.tensor([order[i % self.period][i // self.period] for i in range(n)])

    def _teacher_error(self, n: int) -> Estimator:
        values = self._errors(n)[None]
        return Estimator(f"teacher error, {n} images", values, self.calls(n) + self.shared(n, self.teacher_steps))

    def _errors(self, n: int) -> np.ndarray:
        teacher = self.teacher.latents[:n].double()
        return np.array([error(one.latents[:n].double(), teacher) for one in self.images])

    def _relative(self, n: int) -> Estimator:
        x = self.teacher.features.double()
        mean, root = x.mean(0), _frechet.root(x.T.cov())
        values = np.array([[_frechet.distance(one.features[:n], mean, root).item() for one in self.images]])
        calls = self.calls(n) + self.shared(self.count, self.teacher_steps)
        return Estimator(f"FD to the teacher's images, {n} images", values, calls)

    def _kernel(self, n: int) -> Estimator:
        y = self.reference.kept[:KEPT]
        values = [[_kernels.mmd(one.features[:n], y, kid.cubic, (), self.period).item() for one in self.images]]
        return Estimator(f"KD, {n} images", np.array(values), self.calls(n))

    def _control(self, n: int) -> Estimator:
        stage = SearchStage(search="random_search", samples=n, control=True, rescore_samples=self.count)
        values = self._answered(stage, list(range(len(self.images))), len(self.images))[0][None]
        return Estimator(f"FD, {n} images, control variate", values, self.calls(n) + self.shared(self.count))

    def _halving(self) -> Estimator:
        rungs = (self.count // 16, self.count // 4, self.count)
        stage = SearchStage(search="random_search", samples=self.count, fidelity=rungs)
        return self._in_generations(f"successive halving, {', '.join(map(str, rungs))} images", stage, self.shared(self.count))

    def _screening(self, n: int) -> Estimator:
        stage = SearchStage(search="random_search", samples=n, screen=0.5)
        extra = self.calls(SCREENED) + self.shared(SCREENED, self.teacher_steps)
        return self._in_generations(f"half by teacher error, then FD, {n} images", stage, extra)

    def _in_generations(self, name: str, stage: SearchStage, extra: float) -> Estimator:
        """In batches drawn at random, as a method would propose them. Images that were made before cost nothing: the memo."""
        rng, values, made = random.Random(0), [], []
        for _ in range(DRAWS):
            order = list(range(len(self.images)))
            rng.shuffle(order)
            found, images = self._answered(stage, order, GENERATION)
            values.append(found)
            made.append(images)
        return Estimator(name, np.array(values), self.calls(float(np.mean(made)) / len(self.images)) + extra)

    def _answered(self, stage: SearchStage, order: Sequence[int], batch: int) -> tuple[np.ndarray, int]:
        """((C,) values as a method gets them, images made of the candidates) of Ladder's own code."""
        seeds = Seeds(role="search", base=0, count=stage.samples)
        store = _Store(self)
        (reference,) = store("search", [(Request(candidate=self.fixed, seeds=seeds), None)])
        ladder, values = Ladder(stage, store, reference), np.zeros(len(order))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            asked = [Request(candidate=self.candidates[i], seeds=seeds) for i in part]
            for i, trial in zip(part, ladder.answers(asked, start), strict=True):
                values[i] = trial.value(FD)
        return values, sum(store.most.values())

    @cached_property
    def places(self) -> dict[str, int]:
        return {candidate.digest(): i for i, candidate in enumerate(self.candidates)}

    @cached_property
    def cache(self) -> dict[tuple[str, int, int, bool], tuple[float, tuple[float, ...]]]:
        """Values and replicates of blocks of images: chance draws ask for the same ones."""
        return {}


class _Store:
    """Scores requests from the images that are there."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.most: dict[int, int] = {}  # of each candidate, the largest block that was asked for

    def __call__(self, study: str, requests: list[tuple[Request, int | None]]) -> list[Trial]:
        score: Callable[[Request], Measurement] = self._screen if study == "screen" else self._fd
        return [Trial(number=0, request=request, measurements=(score(request),)) for request, _ in requests]

    def _screen(self, request: Request) -> Measurement:
        place, n, trials = self._place(request), request.seeds.count, self.trials
        assert place is not None  # the reference is not screened
        key = ("error", place, n, False)
        if key not in trials.cache:
            teacher = trials.teacher.latents[:n].double()
            trials.cache[key] = error(trials.images[place].latents[:n].double(), teacher), ()
        return Measurement(metric=METRIC, value=trials.cache[key][0], direction="lower", n=n, seeds=request.seeds)

    def _fd(self, request: Request) -> Measurement:
        place, seeds, trials = self._place(request), request.seeds, self.trials
        if place is not None:
            self.most[place] = max(self.most.get(place, 0), seeds.count)
        key = (f"fd {seeds.start}", -1 if place is None else place, seeds.count, True)
        if key not in trials.cache:
            images = trials.usual if place is None else trials.images[place]
            x = images.features[seeds.start : seeds.start + seeds.count]
            halves = half_samples(len(x), trials.period)
            found = _frechet.over_halves(x, halves, trials.reference.mean, trials.reference.root)
            trials.cache[key] = trials.fd(x), tuple(found.tolist())
        value, replicates = trials.cache[key]
        return Measurement(
            metric=FD, value=value, direction="lower", n=seeds.count, seeds=seeds, replicates=replicates, prompts="same"
        )

    def _place(self, request: Request) -> int | None:
        digest = request.candidate.digest()
        return None if digest == self.trials.fixed.digest() else self.trials.places[digest]
