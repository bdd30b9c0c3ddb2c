"""Where trials are kept: a journal file or a database, opened once, asked again when the connection is lost.

Passwords are part of a storage URL and nothing else: no message, no file and no log that is made here holds one.
"""

import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from . import journal
from .errors import StorageLost, UserError, one_line
from .files import disk_errors

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import URL

PATIENCE = 300.0  # seconds that a lost connection is waited for
DRIVERS = ("psycopg", "psycopg2", "pg8000")  # for PostgreSQL, the one we test with first
CONNECT = 10  # seconds for a database's first answer
SILENT = 30  # seconds after which a connection that no longer answers is given up
TRIES = 6  # to make the tables of a new database
GONE = (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ECONNRESET)  # what a shared folder says while its server is away
SECRET = re.compile(r"passw|pwd|secret|token", re.IGNORECASE)  # in the name of a URL's option
MASK = "***"

T = TypeVar("T")


class Storage:
    """A journal file or a database, for all studies that a process uses in it."""

    def __init__(
        self,
        where: str | Path,
        *,
        mend: bool = True,
        patience: float | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Open the journal file at a path, or the database at a URL. Raises UserError at once where it cannot be reached.

        mend: cut off half a record at the end of a journal, which a killed process left. patience: seconds that a lost
        connection is waited for [300]. warn: told, once each time, that the storage is away, and what else must not be missed.
        """
        self.where, self.place = where, place_of(where)
        self.patience = PATIENCE if patience is None else patience
        self.warn = warn or (lambda text: None)
        with refusing(self.place):
            self.backend = _open(where, mend)

    @property
    def studies(self) -> dict[str, dict[str, Any]]:
        """The user attributes of every study."""
        return {study.study_name: study.user_attrs for study in self.do(self.backend.get_all_studies)}

    def do(self, operation: Callable[[], T], *, after_all: Callable[[], T | None] | None = None) -> T:
        """The answer of an operation on the backend, repeated while the storage is away.

        after_all: asked before each repetition, whether the operation went through although its answer was lost. Raises
        StorageLost when the patience is over, UserError for what a repetition would not mend, and Optuna's own error for a
        trial that has ended.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        began, pause, away = 0.0, 0.25, False
        while True:
            try:
                with refusing(self.place, UpdateFinishedTrialError, passing):
                    if away and after_all is not None and (found := after_all()) is not None:
                        return found
                    return operation()
            except Exception as e:
                if not passing(e):
                    raise
                if not away:
                    began, away = time.monotonic(), True
                    self.warn(f"{self.place}: cannot be reached ({reason(e)}); waiting for up to {self.patience:.0f} s")
                elif time.monotonic() - began > self.patience:
                    raise StorageLost(
                        f"{self.place}: cannot be reached for {self.patience:.0f} s now ({reason(e)}). Nothing complete is "
                        "lost: start this command again when the storage is back, a run with --resume."
                    ) from e
            time.sleep(min(pause, self.patience / 4))
            pause = min(2 * pause, 5.0)


def check(url: str) -> None:
    """Raises UserError at once for a database that cannot be reached. One that is a file is not made."""
    from sqlalchemy import create_engine

    with refusing(place_of(url)):
        parsed = _with_driver(_parsed(url))
        if parsed.get_backend_name() != "sqlite":
            engine = create_engine(parsed, connect_args=_manners(parsed))
            engine.connect().close()
            engine.dispose()


def _open(where: str | Path, mend: bool) -> "BaseStorage":
    if isinstance(where, Path):
        return journal.open_file(where.absolute(), mend=mend)
    from optuna.storages import RDBStorage, get_storage
    from sqlalchemy.exc import DBAPIError

    url = _with_driver(_parsed(where))
    # Optuna fills in {SCHEMA_VERSION}: braces in a password are not meant.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    for left in reversed(range(TRIES)):
        try:
            return get_storage(RDBStorage(text, {"pool_pre_ping": True, "connect_args": _manners(url)}))
        except DBAPIError as e:  # of several that make the tables of a new database at once, one succeeds
            if not left or not re.search("already exists|duplicate", str(e.orig), re.IGNORECASE):
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


def named(text: str) -> str | Path:
    """What a user means by a storage: a URL, or a journal file. A mistyped URL with a password in it is not taken for a file.

    >>> named("postgresql//me:secret@there/trials"), named("runs/a/trials.journal").name
    ('postgresql//me:secret@there/trials', 'trials.journal')
    """
    return text if "://" in text or re.search(r":[^/]*@", text) else Path(text)


def place_of(storage: str | Path) -> str:
    """How messages name the storage: a path, or a URL without its password."""
    return without_password(storage) if isinstance(storage, str) else str(storage)


def without_password(url: str) -> str:
    """A storage URL as it may be shown and kept. UserError for what is not one.

    >>> without_password("postgresql://me:secret@there/trials?sslmode=require&sslpassword=secret")
    'postgresql://me:***@there/trials?sslmode=require&sslpassword=***'
    """
    parsed = _parsed(url)
    shown = {key: MASK if SECRET.search(key) else value for key, value in parsed.query.items()}
    return parsed.set(query=shown).render_as_string(hide_password=True).replace(quote(MASK), MASK)


def bare(storage: str | Path) -> str:
    """A storage as it can be typed again: a path, or a URL whose password comes from elsewhere.

    >>> bare("postgresql://me:secret@there/trials?sslpassword=secret")
    'postgresql://me@there/trials'
    """
    if isinstance(storage, Path):
        return str(storage.absolute())
    parsed = _parsed(storage)
    plain = {key: value for key, value in parsed.query.items() if not SECRET.search(key)}
    return parsed._replace(password=None).set(query=plain).render_as_string(hide_password=False)


def _parsed(url: str) -> "URL":
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
        if "@" in (parsed.host or ""):
            raise ValueError
    except (ArgumentError, ValueError):  # not kept as the cause: it may hold the URL
        masked = re.sub(r":[^:/@][^/]*@", f":{MASK}@", url)
        raise UserError(
            f"--storage {masked}: not a storage URL. Write one such as sqlite:///trials.db or "
            "postgresql://user:password@host/database; an @ or / in a password is written %40 or %2F."
        ) from None
    return parsed


def _with_driver(url: "URL") -> "URL":
    """A PostgreSQL URL that names no driver, with the one that is installed."""
    if url.drivername not in ("postgresql", "postgres"):
        return url
    driver = next((name for name in DRIVERS if find_spec(name)), None)
    if driver is None:
        raise UserError(
            f"{url.render_as_string(hide_password=True)}: no driver for PostgreSQL is installed here. "
            "Install one: pip install 'psycopg[binary]'."
        )
    return url.set(drivername=f"postgresql+{driver}")


def _manners(url: "URL") -> dict[str, Any]:
    """What the driver is told so that a dead connection is noticed in seconds, where the URL does not say otherwise."""
    if url.drivername not in ("postgresql+psycopg", "postgresql+psycopg2"):
        return {}
    usual = {"connect_timeout": CONNECT, "tcp_user_timeout": SILENT * 1000, "keepalives_idle": SILENT}
    return {name: value for name, value in usual.items() if name not in url.query}


@contextmanager
def refusing(
    place: str, but: type[Exception] | tuple[()] = (), let: Callable[[BaseException], bool] = lambda e: False
) -> Iterator[None]:
    """Turn what Optuna says of a storage that it cannot read or write into one sentence.

    but: an error that is left as it is, as are those that `let` says yes to.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("optuna").setLevel(logging.ERROR)
    try:
        with disk_errors(Path(place)):
            yield
    except but:
        raise
    except (OptunaError, SQLAlchemyError, ImportError) as e:
        if let(e):
            raise
        raise UserError(f"{place}: cannot be used as storage ({reason(e)}). Check the URL and the database.") from e
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as e:  # whatever a foreign record provokes
        kind = "database" if "://" in place else "journal"
        raise UserError(
            f"{place}: not a lissom {kind} ({type(e).__name__}: {one_line(e)}). Choose another --out folder."
        ) from e


def reason(e: BaseException) -> str:
    """What the database itself said, without what was asked of it."""
    from sqlalchemy.exc import DBAPIError

    while not (isinstance(e, DBAPIError) and e.orig is not None):
        if (inner := e.__cause__ or e.__context__) is None:
            return one_line(e)
        e = inner
    return one_line(e.orig)


def passing(e: BaseException) -> bool:
    """Whether an error is of a kind that goes away: a connection that was lost, a server that starts, a lock held too long."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy import exc

    if isinstance(e, OSError):
        return e.errno in GONE
    if isinstance(e, StorageInternalError) and e.__cause__ is not None:
        e = e.__cause__
    if isinstance(e, exc.DBAPIError) and e.connection_invalidated:
        return True
    # Optuna asks again on the connection that an OperationalError has just told it is gone: then its error is PendingRollbackError.
    pending = exc.PendingRollbackError | exc.ResourceClosedError
    return isinstance(e, exc.OperationalError | exc.InterfaceError | exc.InternalError | exc.TimeoutError | pending)
