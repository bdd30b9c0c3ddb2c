"""A worker that is gone is noticed, one that lives never is, and no two machines' clocks are compared."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lissom.core import leases
from lissom.core.errors import StorageLost, UserError
from lissom.core.measurement import Trial
from lissom.core.storages import Storage
from lissom.core.store import DEATHS, TrialStore
from lissom.tests.core.test_store import SAME, fid, reopen, request
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

ELSEWHERE = {"machine": "another", "space": "pid:[1]"}


@pytest.fixture(params=["journal", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return tmp_path / "trials.journal" if request.param == "journal" else f"sqlite:///{tmp_path}/trials.db"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def signed(seconds: float = 60.0, **changes: Any) -> dict[str, Any]:
    return leases.lease("somebody", seconds) | ELSEWHERE | changes


def test_a_beat_that_stands_still_is_stale_after_the_lease_on_the_observers_own_clock() -> None:
    clock = Clock()
    watch = leases.Watch(clock)
    for _ in range(59):
        assert not watch.stale(1, signed(), beat=7)
        clock.now += 1
    assert not watch.stale(1, signed(), beat=8)  # it lives
    for _ in range(60):
        assert not watch.stale(1, signed(), beat=8)
        clock.now += 1
    assert watch.stale(1, signed(), beat=8)
    watch.forget([])
    assert not watch.stale(1, signed(), beat=8)  # another trial under this number would begin anew


def test_a_worker_is_not_blamed_for_what_the_observer_missed() -> None:
    clock = Clock()
    watch = leases.Watch(clock)
    assert not watch.stale(1, signed(), beat=7)
    for _ in range(leases.LOOKS - 1):  # each time after an hour: a slow candidate, a laptop asleep, the database away
        clock.now += 3600
        assert not watch.stale(1, signed(), beat=7)
    clock.now += 3600
    assert watch.stale(1, signed(), beat=7)


def test_another_worker_on_the_same_trial_begins_anew() -> None:
    clock = Clock()
    watch = leases.Watch(clock)
    for worker in ("a", "b", "a"):
        for _ in range(4):
            assert not watch.stale(1, signed(worker=worker), beat=0)
            clock.now += 14


def test_a_trial_that_nobody_signed_for_is_free_soon() -> None:
    clock = Clock()
    watch = leases.Watch(clock)
    assert not watch.stale(1, None, beat=0)
    for _ in range(leases.LOOKS):
        clock.now += leases.UNSIGNED / leases.LOOKS
        freed = watch.stale(1, None, beat=0)
    assert freed


def test_a_process_that_is_gone_is_known_to_be_gone_on_its_own_machine_alone() -> None:
    code = "import json, lissom.core.leases as l; print(json.dumps(l.lease('w', 60.0)), flush=True); input()"
    import json

    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lease = json.loads(process.stdout.readline())
    assert lease["pid"] == process.pid and not leases.dead(lease, 1)
    assert leases.dead(lease | {"started": "1"}, 1)  # the number is used again
    process.kill()
    deadline = time.monotonic() + 10
    while not leases.dead(lease, 1):  # a zombie, until somebody waits for it
        assert time.monotonic() < deadline
    process.wait()
    assert leases.dead(lease, 1)
    assert not leases.dead(lease | {"machine": "another"}, 1) and not leases.dead(lease | {"space": "pid:[1]"}, 1)


def test_of_its_own_leases_a_process_knows_which_it_keeps() -> None:
    lease = leases.lease("w", 60.0)
    with leases.kept("w", 3, 60.0, lambda count: None):
        assert not leases.dead(lease, 3) and leases.dead(lease, 4)
    assert leases.dead(lease, 3)


def test_beats_go_on_while_some_fail_and_stop_at_the_end() -> None:
    beats: list[int] = []

    def beat(count: int) -> None:
        beats.append(count)
        if count % 2:
            raise OperationalError("SELECT 1", {}, Exception("away"))

    with leases.kept("w", 3, 0.06, beat):
        time.sleep(0.2)
    count = len(beats)
    assert count >= 4 and beats == list(range(1, count + 1))
    time.sleep(0.05)
    assert len(beats) == count


def claimed(store: TrialStore, *timesteps: float) -> Any:
    store.propose(request(*timesteps))
    claim = store.claim()
    assert claim is not None
    return claim


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are written as if by another machine, whose processes nobody here can ask for."""
    lease = leases.lease
    monkeypatch.setattr(leases, "lease", lambda *args: lease(*args) | ELSEWHERE)


def quick(place: Path | str, lease: float = 0.3) -> TrialStore:
    return TrialStore.open(place, "search", SAME, "evaluator", ("fid",), lease=lease)


