"""Cheaper answers, with a store that pretends: who goes on, what the others are answered with, and what the method may believe."""

import math
import random
import statistics
from typing import Any

import pytest
from lissom.core import methods
from lissom.core.candidate import Candidate, Request, SamplingPlan, Scheduler, Seeds, Step
from lissom.core.errors import UserError
from lissom.core.measurement import Measurement, Trial
from lissom.core.stages import SearchStage
from lissom.search._space import Price, Space
from lissom.search._task import Task
from lissom.workflow._ladder import Ladder, beta

REFERENCE = 500.0  # timestep of the best fixed schedule


class Pretended:
    """A store: the value of timestep t on n images is t / 100 + 640 / n, unless told otherwise. Ends after `left` trials."""

    def __init__(self, left: float = math.inf, direction: str = "lower", **values: dict[int, float]) -> None:
        """values: t500={64: 3.0}: of that timestep on that number of images."""
        self.left, self.direction, self.values = left, direction, values
        self.asked: list[tuple[str, float, Seeds, int | None]] = []
        self.stored: dict[str, Trial] = {}
        self.fails: set[tuple[float, int]] = set()
        self.halves: dict[tuple[float, int], tuple[float, ...]] = {}

    def __call__(self, study: str, requests: list[tuple[Request, int | None]]) -> list[Trial]:
        found = []
        for request, index in requests:
            self.asked.append((study, time_of(request), request.seeds, index))
            key = request.key(study)
            if key not in self.stored:
                if self.left <= 0:
                    continue
                self.left -= 1
                self.stored[key] = self.score(study, request)
            found.append(self.stored[key])
        return found

    def score(self, study: str, request: Request) -> Trial:
        t, n = time_of(request), request.seeds.count
        number = len(self.stored)
        if (t, n) in self.fails:
            return Trial(number=number, request=request, state="failed", error="boom")
        if study == "screen":
            value, name = t / 100, "teacher_error"
        else:
            value = self.values.get(f"t{t:g}", {}).get(n, t / 100 + 640 / n) + request.seeds.start / 1e4
            value, name = value if self.direction == "lower" else -value, "fid"
        measured = {"direction": self.direction if name == "fid" else "lower", "n": n, "seeds": request.seeds}
        own = Measurement.model_validate(
            {"metric": name, "value": value, "replicates": self.halves.get((t, n), ()), **measured}
        )
        other = Measurement.model_validate({"metric": "accuracy", "value": 0.5, **measured, "direction": "higher"})
        return Trial(number=number, request=request, measurements=(own,) if study == "screen" else (own, other))

    def counts(self, study: str = "search", reference: bool = False) -> list[tuple[float, int]]:
        """(timestep, images) of what was scored, in order."""
        return [(t, s.count) for name, t, s, _ in self.asked if name == study and (reference or t != REFERENCE)]


def time_of(request: Request) -> float:
    assert request.candidate.plan is not None
    return request.candidate.plan.steps[0].timestep


def asked(t: float, samples: int = 256, macs: float = 1.0) -> Request:
    plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=(Step(timestep=t),))
    seeds = Seeds(role="search", base=0, count=samples)
    return Request(candidate=Candidate(plan=plan), seeds=seeds, origin="mutation", costs={"macs": macs})


def batch(*times: float, samples: int = 256) -> list[Request]:
    return [asked(t, samples) for t in times]


def ladder(store: Pretended, **stage: Any) -> Ladder:
    stage = {"search": "random_search", "samples": 256} | stage
    (reference,) = store("search", [(asked(REFERENCE, stage["samples"]), None)])
    store.asked.clear()
    return Ladder(SearchStage.model_validate(stage), store, reference)


def fids(trials: list[Trial]) -> list[float]:
    return [t.value("fid") for t in trials]


def test_without_settings_requests_pass_as_they_are() -> None:
    store = Pretended()
    own = ladder(store)
    answers = own.answers(batch(10, 20, 30), first=7)
    assert [(t, s.count, i) for _, t, s, i in store.asked] == [(10, 256, 7), (20, 256, 8), (30, 256, 9)]
    assert fids(answers) == [2.6, 2.7, 2.8] and own.full(answers) == answers == own.known(answers)
    store.left = 1
    assert len(own.answers(batch(40, 50), first=3)) == 1


