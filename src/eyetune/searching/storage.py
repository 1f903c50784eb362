"""The database that holds the trials: SQLite in the search's own folder, or any that SQLAlchemy knows, by URL.

The URL may hold a password: it is never shown, logged or written anywhere (:attr:`Place.shown`).
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import MissingExtra, UserError
from eyetune.files import make_folder, writing_failed

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

FILE = "search.db"

HEARTBEAT = 10
"""Seconds between two signs of life of a worker, while a trial runs."""

GRACE = 60
"""Seconds without one after which a trial is given to another worker. (One of the same folder is known at once.)"""

WAIT = 60.0
"""Seconds to wait for a database that is locked, or does not answer, before giving up."""

_TRIES = 5
_SECRET = re.compile(r"([?&](?:[^=&]*(?:pass|pwd|secret|token|key)[^=&]*)=)[^&]*", re.IGNORECASE)


class StorageError(UserError):
    """The database cannot be reached, read or written: no trial's fault."""


@dataclass(frozen=True)
class Place:
    """Where the trials are kept."""

    url: str
    shown: str
    """The URL as people may see it."""
    file: Path | None
    """The SQLite file; None for a server."""

    def clean(self, text: str) -> str:
        """`text` without the password, should it have slipped in."""
        return text.replace(self.url, self.shown) if self.url != self.shown else text

    def command(self, arguments: Sequence[str], storage: str | None) -> list[str]:
        """The words of the command line as they may be written down."""
        if storage is None:
            return list(arguments)
        return [word.replace(storage, self.shown) for word in arguments]


def find_place(storage: str | None, out: Path) -> Place:
    """Where the trials are kept: `storage`, an URL, or a SQLite file in the folder `out`.

    Raises UserError for what is no database, MissingExtra without Optuna.
    """
    try:
        import optuna
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ModuleNotFoundError as error:
        raise MissingExtra("eyetune search", "search") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if storage is None:
        file = out / FILE
        return Place(f"sqlite:///{file.absolute()}", f"sqlite:///{file}", file)
    scheme = storage.partition(":")[0].lower()
    if "journal" in scheme or Path(storage.rpartition("/")[2]).suffix in (".log", ".journal"):
        raise UserError(
            "--storage: a journal file is not taken. A process that is killed while it writes leaves a torn line, and "
            "with it the whole study cannot be read any more. Use SQLite (sqlite:///search.db) or a database server."
        )
    if scheme == "redis":
        raise UserError("--storage: Optuna keeps no trials in Redis but as a journal. Use SQLite or a database server.")
    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):
        hint = f" A SQLite file is sqlite:///{storage}." if "://" not in storage else ""
        raise UserError(
            f"--storage: this is not the URL of a database (what stands there is not repeated here: it may hold a "
            f"password).{hint if '@' not in storage else ''} Examples: sqlite:///search.db, "
            "postgresql+psycopg://user@host/name."
        ) from None
    if "@" in (url.host or ""):
        # What follows the first @ would count as the host, and be shown.
        raise UserError(
            "--storage: more than one @ in the URL (which is not repeated here: it may hold a password). "
            "In a password write @ as %40."
        )
    shown = _SECRET.sub(r"\1***", url.render_as_string(hide_password=True))
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise UserError("--storage: a SQLite database in memory is gone with the process. Name a file.")
        return Place(storage, shown, Path(url.database))
    return Place(storage, shown, None)


def open_storage(place: Place, retry: Any) -> RDBStorage:
    """The storage, its tables made where there are none. `retry` is called with the study and a trial whose worker is
    dead.

    Raises StorageError when the database cannot be reached, is damaged or cannot be written.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy import event
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
    from sqlalchemy.pool import NullPool

    if place.file is not None:
        try:
            make_folder(place.file.parent)
        except OSError as error:
            raise writing_failed(place.file.parent, error) from error
    # A connection is open as long as it is used: trials take hours, and servers drop who is silent for long.
    options: dict[str, Any] = {"poolclass": NullPool}
    if place.file is not None:
        options["connect_args"] = {"timeout": WAIT}
    with translated(place), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that heartbeats are experimental
        for left in reversed(range(_TRIES)):
            try:
                storage = RDBStorage(
                    place.url,
                    engine_kwargs=options,
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                    heartbeat_stale_trial_callback=retry,
                )
                break
            except (IntegrityError, OperationalError, ProgrammingError) as error:
                # Two workers that begin at the same moment both make the tables, and one comes second.
                if not left or not re.search("exist|unique|duplicate", str(error.orig), re.IGNORECASE):
                    raise
                time.sleep(0.2 * (_TRIES - left))
    if place.file is not None:
        # SQLite has no lock on a row: two workers could both find a trial waiting, and both take it. With the lock
        # on the whole file from the first look on, whatever Optuna does in one transaction is done by one of them.
        event.listen(storage.engine, "connect", _no_implicit_begin)
        event.listen(storage.engine, "begin", _begin_immediate)
    return storage


def _no_implicit_begin(connection: Any, record: Any) -> None:
    connection.isolation_level = None


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def translated(place: Place) -> Iterator[None]:
    """Say in one message, without the password, what the database has against us. Raises StorageError."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    try:
        yield
    except ImportError:
        raise StorageError(
            f"{place.shown}: the Python package for this database is not installed. For PostgreSQL: pip install "
            "'psycopg[binary]', and write postgresql+psycopg://…; for MySQL: pip install pymysql, mysql+pymysql://…"
        ) from None
    except NoSuchModuleError as error:
        raise StorageError(f"{place.shown}: no such kind of database ({place.clean(str(error))}).") from None
    except (StorageInternalError, SQLAlchemyError) as error:
        raise StorageError(_message(place, error)) from None
    except RuntimeError as error:
        if "schema" not in str(error):
            raise
        raise StorageError(f"{place.shown} was made by another version of Optuna. {error}") from None


def _message(place: Place, error: Exception) -> str:
    """What went wrong, and what can be done."""
    inner: Any = error.__cause__ if error.__cause__ is not None else error
    said = place.clean(str(getattr(inner, "orig", None) or inner)).strip().splitlines()[0]
    where = str(place.file) if place.file is not None else place.shown
    low = said.lower()
    if "is full" in low:
        return f"cannot write {where}: the disk is full: free some space, then go on with the same command."
    if "readonly" in low or "unable to open" in low:
        return f"cannot write {where}: no permission, or a read-only file system: choose another --out or --storage."
    if "locked" in low or "busy" in low:
        return (
            f"{where} was locked by another program for {WAIT:.0f} seconds. Wait for it to end, then go on with the "
            "same command; on a network drive keep the trials on a database server (--storage)."
        )
    if "not a database" in low or "malformed" in low or "disk image" in low:
        return (
            f"{where} is damaged, or no SQLite database ({said}). Put back a copy of it, or move it away and begin "
            "anew; trials.csv beside it, if there, says what was found."
        )
    return f"the database {where} does not work: {said}. Is it running, and are name, user and password right?"
