"""Progress on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_EVERY = 10.0  # seconds between plain lines


@contextmanager
def watch(quiet: bool) -> Iterator[Any]:
    """A Progress for this terminal."""
    if quiet:
        yield _Quiet()
    elif sys.stderr.isatty():
        bar = _Bar()
        try:
            yield bar
        finally:
            bar.stop()
    else:
        yield _Lines()


class _Quiet:
    """No progress, but warnings."""

    def phase(self, name: str, total: int) -> None: ...
    def advance(self, note: str = "", *, fresh: bool = True) -> None: ...
    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)


class _Counted:
    """Counts one phase; the estimate of what is left uses only evaluations made in this session."""

    def __init__(self) -> None:
        self.name, self.total, self.done, self.fresh = "", 0, 0, 0
        self.began = time.monotonic()

    def begin(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.fresh, self.began = name, total, 0, 0, time.monotonic()

    def add(self, fresh: bool) -> None:
        self.done += 1
        self.fresh += fresh

    @property
    def left(self) -> str:
        if not self.fresh or self.done >= self.total:
            return "--:--"
        rest = int((time.monotonic() - self.began) / self.fresh * (self.total - self.done))
        return f"{rest // 60}:{rest % 60:02}"


class _Lines(_Counted):
    """One line a phase, and one every ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._last = 0.0

    def phase(self, name: str, total: int) -> None:
        self.begin(name, total)
        self._last = time.monotonic()
        print(f"{name}: {total} to do", file=sys.stderr, flush=True)

    def advance(self, note: str = "", *, fresh: bool = True) -> None:
        self.add(fresh)
        if self.done >= self.total or time.monotonic() - self._last > PLAIN_EVERY:
            self._last = time.monotonic()
            print(f"{self.name}: {self.done} of {self.total}  {note}  left {self.left}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)


class _Bar(_Counted):
    """One live line: candidate k of n, best so far, time left; finished phases stay as lines above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__()
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:28}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
        )
        self._task: Any = None

    def phase(self, name: str, total: int) -> None:
        self.begin(name, total)
        if self._task is None:
            self._progress.start()
        else:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(name, total=total, note="", left="--:--")

    def advance(self, note: str = "", *, fresh: bool = True) -> None:
        self.add(fresh)
        left = "" if self.done >= self.total else self.left
        self._progress.update(self._task, completed=self.done, note=note, left=left)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", markup=False, highlight=False, style="yellow")

    def stop(self) -> None:
        self._progress.stop()
