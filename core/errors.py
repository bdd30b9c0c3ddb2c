"""Errors that are shown to the user as one sentence, without a traceback, and the exit codes they end with."""

OK, INTERNAL, USAGE, REGRESSION, INCONCLUSIVE, OFFLINE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


def one_line(e: BaseException) -> str:
    """What an error says, on one line and not too long for a sentence."""
    text = " ".join(str(e).split())
    return text[:200] or type(e).__name__


class UserError(Exception):
    """Something the user can mend. The message names the file, the value and what to do."""

    exit_code = USAGE


class MissingOffline(UserError):
    """A file is needed that is not on this machine and may not be downloaded."""

    exit_code = OFFLINE


class SamplingError(UserError):
    """These images cannot be made or scored: not finite, not a picture, or too large for the memory even one by one."""


class NotFinite(SamplingError):
    """The samples hold NaN or infinity: for who scores cuts an answer, for everyone else an error."""


class DiskError(UserError):
    """The output cannot be written (disk full or read-only): nothing is lost, the run can be resumed."""

    exit_code = INTERNAL


class StorageLost(UserError):
    """The storage of the trials cannot be reached any more: nothing complete is lost, the run can be resumed."""

    exit_code = INTERNAL
