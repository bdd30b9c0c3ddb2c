"""A worker does a part of a search as the search itself would, refuses what it would do otherwise, and knows when to end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from lissom.core.errors import StorageLost, UserError
from lissom.core.storages import Storage
from lissom.core.store import TrialStore
from lissom.tests.cli.commands import lissom, refused
from lissom.tests.core.test_store import SAME, request
from lissom.tests.workflow import small
from lissom.tests.workflow.test_resume import Killed, dies
from lissom.workflow import _settle, _work, worker
from lissom.workflow._evaluator import Evaluator
from lissom.workflow.context import Options, Silent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search by one process; values are pretended."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "score", small.pretended)
        small.search(folder)
    return folder


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a search that was killed in its second evaluation: two fixed schedules wait, one was in work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Evaluator, "score", small.pretended)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Evaluator, "score", dies(2, Evaluator.score))
        small.search(tmp_path / "run")
    return tmp_path / "run"


def work(
    journal: Path | str, study: str | None = None, idle: float = 0.3, progress: Any = None, **terms: Any
) -> worker.Outcome:
    return worker.work(journal, study, worker.Terms(idle=idle, **terms), progress or Silent())


def search_study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="search", storage=Storage(folder / "trials.journal").backend)


def changed(folder: Path, **facts: Any) -> None:
    """Another driver's description of the same search."""
    study = search_study(folder)
    study.set_user_attr("work", study.user_attrs["work"] | facts)


