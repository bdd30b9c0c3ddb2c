"""Cheaper answers to a search's method: fewer images for most candidates, a screen before any, and control variates.

Without `fidelity`, `screen` and `control` a batch is scored as it is. With them:

- `fidelity: [64, 256, 1024]` is successive halving within a batch (Jamieson and Talwalkar, 1502.07943; its rungs as in Li et al.,
  1810.05934): all of a batch on the first 64 images, the best quarter on 256, the best quarter of these on 1,024. The share that
  goes on is the ratio of the two numbers, rounded up, so that every rung costs about the same. A method that proposes one
  candidate at a time saves nothing. Images of a smaller rung are the first of a larger one: where rungs are multiples of the
  chunk, the memo serves their denoiser calls again.
- `screen: 0.5` scores only the half of a batch that comes nearest to the model's own many-step images (`_screen`).
- `control: true` takes from every value what luck the best fixed schedule had on the same images.

Of several objectives the candidates that no other one dominates go on first, then those that only these dominate, and so on,
the least first objective first.
"""

import math
import statistics
from collections.abc import Callable, Sequence

from ..core.candidate import Request, Seeds
from ..core.errors import UserError
from ..core.measurement import Measurement, Trial, paired
from ..core.stages import COSTS, SearchStage
from ._elites import dominates
from ._screen import METRIC, SCREENED

# Scores requests of a study and answers in their order; fewer answers than requests mean that time is over.
Settle = Callable[[str, list[tuple[Request, int | None]]], list[Trial]]

IMAGES = "images"  # in the settings of a corrected measurement: of how many images it is, where these are not all


