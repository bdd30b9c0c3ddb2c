"""Take waiting trials of a running search, on any machine that reaches its storage."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.leases import LEASE
from ..core.measurement import Trial
from ..core.storages import Storage, place_of
from ..core.store import TrialStore
from . import _work
from ._settle import LONGEST, Clock, Pause, evaluate
from ._stores import identity
from .context import Options, Progress

IDLE = 600.0  # seconds without anything to do after which a worker ends


@dataclass(frozen=True)
class Terms:
    """How a worker takes part; whatever decides results is the search's."""

    options: Options = field(default_factory=Options)  # memo, trust and offload of this machine; how long at most
    device: str | None = None  # the search's kind, e.g. cuda:1
    dtype: str | None = None
    model: str | None = None  # where the model is on this machine, if elsewhere
    base: Path | None = None  # where the recipe's relative paths start on this machine, if elsewhere
    lease: float = LEASE  # seconds without a sign of life after which others take over
    idle: float | None = None  # seconds without anything to do after which it ends; given, it also waits for a search to begin
    models: Mapping[str, str] = field(default_factory=dict)  # where other models of plans are on this machine, if elsewhere
    patience: float | None = None  # seconds that a lost connection is waited for


@dataclass
class Outcome:
    """What a worker has done."""

    study: str
    scored: int = 0
    failed: int = 0
    discarded: int = 0  # results that came after the trial had been taken away
    ended: str = ""  # finished, idle, max-time

    @property
    def said(self) -> str:
        why = {
            "finished": "the search is finished",
            "idle": "there was nothing to do",
            "max-time": "its time is over",
        }[self.ended]
        more = f", {self.failed} of them failed" if self.failed else ""
        late = f", {self.discarded} results came too late" if self.discarded else ""
        return f"{self.scored + self.failed} candidates{more}{late}; ended because {why}"


def work(where: str | Path, study: str | None, terms: Terms, progress: Progress) -> Outcome:
    """Score what waits in a search until it is finished, time is over, or nothing was to do for a while.

    where: storage URL or journal file. study: RUN_ID/FOLDER as the run says it; may be left out where one search alone is
    running. Raises UserError for a search that is not there, or that this worker would measure otherwise.
    """
    storage, name = _find(where, study, terms, progress)
    prefix, clock = f"{name}/" if name else "", Clock(terms.options.max_time, time.monotonic())
    outcome = Outcome(name or storage.place)
    known = _described(storage, prefix)
    if known["finished"]:
        outcome.ended = "finished"
        return outcome
    job = _work.restore(
        known,
        storage.place,
        terms.options,
        progress,
        device=terms.device,
        dtype=terms.dtype,
        model=terms.model,
        base=terms.base,
        models=terms.models,
    )
    same = identity(job.stage, job.subject)
    stores = {
        study: TrialStore.open(
            storage,
            prefix + study,
            {**same, "evaluator": judge.id},
            judge.id,
            job.stage.objective,
            lease=terms.lease,
            driver=False,
        )
        for study, judge in job.judges.items()
    }
    progress.say(f"joined the search {outcome.study} on {job.subject.model.device}")
    pause, active = Pause(), time.monotonic()
    while not clock.over():
        known = stores["search"].recall("work")
        if known["finished"]:
            outcome.ended = "finished"
            return outcome
        _work.check_version(known, storage.place)
        if any(_one(stores[study], judge, study, outcome, progress) for study, judge in job.judges.items()):
            pause.end()
            active = time.monotonic()
            continue
        if any(store.busy for store in stores.values()):  # somebody is at work, and may propose more afterwards
            active = time.monotonic()
        elif time.monotonic() - active > (IDLE if terms.idle is None else terms.idle):
            outcome.ended = "idle"
            return outcome
        pause.wait(sum(store.cost for store in stores.values()))
    outcome.ended = "max-time"
    return outcome


def _one(store: TrialStore, judge: Any, study: str, outcome: Outcome, progress: Progress) -> bool:
    """Score one request, if any waits."""
    claim = store.claim()
    if claim is None:
        return False
    trial = evaluate(store, claim, judge, progress)
    if trial is None:
        outcome.discarded += 1
    elif trial.state == "failed":
        outcome.failed += 1
    else:
        outcome.scored += 1
        progress.say(f"{study} {claim.number}: {_value(trial, store.objective)} in {trial.seconds:.1f} s")
    return True


def _value(trial: Trial, objective: str) -> str:
    found = trial.measured(objective)
    return f"{found.label} {found.value:.4g}" if found else f"{objective} {trial.value(objective):.4g}"


def _find(where: str | Path, study: str | None, terms: Terms, progress: Progress) -> tuple[Storage, str]:
    """The storage and the name of the search in it; waits for both where --idle is given."""
    began, said = time.monotonic(), False
    while True:
        try:
            if isinstance(where, Path) and not where.is_file():
                raise _absent(where)
            storage = Storage(where, patience=terms.patience, warn=progress.warn)
            return storage, _name(storage, study)
        except _NotYet as e:
            if terms.idle is None:
                raise UserError(f"{e} Start the search first, or let the worker wait for it with --idle 30m.") from None
            if time.monotonic() - began > terms.idle:
                raise UserError(f"{e} Waited for {terms.idle:.0f} s.") from None
            if not said:
                progress.say(f"{e} Waiting for it.")
                said = True
        time.sleep(LONGEST)


class _NotYet(Exception):
    """There is no such search, and may be one later."""


def _absent(journal: Path) -> Exception:
    if journal.is_dir():
        return UserError(f"{journal}: is a folder. Name the journal in it, e.g. {journal / 'trials.journal'}.")
    return _NotYet(f"{place_of(journal)}: there is no such journal.")


def _name(storage: Storage, study: str | None) -> str:
    """The search's name, empty in a run's own journal. Raises _NotYet where there is none, UserError where that is unclear."""
    names = {name.removesuffix("search").rstrip("/"): facts for name, facts in storage.studies.items() if _is_search(name)}
    running = [name for name, facts in names.items() if "work" in facts and not facts["work"]["finished"]]
    there = "; running there: " + ", ".join(sorted(running)[:10]) if any(running) else ""
    if study is not None:
        name = study.removesuffix("/search").strip("/")
        if name not in names:
            raise _NotYet(f"{storage.place}: holds no search {name!r}{there}.")
        found = name
    elif list(names) == [""]:
        found = ""
    elif len(running) == 1:
        found = running[0]
    elif not running:
        raise _NotYet(f"{storage.place}: no search is running there.")
    else:
        raise UserError(
            f"{storage.place}: {len(running)} searches are running there. Choose one by --study: {', '.join(running)}"
        )
    if "identity" not in names[found]:
        raise UserError(
            f"{storage.place}: the study {found or 'search'!r} was not made by lissom. Check --storage and --study."
        )
    if "work" not in names[found]:
        raise _NotYet(f"{storage.place}: the search {found or 'search'!r} takes no workers yet.")
    return found


def _is_search(name: str) -> bool:
    return name == "search" or name.endswith("/search")


def _described(storage: Storage, prefix: str) -> dict[str, Any]:
    """What the driver has written for workers."""
    described: dict[str, Any] = storage.studies[f"{prefix}search"]["work"]
    return described
