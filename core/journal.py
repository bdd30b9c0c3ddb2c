"""Optuna's journal file, made safe against Ctrl-C, SIGTERM and kill -9."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .interrupts import deferred

LOCK_SECONDS = 10  # a lock on the journal that is this old was left by a killed process: a write takes milliseconds


def open_file(path: Path, *, mend: bool) -> Any:
    """Optuna storage in the journal file at an absolute path.

    mend: cut off half a record at the end, which a killed process left; ValueError for a file that is no journal.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock

    # The lock is a link to this text: a relative one would be read from the link's own folder.
    kind = JournalFileOpenLock if os.name == "nt" else JournalFileSymlinkLock  # Windows lets few users make links
    lock: Any = _Careful(kind(str(path), grace_period=LOCK_SECONDS), path)
    if mend and path.exists():
        _check_last_line(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


class _Careful:
    """Optuna's lock, with Ctrl-C and SIGTERM held back from before it is taken until it is given up.

    An interrupt meanwhile would leave the lock behind, or half a record; within Optuna's release it turns into a
    FileNotFoundError. Whoever takes the lock first drops the half record that a killed process has left: Optuna would append
    the next one to it and lose both.
    """

    def __init__(self, lock: Any, path: Path) -> None:
        self._lock, self._path, self._held = lock, path, ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(deferred())
        try:
            taken = bool(self._lock.acquire())
        except BaseException:
            self._held.close()
            raise
        try:
            _cut_torn_line(self._path)
        except BaseException:
            self.release()
            raise
        return taken

    def release(self) -> None:
        try:
            self._lock.release()
        finally:
            self._held.close()


def _cut_torn_line(path: Path) -> None:
    """Drop a last line without newline: a process died in the middle of writing it. Call with the lock held."""
    if not path.exists():
        return
    with path.open("rb") as f:
        end = keep = f.seek(0, os.SEEK_END)
        while keep > 0:
            f.seek(max(0, keep - 4096))
            block = f.read(keep - f.tell())
            if (at := block.rfind(b"\n")) >= 0:
                keep = keep - len(block) + at + 1
                break
            keep -= len(block)
    if keep < end:
        os.truncate(path, keep)


def _check_last_line(path: Path, lock: Any) -> None:
    """ValueError for a last line that is whole but no record, which Optuna would pass over, and for a file of something else."""
    with path.open("rb") as f:
        if f.read(1) not in (b"", b"{"):  # before a foreign file's last line is taken for half a record
            raise ValueError("its first line is no record")
    lock.acquire()
    try:
        with path.open("rb") as f:
            end = f.seek(0, os.SEEK_END)
            f.seek(max(0, end - 2**20))
            _, newline, last = f.read().rstrip(b"\n").rpartition(b"\n")
            if last and (newline or end <= 2**20):
                json.loads(last)
    finally:
        lock.release()