def test_the_best_quarter_goes_on() -> None:
    store = Pretended()
    own = ladder(store, samples=1024, fidelity=[64, 256, 1024])
    times = [90.0, 10, 80, 20, 70, 30, 60, 40, 55, 45, 35, 25, 15, 5, 95, 85, 75, 65, 51, 52]
    answers = own.answers(batch(*times, samples=1024), first=40)
    rungs = {n: [t for t, count in store.counts() if count == n] for n in (64, 256, 1024)}
    assert rungs[64] == times and sorted(rungs[256]) == [5, 10, 15, 20, 25] and sorted(rungs[1024]) == [5, 10]
    indices = {(s.count, i) for _, t, s, i in store.asked if t != REFERENCE}
    assert indices == {(64, 40 + i) for i in range(20)} | {(256, None), (1024, None)}
    assert all(s.start == 0 and s.role == "search" for _, _, s, _ in store.asked)
    assert [time_of(t.request) for t in answers] == times and all(t.request.seeds.count == 1024 for t in answers)
    full = own.full(answers)
    assert sorted(map(time_of, (t.request for t in full))) == [5, 10]
    assert all(t.measured("fid").settings == {} for t in full)  # type: ignore[union-attr]
    own.answers(batch(1, 2, samples=1024), first=60)
    assert store.counts(reference=True).count((REFERENCE, 64)) == 1  # the reference is scored once for each number of images


def test_a_batch_of_one_climbs_to_the_top() -> None:
    own = ladder(Pretended(), samples=1024, fidelity=[64, 256, 1024])
    assert len(own.full(own.answers(batch(10, samples=1024), first=0))) == 1


def test_who_falls_out_is_answered_as_if_on_all_images() -> None:
    store = Pretended(t1={64: 1.0, 256: 0.9}, t2={64: 2.0}, t3={64: 3.0}, t500={64: 6.0, 256: 4.5})
    trials = ladder(store, fidelity=[64, 256]).answers(batch(3, 1, 2), first=0)
    assert fids(trials) == pytest.approx([1.5, 0.9, 0.9]) and trials[2].value("fid") > 0.9  # 2.0 - 1.5 would be before 0.9
    measured = trials[0].measured("fid")
    assert measured is not None and measured.settings == {"images": 64, "uncorrected": 3.0} and measured.n == 64
    other = trials[0].measured("accuracy")
    assert other is not None and other.value == 0.5 and other.settings == {}
    assert all(Trial.model_validate_json(t.canonical()) == t for t in trials)


def test_who_falls_out_never_ranks_before_who_went_on() -> None:
    drawn = random.Random(3)
    for direction in ("lower", "higher"):
        values = {f"t{t}": {n: drawn.uniform(1, 9) for n in (64, 128, 256)} for t in range(40)}
        store = Pretended(direction=direction, **values)
        trials = ladder(store, fidelity=[64, 128, 256]).answers(batch(*map(float, range(40))), first=0)
        reached = {t: max(n for time, n in store.counts() if time == t) for t in range(40)}
        ordered = sorted(range(40), key=lambda t: trials[t].value("fid"))
        assert [reached[t] for t in ordered] == sorted(reached.values(), reverse=True)
        for n in (64, 128):  # those that fell out together keep their order
            out = [values[f"t{t}"][n] for t in ordered if reached[t] == n]
            assert out == sorted(out)


def test_of_several_objectives_the_front_goes_on() -> None:
    store = Pretended()
    requests = [asked(t, macs=macs) for t, macs in ((10, 1.0), (20, 0.5), (30, 0.9), (40, 0.2), (15, 1.0), (50, 0.6))]
    own = ladder(store, objective=["fid", "macs"], fidelity=[128, 256])
    trials = own.answers(requests, first=0)
    assert {t for t, n in store.counts() if n == 256} == {10, 20, 40}
    assert len(own.full(trials)) == 3
    # 15 is no better than 10 in MACs, so it may not look better otherwise; 50 is cheaper than 10 and no better than 20.
    cheap = next(t for t in trials if time_of(t.request) == 50)
    assert cheap.value("fid") == pytest.approx(0.5 + 2.5) and cheap.value("macs") == 0.6


