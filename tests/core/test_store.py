"""What a trial store must never lose, whatever happens to the process that writes it."""

import errno
import io
import json
import os
from pathlib import Path

import optuna
import pytest
from lissom.core.candidate import Candidate, Request, SamplingPlan, Scheduler, Seeds, Step
from lissom.core.errors import DiskError, UserError
from lissom.core.measurement import Measurement
from lissom.core.store import TrialStore, identity_of

SAME = identity_of(lissom="0", model="m", settings={"a": 1})


def request(*timesteps: float, count: int = 8, skip: tuple[str, ...] = ()) -> Request:
    steps = tuple(Step(timestep=t, skip=skip) for t in timesteps)
    plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=steps)
    return Request(candidate=Candidate(plan=plan), seeds=Seeds(role="search", base=0, count=count))


def fid(value: float) -> tuple[Measurement, ...]:
    return (Measurement(metric="fid", value=value, direction="lower", n=8),)


def reopen(path: Path | str, **changes: str) -> TrialStore:
    return TrialStore.open(path, "search", SAME | changes, "evaluator", ("fid",))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "trials.journal"


def scored(store: TrialStore, wanted: Request, value: float, index: int | None = None) -> str:
    key = store.propose(wanted, index)
    claim = store.claim()
    assert claim is not None and claim.key == key
    store.tell(claim, fid(value), calls=3, plain_calls=4, seconds=1.0)
    return key


def test_what_is_told_is_there_after_reopening(journal: Path) -> None:
    store = reopen(journal)
    key = scored(store, request(900, 300, skip=("a", "b")), 5.0)
    again = reopen(journal)
    assert again.trials == store.trials and again.trials[key].value("fid") == 5.0
    assert again.trials[key].calls == 3 and again.trials[key].plain_calls == 4
    assert again.claim() is None


def test_a_request_is_queued_and_scored_once_however_often_it_is_proposed(journal: Path) -> None:
    store = reopen(journal)
    keys = {store.propose(request(900, 300)) for _ in range(3)} | {scored(store, request(900, 300), 1.0)}
    assert len(keys) == 1 and store.claim() is None
    assert reopen(journal).propose(request(900, 300)) in keys and reopen(journal).claim() is None


def test_requests_are_claimed_in_the_order_they_were_proposed(journal: Path) -> None:
    store = reopen(journal)
    keys = [store.propose(request(t)) for t in (900, 100, 500)]
    reopened = reopen(journal)
    claimed = [reopened.claim() for _ in keys]
    assert [c.key for c in claimed if c] == keys


def test_a_claim_whose_process_died_is_evaluated_again_and_its_record_stays(journal: Path) -> None:
    store = reopen(journal)
    key = store.propose(request(900, 300), 0)
    assert store.claim() is not None  # and then the process is gone
    after = reopen(journal)
    assert key not in after.trials and after.claim() is None
    assert scored(after, request(900, 300), 2.0, 0) == key
    states = [t.state.name for t in after.study.get_trials()]
    assert states == ["FAIL", "COMPLETE"]