def test_what_a_worker_did_is_not_done_again_and_the_outcome_is_the_same(begun: Path, whole: Path) -> None:
    watched = small.Watched()
    outcome = work(begun / "trials.journal", progress=watched)
    assert (outcome.scored, outcome.failed, outcome.ended) == (2, 0, "idle"), watched.warned
    assert outcome.said == "2 candidates; ended because there was nothing to do"
    assert small.results(begun) == 3 and sum("search" in text for text in watched.said) == 3  # joined, and two candidates
    small.search(begun, resume=True)
    assert (begun / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert small.evaluated(begun) == small.evaluated(whole) and set(small.evaluated(begun).values()) == {1}
    after = work(begun / "trials.journal", idle=60.0)
    assert (after.scored, after.ended) == (0, "finished")
    left = sorted(p.name for p in begun.iterdir())
    assert left == sorted({p.name for p in whole.iterdir()}) and not (begun.parent / "runs").exists()


def test_a_search_that_goes_on_takes_workers_again(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(begun, finished=True)
    assert work(begun / "trials.journal").ended == "finished"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Evaluator, "score", dies(1, Evaluator.score))
        small.search(begun, resume=True)
    assert work(begun / "trials.journal").scored > 0


@pytest.mark.parametrize(
    ("facts", "terms", "says"),
    [
        ({"lissom": "0.0.1"}, {}, r"the search is driven by lissom 0\.0\.1, this worker is lissom \d"),
        ({"hash": "f" * 64}, {}, r"zoo:fashion: its weights have the hash \w{16}…, those of the search f{16}…"),
        ({}, {"model": "zoo:fashion-dit"}, r"zoo:fashion-dit: its weights have the hash \w{16}…, those of the search \w{16}…"),
        ({}, {"device": "cuda:1"}, r"--device cuda: the search measures with cpu"),
        ({}, {"dtype": "float16"}, r"--dtype float16: the search measures with float32"),
        ({"chunk": 3}, {}, r"measure something else: the search's chunk is 64, this worker's is 3"),
        ({"dtype": "bfloat16"}, {}, r"the search's dtype is float32, this worker's is bfloat16"),
    ],
)
def test_a_worker_that_differs_refuses_with_both_named(
    begun: Path, facts: dict[str, Any], terms: dict[str, Any], says: str
) -> None:
    changed(begun, **facts)
    before = small.results(begun)
    with pytest.raises(UserError, match=says) as e:
        work(begun / "trials.journal", **terms)
    assert "\n" not in str(e.value) and small.results(begun) == before


@pytest.mark.parametrize("part", ["evaluator", "prompts", "call", "evaluation"])
def test_another_way_of_measuring_is_refused_with_both_named(begun: Path, part: str) -> None:
    study = search_study(begun)
    study.set_user_attr("identity", study.user_attrs["identity"] | {part: "another"})
    with pytest.raises(UserError, match=rf"the search's {part} is another, this worker's is .*not be comparable"):
        work(begun / "trials.journal")


def test_a_search_of_another_version_is_left_in_the_middle(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Evaluator.score

    def then_driven_anew(*args: Any, **kwargs: Any) -> Any:
        changed(begun, lissom="99")
        return score(*args, **kwargs)

    monkeypatch.setattr(Evaluator, "score", then_driven_anew)
    with pytest.raises(UserError, match="driven by lissom 99"):
        work(begun / "trials.journal")
    assert small.results(begun) == 2  # what it had begun is told


def test_what_is_not_there_is_said_with_what_is(begun: Path, tmp_path: Path) -> None:
    said = refused("worker", "--storage", "nowhere.journal")
    assert (
        "nowhere.journal: there is no such journal. Start the search first, or let the worker wait for it with --idle" in said
    )
    assert not (tmp_path / "nowhere.journal").exists()
    began = time.monotonic()
    assert "Waited for 1 s" in refused("worker", "--storage", "nowhere.journal", "--idle", "1s", "-q")
    assert time.monotonic() - began >= 1
    assert "is a folder. Name the journal in it, e.g. run/trials.journal" in refused("worker", "--storage", "run")
    assert "holds no search 'other'" in refused("worker", "--storage", "run/trials.journal", "--study", "other")
    assert "--lease" in refused("worker", "--storage", "x", "--lease", "0.1s")
    assert "Missing option '--storage'" in refused("worker")
    (tmp_path / "notes.txt").write_text("mine\n")
    assert "notes.txt: not a lissom journal" in refused("worker", "--storage", "notes.txt")
    url = f"sqlite:///{tmp_path}/trials.db"
    assert "no search is running there" in refused("worker", "--storage", url)
    described = search_study(begun).user_attrs["work"]
    for name in ("a/run", "b/run"):
        store = TrialStore.open(url, f"{name}/search", SAME, "evaluator", ("fid",))
        store.remember(work=described)
    assert "2 searches are running there. Choose one by --study: a/run, b/run" in refused("worker", "--storage", url)
    assert "the search's model is m, this worker's is " in refused("worker", "--storage", url, "--study", "a/run/", "-q")
    optuna.create_study(study_name="c/search", storage=Storage(url).backend)
    assert "the study 'c' was not made by lissom" in refused("worker", "--storage", url, "--study", "c")


def test_an_interrupt_gives_the_candidate_back_and_says_how_to_go_on(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score", interrupted)
        ended = lissom("worker", "--storage", "run/trials.journal", "-q")
    assert ended.exit_code == 130 and ended.stdout == ""
    assert ended.stderr.endswith(f"Go on with: lissom worker --storage {begun}/trials.journal\n")
    trials = small.studies(begun)["search"]
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "FAIL", "WAITING"]
    assert ["lost" in t.user_attrs for t in trials] == [False, True, False, False] and "returned" in trials[2].user_attrs
    small.search(begun, resume=True)
    assert set(small.evaluated(begun).values()) == {1}


def test_time_is_over_and_json_says_so(begun: Path) -> None:
    ended = lissom("worker", "--storage", "run/trials.journal", "--max-time", "0", "--json", "-q")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["ended"] == "max-time" and ended.stderr == ""


def test_failures_are_results_of_a_worker_too(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score", fails)
        outcome = work(begun / "trials.journal")
    assert (outcome.scored, outcome.failed) == (0, 2) and "2 candidates, 2 of them failed" in outcome.said


def test_a_lost_device_ends_the_worker_and_frees_its_candidate(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import AcceleratorError

    def lost(*_: Any, **__: Any) -> None:
        raise AcceleratorError("device lost")

    with monkeypatch.context() as patch, pytest.raises(AcceleratorError):
        patch.setattr(Evaluator, "score", lost)
        work(begun / "trials.journal")
    assert [t.state.name for t in small.studies(begun)["search"]][2] == "FAIL"
    assert work(begun / "trials.journal").scored == 1


def test_a_storage_that_stays_away_ends_it_with_one_sentence(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from optuna.storages import JournalStorage

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    score = Evaluator.score

    def then_away(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(JournalStorage, "set_trial_user_attr", stale)
        return score(*args, **kwargs)

    monkeypatch.setattr(Evaluator, "score", then_away)
    watched = small.Watched()
    with pytest.raises(
        StorageLost, match=r"trials\.journal: cannot be reached for 0 s now .*Stale file handle.*Nothing complete"
    ):
        work(begun / "trials.journal", patience=0.1, progress=watched)
    assert len(watched.warned) == 1


def test_references_are_kept_in_the_run_or_in_a_folder_of_the_workers_own(begun: Path, tmp_path: Path) -> None:
    described = search_study(begun).user_attrs["work"]
    with _work._cache(described, Silent()) as cache:
        assert cache == begun
    with _work._cache(described | {"run": "another"}, Silent()) as cache:
        assert cache == Path("runs") / "worker-another-run"
        (cache / "reference.safetensors").touch()
    assert [p.name for p in Path("runs/worker-another-run").iterdir()] == ["reference.safetensors"]
    with _work._cache(described | {"folder": "/not/here/run"}, Silent()):
        pass
    assert not list(Path("runs").glob(f"worker-{described['run']}-run"))


def test_environment_does_not_move_a_run_that_has_its_own_journal(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{begun.parent}/other.db"
    monkeypatch.setenv("LISSOM_STORAGE", url)
    with pytest.raises(UserError, match=r"keeps its trials in its own journal, not in sqlite:.*Go on with `lissom run "):
        small.search(begun, resume=True, options=Options(device="cpu", storage=url))
    ended = lissom("run", "run", "-q")
    assert ended.exit_code == 0, ended.stderr
    assert lissom("report", "run").exit_code == 0 and not (begun.parent / "other.db").exists()


def test_waiting_for_others_ends_with_the_time(begun: Path) -> None:
    store = TrialStore.open(begun / "other.journal", "search", SAME, "evaluator", ("fid",))
    other = TrialStore.open(begun / "other.journal", "search", SAME, "evaluator", ("fid",))
    store.propose(request(900))
    claim = other.claim()
    assert claim is not None
    with other.keeping(claim):
        clock = _settle.Clock(0.5, time.monotonic())
        asked: list[Any] = [(request(900), 0)]
        assert _settle.settled(store, asked, None, Silent(), clock, lambda trial: True) == []  # type: ignore[arg-type]
    assert 0.5 < time.monotonic() - clock.began < 5


def test_a_real_worker_beside_a_real_search(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pretended: two processes, one journal, the plan of one process."""
    journal, said = tmp_path / "run" / "trials.journal", tmp_path / "worker.txt"
    process = subprocess.Popen(
        [sys.executable, "-m", "lissom", "worker", "--storage", str(journal), "--idle", "90s"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=said.open("w"), stderr=subprocess.STDOUT, cwd=tmp_path,
    )  # fmt: skip
    score, results = Evaluator.score, 3

    def waiting(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + 90
        while said.read_text().count("search ") < results and process.poll() is None:  # it has joined, and scored some
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return score(*args, **kwargs)

    monkeypatch.setattr(Evaluator, "score", waiting)
    try:
        small.search(tmp_path / "run")
        assert process.wait(60) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()
    assert "ended because the search is finished" in said.read_text(), said.read_text()
    assert (tmp_path / "run" / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    assert set(small.evaluated(tmp_path / "run").values()) == {1}
    workers = {t.user_attrs["lease"]["pid"] for ts in small.studies(tmp_path / "run").values() for t in ts}
    assert workers == {os.getpid(), process.pid}
    ours, theirs = small.report(tmp_path / "run"), small.report(finished)
    assert ours["winner"]["measurements"] == theirs["winner"]["measurements"]