def test_of_several_objectives_none_that_fell_out_dominates() -> None:
    store = Pretended(t20={128: 7.0, 256: 9.0}, t30={128: 8.0}, t10={128: 1.0, 256: 1.0})
    requests = [asked(10, macs=1.0), asked(20, macs=0.5), asked(30, macs=0.5)]
    trials = ladder(store, objective=["fid", "macs"], fidelity=[128, 256]).answers(requests, first=0)
    assert trials[2].value("fid") > trials[1].value("fid") == 9.0


def test_failures_are_answered_and_do_not_climb() -> None:
    store = Pretended()
    store.fails = {(10, 64), (20, 256)}
    own = ladder(store, fidelity=[64, 256])
    trials = own.answers(batch(10, 20, 30, 40, 50, 60, 70, 80), first=0)
    assert [t.state for t in trials] == ["failed", "failed"] + 6 * ["complete"]
    assert [time_of(t.request) for t in own.full(trials)] == [30]
    store.fails = {(t, 64) for t in (1, 2)}
    assert [t.state for t in own.answers(batch(1, 2), first=8)] == ["failed", "failed"]


@pytest.mark.parametrize(
    "left, answered",
    [(0, []), (3, []), (9, [30, 40, 50, 60, 70, 80]), (10, [10, 30, 40, 50, 60, 70, 80]), (11, list(range(10, 90, 10)))],
)
def test_out_of_time_what_is_decided_is_answered(left: int, answered: list[float]) -> None:
    store = Pretended()
    own = ladder(store, fidelity=[64, 256])
    store.left = left
    trials = own.answers(batch(*map(float, range(10, 90, 10))), first=0)
    assert [time_of(t.request) for t in trials] == answered
    store.left = math.inf
    assert len(own.answers(batch(*map(float, range(10, 90, 10))), first=0)) == 8  # taken up again, it goes on


def test_a_screen_lets_a_share_through() -> None:
    store = Pretended()
    store.fails = {(10, 16)}
    own = ladder(store, screen=0.5)
    trials = own.answers(batch(40, 10, 30, 20, 60), first=5)
    assert store.counts("screen") == [(40, 16), (10, 16), (30, 16), (20, 16), (60, 16)]
    assert store.counts() == [(40, 256), (30, 256), (20, 256)]
    assert [(name, i) for name, _, _, i in store.asked if name == "search"] == [("search", i) for i in (5, 7, 8)]
    assert [t.state for t in trials] == ["complete", "failed", "complete", "complete", "complete"]
    assert fids(trials) == [2.9, math.inf, 2.8, 2.7, math.inf]
    assert trials[4].value("teacher_error") == 0.6 and trials[4].measured("fid") is None
    assert [time_of(t.request) for t in own.full(trials)] == [40, 30, 20]
    store.left = 2
    assert own.answers(batch(1, 2, 3), first=10) == []


def test_a_screen_counts_costs_that_are_objectives() -> None:
    store = Pretended()
    requests = [asked(t, macs=macs) for t, macs in ((10, 1.0), (20, 1.0), (90, 0.1), (30, 1.0))]
    ladder(store, screen=0.5, objective=["fid", "macs"]).answers(requests, first=0)
    assert {t for t, _ in store.counts()} == {10, 90}


def test_a_screen_before_rungs() -> None:
    store = Pretended()
    own = ladder(store, screen=0.5, fidelity=[64, 256])
    trials = own.answers(batch(*map(float, range(10, 90, 10))), first=0)
    assert [t for t, n in store.counts() if n == 64] == [10, 20, 30, 40] and [t for t, n in store.counts() if n == 256] == [10]
    assert len(trials) == 8 and len(own.full(trials)) == 1


@pytest.mark.parametrize("stage", [{"screen": 0.5}, {"fidelity": [64, 256]}, {"fidelity": [64, 256], "screen": 0.3}])
@pytest.mark.parametrize("name", [n for n in methods.names("search") if not getattr(methods.load("search", n), "needs", None)])
def test_every_method_takes_such_answers(name: str, stage: dict[str, Any]) -> None:
    module, store = methods.load("search", name), Pretended()
    space = Space(
        Scheduler(name="DDIMScheduler"), 2, 0.0, 999.0, True, {"macs": Price(100.0, {"a": 5.0, "b": 7.0})}, ("a", "b")
    )
    objective = ("fid", "macs") if getattr(module, "several", False) else ("fid",)
    own = ladder(store, objective=objective, **stage)
    task = Task(space, trials=40, seeds=Seeds(role="search", base=0, count=256), objectives=objective)
    proposals, proposed, answers = module.search(task, module.Config(), random.Random(0)), 0, None
    try:
        while True:
            requests = proposals.send(answers)
            answers = own.answers(requests, proposed)
            assert len(answers) == len(requests)
            proposed += len(requests)
    except StopIteration:
        assert proposed == 40


