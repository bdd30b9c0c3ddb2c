"""Writing results: beside, then renamed, so that no reader and no kill -9 ever sees half a file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskError, UserError


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises DiskError when the disk is full or read-only."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises DiskError when the disk is full or read-only."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a disk into one sentence."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise DiskError(f"{path}: cannot be written ({e.strerror}). Free space and go on with --resume.") from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG):
            raise UserError(f"{path}: cannot be written ({e.strerror}). Choose another --out folder.") from e
        raise


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """One process at a time works on `what`; the operating system frees the lock file `path` when its holder dies."""
    from filelock import FileLock, Timeout

    with disk_errors(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{what}: another lissom process is working on it. Wait for it, or choose another --out.") from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise UserError(f"{what}: cannot be locked there ({e.strerror}). Choose an --out on a local disk.") from e
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def check_target(path: Path) -> None:
    """Refuse, before any work, a file to write whose place is taken by a folder or lies inside a file."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name a file in it, e.g. {path / 'result'}.")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(
            f"{path}: cannot be written, {above} is {'read-only' if above.is_dir() else 'a file'}. Name another file."
        )


def prepare(folder: Path, resume: bool) -> None:
    """Make an output folder ready: new or empty, or, with resume, an earlier run's. UserError otherwise."""
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file. Choose another --out folder.")
        if folder.is_dir() and any(folder.iterdir()) and not resume:
            raise UserError(f"{folder}: is not empty. Add --resume to go on with the run in it, or choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
