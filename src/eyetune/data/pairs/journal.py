"""The photographs prepared so far, kept until the databases are whole: a killed preparation goes on from here.

A line a photograph: its key, a checksum, the id by which the file is known again, the image as base64. The key is made
of the file (name, size, time) and of how it was prepared, so that what is found here is always right: a photograph that
was mended, or is wanted at another size, has another key. A line that was half written when the process or the machine
stopped is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from eyetune.errors import RunError
from eyetune.files import make_folder, writing_failed

NAME = ".prepared"
"""The file, in the folder that is being prepared."""

_LONGEST_LINE = 2**28


class Journal:
    """Prepared images by key, on disk; of each only its place is held in memory. Use :meth:`open`."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.path = path
        self._stream = stream
        self._places: dict[str, tuple[int, int]] = {}
        self._end = self._load()

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Journal]:
        """The journal of a folder, made where there is none; no other process may have it open meanwhile.

        Raises RunError when another process is preparing this folder; UserError when it cannot be written.
        """
        path = folder / NAME
        try:
            make_folder(folder)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise writing_failed(path, error) from error
        with open(handle, "r+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{folder} is being prepared by another process. Wait for it, or stop it.") from None
            yield cls(stream, path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, key: str, image: str, photograph: str) -> None:
        """Keep an image (base64), and the id of the file it was made of, under a key. Raises UserError when the disk is
        full."""
        line = f"{key}\t{_check(key, photograph, image):08x}\t{photograph}\t{image}\n".encode("ascii")
        try:
            self._stream.seek(self._end)
            self._stream.write(line)
            self._stream.flush()  # what a killed process has handed to the system is written all the same
        except OSError as error:
            raise writing_failed(self.path, error) from error
        self._places[key] = self._end, len(line)
        self._end += len(line)

    def get(self, key: str) -> str:
        """The image (base64) under a key that is there."""
        return self._line(key)[3]

    def photograph(self, key: str) -> str:
        """The id of the file that the image under a key was made of."""
        return self._line(key)[2]

    def _line(self, key: str) -> list[str]:
        offset, length = self._places[key]
        self._stream.seek(offset)
        return self._stream.read(length).decode("ascii").rstrip("\n").split("\t")

    def delete(self) -> None:
        """Remove the file: what it held is in the databases."""
        self.path.unlink(missing_ok=True)

    def _load(self) -> int:
        """Note where every whole line is; cut off what comes after the last. Returns its end."""
        end = 0
        self._stream.seek(0)
        while line := self._stream.readline(_LONGEST_LINE):
            key = _key_of(line)
            if key is None:
                break
            self._places[key] = end, len(line)
            end += len(line)
        self._stream.truncate(end)
        return end


def _key_of(line: bytes) -> str | None:
    """The key of a line that is whole, else None."""
    try:
        key, check, photograph, image = line.decode("ascii").split("\t")
        whole = image.endswith("\n") and int(check, 16) == _check(key, photograph, image[:-1])
    except ValueError:  # UnicodeDecodeError among them
        return None
    return key if whole else None


def _check(*parts: str) -> int:
    found = 0
    for part in parts:
        found = zlib.crc32(part.encode("ascii"), found)
    return found
