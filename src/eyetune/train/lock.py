"""One process at a time works on a run folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from eyetune.errors import RunError
from eyetune.files import try_lock, writing_failed

LOCK = ".lock"

#: The locks this process holds: record locks do not keep a process from itself.
_LOCKED: set[Path] = set()


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[bool]:
    """While inside, no other process may work on this folder. Raises RunError when one does already.

    Gives whether a lock was taken here: not where this process has it already (evaluate inside finetune), nor where
    the file system has no locks, which a line on stderr says.
    """
    path = folder / LOCK
    if path in _LOCKED:
        yield False
        return
    handle = _lock(path)
    _LOCKED.add(path)
    try:
        yield handle is not None
    finally:
        _LOCKED.discard(path)
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(handle)


def _lock(path: Path) -> int | None:
    """Lock `path`: an open file, None where there are no locks. Raises RunError when another process has it."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise writing_failed(path, error) from error
        locked = try_lock(handle)
        if locked is None:
            print(f"{path.parent}: no locks on this file system; run one process there at a time.", file=sys.stderr)
            os.close(handle)
            return None
        if not locked:
            owner = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise RunError(
                f"{path.parent} is in use by another process (number {owner} on its machine). Wait for it to end, or "
                "choose another run folder."
            )
        # Whoever held the lock before may have removed the file between our opening and locking it.
        mine = False
        with contextlib.suppress(FileNotFoundError):
            mine = os.fstat(handle).st_ino == path.stat().st_ino
        if mine:
            try:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
            except OSError as error:
                os.close(handle)
                raise writing_failed(path, error) from error
            return handle
        os.close(handle)
