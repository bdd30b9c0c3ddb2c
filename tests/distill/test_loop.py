"""The training loop: it learns, it resumes exactly, it survives a NaN once, and it says what does not fit."""

import errno
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.errors import DiskError, UserError
from lissom.distill import _checkpoint, _loop
from lissom.distill._seen import Pairing, Site
from lissom.tests.distill.learning import Net, Numbered, pairing, term, trainer, weights


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    made = trainer(tmp_path, terms=[term("output")], iterations=200)
    before = made.scales()["output"]
    made.run()
    assert made.loss_on(Numbered(), 5) < before / 5
    found = lines(tmp_path)
    assert [line["iteration"] for line in found] == list(range(10, 201, 10))
    assert found[-1]["output"] < found[0]["output"] / 3


def test_every_term_is_logged_apart_and_the_total_is_their_weighted_sum(tmp_path: Path) -> None:
    sites = (Site("blocks.0", "blocks.0"), Site("blocks.1", "blocks.2"))
    terms = [term("task", 0.5), term("output", 2.0), term("normalized_features", 0.1, sites)]
    made = trainer(tmp_path, terms=terms, iterations=10)
    assert set(made.scales()) == {"task", "output", "normalized_features"}
    made.run()
    (line,) = lines(tmp_path)
    assert line["total"] == pytest.approx(0.5 * line["task"] + 2 * line["output"] + 0.1 * line["normalized_features"], rel=1e-5)


def test_what_no_loss_reaches_stays_as_it_was(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = made.pairing.student.unused.weight.clone()
    made.scales()
    outcome = made.run()
    assert outcome.frozen == 6 and torch.equal(made.pairing.student.unused.weight, before)


class Killed(BaseException):
    """What kill -9 leaves: nothing is written any more."""


def killed_at(made: Any, iteration: int) -> None:
    def advance(note: str) -> None:
        if made.outcome.iteration == iteration:
            raise Killed

    made.scales()
    with pytest.raises(Killed):
        made.run(advance=advance)


@pytest.mark.parametrize("iteration", [1, 13, 29])
def test_a_killed_run_goes_on_exactly(tmp_path: Path, iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.scales()
    whole.run()
    (tmp_path / "torn").mkdir()
    monkeypatch.setattr(_loop, "SAVE_SECONDS", 0.0 if iteration == 13 else 60.0)
    killed_at(trainer(tmp_path / "torn"), iteration)
    again = trainer(tmp_path / "torn")
    again.scales()
    outcome = again.run()
    assert outcome.iteration == 30 and same(weights(again), weights(whole))
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")


def test_a_torn_line_of_the_log_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loop, "SAVE_SECONDS", 0.0)
    killed_at(trainer(tmp_path), 20)
    log = tmp_path / "losses.jsonl"
    log.write_text(log.read_text() + '{"iteration": 2')
    again = trainer(tmp_path)
    again.scales()
    again.run()
    assert [line["iteration"] for line in lines(tmp_path)] == [10, 20, 30]


def test_parts_of_a_batch_are_as_good_as_the_whole(tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 4):
        made = trainer(tmp_path / str(accumulate), accumulate=accumulate)
        (tmp_path / str(accumulate)).mkdir()
        made.scales()
        made.run()
        found.append(weights(made))
    assert max((found[0][k] - found[1][k]).abs().max().item() for k in found[0]) < 1e-5


def test_a_nan_goes_back_once_and_sees_other_noise(tmp_path: Path) -> None:
    said: list[str] = []
    made = trainer(tmp_path, Numbered(broken=[50]), say=said.append)
    made.scales()
    outcome = made.run()
    assert outcome.iteration == 30 and outcome.restarts == 1
    assert said == ["the loss became NaN or infinite in iteration 13: back to iteration 0, with other noise"]
    assert all(bool(torch.isfinite(w).all()) for w in weights(made).values())
    assert [line["iteration"] for line in lines(tmp_path)] == [10, 20, 30]


def test_a_second_nan_ends_with_a_sentence_and_the_last_good_state(tmp_path: Path) -> None:
    made = trainer(tmp_path, Numbered(broken=[50], always=True))
    made.scales()
    with pytest.raises(UserError, match=r"NaN or infinite in iteration 13, for the second time.*checkpoint.pt.*learning rate"):
        made.run()
    state = _checkpoint.read(tmp_path / "checkpoint.pt", "same")
    assert state is not None and all(bool(torch.isfinite(w).all()) for w in state["student"].values())


def test_it_stops_where_nothing_improves(tmp_path: Path) -> None:
    values = iter([5.0, 4.0, 4.5, 4.2, 4.1, 3.0])
    looked: list[int] = []
    made = trainer(tmp_path, check_every=5, patience=3)
    made.scales()
    outcome = made.run(lambda at: looked.append(at) or next(values))
    assert outcome.stopped_early and outcome.iteration == 25 and looked == [5, 10, 15, 20, 25]
    assert outcome.checks[1] == (10, 4.0)
    again = trainer(tmp_path, check_every=5, patience=3)
    again.scales()
    assert again.run(lambda at: 0.0).iteration == 25  # it has ended, a resumed one too


def test_a_check_sees_averaged_weights_and_changes_nothing(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    plain, looking = trainer(tmp_path / "a"), trainer(tmp_path / "b", check_every=7)
    plain.scales(), looking.scales()
    plain.run()
    looking.run(lambda at: seen.append(looking.pairing.student.blocks[0].line.weight.clone()) or 1.0)
    assert same(weights(plain), weights(looking)) and len(seen) == 4


def test_the_rate_warms_up_and_falls(tmp_path: Path) -> None:
    made = trainer(tmp_path, warmup=4, schedule="cosine", iterations=20)
    rates = [made._rate(at) for at in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:])) and 0 < rates[-1] < 0.02


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    killed_at(trainer(tmp_path), 3)
    other = trainer(tmp_path)
    other.identity = "other"
    with pytest.raises(UserError, match=r"checkpoint.pt: is of another run"):
        other.run()
    (tmp_path / "checkpoint.pt").write_bytes(b"\x80\x04junk")
    with pytest.raises(UserError, match="not a checkpoint of lissom, or damaged"):
        trainer(tmp_path).run()


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a checkpoint"):
        trainer(tmp_path).run()
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    _checkpoint.write(path, {"identity": "same", "iteration": 1})

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskError, match=r"checkpoint.pt: cannot be written \(No space left on device\)"):
        _checkpoint.write(path, {"identity": "same", "iteration": 2})
    state = _checkpoint.read(path, "same")
    assert state is not None and state["iteration"] == 1 and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_batch_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch 4: cannot be split evenly over 1 processes x accumulate 3"):
        trainer(tmp_path, accumulate=3)


def test_models_that_do_not_fit_are_named_at_the_first_mismatch(tmp_path: Path) -> None:
    pair = pairing()
    wide = Net(3, seed=0)
    wide.blocks[2] = torch.nn.Linear(6, 7)
    wide.blocks.append(torch.nn.Linear(7, 6))
    sites = (Site("blocks.0", "blocks.0"), Site("blocks.1", "blocks.2"))
    made = trainer(tmp_path, terms=[term("features", sites=sites)], pair=Pairing(pair.student, wide, pair.origin))
    with pytest.raises(UserError, match=r"blocks.1 of the student is \(4, 6\), blocks.2 of the teacher is \(4, 7\)"):
        made.scales()