def test_a_result_that_was_written_but_not_told_is_not_evaluated_again(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = reopen(journal)
    key = store.propose(request(900, 300))
    claim = store.claim()
    assert claim is not None
    with monkeypatch.context() as patch:  # killed between the two writes
        patch.setattr("lissom.core.store._finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.tell(claim, fid(7.0))
    after = reopen(journal)
    assert after.trials[key].value("fid") == 7.0
    assert [t.value for t in after.study.get_trials()] == [7.0]


def test_failures_are_kept_and_cost_infinity(journal: Path) -> None:
    store = reopen(journal)
    key = store.propose(request(900))
    claim = store.claim()
    assert claim is not None
    store.tell(claim, error="NaN")
    kept = reopen(journal).trials[key]
    assert (kept.state, kept.error, kept.value("fid")) == ("failed", "NaN", float("inf"))


def test_a_metric_where_higher_is_better_is_stored_as_a_cost(journal: Path) -> None:
    store = TrialStore.open(journal, "search", SAME, "evaluator", ("accuracy",))
    store.propose(request(900))
    claim = store.claim()
    assert claim is not None
    store.tell(claim, (Measurement(metric="accuracy", value=0.8, direction="higher", n=8),))
    assert store.study.best_value == -0.8


@pytest.mark.parametrize("torn", [b'{"op_code":', b"\0" * 5000, b"x" * 10_000])
def test_a_torn_last_line_is_cut_and_nothing_before_it(journal: Path, torn: bytes) -> None:
    key = scored(reopen(journal), request(900, 300), 5.0)
    whole = journal.read_bytes()
    with journal.open("ab") as f:
        f.write(torn)
    store = reopen(journal)
    assert journal.read_bytes() == whole and list(store.trials) == [key]
    scored(store, request(800, 300), 4.0)  # the next record is not glued to the torn one
    assert len(reopen(journal).trials) == 2


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
def test_a_lock_left_by_a_killed_writer_frees_itself(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.core.journal.LOCK_SECONDS", 1)
    monkeypatch.chdir(journal.parent)
    key = scored(reopen(Path(journal.name)), request(900), 5.0)  # a relative path, as users give it
    os.symlink(journal, f"{journal}.lock")
    assert list(reopen(Path(journal.name)).trials) == [key]


GARBAGE = [
    b"garbage\n",
    b"\xff\xfe\n\xff\n",
    b'{"a": 1}\n',
    b"[1]\n",
    b"3\n",
    b'{"op_code": 99, "worker_id": "x"}\n',
    b"{}\n{}\n",
]


@pytest.mark.parametrize("content", GARBAGE)
def test_a_file_that_is_no_journal_is_refused_by_name_and_left_alone(journal: Path, content: bytes) -> None:
    journal.write_bytes(content)
    with pytest.raises(UserError, match=r"trials\.journal: not a lissom journal .* Choose another --out") as e:
        reopen(journal)
    assert "\n" not in str(e.value) and journal.read_bytes() == content


def test_a_damaged_record_is_refused_by_name(journal: Path) -> None:
    scored(reopen(journal), request(900), 5.0)
    journal.write_text(journal.read_text().replace('\\"metric\\"', '\\"metrik\\"'))
    with pytest.raises(UserError, match=r"trials\.journal: not a lissom journal"):
        reopen(journal)


def test_a_study_of_another_search_is_refused_with_both_values(journal: Path) -> None:
    scored(reopen(journal), request(900), 5.0)
    before = journal.read_bytes()
    with pytest.raises(UserError, match=r"belongs to another search: its model is m, this one's is other\. .*--out"):
        reopen(journal, model="other")
    assert journal.read_bytes() == before
    assert len(reopen(journal, lissom="1").trials) == 1  # a newer version may finish what an older one began


def test_a_study_that_someone_else_made_is_refused(journal: Path) -> None:
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    optuna.create_study(study_name="search", storage=storage).optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(UserError, match="was not made by lissom"):
        reopen(journal)


def test_another_sequence_of_proposals_stops_with_both_versions(journal: Path) -> None:
    scored(reopen(journal), request(900), 5.0, index=0)
    with pytest.raises(UserError, match=r"proposal 0 .*\(lissom 0\) is not what lissom \S+ proposes"):
        reopen(journal).propose(request(800), 0)


def test_reading_writes_nothing_while_a_search_is_running(journal: Path) -> None:
    store = reopen(journal)
    key = scored(store, request(900), 5.0)
    store.propose(request(800))
    claim = store.claim()
    before = journal.read_bytes() + b'{"op'
    journal.write_bytes(before)  # the other process is in the middle of a line
    assert list(TrialStore.read(journal, "search", ("fid",)).trials) == [key]
    assert journal.read_bytes() == before
    with pytest.raises(UserError, match="holds no study 'rescore'"):
        TrialStore.read(journal, "rescore", ("fid",))
    journal.write_bytes(before[:-4])
    assert claim is not None
    store.tell(claim, fid(3.0))
    assert len(reopen(journal).trials) == 2


def test_a_full_disk_is_one_sentence_and_loses_nothing(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = reopen(journal)
    key = scored(store, request(900), 5.0)
    store.propose(request(800))
    claim = store.claim()
    assert claim is not None
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DiskError, match=r"trials\.journal: cannot be written \(No space left on device\).*--resume"):
            store.tell(claim, fid(1.0))
    assert key in reopen(journal).trials


def test_a_folder_in_the_place_of_the_journal_is_refused(journal: Path) -> None:
    journal.mkdir()
    with pytest.raises(UserError, match=r"trials\.journal: cannot be written"):
        reopen(journal)


def test_any_optuna_storage_will_do_and_its_password_is_not_shown(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    key = scored(reopen(url), request(900), 5.0)
    assert list(reopen(url).trials) == [key]
    with pytest.raises(UserError, match=r"--storage trials\.db: not a storage URL\. Write one such as sqlite:///"):
        reopen("trials.db")
    with pytest.raises(UserError) as e:
        reopen("postgresql://me:secret@localhost:1/db")
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


def test_the_genome_is_visible_to_a_dashboard(journal: Path) -> None:
    store = reopen(journal)
    scored(store, request(900, 300, skip=("a", "b")), 5.0)
    scored(store, request(*range(900, 0, -10)), 6.0)
    short, long = store.study.get_trials()
    assert short.params == {"t0": 900, "t1": 300, "skipped0": 2, "skipped1": 2}
    assert len(long.params) == 50 and long.params["t00"] == 900
    assert len(json.loads(long.user_attrs["request"])["candidate"]["plan"]["steps"]) == 90


def test_optuna_dashboard_opens_the_study(journal: Path) -> None:
    dashboard = pytest.importorskip(
        "optuna_dashboard", reason="optuna-dashboard is not installed (pip install optuna-dashboard)"
    )
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    store = reopen(journal)
    scored(store, request(900, 300), 5.0)
    app = dashboard.wsgi(JournalStorage(JournalFileBackend(str(journal))))

    def get(path: str) -> dict:
        status: list[str] = []
        environ = {
            "REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "here", "SERVER_PORT": "80",
            "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(),
        }  # fmt: skip
        body = b"".join(app(environ, lambda s, headers, exc_info=None: status.append(s)))
        assert status[0].startswith("200"), (path, status, body)
        return json.loads(body)

    (study,) = get("/api/studies")["study_summaries"]
    assert study["study_name"] == "search"
    (trial,) = get(f"/api/studies/{study['study_id']}")["trials"]
    assert trial["state"] == "Complete" and trial["values"] == [5.0]
    assert {p["name"]: float(p["param_internal_value"]) for p in trial["params"]} == {"t0": 900.0, "t1": 300.0}