def halves(slope: float, seed: int, noise: float = 0.0) -> tuple[float, ...]:
    shared, own = random.Random(0), random.Random(seed)
    return tuple(9 + slope * shared.gauss(0, 1) + noise * own.gauss(0, 1) for _ in range(40))


def test_control_takes_out_the_luck_of_the_images() -> None:
    store = Pretended(t500={256: 4.0}, t10={256: 3.0}, t20={256: 3.0})
    store.halves = {(500, 256): halves(1, 0), (10, 256): halves(2, 0), (20, 256): halves(0.5, 0)}
    own = ladder(store, control=True, rescore_samples=1024)
    trials = own.answers(batch(10, 20), first=0)
    blocks = [s.start for _, t, s, _ in store.asked if t == REFERENCE]
    assert blocks == [0, 256, 512, 768]
    luck = 4.0 - statistics.fmean(4.0 + start / 1e4 for start in blocks)
    assert fids(trials) == pytest.approx([3.0 - 2 * luck, 3.0 - 0.5 * luck])
    measured = trials[0].measured("fid")
    assert measured is not None and measured.settings["beta"] == pytest.approx(2) and own.full(trials) == trials
    (known,) = own.known([store.stored[asked(REFERENCE).key("search")]])
    assert known.value("fid") == pytest.approx(4.0 - luck)  # the schedule itself has no luck left


def test_control_corrects_rungs_too() -> None:
    store = Pretended(t500={64: 6.0, 256: 4.0}, t10={64: 2.0, 256: 3.0}, t20={64: 9.0})
    store.halves = {(500, 64): halves(1, 0), (20, 64): halves(3, 0)}
    trials = ladder(store, control=True, fidelity=[64, 256], rescore_samples=512).answers(batch(10, 20), first=0)
    few = statistics.fmean(6.0 + 64 * k / 1e4 for k in range(8))
    all_images = statistics.fmean(4.0 + 256 * k / 1e4 for k in range(2))
    assert trials[1].value("fid") == pytest.approx(9.0 - 3 * (6.0 - few) + all_images - few)
    assert trials[0].value("fid") == pytest.approx(3.0 - (4.0 - all_images))  # half-samples unknown: the same for all


def test_slopes() -> None:
    seeds = Seeds(role="search", base=0, count=8)

    def measured(replicates: tuple[float, ...], **changes: Any) -> Measurement:
        fields = {"metric": "fid", "value": 1.0, "direction": "lower", "n": 8, "seeds": seeds, "replicates": replicates}
        return Measurement.model_validate(fields | changes)

    reference = measured(halves(1, 0))
    assert beta(measured(halves(2, 0)), reference) == pytest.approx(2)
    assert beta(measured(halves(2, 1, noise=0.1)), reference) == pytest.approx(2, abs=0.1)
    assert abs(beta(measured(halves(0, 1, noise=1)), reference)) < 0.5
    assert beta(measured(()), reference) == beta(measured(halves(2, 0)), measured((1.0,) * 40)) == 1
    other = seeds.model_copy(update={"base": 1})
    assert beta(measured(halves(2, 0), seeds=other), reference) == 1  # other images share no luck


def test_a_reference_is_needed_and_must_not_fail() -> None:
    for settings in ({"fidelity": (64, 256)}, {"control": True}):
        with pytest.raises(UserError, match="best fixed schedule"):
            Ladder(SearchStage.model_validate({"search": "random_search", "samples": 256, **settings}), Pretended(), None)
    assert Ladder(SearchStage(search="random_search", screen=0.5), Pretended(), None)
    store = Pretended()
    store.fails = {(REFERENCE, 64)}
    with pytest.raises(UserError, match="64 images.*boom"):
        ladder(store, fidelity=[64, 256]).answers(batch(1, 2), first=0)
