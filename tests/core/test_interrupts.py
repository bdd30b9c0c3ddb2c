"""Ctrl-C and SIGTERM never break a write of the journal in two."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from lissom.core import journal
from lissom.core.interrupts import HELD, deferred


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As the `lissom` command sets them."""
    before = {number: signal.signal(number, interrupt) for number in HELD}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HELD)
def test_an_interrupt_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), deferred():
        signal.raise_signal(number)
        signal.raise_signal(number)
        done = True
    assert done and signal.getsignal(number) is interrupt


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_error_of_the_block_goes_through_and_handlers_come_back() -> None:
    with pytest.raises(ValueError), deferred():
        raise ValueError
    assert all(signal.getsignal(number) is interrupt for number in HELD)


def test_other_threads_write_without_it() -> None:
    passed: list[bool] = []

    def work() -> None:
        with deferred():
            passed.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed == [True]


@pytest.mark.parametrize("call", ["symlink", "fsync", "rename", "unlink"])
def test_an_interrupt_within_a_write_leaves_a_whole_record_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At each thing that Optuna asks of the system: taking the lock, writing, and the two halves of giving it up."""
    path = tmp_path / "trials.journal"
    study = optuna.create_study(study_name="s", storage=journal.open_file(path, mend=True))
    asked, stopped = getattr(os, call), False

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal stopped
        answer = asked(*args, **kwargs)
        if not stopped:
            stopped = True
            signal.raise_signal(signal.SIGTERM)
        return answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, call, interrupted)
        study.set_user_attr("fact", 1)
    assert stopped and [p.name for p in tmp_path.iterdir()] == ["trials.journal"]
    again = optuna.load_study(study_name="s", storage=journal.open_file(path, mend=True))
    assert again.user_attrs == {"fact": 1}
    again.set_user_attr("fact", 2)  # the lock is free


def test_a_refused_lock_leaves_the_handlers_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = journal.open_file(tmp_path / "trials.journal", mend=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(PermissionError))
        with pytest.raises(PermissionError):
            optuna.create_study(study_name="s", storage=storage)
    assert all(signal.getsignal(number) is interrupt for number in HELD)
