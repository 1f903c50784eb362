"""Writing so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eyetune.errors import UserError

#: What the system says when a folder cannot take a file, and what the user can do about it.
WRITING_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "your quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file system, or a limit of yours, allows no file of this size: choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "no permission to write there: choose another folder",
    errno.EPERM: "no permission to write there: choose another folder",
    errno.EIO: "the disk reports an error: look at its health, or choose another folder",
    errno.ESTALE: "the network drive has lost the file: mount it again, or choose another folder",
}

#: What a folder says when it cannot be synced by itself (some network and FUSE file systems): there is no more to do.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES)

#: The temporary names of :func:`atomic`.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}~(\.\w+)?")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced and renamed to `path`, else it is removed.

    The file gets the permissions any new file of this user gets: colleagues can read it. Raises UserError, naming the
    path, when the disk is full, read-only or not ours to write.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        make_folder(path.parent)
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}~{path.suffix}")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        temporary = None
        sync(path.parent)
    except OSError as error:
        raise writing_failed(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # the error that brought us here says more
                temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether `path` has a name of :func:`atomic`: what a killed process left behind, if nobody is writing."""
    return _TEMPORARY.fullmatch(path.name) is not None


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they are still there after a power cut. Raises OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def writing_failed(path: Path, error: OSError) -> UserError:
    """The message for a failed write of `path`: the disk, the permission, or whatever the system said."""
    return UserError(f"cannot write {path}: {WRITING_ERRORS.get(error.errno or 0, str(error))}.")


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON to `path`, atomically. NaN and infinity are refused: JSON has neither."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def cache_folder() -> Path:
    """Where downloads, copies and prepared images go: EYETUNE_CACHE, else `eyetune` in the user's cache folder."""
    if own := os.environ.get("EYETUNE_CACHE"):
        return Path(own)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "eyetune"
    home = Path.home()
    return (home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache") / "eyetune"


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_SYNC):
            raise


def try_lock(handle: int) -> bool | None:
    """Lock an open file until it is closed: whether that worked; None where there are no locks.

    A record lock: the system releases it when the process dies, however it dies, it works on network drives, and unlike
    that of `flock` it does not pass on to child processes (a loader's outlive a killed one for seconds). A process has
    it once: closing the file another time gives it up.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True
