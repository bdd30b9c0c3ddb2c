"""Every scored request, durable: an Optuna study in a journal file (or any Optuna storage).

Optuna is the record and the queue (enqueue -> claim -> evaluate -> tell), never the proposer: what to try next comes from
the methods in search/. `optuna-dashboard trials.journal` shows every search, whichever engine proposed it.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import journal
from .candidate import Request, canonical
from .errors import UserError, one_line
from .files import disk_errors
from .measurement import Measurement, Trial

if TYPE_CHECKING:
    import optuna

VISIBLE = 50  # parameters shown in the dashboard at most; the full genome sits in the request


@dataclass(frozen=True)
class Claim:
    """A waiting request that this process has taken."""

    trial: "optuna.Trial"
    request: Request
    key: str


class TrialStore:
    """The trials of one study, indexed by key. Not thread-safe; one local driver at a time."""

    def __init__(self, study: "optuna.Study", evaluator: str, objective: str, place: str, *, settle: bool = True) -> None:
        """settle: finish what was scored but not told, and give back what a dead process held (see `_index`)."""
        self.study, self.evaluator, self.objective, self.place = study, evaluator, objective, place
        self.trials: dict[str, Trial] = {}
        self._proposals: dict[int, str] = {}  # position in the method's sequence of proposals -> key
        self._waiting: set[str] = set()
        self._index(settle)

    @classmethod
    def open(cls, storage: str | Path, name: str, identity: Mapping[str, str], evaluator: str, objective: str) -> "TrialStore":
        """Create the study or open it again.

        storage: path of a journal file, or an Optuna storage URL. identity: what must agree for two processes to share a
        study (model, method, settings, ...); one that disagrees raises UserError with both values named. evaluator: hash
        of how values are measured, part of every key. objective: the metric that the study minimises (negated where
        higher is better).
        """
        import optuna

        place = _place(storage)
        with _refusing(place):
            backend, sampler = _storage(storage), optuna.samplers.RandomSampler(0)
            if name in optuna.get_all_study_names(backend):  # create_study would write into a journal that is not ours
                study = optuna.load_study(study_name=name, storage=backend, sampler=sampler)
            else:
                study = optuna.create_study(study_name=name, storage=backend, sampler=sampler, direction="minimize")
            stored = study.user_attrs.get("identity")
            if stored is None:
                if study.get_trials(deepcopy=False):
                    raise UserError(f"{place}: the study {name!r} was not made by lissom. Choose another folder or study name.")
                study.set_user_attr("identity", dict(identity))
            else:
                for key in identity:
                    if key != "lissom" and stored.get(key) != identity[key]:
                        raise UserError(
                            f"{place} belongs to another search: its {key} is {stored.get(key)}, this one's is {identity[key]}. "
                            "Choose another --out folder, or give the settings it was started with."
                        )
            return cls(study, evaluator, objective, place)

    @classmethod
    def read(cls, storage: str | Path, name: str, objective: str) -> "TrialStore":
        """A study as it is, for reports: nothing is written, so that a search may be running meanwhile.

        UserError where there is no such study.
        """
        import optuna

        place = _place(storage)
        with _refusing(place):
            backend = _storage(storage, mend=False)
            if name not in optuna.get_all_study_names(backend):
                raise UserError(
                    f"{place}: holds no study {name!r}; the search has not started yet, or belongs to another folder."
                )
            return cls(optuna.load_study(study_name=name, storage=backend), "", objective, place, settle=False)

    def propose(self, request: Request, index: int | None = None) -> str:
        """Queue a request unless its key is scored or queued already; return the key.

        index: its position in the method's sequence of proposals. A restarted method must propose the same again;
        UserError names both versions where it does not.
        """
        key = request.key(self.evaluator)
        if index is not None:
            before = self._proposals.get(index)
            if before is not None and before != key:
                from .. import __version__

                made_by = self.study.user_attrs["identity"].get("lissom")
                raise UserError(
                    f"{self.place}: proposal {index} of the stored search (lissom {made_by}) is not what lissom {__version__} "
                    "proposes now. Finish it with the version that started it, or start anew in another --out folder."
                )
            self._proposals[index] = key
        if key not in self.trials and key not in self._waiting:
            attributes = {"key": key, "request": request.canonical(), "index": index}
            with self._writing():
                self.study.enqueue_trial(_visible(request), user_attrs=attributes)
            self._waiting.add(key)
        return key

    def claim(self) -> Claim | None:
        """Take the oldest waiting request, or None."""
        import optuna

        if not self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
            return None  # ask() would invent a trial
        with self._writing():
            trial = self.study.ask()
            request = Request.model_validate_json(trial.user_attrs["request"])
            trial.set_user_attr("lease", {"host": socket.gethostname(), "pid": os.getpid()})
            for name, value in _visible(request).items():
                high = float(max(1000.0, value)) if name.startswith("t") else 10_000.0
                trial.suggest_float(name, 0.0, high)  # the value is fixed already; this makes it visible
        return Claim(trial, request, trial.user_attrs["key"])

    def tell(
        self,
        claim: Claim,
        measurements: tuple[Measurement, ...] = (),
        *,
        error: str | None = None,
        calls: int = 0,
        plain_calls: int = 0,
        seconds: float = 0.0,
    ) -> Trial:
        """Record the result: measurements, or a failure by its one-line error."""
        trial = Trial(
            number=claim.trial.number,
            request=claim.request,
            state="complete" if error is None else "failed",
            measurements=measurements,
            error=error,
            calls=calls,
            plain_calls=plain_calls,
            seconds=round(seconds, 3),
        )
        with self._writing():
            written = trial.canonical()
            claim.trial.set_user_attr("result", written)  # before tell: a kill between the two loses nothing
            _finish(self.study, trial, self.objective)
        trial = Trial.model_validate_json(written)  # what later sessions will read, so that their reports are the same text
        self._keep(claim.key, trial)
        return trial

    def retry(self) -> None:
        """Let failed requests be proposed again: what failed once (memory, a device) may pass; its record stays."""
        self.trials = {key: trial for key, trial in self.trials.items() if trial.state == "complete"}

    def remember(self, **facts: Any) -> None:
        """Store JSON values with the study."""
        with self._writing():
            for name, value in facts.items():
                self.study.set_user_attr(name, value)

    def _writing(self) -> AbstractContextManager[None]:
        return disk_errors(Path(self.place))

    def _index(self, settle: bool) -> None:
        """Read every stored trial; with settle, finish what was scored but not told and fail what a dead process held."""
        import optuna

        for frozen in self.study.get_trials(deepcopy=False):
            key = frozen.user_attrs.get("key")
            if key is None:
                continue
            if (index := frozen.user_attrs.get("index")) is not None:
                self._proposals[index] = key
            result = frozen.user_attrs.get("result")
            running = frozen.state == optuna.trial.TrialState.RUNNING
            if result is not None:
                trial = Trial.model_validate_json(result)
                if running and settle:
                    _finish(self.study, trial, self.objective)
                self._keep(key, trial)
            elif running and settle:  # its process is gone (the run folder is locked by us): free the key, keep the record
                self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            elif frozen.state == optuna.trial.TrialState.WAITING:
                self._waiting.add(key)

    def _keep(self, key: str, trial: Trial) -> None:
        self.trials[key] = trial
        self._waiting.discard(key)


def _finish(study: "optuna.Study", trial: Trial, objective: str) -> None:
    import optuna

    if trial.state == "failed":
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial.number, trial.value(objective))


def _visible(request: Request) -> dict[str, float]:
    """The part of a request that the dashboard plots: its timesteps and how many layers each step skips."""
    plan = request.candidate.plan
    if plan is None:
        return {}
    width = len(str(len(plan.steps) - 1))
    times = {f"t{i:0{width}}": float(s.timestep) for i, s in enumerate(plan.steps)}
    skips = {f"skipped{i:0{width}}": float(len(s.skip)) for i, s in enumerate(plan.steps)}
    shown = {**times, **skips} if any(skips.values()) else times
    return dict(list(shown.items())[:VISIBLE])


def _place(storage: str | Path) -> str:
    """How messages name the storage: a path, or a URL without its password."""
    return without_password(storage) if isinstance(storage, str) else str(storage)


def without_password(url: str) -> str:
    """A storage URL as it may be shown and kept. UserError for what is not one."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError as e:
        raise UserError(f"--storage {url}: not a storage URL. Write one such as sqlite:///trials.db.") from e


@contextmanager
def _refusing(place: str) -> Iterator[None]:
    """Turn what Optuna says of a storage that it cannot read or write into one sentence."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("optuna").setLevel(logging.ERROR)
    try:
        with disk_errors(Path(place)):
            yield
    except (OptunaError, SQLAlchemyError, ImportError) as e:
        raise UserError(f"{place}: cannot be used as storage ({one_line(e)}). Check the URL and the database.") from e
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as e:  # whatever a foreign record provokes
        raise UserError(
            f"{place}: not a lissom journal ({type(e).__name__}: {one_line(e)}). Choose another --out folder."
        ) from e


def _storage(storage: str | Path, *, mend: bool = True) -> Any:
    from optuna.storages import RDBStorage

    return RDBStorage(storage) if isinstance(storage, str) else journal.open_file(storage.absolute(), mend=mend)


def identity_of(**parts: Any) -> dict[str, str]:
    """Identity entries as short texts that can be compared and shown."""
    return {k: v if isinstance(v, str) else canonical(v) for k, v in parts.items()}