def states(store: TrialStore) -> list[str]:
    return [trial.state.name for trial in store.study.get_trials()]


def eventually(said: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_silent_workers_candidate_is_free_again_and_its_late_result_is_discarded(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch)
    warned: list[str] = []
    driver, worker = quick(place), TrialStore.open(Storage(place, warn=warned.append), "search", SAME, "e", ("fid",), lease=0.3)
    key = driver.propose(request(900))
    claim = worker.claim()
    assert claim is not None and driver.claim() is None and driver.knows(key) and driver.busy

    def free() -> bool:
        driver.look(now=True)
        return not driver.knows(key)

    eventually(free)  # it was suspended, say
    driver.propose(request(900))
    again = driver.claim()
    assert again is not None and again.key == key
    assert worker.tell(claim, fid(5.0)) is None and "its result is discarded" in warned[0]
    assert driver.tell(again, fid(5.0)) is not None
    assert states(driver) == ["FAIL", "COMPLETE"] and list(reopen(place).trials) == [key]


def test_a_worker_that_shows_signs_of_life_keeps_its_candidate(place: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch)
    driver, worker = quick(place), quick(place)
    driver.propose(request(900))
    claim = worker.claim()
    assert claim is not None
    with worker.keeping(claim):
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            driver.look(now=True)
            assert driver.busy
            time.sleep(0.02)
    assert worker.tell(claim, fid(5.0)) is not None
    driver.look(now=True)
    assert states(driver) == ["COMPLETE"] and len(driver.trials) == 1


def test_a_dead_workers_written_result_is_kept(place: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = quick(place)
    claim = claimed(worker, 900)
    with monkeypatch.context() as patch:
        patch.setattr("lissom.core.store._finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            worker.tell(claim, fid(7.0))
    assert reopen(place).trials[claim.key].value("fid") == 7.0
    assert states(worker) == ["COMPLETE"]


def test_what_is_given_back_is_free_at_once_and_nobody_died(place: Path | str) -> None:
    driver, worker = quick(place, 60.0), quick(place, 60.0)
    for _ in range(DEATHS + 1):
        driver.propose(request(900))
        claim = worker.claim()
        assert claim is not None
        worker.give_back(claim)
        driver.look(now=True)
        assert not driver.knows(claim.key)
    driver.propose(request(900))
    assert driver.claim() is not None


def test_a_candidate_that_kills_its_workers_is_recorded_as_a_failure(place: Path | str) -> None:
    driver = quick(place, 60.0)
    for _ in range(DEATHS):
        key = driver.propose(request(900))
        assert quick(place, 60.0).claim() is not None  # and then the process is gone
        driver.look(now=True)
    assert driver.propose(request(900)) == key and driver.claim() is None
    for store in (driver, reopen(place)):
        assert (store.trials[key].state, store.trials[key].error) == ("failed", "its worker died 3 times")
        assert store.trials[key].number == DEATHS
    driver.retry()
    driver.propose(request(900))
    assert driver.claim() is not None


def test_of_many_claims_at_once_each_candidate_goes_to_one(place: Path | str) -> None:
    driver = quick(place)
    keys = [driver.propose(request(t)) for t in range(1, 13)]
    workers = [quick(place) for _ in range(3)]
    for worker in workers:
        worker.look(now=True)  # all see all of them waiting
    claims = [worker.claim() for _ in range(4) for worker in workers]
    assert sorted(c.key for c in claims if c) == sorted(keys)
    assert all(worker.claim() is None for worker in workers)


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store whose storage loses its connection in a chosen operation: before it, or after it, when the answer is lost."""
    warned: list[str] = []
    storage = Storage(f"sqlite:///{tmp_path}/trials.db", patience=5.0, warn=warned.append)
    store = TrialStore.open(storage, "search", SAME, "evaluator", ("fid",))

    def breaks(name: str, after: bool, times: int = 1) -> None:
        method = getattr(storage.backend, name)
        left = times

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left > 0:
                left -= 1
                if after:
                    method(*args, **kwargs)
                gone = OperationalError("COMMIT", {}, Exception("server closed the connection"))
                raise StorageInternalError("An exception is raised during the commit.") from gone
            return method(*args, **kwargs)

        monkeypatch.setattr(storage.backend, name, broken)

    return store, breaks, warned


@pytest.mark.parametrize("after", [False, True], ids=["lost before", "answer lost"])
@pytest.mark.parametrize("name", ["create_new_trial", "set_trial_user_attr", "set_trial_state_values", "get_all_trials"])
def test_a_lost_connection_is_waited_for_and_nothing_is_there_twice(flaky: Any, name: str, after: bool) -> None:
    store, breaks, warned = flaky
    breaks(name, after)
    key = store.propose(request(900))
    claim = store.claim()
    if name == "set_trial_state_values" and after:  # taken, and not known to be: free again after a moment
        assert claim is None

        def free() -> bool:
            store.look(now=True)
            return not store.knows(key)

        eventually(free)
        store.propose(request(900))
        claim = store.claim()
    assert claim is not None
    assert store.tell(claim, fid(5.0)) is not None
    assert states(store).count("COMPLETE") == 1 and "WAITING" not in states(store) and "RUNNING" not in states(store)
    assert len(warned) == 1 and "cannot be reached (server closed the connection)" in warned[0]


@pytest.mark.parametrize("name", ["set_trial_user_attr", "set_trial_state_values"])
def test_a_result_whose_answer_was_lost_is_told_once(flaky: Any, name: str) -> None:
    store, breaks, warned = flaky
    claim = claimed(store, 900)
    breaks(name, after=True)
    assert store.tell(claim, fid(5.0)) is not None
    assert states(store) == ["COMPLETE"] and len(warned) == 1


def test_after_its_patience_it_ends_with_one_sentence(flaky: Any) -> None:
    store, breaks, warned = flaky
    store.storage.patience = 0.2
    breaks("create_new_trial", after=False, times=10**6)
    with pytest.raises(StorageLost, match=r"cannot be reached for 0 s now .*Nothing complete is lost: .*--resume") as e:
        store.propose(request(900))
    assert "\n" not in str(e.value) and len(warned) == 1 and isinstance(e.value, UserError)


def test_an_error_that_does_not_pass_is_not_repeated(flaky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import ProgrammingError

    store, _, warned = flaky
    asked: list[int] = []

    def broken(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise StorageInternalError("commit") from ProgrammingError("SELECT", {}, Exception("no such table"))

    monkeypatch.setattr(store.storage.backend, "create_new_trial", broken)
    with pytest.raises(UserError, match="cannot be used as storage \\(no such table\\)"):
        store.propose(request(900))
    assert len(asked) == 1 and not warned


def test_a_request_that_is_there_twice_is_scored_once(place: Path | str) -> None:
    store = quick(place)
    key = store.propose(request(900))
    store._ledger.open.clear()  # as if the answer to the first had been lost, and not looked for
    store.propose(request(900))
    claim = store.claim()
    assert claim is not None and claim.key == key
    with store.keeping(claim):
        assert store.claim() is None
    store.tell(claim, fid(1.0))
    assert states(store) == ["COMPLETE", "FAIL"]


def test_a_study_is_read_once_and_not_again(place: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = quick(place)
    for t in range(1, 6):
        claim = claimed(store, t)
        store.tell(claim, fid(float(t)))
    other = quick(place)
    monkeypatch.setattr(Trial, "model_validate_json", lambda *_: pytest.fail("read again"))
    other.look(now=True)
    assert len(other.trials) == 5
    best = other.best(lambda trial: trial.value("fid") > 2)
    assert best is not None and best.value("fid") == 3.0


def test_a_torn_line_of_a_worker_that_was_killed_does_not_spoil_the_others(tmp_path: Path) -> None:
    journal = tmp_path / "trials.journal"
    one, two = quick(journal), quick(journal)
    one.propose(request(900))
    with journal.open("ab") as f:
        f.write(b'{"op_code":4,"worker_id":"')
    two.propose(request(800))
    assert len(states(one)) == 2 and all(line.endswith(b"}\n") for line in journal.read_bytes().splitlines(keepends=True))


def test_what_is_no_journal_is_left_alone_even_without_a_newline(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt: not a lissom journal"):
        reopen(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_several_objectives_are_told_as_they_are_named(place: Path | str) -> None:
    store = TrialStore.open(place, "search", SAME, "evaluator", ("fid", "macs"))
    store.propose(request(900).model_copy(update={"costs": {"macs": 0.5}}))
    claim = store.claim()
    assert claim is not None
    store.tell(claim, fid(2.0))
    assert store.study.metric_names == ["fid", "macs"]
    assert store.study.get_trials()[0].values == [2.0, 0.5]
    worker = TrialStore.open(place, "search", SAME, "evaluator", (), driver=False)
    assert worker.objectives == ("fid", "macs")


def test_hidden_processes_of_others_are_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_stat", lambda pid: [])
    assert leases._alive(os.getpid(), None) and not leases._alive(2**22 + 1, None)
