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
    lock: Any = _Deferring(kind(str(path), grace_period=LOCK_SECONDS))
    if mend and path.exists():
        _cut_torn_line(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


class _Deferring:
    """Optuna's lock, with Ctrl-C and SIGTERM held back from before it is taken until it is given up.

    An interrupt meanwhile would leave the lock behind, or half a record; within Optuna's release it turns into a
    FileNotFoundError.
    """

    def __init__(self, lock: Any) -> None:
        self._lock, self._held = lock, ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(deferred())
        try:
            return bool(self._lock.acquire())
        except BaseException:
            self._held.close()
            raise

    def release(self) -> None:
        try:
            self._lock.release()
        finally:
            self._held.close()


def _cut_torn_line(path: Path, lock: Any) -> None:
    """Drop a last line without newline (a process died in the middle of writing it), under Optuna's own lock.

    Optuna would append the next record to it and lose both. ValueError for a last line that is whole but no record, which
    Optuna would pass over.
    """
    lock.acquire()
    try:
        with path.open("r+b") as f:
            end = f.seek(0, os.SEEK_END)
            keep = end
            while keep > 0:
                f.seek(max(0, keep - 4096))
                block = f.read(keep - f.tell())
                if (at := block.rfind(b"\n")) >= 0:
                    keep = keep - len(block) + at + 1
                    break
                keep -= len(block)
            if keep < end:
                f.truncate(keep)
            f.seek(max(0, keep - 2**20))
            _, newline, last = f.read().rstrip(b"\n").rpartition(b"\n")
            if last and (newline or keep <= 2**20):
                json.loads(last)
    finally:
        lock.release()
