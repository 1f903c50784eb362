"""Which photographs a command line means, one after the other: a hundred thousand take no more memory than ten."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from eyetune.data.folders import walk
from eyetune.data.images import is_image_name
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.errors import DataError

TABLES = (".csv", ".tsv", ".jsonl")
"""What is taken for a table rather than an image."""

STREAM = "-"
"""The path that stands for standard input."""

_BLOCK = 1 << 16
_LONGEST = 1 << 16
"""Bytes of a path beyond which the stream is no list of paths."""


class Sources:
    """The photographs of files, folders, tables and a stream of paths, in the order given.

    Args:
        paths: image files, folders, tables, and at most one `-`.
        images: folder of the images that tables name.
        image_column: column of the image names in tables.
        stream: what `-` reads; None: standard input.

    Raises DataError for a path that is not there and does not look like an image, a folder without images, a table that
    cannot be read, and a second `-`. What is wrong with a single image is not said here.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        images: Path | None = None,
        image_column: str | None = None,
        stream: IO[bytes] | None = None,
    ) -> None:
        if sum(str(path) == STREAM for path in paths) > 1:
            raise DataError("two paths are -, and there is one standard input.")
        self._stream = stream
        # A folder keeps its names, not its records; only a table is held whole.
        self._parts = [self._part(path, images, image_column) for path in paths]

    def _part(
        self, path: Path, images: Path | None, image_column: str | None
    ) -> tuple[Path | None, Sequence[Record | str] | None]:
        if str(path) == STREAM:
            return None, None
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in walk(path) if is_image_name(file.name)]
            if not names:
                raise DataError(f"{path}: no images in it.")
            return path, names
        if not path.exists() and not is_image_name(path.name):
            raise DataError(f"no file or folder at {path}.")
        if path.suffix.lower() in TABLES:
            # Of a table only the image column matters here; the rest may be of another task.
            found = Manifest.from_table(
                path,
                images=images,
                image_column=image_column,
                label_column="none",
                patient_column="none",
                eye_column="none",
                split_column="none",
                labels_required=False,
            )
            return None, found.records
        return None, [file_record(str(path))]

    @property
    def total(self) -> int | None:
        """How many photographs there are; None when a stream is among the paths."""
        counts = [None if records is None else len(records) for _, records in self._parts]
        return None if None in counts else sum(count or 0 for count in counts)

    def __iter__(self) -> Iterator[Record]:
        for folder, records in self._parts:
            if records is None:
                yield from map(file_record, read_paths(self._stream or sys.stdin.buffer))
                continue
            for record in records:
                if isinstance(record, Record):
                    yield record
                else:
                    image = Path(record) if folder is None else folder / record
                    yield Record(image=image, label=None, name=record, row=record)


def file_record(path: str) -> Record:
    """A photograph known by nothing but its path."""
    return Record(image=Path(path), label=None, name=path, row=path)


def read_paths(stream: IO[bytes]) -> Iterator[str]:
    """Paths from a stream, one a line, or one a NUL byte where there are any (`find … -print0`); empty ones left out.

    A line may end as on Windows. Names that are no text keep their bytes, as Python's file functions take them. Raises
    DataError for a stream that is no list of paths.
    """
    waiting, separator, ended = b"", b"", False
    while not ended:
        block = stream.read1(_BLOCK) if hasattr(stream, "read1") else stream.read(_BLOCK)
        ended, waiting = not block, waiting + block
        if not separator:
            separator = b"\0" if b"\0" in waiting else b"\n" if b"\n" in waiting or ended else b""
        pieces = waiting.split(separator) if separator else [waiting]
        waiting = b"" if ended else pieces.pop()
        if len(waiting) > _LONGEST or any(len(piece) > _LONGEST for piece in pieces):
            raise DataError(
                f"standard input has no end of line within {_LONGEST} bytes: - expects paths, one a line, as from "
                "find photos -name '*.jpg' | eyetune predict RUN -"
            )
        for piece in pieces:
            cleaned = piece if separator == b"\0" else piece.rstrip(b"\r")
            if cleaned:
                yield os.fsdecode(cleaned)


def chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of `size` records, the last one shorter."""
    found: list[Record] = []
    for record in records:
        found.append(record)
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found
