"""A folder that is there when it is whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from eyetune.errors import RunError
from eyetune.exporting.describe import SHEET
from eyetune.files import make_folder, sync, writing_failed


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which takes its place when the block ends well, and is removed when not.

    Raises RunError when `path` holds anything but an earlier export; UserError when it cannot be written.
    """
    if path.exists() and any(path.iterdir()) and not (path / SHEET).is_file():
        raise RunError(f"{path} is there and is no export: choose another --out, or move it away.")
    try:
        make_folder(path.parent)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            scratch.chmod(0o777 & ~_umask())
            yield scratch
            sync(scratch)
            if path.exists():
                older = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
                os.replace(path, older)
                os.replace(scratch, path)
                shutil.rmtree(older)
            else:
                os.replace(scratch, path)
            sync(path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise writing_failed(path, error) from error


def _umask() -> int:
    """The user's own: `mkdtemp` lets nobody else in, and colleagues are to read an export."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
