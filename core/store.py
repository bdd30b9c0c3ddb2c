"""Every scored request, durable: an Optuna study in a journal file (or any Optuna storage).

Optuna is the record and the queue (enqueue -> claim -> evaluate -> tell), never the proposer: what to try next comes from
the methods in search/. `optuna-dashboard trials.journal` shows every search, whichever engine proposed it.

One process, the driver, enqueues; any number of workers claim. Each write can be repeated, and each is decided by the storage
alone: a trial is claimed once and ends once, whoever tries it at the same time.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import leases
from .candidate import Request, canonical
from .dashboard import ranges, visible
from .errors import UserError
from .ledger import Ledger
from .measurement import Measurement, Trial
from .storages import Storage, refusing
from .studies import agree, create, there

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

DEATHS = 3  # workers that a request may cost before it is recorded as a failure
SHARE = 5  # looking at the storage takes at most about one part in so many of the time, where there is something else to do


@dataclass(frozen=True)
class Claim:
    """A waiting request that this process has taken."""

    number: int  # of the trial in its study
    id: int  # of the trial in its storage
    request: Request
    key: str


class TrialStore:
    """The trials of one study, indexed by key. Not thread-safe; one driver at a time, any number of workers."""

    def __init__(
        self, storage: Storage, study: "optuna.Study", evaluator: str, objectives: tuple[str, ...], lease: float, looks: bool
    ) -> None:
        """looks: take trials away from workers that are gone (see `look`)."""
        self.storage, self.study, self.evaluator, self.objectives = storage, study, evaluator, objectives
        self.place, self.lease, self.worker = storage.place, lease, uuid.uuid4().hex
        self._backend: BaseStorage = storage.backend
        self._study_id = self._backend.get_study_id_from_name(study.study_name)
        self._ledger = Ledger()
        self._watch = leases.Watch()
        self._rest = 0.0  # no need to look before, as time.monotonic() tells it
        self.cost = 0.0  # seconds that the last look took
        if looks:
            self.look(now=True)
        else:
            self._ledger.absorb(self._all())

    @classmethod
    def open(
        cls,
        storage: Storage | str | Path,
        name: str,
        identity: Mapping[str, str],
        evaluator: str,
        objectives: tuple[str, ...],
        *,
        lease: float = leases.LEASE,
        driver: bool = True,
    ) -> "TrialStore":
        """Create the study or open it again.

        storage: an open one, path of a journal file, or an Optuna storage URL. identity: what must agree for two processes to
        share a study (model, method, settings, ...); one that disagrees raises UserError with both values named. evaluator:
        hash of how values are measured, part of every key. objectives: metrics and costs that the study minimises (negated
        where higher is better), the one that matters most first. lease: seconds without a sign of life after which others may
        take this process's trials. driver: False for a worker: UserError where there is no such study, whose objectives count.
        """
        import optuna

        storage = storage if isinstance(storage, Storage) else Storage(storage)
        backend, sampler = storage.backend, optuna.samplers.RandomSampler(0)
        with refusing(storage.place):
            if not there(backend, name):
                if not driver:
                    raise UserError(
                        f"{storage.place}: holds no study {name!r}. Check --study; the search may not have started."
                    )
                create(backend, name, objectives)
            study = optuna.load_study(study_name=name, storage=backend, sampler=sampler)
            stored = study.user_attrs.get("identity")
            if stored is None and not study.get_trials(deepcopy=False) and driver:
                study.set_user_attr("identity", dict(identity))
            elif stored is None:
                raise UserError(
                    f"{storage.place}: the study {name!r} was not made by lissom. Choose another folder or study name."
                )
            else:
                agree(stored, identity, storage.place, worker=not driver)
            told = objectives if driver else tuple(study.metric_names or objectives)
            return cls(storage, study, evaluator, told, lease, looks=True)

    @classmethod
    def read(cls, storage: Storage | str | Path, name: str, objectives: tuple[str, ...]) -> "TrialStore":
        """A study as it is, for reports: nothing is written, so that a search may be running meanwhile.

        UserError where there is no such study.
        """
        import optuna

        storage = storage if isinstance(storage, Storage) else Storage(storage, mend=False)
        with refusing(storage.place):
            if not there(storage.backend, name):
                raise UserError(
                    f"{storage.place}: holds no study {name!r}; the search has not started yet, or belongs to another folder."
                )
            study = optuna.load_study(study_name=name, storage=storage.backend, sampler=optuna.samplers.RandomSampler(0))
            return cls(storage, study, "", objectives, leases.LEASE, looks=False)

    @property
    def trials(self) -> dict[str, Trial]:
        """Every scored request by its key."""
        return self._ledger.scored

    @property
    def objective(self) -> str:
        """What matters most."""
        return self.objectives[0]

    @property
    def busy(self) -> bool:
        """Whether any worker was seen at work on a trial."""
        return bool(self._ledger.running)

    def knows(self, key: str) -> bool:
        """Whether a request was last seen scored, waiting or in work."""
        return self._ledger.known(key)

    def propose(self, request: Request, index: int | None = None) -> str:
        """Queue a request unless its key is scored, queued or in work already; return the key. For the driver alone.

        index: its position in the method's sequence of proposals. A restarted method must propose the same again;
        UserError names both versions where it does not. A request that has cost `DEATHS` workers is recorded as a failure.
        """
        key = request.key(self.evaluator)
        if index is not None:
            before = self._ledger.proposals.get(index)
            if before is not None and before != key:
                from .. import __version__

                made_by = self.study.user_attrs["identity"].get("lissom")
                raise UserError(
                    f"{self.place}: proposal {index} of the stored search (lissom {made_by}) is not what lissom {__version__} "
                    "proposes now. Finish it with the version that started it, or start anew in another --out folder."
                )
            self._ledger.proposals[index] = key
        if not self._ledger.known(key):
            self._enqueue(key, request, index)
        return key

    def _enqueue(self, key: str, request: Request, index: int | None) -> None:
        """One write: the trial is there with all that belongs to it, or not at all."""
        from optuna.trial import TrialState, create_trial

        attributes = {"key": key, "request": request.canonical(), "index": index}
        state = TrialState.WAITING
        if self._ledger.lost[key] >= DEATHS:
            failed = Trial(number=0, request=request, state="failed", error=f"its worker died {self._ledger.lost[key]} times")
            attributes["result"], state = failed.canonical(), TrialState.FAIL
        shown = visible(request)
        template = create_trial(state=state, params=shown, distributions=ranges(shown), user_attrs=attributes)

        def arrived() -> int | None:
            self._ledger.absorb(self._backend.get_all_trials(self._study_id, deepcopy=False))
            return 0 if self._ledger.known(key) else None

        self.storage.do(lambda: self._backend.create_new_trial(self._study_id, template), after_all=arrived)
        if state is TrialState.WAITING:
            self._ledger.open.setdefault(key, None)
        else:
            self._ledger.absorb(self._all())

    def look(self, *, now: bool = False) -> None:
        """See what others have done since, and take the trials of workers that are gone away from them.

        A result that a dead worker had written already is kept; a trial without one fails, for the driver to propose again.
        now: also if the last look was just before, or took long.
        """
        began = time.monotonic()
        if not now and began < self._rest:
            return
        self._ledger.absorb(self._all())
        stale = [
            trial
            for number, trial in self._ledger.running.items()
            if self._watch.stale(number, trial.user_attrs.get("lease"), trial.user_attrs.get("beat", 0))
        ]
        for trial in stale:
            self._bury(trial)
        if stale:
            self._ledger.absorb(self._all())
        self._watch.forget(self._ledger.running.keys())
        ended = time.monotonic()
        self.cost = ended - began
        self._rest = ended + (SHARE - 1) * self.cost

    def claim(self) -> Claim | None:
        """Take the oldest waiting request, or None."""
        from optuna.exceptions import UpdateFinishedTrialError

        waiting = self._ledger.waiting
        self.look(now=not waiting)
        while waiting:
            trial = waiting.pop(next(iter(waiting)))
            key, number = trial.user_attrs["key"], trial.number
            at = self._id(number)
            if not self._take(at):
                continue  # somebody else was faster
            try:
                if self._ledger.elsewhere(key, number):  # the answer to its first enqueueing was lost
                    self._end(at, duplicate=True)
                    continue
                lease = leases.lease(self.worker, self.lease)
                self.storage.do(partial(self._backend.set_trial_user_attr, at, "lease", lease))
            except UpdateFinishedTrialError:  # the storage was away for so long that it was taken from us
                continue
            except BaseException:
                self._end(at, returned=self.worker)
                raise
            self._ledger.open[key] = number
            return Claim(number, at, Request.model_validate_json(trial.user_attrs["request"]), key)
        return None

    def keeping(self, claim: Claim) -> AbstractContextManager[None]:
        """While inside, signs of life are written beside the claimed trial."""
        return leases.kept(
            self.worker, claim.number, self.lease, lambda count: self._backend.set_trial_user_attr(claim.id, "beat", count)
        )

    def tell(
        self,
        claim: Claim,
        measurements: tuple[Measurement, ...] = (),
        *,
        error: str | None = None,
        calls: int = 0,
        plain_calls: int = 0,
        seconds: float = 0.0,
    ) -> Trial | None:
        """Record the result: measurements, or a failure by its one-line error.

        None, with a warning, where the trial was taken from this process meanwhile: the result is discarded.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        trial = Trial(
            number=claim.number,
            request=claim.request,
            state="complete" if error is None else "failed",
            measurements=measurements,
            error=error,
            calls=calls,
            plain_calls=plain_calls,
            seconds=round(seconds, 3),
        )
        written = trial.canonical()
        try:
            # Before the state: a kill between the two loses nothing.
            self.storage.do(partial(self._backend.set_trial_user_attr, claim.id, "result", written))
            _finish(self.storage, claim.id, trial, self.objectives)
        except UpdateFinishedTrialError:  # by somebody else, or by us, the answer being lost
            ended = self.storage.do(partial(self._backend.get_trial, claim.id))
            if ended.user_attrs.get("result") != written:
                self.storage.warn(
                    f"candidate {claim.number} was taken from this process, which showed no sign of life for "
                    f"{self.lease:.0f} s; its result is discarded"
                )
                return None
        trial = Trial.model_validate_json(written)  # what later sessions will read, so that their reports are the same text
        self._ledger.end(claim.key, trial)
        return trial

    def give_back(self, claim: Claim, *, died: bool = False) -> None:
        """Let the driver propose a claimed request again, if the storage can be reached at all.

        died: this process ends because of it, as far as can be told (see `DEATHS`).
        """
        self._end(claim.id, **{"lost" if died else "returned": self.worker})

    def retry(self) -> None:
        """Let failed requests be proposed again: what failed once (memory, a device) may pass; its record stays."""
        scored = self._ledger.scored
        for key in [key for key, trial in scored.items() if trial.state == "failed"]:
            del scored[key]
        self._ledger.lost.clear()

    def best(self, counts: Callable[[Trial], bool]) -> Trial | None:
        """The complete trial with the best objective. counts: asked once of each trial, whether it may be the best."""
        return self._ledger.best(self.objective, counts)

    def remember(self, **facts: Any) -> None:
        """Store JSON values with the study."""
        for name, value in facts.items():
            self.storage.do(partial(self._backend.set_study_user_attr, self._study_id, name, value))

    def recall(self, name: str, default: Any = None) -> Any:
        """A value that is stored with the study."""
        return self.storage.do(lambda: self._backend.get_study_user_attrs(self._study_id)).get(name, default)

    def _all(self) -> "list[FrozenTrial]":
        return self.storage.do(lambda: self._backend.get_all_trials(self._study_id, deepcopy=False))

    def _id(self, number: int) -> int:
        return self.storage.do(partial(self._backend.get_trial_id_from_study_id_trial_number, self._study_id, number))

    def _take(self, at: int) -> bool:
        """Whether a waiting trial is ours now. Where the answer was lost it is nobody's, until its missing lease runs out."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            return self.storage.do(partial(self._backend.set_trial_state_values, at, TrialState.RUNNING))
        except UpdateFinishedTrialError:
            return False

    def _bury(self, trial: "FrozenTrial") -> None:
        """End a trial whose worker is gone: with its result if that is written, else without one."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        at, result = self._id(trial.number), trial.user_attrs.get("result")
        with suppress(UpdateFinishedTrialError):  # somebody else was faster, or the worker lives after all
            if result is not None:
                _finish(self.storage, at, Trial.model_validate_json(result), self.objectives)
                return
            if (by := trial.user_attrs.get("lease")) is not None:  # without one, nobody has begun
                self.storage.do(partial(self._backend.set_trial_user_attr, at, "lost", by["worker"]))
            self.storage.do(partial(self._backend.set_trial_state_values, at, TrialState.FAIL))

    def _end(self, at: int, **note: Any) -> None:
        """Fail a trial of ours, if the storage can be reached: nobody waits for that while a process ends."""
        from optuna.trial import TrialState

        with suppress(Exception):
            for name, value in note.items():
                self._backend.set_trial_user_attr(at, name, value)
            self._backend.set_trial_state_values(at, TrialState.FAIL)


def _finish(storage: Storage, at: int, trial: Trial, objectives: tuple[str, ...]) -> None:
    """Give a trial its final state; UpdateFinishedTrialError where it has one."""
    from optuna.trial import TrialState

    if trial.state == "failed":
        storage.do(partial(storage.backend.set_trial_state_values, at, TrialState.FAIL))
    else:
        values = [float(trial.value(name)) for name in objectives]
        storage.do(partial(storage.backend.set_trial_state_values, at, TrialState.COMPLETE, values))


def identity_of(**parts: Any) -> dict[str, str]:
    """Identity entries as short texts that can be compared and shown."""
    return {k: v if isinstance(v, str) else canonical(v) for k, v in parts.items()}
