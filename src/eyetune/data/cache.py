"""Each photograph is decoded once: prepared squares, kept on disk by the content of the file and all settings.

A square is kept as its raw pixels (docs/benchmarks.md says why): what comes out of the cache is to the byte what
:func:`eyetune.data.fundus.load_square` makes, in training, evaluation and prediction alike. Features of frozen
backbones lie in the same store (:mod:`eyetune.train.features`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import __version__ as pillow_version

from eyetune.data.fundus import VERSION, FundusSettings, load_square
from eyetune.data.photo import Photo
from eyetune.data.store import KEY_BYTES, Info, Item, Kind, Store
from eyetune.errors import DataError
from eyetune.files import cache_folder
from eyetune.progress import track

if TYPE_CHECKING:
    from eyetune.data.config import PhotoConfig

_LAYOUT = "store-1"
"""The folder inside the cache folder; another layout of the files gets another name."""

_SETTLED = 2.0
"""Seconds after its last change from which on a file's times identify its content: some file systems count in these."""

_REFRESH = 1.0
"""Seconds between looks at what other processes have stored meanwhile."""


def content_key(*parts: Any) -> bytes:
    """A key of the store for anything that JSON can say."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:KEY_BYTES]


def file_digest(path: Path) -> bytes:
    """What identifies the content of a file: 16 bytes of its SHA-256. Raises OSError."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()[:KEY_BYTES]


def content_digest(content: bytes) -> bytes:
    """The same of the bytes of a file."""
    return hashlib.sha256(content).digest()[:KEY_BYTES]


def photograph_id(digest: bytes) -> str:
    """What runs and pairs note of a photograph so that it is known again: 16 hexadecimal digits of its digest."""
    return digest[:8].hex()


@dataclass(frozen=True)
class _State:
    """A file as the system describes it, without a look inside."""

    key: bytes
    settled: bool

    @classmethod
    def of(cls, path: Path) -> _State:
        """Raises OSError."""
        found = os.stat(path)
        times = found.st_mtime_ns, found.st_ctime_ns
        key = content_key("file", os.path.abspath(path), found.st_size, *times, found.st_ino)
        return cls(key, time.time() - max(times) / 1e9 > _SETTLED)


class Cache:
    """Prepared squares on disk. May be shared by threads and processes; see :class:`eyetune.data.store.Store`.

    What a file holds is looked at once a `Cache`: one that is changed while a run goes on stays for it what it was.

    Args:
        folder: the cache folder.
        limit: GiB it may grow to.
        private: only this user may enter it, when it is made here: photographs of patients lie in it.
    """

    def __init__(self, folder: Path, limit: float, *, private: bool = False) -> None:
        self.store = Store(folder / _LAYOUT, int(limit * 2**30), _say, private=private)
        self._digests: dict[str, tuple[_State, bytes]] = {}

    @classmethod
    def of(cls, config: PhotoConfig) -> Cache | None:
        """The cache a configuration asks for; None when it wants none."""
        if config.cache is False:
            return None
        own = config.cache is True  # a folder given by name may be meant for colleagues too
        folder = cache_folder() if config.cache is True else Path(config.cache)
        return cls(folder, config.cache_limit, private=own)

    def digest(self, path: Path) -> bytes:
        """As :func:`file_digest`, read only when the file was never seen in its present state. Raises OSError."""
        known = self._digests.get(str(path))
        if known is not None:
            return known[1]
        before = _State.of(path)
        kept = self.store.get(before.key) if before.settled else None
        if kept is not None and len(kept) == KEY_BYTES:
            digest = kept.tobytes()
        else:
            digest = file_digest(path)
            if before.settled and _State.of(path) == before:
                self.store.put([Item(before.key, Kind.FILE, digest)])
        self._digests[str(path)] = before, digest
        return digest

    def square_key(self, path: Path, settings: FundusSettings) -> bytes:
        """The key of a prepared square: content, settings, and the code that prepares. Raises OSError."""
        code = VERSION, cv2.__version__, pillow_version
        return content_key("square", *code, settings.to_dict(), self.digest(path).hex())

    def square(self, path: Path, settings: FundusSettings) -> Photo:
        """The same as :func:`eyetune.data.fundus.load_square`, from the cache where it has it; DataError likewise."""
        try:
            key = self.square_key(path, settings)
        except OSError:
            return load_square(path, settings)  # which says what is wrong with the file
        shape = settings.pixels, settings.pixels, 3
        kept = self.store.get(key)
        if kept is not None and len(kept) == np.prod(shape):
            return kept.reshape(shape)
        return self._prepare(path, settings, key)

    def square_of(self, content: bytes, settings: FundusSettings, make: Callable[[], Photo]) -> Photo:
        """What `make` prepares of a photograph that is no file of its own, from the cache where it has it.

        Args:
            content: the photograph's bytes.
            settings: how it becomes a square.
            make: gives the square, uint8[pixels, pixels, 3].
        """
        digest = hashlib.sha256(content).hexdigest()
        code = VERSION, cv2.__version__, pillow_version
        key = content_key("square of bytes", *code, settings.to_dict(), digest)
        shape = settings.pixels, settings.pixels, 3
        kept = self.store.get(key)
        if kept is not None and len(kept) == np.prod(shape):
            return kept.reshape(shape)
        square = make()
        self.store.put([Item(key, Kind.SQUARE, square.tobytes())])
        return square

    def _prepare(self, path: Path, settings: FundusSettings, key: bytes) -> Photo:
        square = load_square(path, settings)
        self.keep(path, Item(key, Kind.SQUARE, square.tobytes()))
        return square

    def keep(self, path: Path, item: Item) -> None:
        """Store what was computed from the file at `path`, whose :meth:`digest` is in its key. Raises OSError."""
        state, digest = self._digests[str(path)]
        # The file may have been replaced after it was identified: then this does not belong to that content.
        if (state.settled and _State.of(path) == state) or file_digest(path) == digest:
            self.store.put([item])

    def fill(self, paths: Sequence[Path], settings: FundusSettings, *, threads: int) -> list[str | None]:
        """Prepare what is not kept yet: what is wrong with each file, in order; None where it can be read.

        Several processes that fill the same store share the work: each starts at another place, and leaves out what
        another has stored meanwhile.

        Args:
            paths: the files.
            settings: how a photograph becomes a square.
            threads: how many files at a time (decoders work outside Python's lock).
        """
        start = int.from_bytes(content_key(os.getpid())[:4], "little") % max(1, len(paths))
        order = [*range(start, len(paths)), *range(start)]
        faults: list[str | None] = [None] * len(paths)
        looked = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda index: self._fault(paths[index], settings), order)
            for index, fault in zip(order, track(found, len(paths), "Preparing images"), strict=True):
                faults[index] = fault
                if time.monotonic() - looked > _REFRESH:
                    self.store.refresh()
                    looked = time.monotonic()
        self.store.close()
        self.store.refresh()
        return faults

    def _fault(self, path: Path, settings: FundusSettings) -> str | None:
        try:
            key = self.square_key(path, settings)
            if not self.store.has(key):
                self._prepare(path, settings, key)
        except DataError as error:
            return str(error)
        except OSError:
            try:
                load_square(path, settings)
            except DataError as error:
                return str(error)
        return None

    def info(self) -> Info:
        """What is kept now."""
        return self.store.info()

    def clear(self) -> int:
        """Delete everything kept; returns how many bytes that was."""
        return self.store.clear()


def _say(line: str) -> None:
    print(f"eyetune: {line}", file=sys.stderr, flush=True)
