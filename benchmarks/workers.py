"""What many workers bring and what a trial costs to keep: `python -m lissom.benchmarks.workers` (about ten minutes).

Candidates that take one second each and compute nothing, so that what is measured is the queue: candidates a minute with 1, 2
and 4 workers, each a process, on a journal file and on PostgreSQL; then, in studies of 100 and of 20,000 trials, how long it
takes to open the study, to queue a request, to claim one, and to tell a result. PostgreSQL is measured where LISSOM_STORAGE
names a database that may be filled (postgresql://user@host/database); without one its rows are left out.
`python -m lissom.tests.workflow.postgres python -m lissom.benchmarks.workers` lends it a server for the time being.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.candidate import Candidate, Request, SamplingPlan, Scheduler, Seeds, Step
from ..core.measurement import Measurement, Trial
from ..core.storages import Storage
from ..core.store import TrialStore, identity_of
from . import _results

CREW, STEPS, HALVES = (1, 2, 4), 4, 40
IDENTITY = identity_of(lissom="benchmark")
TURNS = 20  # trials that are timed in each study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a candidate")
    parser.add_argument("--each", type=int, default=30, help="candidates for each worker")
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 20_000], help="in the studies whose costs are measured")
    parser.add_argument("--try", dest="tried", action="store_true", help="print, and leave docs/results.md alone")
    asked = parser.parse_args()
    url = os.environ.get("LISSOM_STORAGE")
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Callable[[], str | Path]] = {"journal": lambda: Path(folder) / f"{uuid.uuid4().hex}.journal"}
        kept: dict[str, Callable[[], str | Path]] = {
            **shared,
            "SQLite": lambda: f"sqlite:///{folder}/{uuid.uuid4().hex}.db",
        }
        if url:
            shared["PostgreSQL"] = kept["PostgreSQL"] = lambda: url
        speed = [_speed(name, make(), crew, asked.seconds, asked.each) for name, make in shared.items() for crew in CREW]
        cost = [_cost(name, make(), trials) for name, make in kept.items() for trials in asked.trials]
    text = (
        f"Candidates of {asked.seconds:g} s, {asked.each} for each worker, on {os.cpu_count()} processor cores; "
        f"{platform.machine()}, Python {platform.python_version()}.\n\n"
        + _results.table(["storage", "workers", "candidates a minute", "of what the workers could do"], speed)
        + f"\n\nMedian of {TURNS} trials of {STEPS} steps, in a study that holds so many already; opening it once.\n\n"
        + _results.table(["storage", "trials", "open, s", "queue, ms", "claim, ms", "tell, ms", "look, ms"], cost)
    )
    if asked.tried:
        print(text)
    else:
        _results.write("workers", text)


def _speed(name: str, where: str | Path, crew: int, seconds: float, each: int) -> list[str]:
    """A row: workers that are there already begin at once, and it is over when the last result is told."""
    study, total = f"{uuid.uuid4().hex}/search", crew * each
    store = _open(Storage(where), study)
    for number in range(total):
        store.propose(_request(number), number)
    process = multiprocessing.get_context("spawn")
    ready, go = process.Barrier(crew + 1), process.Event()
    workers = [process.Process(target=_work, args=(where, study, seconds, ready, go), daemon=True) for _ in range(crew)]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.monotonic()
    go.set()
    for worker in workers:
        worker.join()
    took = time.monotonic() - began
    store.look(now=True)
    assert len(store.trials) == total
    return [name, str(crew), f"{60 * total / took:.0f}", f"{total * seconds / took / crew:.0%}"]


def _work(where: str | Path, study: str, seconds: float, ready: Any, go: Any) -> None:
    """What a worker does between a candidate and the next, with nothing to compute."""
    store = _open(Storage(where), study)
    ready.wait()
    go.wait()
    while (claim := store.claim()) is not None:
        store.recall("work")
        with store.keeping(claim):
            time.sleep(seconds)
        store.tell(claim, _measured(claim.number), calls=STEPS, plain_calls=STEPS, seconds=seconds)


def _cost(name: str, where: str | Path, trials: int) -> list[str]:
    """A row. The study is filled with ended trials, one write each."""
    study = f"{uuid.uuid4().hex}/search"
    _fill(_open(Storage(where), study), trials)
    began = time.perf_counter()
    store = _open(Storage(where), study)
    opened = time.perf_counter() - began
    assert len(store.trials) == trials
    times: dict[str, list[float]] = {"queue": [], "claim": [], "tell": [], "look": []}
    for number in range(trials, trials + TURNS + 1):
        with _timed(times["queue"]):
            store.propose(_request(number), number)
        with _timed(times["claim"]):
            claim = store.claim()
        assert claim is not None
        with _timed(times["tell"]):
            store.tell(claim, _measured(number))
        with _timed(times["look"]):
            store.look(now=True)
    medians = [f"{statistics.median(taken[1:]):.1f}" for taken in times.values()]  # the first one warms up
    return [name, f"{trials:,}", f"{opened:.2f}", *medians]


@contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    """Adds the milliseconds that the block takes."""
    began = time.perf_counter()
    yield
    times.append(1000 * (time.perf_counter() - began))


def _fill(store: TrialStore, trials: int) -> None:
    """As if so many candidates had been scored."""
    from optuna.trial import TrialState, create_trial

    from ..core.dashboard import ranges, visible

    backend = store.storage.backend
    at = backend.get_study_id_from_name(store.study.study_name)
    for number in range(trials):
        request = _request(number)
        result = Trial(number=number, request=request, measurements=_measured(number), calls=STEPS, plain_calls=STEPS)
        shown = visible(request)
        attributes = {
            "key": request.key("evaluator"),
            "request": request.canonical(),
            "index": number,
            "lease": {"worker": "nobody", "seconds": 60.0},
            "result": result.canonical(),
        }
        template = create_trial(
            state=TrialState.COMPLETE, value=1.0, params=shown, distributions=ranges(shown), user_attrs=attributes
        )
        backend.create_new_trial(at, template)


def _open(storage: Storage, study: str) -> TrialStore:
    return TrialStore.open(storage, study, IDENTITY, "evaluator", ("fid",))


def _request(number: int) -> Request:
    """A plan of its own for each number."""
    times = [999.0 - number / 100_000, *(float(t) for t in (700, 400, 100))][:STEPS]
    plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=tuple(Step(timestep=t) for t in times))
    return Request(candidate=Candidate(plan=plan), seeds=Seeds(role="search", base=0, count=256), origin="benchmark")


def _measured(number: int) -> tuple[Measurement, ...]:
    """As large as what an evaluation gives."""
    seeds, halves = Seeds(role="search", base=0, count=256), tuple(1.0 + number / 7 + i / 3 for i in range(HALVES))
    return tuple(
        Measurement(metric=name, value=1.0, direction="lower", n=256, seeds=seeds, replicates=halves)
        for name in ("fid", "clip_score")
    )


if __name__ == "__main__":
    main()
