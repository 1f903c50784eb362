"""Whether the process that worked on a trial is still alive: a lock in the search's folder that dies with it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from eyetune.files import make_folder, try_lock, writing_failed

FOLDER = "workers"


@contextlib.contextmanager
def at_work(out: Path) -> Iterator[str]:
    """While inside, `out/workers/NAME` is locked; gives NAME, which means nothing. Where the system has no locks, the
    heartbeats in the database alone tell.

    Raises UserError when the folder cannot be written.
    """
    name = secrets.token_hex(6)
    file = out / FOLDER / name
    try:
        make_folder(file.parent)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise writing_failed(file, error) from error
    try:
        locked = try_lock(handle)
        if locked is not True:
            file.unlink(missing_ok=True)
        yield name
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        os.close(handle)


def the_dead(out: Path, own: str) -> set[str]:
    """The workers of this folder that are gone without a word; `own` is the name of who asks. None where nobody can
    tell."""
    found = set()
    with contextlib.suppress(OSError):
        for file in (out / FOLDER).iterdir():
            if file.name == own:  # closing it once would give up our lock
                continue
            with contextlib.suppress(OSError):
                handle = os.open(file, os.O_RDWR)
                try:
                    if try_lock(handle) is True:
                        found.add(file.name)
                finally:
                    os.close(handle)
    return found


def bury(out: Path, names: Iterable[str]) -> None:
    """Forget dead workers."""
    for name in names:
        with contextlib.suppress(OSError):
            (out / FOLDER / name).unlink(missing_ok=True)
