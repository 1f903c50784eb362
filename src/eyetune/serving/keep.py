"""Results on disk, for who asks for them: a row as soon as a photograph has been read. Photographs are never kept."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eyetune import files

if TYPE_CHECKING:
    from eyetune.serving.desk import Photograph
    from eyetune.serving.reader import Reader


class Kept:
    """A growing table in a folder, readable by its owner alone.

    Args:
        folder: is made where it is missing.
        reader: makes its rows, at its first operating point.

    Attributes:
        path: `results-YYYYMMDD-HHMMSS.csv`.

    Raises UserError when it cannot be written.
    """

    def __init__(self, folder: Path, reader: Reader) -> None:
        self.path = folder / f"results-{time.strftime('%Y%m%d-%H%M%S')}.csv"
        self._reader = reader
        try:
            files.make_folder(folder)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            self._write(reader.header(reader.point))
        except OSError as error:
            raise files.writing_failed(self.path, error) from error

    def add(self, photographs: Sequence[Photograph]) -> None:
        """Write the rows of photographs that have been read. Raises UserError when that fails."""
        reader = self._reader
        rows = [reader.row(reader.point, one.name, one.reading, one.error) for one in photographs]
        try:
            self._write(b"".join(reader.line(reader.point, row) for row in rows))
        except OSError as error:
            raise files.writing_failed(self.path, error) from error

    def _write(self, text: bytes) -> None:
        while text:
            text = text[os.write(self._file, text) :]
        os.fsync(self._file)

    def close(self) -> None:
        """No more rows come."""
        os.close(self._file)