class Ladder:
    """Answers batches of a method's requests. The store keeps what was really scored, under keys of its own."""

    def __init__(self, stage: SearchStage, settle: Settle, reference: Trial | None) -> None:
        """reference: the best fixed schedule, scored on all of the stage's samples.

        Raises UserError where there is none and values are to be corrected by it.
        """
        self.stage, self._settle, self._reference = stage, settle, reference
        self.rungs = stage.fidelity or (stage.samples,)
        self._objectives = stage.objective
        self._usual: dict[int, _Usual] = {}  # by number of images
        if reference is None and (stage.fidelity or stage.control):
            raise UserError(
                "fidelity and control: values are corrected by the best fixed schedule, and none could be scored. Leave both out."
            )

    def answers(self, batch: Sequence[Request], first: int) -> list[Trial]:
        """The trials of a batch, in its order; first: how many requests were answered before.

        Their requests are those of the batch. One that was scored on all samples holds what was measured. One that fell out on
        n images holds values as they would be on all of them, by the best fixed schedule's: its value on n images, plus what
        that schedule's differs between all images and n; but it is never better than a candidate of its batch that went on.
        Its measurements say `images: n` in their settings. One that was screened out is complete and has no objective: its
        value is infinite.
        Out of time, those are answered that were decided on, the rest is left out: fewer trials than requests.
        """
        stage = self.stage
        if not (stage.fidelity or stage.screen or stage.control):
            return self._settle("search", [(request, first + i) for i, request in enumerate(batch)])
        going, answered = list(range(len(batch))), dict[int, Trial]()  # places in the batch
        if stage.screen is not None:
            seen = self._scored("screen", batch, going, SCREENED, first)
            if len(seen) < len(going):
                return []
            answered, going = self._screened(seen, stage.screen)
        fallen: list[list[int]] = []  # of each rung, best first
        for n in self.rungs:
            scored = self._corrected(self._scored("search", batch, going, n, first if n == self.rungs[0] else None), n)
            if scored is None:
                break
            answered |= {i: t for i, t in scored.items() if t.state == "failed" or n == stage.samples}
            if n == stage.samples or len(scored) < len(going):
                break
            ranked = _ranked({i: t for i, t in scored.items() if t.state == "complete"}, self._objectives)
            count = math.ceil(len(going) * n / self.rungs[self.rungs.index(n) + 1])
            going, out = ranked[:count], ranked[count:]
            fallen.append(out)
            answered |= {i: scored[i] for i in out}
            if not going:
                break
        ahead = self.full(list(answered.values()))
        for out in reversed(fallen):
            for place, i in enumerate(out, 1):
                answered[i] = self._behind(answered[i], ahead, place)
            ahead += [answered[i] for i in out]
        return [answered[i] for i in sorted(answered)]

    def full(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those of the answers that were scored on all samples: only they may become elites."""
        return [t for t in trials if t.state == "complete" and not self._partial(t)]

    def known(self, trials: Sequence[Trial]) -> list[Trial]:
        """The fixed schedules, scored on all samples, as the method should see them: their values are comparable with answers."""
        if not self.stage.control:
            return list(trials)
        corrected = self._corrected(dict(enumerate(trials)), self.stage.samples)
        return list(trials) if corrected is None else [corrected[i] for i in range(len(trials))]

    def _partial(self, trial: Trial) -> bool:
        measured = trial.measured(self._objectives[0])
        return measured is None or IMAGES in measured.settings

    def _scored(
        self, study: str, batch: Sequence[Request], going: Sequence[int], count: int, first: int | None
    ) -> dict[int, Trial]:
        """By place in the batch: trials on the first `count` images, with the requests that the method made.

        first: where the method's sequence of proposals stood before the batch; told at the first meeting only.
        """
        asked = [batch[i].model_copy(update={"seeds": _few(batch[i].seeds, count)}) for i in going]
        places = [None if first is None else first + i for i in going]
        found = {
            trial.request.candidate.digest(): trial for trial in self._settle(study, list(zip(asked, places, strict=True)))
        }
        keys = {i: batch[i].candidate.digest() for i in going}
        return {i: found[key].model_copy(update={"request": batch[i]}) for i, key in keys.items() if key in found}

    def _screened(self, seen: dict[int, Trial], share: float) -> tuple[dict[int, Trial], list[int]]:
        """(who is answered already, who is scored); costs that are objectives count beside the error."""
        costs = [name for name in self._objectives if name in COSTS]
        ranked = _ranked({i: t for i, t in seen.items() if t.state == "complete"}, (METRIC, *costs))
        passed = ranked[: math.ceil(round(share * len(seen), 9))]
        return {i: t for i, t in seen.items() if i not in passed}, sorted(passed)

    def _corrected(self, trials: dict[int, Trial], n: int) -> dict[int, Trial] | None:
        """Trials on n images with their values on all of them, or None where time was over before these could be known."""
        if not self.stage.control and n == self.stage.samples:
            return trials
        usual, whole = self._at(n), self._at(self.stage.samples)
        if usual is None or whole is None:
            return None
        return {i: self._moved(trial, n, usual, whole) for i, trial in trials.items()}

    def _moved(self, trial: Trial, n: int, usual: "_Usual", whole: "_Usual") -> Trial:
        changed = []
        for m in trial.measurements:
            if m.metric in self._objectives:
                slope = beta(m, usual.measured[m.metric]) if self.stage.control else 1.0
                luck = usual.measured[m.metric].value - usual.expected[m.metric]
                value = m.value - slope * luck + whole.expected[m.metric] - usual.expected[m.metric]
                told: dict[str, float] = {IMAGES: n} if n < self.stage.samples else {}
                told |= {"beta": slope} if self.stage.control else {}
                m = m.model_copy(update={"value": value, "settings": {**m.settings, **told, "uncorrected": m.value}})
            changed.append(m)
        return trial.model_copy(update={"measurements": tuple(changed)})

    def _at(self, n: int) -> "_Usual | None":
        """The best fixed schedule on n images, scored once; None if time was over."""
        if n not in self._usual:
            assert self._reference is not None  # else refused
            request = self._reference.request
            blocks = math.ceil(self.stage.rescore_samples / n) if self.stage.control else 1
            seeds = [Seeds(role=request.seeds.role, base=request.seeds.base, count=n, start=k * n) for k in range(blocks)]
            trials = self._settle("search", [(request.model_copy(update={"seeds": s}), None) for s in seeds])
            if len(trials) < len(seeds):
                return None
            if failed := next((t for t in trials if t.state == "failed"), None):
                raise UserError(
                    f"the best fixed schedule failed on {n} images, and values are corrected by it: {failed.error} "
                    "Leave fidelity and control out."
                )
            self._usual[n] = _Usual(trials, self._objectives)
        return self._usual[n]

    def _behind(self, trial: Trial, ahead: Sequence[Trial], place: int) -> Trial:
        """A trial that fell out, no better than any that went on and is not ahead by another objective.

        place: from 1, among those that fell out with it; their order stays.
        """
        own, *others = (trial.value(name) for name in self._objectives)
        rivals = [[t.value(name) for name in self._objectives] for t in ahead]
        worse = [v[0] for v in rivals if math.isfinite(v[0]) and all(a >= b for a, b in zip(v[1:], others, strict=True))]
        least = max(worse) + place * math.ulp(max(worse)) if worse else own
        if own >= least:
            return trial
        first = self._objectives[0]
        changed = tuple(
            m.model_copy(update={"value": least if m.direction == "lower" else -least}) if m.metric == first else m
            for m in trial.measurements
        )
        return trial.model_copy(update={"measurements": changed})


class _Usual:
    """The best fixed schedule on some number of images."""

    def __init__(self, trials: Sequence[Trial], objectives: Sequence[str]) -> None:
        """trials: on blocks of equally many images, the search's own images first.

        The expected value is that of the blocks' mean. It is not the value of all their images at once: a Frechet distance of
        more images is smaller by its bias, which is no luck, and a slope would multiply it.
        """
        self.measured = {m.metric: m for m in trials[0].measurements if m.metric in objectives}
        values = {name: [m.value for t in trials if (m := t.measured(name)) is not None] for name in self.measured}
        self.expected = {name: statistics.fmean(found) for name, found in values.items()}


def beta(own: Measurement, reference: Measurement) -> float:
    """How much of the reference's luck a value has: covariance over variance, of their values over the same half-samples.

    The variance of a value less beta times that luck is 1 - correlation^2 of what it was (Owen, Monte Carlo theory, methods and
    examples, Sec. 8.9). 1 where half-samples are not known or show no spread: then values are moved by the same for all.
    """
    x, y = reference.replicates, own.replicates
    if not paired(own, reference) or len(x) != len(y) or len(x) < 2 or (variance := statistics.variance(x)) == 0:
        return 1.0
    return statistics.covariance(x, y) / variance


def _few(seeds: Seeds, count: int) -> Seeds:
    """The first seeds of a block, all of it where it has no more."""
    return seeds.model_copy(update={"count": min(count, seeds.count)})


def _ranked(trials: dict[int, Trial], objectives: Sequence[str]) -> list[int]:
    """The keys of the trials, best first: by fronts, then by the first objective, then by order of proposal."""
    left = {i: tuple(t.value(name) for name in objectives) for i, t in sorted(trials.items())}
    found: list[int] = []
    while left:
        front = [i for i, own in left.items() if not any(dominates(other, own) for other in left.values())]
        front = sorted(front, key=lambda i: left[i])
        found += front
        left = {i: values for i, values in left.items() if i not in front}
    return found
