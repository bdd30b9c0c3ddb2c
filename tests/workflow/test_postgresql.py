"""A search on PostgreSQL by many processes, with kills and a restart of the database, is the search of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
from lissom.cli.app import app
from lissom.core.errors import UserError
from lissom.core.storages import Storage
from lissom.core.store import TrialStore
from lissom.tests.cli.commands import lissom, refused
from lissom.tests.core.test_store import SAME, fid, request
from lissom.tests.workflow import crew, small
from lissom.tests.workflow.postgres import SECRET, Server
from lissom.workflow._evaluator import Evaluator

SECONDS = 0.25  # of an evaluation
STAGE = {"trials": 24, "population": 8}
assert app  # loaded before any clock runs


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    try:
        made.start()
        yield made
    finally:
        made.remove()


class Crew:
    """Workers in processes of their own."""

    def __init__(self, where: str, folder: Path) -> None:
        self.where, self.log = where, crew.Log(folder / "evaluations.jsonl")
        self.processes: list[subprocess.Popen[str]] = []
        self.said: list[Path] = []
        self.log.hold.touch()

    def add(self, *own: str, more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "lissom.tests.workflow.crew", self.where, str(self.log.path), str(SECONDS), *own, "--"]
        said = self.log.path.with_name(f"worker{len(self.said)}.txt")
        process = subprocess.Popen(
            [*words, "--idle", "60s", "--lease", "3s", "--json", *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said.open("w"), stderr=subprocess.STDOUT, text=True, cwd=said.parent,
        )  # fmt: skip
        self.processes.append(process)
        self.said.append(said)
        return process

    def text(self) -> str:
        return "".join(path.read_text() for path in self.said)

    def end(self) -> None:
        self.log.hold.unlink(missing_ok=True)
        for process in self.processes:
            process.kill()
            process.wait()


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def played(team: Crew, play: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    """What happens to a search while it runs, in a thread: the search itself has the main one, and its signals."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            play()
        except Exception as e:  # noqa: BLE001  shown by the test
            failed.append(e)
            team.log.hold.unlink(missing_ok=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same search by one process, on its own journal."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "score", small.pretended)
        small.search(folder, small.text(**STAGE))
    return folder


def same(out: Path, alone: Path, studies: dict[str, list[optuna.trial.FrozenTrial]], log: crew.Log) -> None:
    """Nothing lost, nothing evaluated twice that was complete, and the same outcome."""
    assert (out / "plan.json").read_bytes() == (alone / "plan.json").read_bytes()
    results = {
        (name, t.user_attrs["key"]): t.user_attrs["result"]
        for name, ts in studies.items()
        for t in ts
        if "result" in t.user_attrs
    }
    assert results.keys() == small.evaluated(alone).keys()
    assert sum("result" in t.user_attrs for ts in studies.values() for t in ts) == len(results)
    assert set(log.ended().values()) == {1} and len(log.ended()) == len(results)
    assert all(t.state.is_finished() for ts in studies.values() for t in ts)
    ours, theirs = small.report(out), small.report(alone)
    assert ours["winner"]["measurements"] == theirs["winner"]["measurements"] and ours["ratio"] == theirs["ratio"]
    assert ours["spent"]["evaluations"] == theirs["spent"]["evaluations"]


def test_four_workers_one_killed_one_late_and_the_database_restarted(
    server: Server, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, team = tmp_path / "run", Crew(server.url, tmp_path)
    monkeypatch.setattr(Evaluator, "score", crew.slowly(team.log, SECONDS))
    watched = small.Watched()
    try:
        victim = team.add("stuck", "elsewhere")  # its beats alone tell of its death
        for _ in range(2):
            team.add()
        until(lambda: team.text().count("Waiting for it") == 3)  # started before the search, they wait for it

        def play() -> None:
            until(lambda: team.log.count("begin", victim.pid) == 2 and team.text().count("joined") == 3)
            victim.send_signal(signal.SIGKILL)
            late = team.add("elsewhere")
            until(lambda: team.log.count("begin", late.pid) == 1)
            team.log.hold.unlink()
            until(lambda: team.log.count("end", late.pid) == 1)
            server.stop("immediate")
            time.sleep(1.5)
            server.start()

        thread, failed = played(team, play)
        options = small.Options(device="cpu", storage=server.url)
        small.search(out, small.text(**STAGE), progress=watched, options=options)
        thread.join()
        assert not failed, failed
        assert [p.wait(30) for p in team.processes] == [-signal.SIGKILL, 0, 0, 0], team.text()
    finally:
        team.end()
    backend = Storage(server.url).backend
    names = [
        n for n in optuna.get_all_study_names(backend) if n.startswith(json.loads((out / "environment.json").read_text())["id"])
    ]
    studies = {n.rpartition("/")[2]: optuna.load_study(study_name=n, storage=backend).get_trials() for n in names}
    same(out, alone, studies, team.log)
    search = studies["search"]
    assert sum("lost" in t.user_attrs for t in search) == 1 and sum(t.state.name == "FAIL" for t in search) >= 1
    workers = {line["pid"] for line in team.log.lines() if line["what"] == "end"}
    assert {p.pid for p in team.processes} <= workers | {victim.pid} and os.getpid() in workers
    assert all('"ended": "finished"' in path.read_text() for path in team.said[1:])
    assert any("cannot be reached" in text and server.shown in text for text in watched.warned)
    (invited,) = [text for text in watched.said if "lissom worker" in text]
    assert f"--storage postgresql://me@127.0.0.1:{server.port}/postgres --study " in invited and "LISSOM_STORAGE" in invited
    everything = team.text() + "".join(watched.warned + watched.said)
    everything += "".join(
        p.read_text(errors="replace") for p in out.rglob("*") if p.suffix in (".json", ".yaml", ".md", ".py", ".html")
    )
    assert SECRET not in everything


def test_on_a_journal_in_a_shared_folder_too(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    team = Crew(str(out / "trials.journal"), tmp_path)
    monkeypatch.setattr(Evaluator, "score", crew.slowly(team.log, SECONDS))
    try:
        victim = team.add("stuck")
        team.add("elsewhere")
        until(lambda: team.text().count("Waiting for it") == 2)

        def play() -> None:
            until(lambda: team.log.count("begin", victim.pid) == 2)
            victim.send_signal(signal.SIGKILL)
            late = team.add()
            until(lambda: team.log.count("begin", late.pid) == 1)
            team.log.hold.unlink()

        thread, failed = played(team, play)
        small.search(out, small.text(**STAGE))
        thread.join()
        assert not failed, failed
        assert [p.wait(30) for p in team.processes] == [-signal.SIGKILL, 0, 0], team.text()
    finally:
        team.end()
    same(out, alone, small.studies(out), team.log)


def test_the_store_on_postgresql(server: Server) -> None:
    """What test_leases.py shows on a journal and SQLite, in short."""
    one, two = (
        TrialStore.open(server.url, "short/search", SAME, "evaluator", ("fid", "macs"), lease=60.0, driver=driver)
        for driver in (True, False)
    )
    keys = [one.propose(request(t).model_copy(update={"costs": {"macs": 0.5}})) for t in (900, 800, 700)]
    with ExitStack() as kept:
        for key, store in zip(keys, (one, two, one), strict=True):
            claim = store.claim()
            assert claim is not None and claim.key == key
            kept.enter_context(store.keeping(claim))
            if store is two:
                assert two.tell(claim, fid(2.0)) is not None
        assert two.claim() is None and two.busy and two.objectives == ("fid", "macs")
    one.look(now=True)
    assert list(one.trials) == [keys[1]]
    states = [trial.state.name for trial in one.study.get_trials()]
    assert states == ["FAIL", "COMPLETE", "FAIL"]  # those that nobody keeps are as if their process had died
    assert one.study.get_trials()[1].values == [2.0, 0.5] and one.study.get_trials()[1].params == {"t0": 800.0}


def test_a_connection_that_is_lost_amid_a_query_is_waited_for(server: Server) -> None:
    """Optuna repeats some queries on the lost connection, and then says PendingRollbackError instead of what happened."""
    import psycopg
    from sqlalchemy import event

    said: list[str] = []
    storage = Storage(server.url, warn=said.append)
    backend = storage.backend
    study = backend.create_new_study([optuna.study.StudyDirection.MINIMIZE], "amid")
    trial = backend.create_new_trial(study)
    lost: list[str] = []

    def cut(connection: object, cursor: object, statement: str, *_: object) -> None:
        if "FROM trials" in statement and not lost:
            lost.append(statement)
            with psycopg.connect(server.url) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )

    event.listen(backend._backend.engine, "before_cursor_execute", cut)
    assert [t._trial_id for t in storage.do(lambda: backend.get_all_trials(study))] == [trial]
    assert lost and len(said) == 1 and "cannot be reached" in said[0] and "terminating connection" in said[0]


def test_bad_storages_are_one_sentence_without_the_password(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url, says in (
        (server.url.replace(SECRET, "wrong-secret"), "password authentication failed"),
        (server.url.replace("/postgres", "/nowhere"), 'database "nowhere" does not exist'),
        (server.url.replace(str(server.port), "1"), "Connection refused"),
    ):
        began = time.monotonic()
        for words in (("worker",), ("search", "random_search", "zoo:fashion", "--out", "x")):
            monkeypatch.setenv("LISSOM_STORAGE", url)
            said = refused(*words)
            assert says in said and "postgresql://me:***@" in said and "secret" not in said and len(said.splitlines()) == 1, (
                said
            )
        assert time.monotonic() - began < 60 and not (tmp_path / "x").exists()
    monkeypatch.setenv("LISSOM_STORAGE", server.url)
    ended = lissom("worker", "--study", "nobody/x", "-v")
    assert ended.exit_code == 2 and SECRET not in ended.output + ended.stderr
    assert "holds no search 'nobody/x'" in ended.stderr


def test_without_a_driver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.core.storages.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"postgresql://me:\*\*\*@h/d: no driver .* pip install 'psycopg\[binary\]'"):
        Storage("postgresql://me:secret@h/d")


def test_where_there_is_no_server_the_tests_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL server here"):
        Server()
