"""Who works on a candidate, and whether that worker is still alive: leases without clocks.

A worker writes who it is beside the trial that it takes, and raises a number, the beat, as long as it lives. Whoever sees a beat
stand still for the lease's length, on a clock of its own, may take the trial away. No two machines' clocks are ever compared.
"""

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEASE = 60.0  # seconds without a sign of life after which a candidate is taken from its worker
BEATS = 6  # signs of life within that time
LOOKS = 4  # times at least that an observer must see the beat stand still: one that did not look cannot say what did not happen
UNSIGNED = 2.0  # seconds for a trial that was taken and has no lease yet: without one, nobody begins to work on it
JOIN = 5.0  # seconds that the last beat may take

# What this process is working on, as (worker, trial): of its own leases it need not guess.
_held: set[tuple[str, int]] = set()


def lease(worker: str, seconds: float) -> dict[str, Any]:
    """What is written beside a trial that is taken. seconds: how long it may show no sign of life."""
    return {"worker": worker, "seconds": seconds, "host": socket.gethostname(), **_process()}


@contextmanager
def kept(worker: str, trial: int, seconds: float, beat: Callable[[int], None]) -> Iterator[None]:
    """While inside, a thread calls `beat` with 1, 2, … so often that the lease does not run out.

    beat: may fail, as it does while the database is away; the next one tries again.
    """
    done = threading.Event()

    def live() -> None:
        count = 0
        while not done.wait(seconds / BEATS):
            count += 1
            with suppress(Exception):  # whatever it is, the evaluation goes on: telling its result will say more
                beat(count)

    _held.add((worker, trial))
    thread = threading.Thread(target=live, name=f"lease of trial {trial}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(JOIN)
        _held.discard((worker, trial))


def dead(lease: Mapping[str, Any], trial: int) -> bool:
    """Whether the process that took the lease is known to be gone. Of other machines and containers nothing is known."""
    here = _process()
    if any(lease.get(part) != here[part] for part in ("machine", "space")):
        return False
    if (lease.get("pid"), lease.get("started")) == (here["pid"], here["started"]):
        return (lease.get("worker"), trial) not in _held
    return not _alive(int(lease["pid"]), lease.get("started"))


@dataclass
class _Seen:
    """One trial as an observer last saw it."""

    sign: tuple[str | None, int]  # worker and beat
    at: float
    still: float = 0.0  # seconds over which it was seen to stand still


class Watch:
    """An observer of other workers' leases."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, _Seen] = {}

    def stale(self, trial: int, lease: Mapping[str, Any] | None, beat: int) -> bool:
        """Look at a running trial: whether its worker is dead, or has shown no sign of life for the length of its lease."""
        now, seconds = self._clock(), float(lease["seconds"]) if lease else UNSIGNED
        sign = (str(lease["worker"]) if lease else None, beat)
        seen = self._seen.get(trial)
        if seen is None or seen.sign != sign:
            seen = self._seen[trial] = _Seen(sign, now)
        # While an observer was busy, asleep or cut off, beats may have been too: such a gap counts as one look, not as its time.
        seen.still += min(now - seen.at, seconds / LOOKS)
        seen.at = now
        return seen.still >= seconds or (lease is not None and dead(lease, trial))

    def forget(self, running: Collection[int]) -> None:
        """Keep only what is known of the trials that are still running."""
        self._seen = {trial: seen for trial, seen in self._seen.items() if trial in running}


def _process() -> dict[str, Any]:
    pid = os.getpid()
    return {**_machine(), "pid": pid, "started": _started(pid)}


@functools.cache
def _machine() -> dict[str, str]:
    """What a process number means something in: a machine since it was booted, and a container's own numbers there."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {"machine": boot, "space": os.readlink("/proc/self/ns/pid")}
    except OSError:  # no Linux
        import uuid

        return {"machine": f"{socket.gethostname()}/{uuid.getnode():x}", "space": ""}


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot: a number that is used again has another one. None where that is not told."""
    fields = _stat(pid)
    return fields[19] if fields else None


def _alive(pid: int, started: str | None) -> bool:
    """Whether a process of this machine still runs. A zombie, which nobody has waited for yet, does not."""
    if fields := _stat(pid):
        return fields[0] not in "ZX" and started in (None, fields[19])
    if os.name != "posix":
        return True  # asking would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where it cannot be read (no Linux, hidden, gone)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
