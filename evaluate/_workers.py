"""One build by several processes: each takes a shard on a device of its own and leaves its state in a file of its own."""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError, one_line
from ..core.interrupts import deferred
from . import _features
from ._extraction import CHECKPOINT, Extraction, Told, signature_of
from ._extractor import Features
from ._images import Images
from ._sketch import KEEP

GRACE = 5.0  # seconds for a worker to leave what it is in the middle of


@dataclass(frozen=True)
class Job:
    """What to build, in words that another process understands."""

    sources: tuple[Path, ...]
    features: str  # as `load` reads it
    keep: int = KEEP
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    load: Callable[[str, str], Features] = _features.load  # name, device

    def part(self, number: int, count: int) -> "Job":
        """The share of one of `count` workers, number 1 to `count`: shard (i, n) of the files, split again."""
        i, n = self.shard
        return Job(self.sources, self.features, self.keep, self.limit, (i + (number - 1) * n, n * count), self.load)

    def extraction(self, features: Features, signature: str | None = None) -> Extraction:
        """Raises UserError for sources that are none."""
        images = [Images(source) for source in self.sources]
        return Extraction(
            images, features, keep=self.keep, limit=self.limit, shard=self.shard, signature=signature or signature_of(images)
        )


def devices(device: str, count: int = 1) -> list[str]:
    """One device for each of `count` workers. auto: the graphics card, if there is one; several workers share out all cards.

    Raises UserError for a device that cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device}: cannot be used here ({one_line(e)}). Try --device cpu.") from e
    if device == "cuda" and count > 1:
        return [f"cuda:{i % torch.cuda.device_count()}" for i in range(count)]
    return [device] * count


def run(job: Job, partials: Sequence[Path], device: str, told: Told, every: int = CHECKPOINT) -> None:
    """Work on all parts of a job, one process for each of `partials`, until the state of every one is complete.

    Raises what a worker raised, after stopping the others; every part goes on from its last state then.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    threads = max(torch.get_num_threads() // len(partials), 1)
    processes: list[BaseProcess] = []
    listening: dict[Any, int] = {}
    try:
        for number, (partial, where) in enumerate(zip(partials, devices(device, len(partials)), strict=True), start=1):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (job.part(number, len(partials)), where, threads, partial, every, theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            with _held_back():
                process.start()
            processes.append(process)
            theirs.close()  # so that the worker's end is the only one, and its death the end of the pipe
            listening[ours] = number
        while listening:
            for pipe in wait(list(listening)):
                assert isinstance(pipe, Connection)
                _hear(pipe, listening, processes, told)
    finally:
        with deferred():
            for started in processes:
                started.terminate()
            for started in processes:
                started.join(GRACE)
                started.kill()  # nothing is lost: a state is written whole or not at all
                started.join()


def _hear(pipe: Connection, listening: dict[Any, int], processes: Sequence[BaseProcess], told: Told) -> None:
    """One message of a worker: (files, fresh), an error, or None at its end."""
    number = listening[pipe]
    try:
        message = pipe.recv()
    except (EOFError, OSError) as e:
        processes[number - 1].join()
        raise UserError(
            f"worker {number} of {len(processes)} ended with code {processes[number - 1].exitcode} before its work was done"
            " (killed, or out of memory?). Go on with --resume."
        ) from e
    if isinstance(message, BaseException):
        raise message
    if message is None:
        del listening[pipe]
    else:
        told(*message)


def _work(job: Job, device: str, threads: int, partial: Path, every: int, pipe: Connection) -> None:
    """What a worker does. It ends with its parent: telling one that is gone fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for where it cannot be held back
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that no half-written file stays
    try:
        torch.set_num_threads(threads)
        extraction = job.extraction(job.load(job.features, device))
        found = extraction.run(partial, every, lambda files, fresh: pipe.send((files, fresh)), whole=False)
        extraction.save(partial, found, extraction.total)
        pipe.send(None)
    except Exception as e:  # noqa: BLE001  whatever it is, the parent raises it
        told = e if isinstance(e, UserError) else RuntimeError(f"{type(e).__name__} in a worker: {traceback.format_exc()}")
        with suppress(OSError):
            pipe.send(told)


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold Ctrl-C back: a process started meanwhile never gets it, so that its parent alone decides what it means."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # the first process would start it, which lets SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
