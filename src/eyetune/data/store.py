"""An append-only store of small binary values on disk, shared by processes that know nothing of each other.

Values lie one after another in *packs* (`.pack`), each with an index beside it (`.idx`): fixed-size entries that say
which key lies where, with the checksum of the value and one of the entry itself. The order of writing is the protocol:

- a value is written before its index entry, so a process killed in between leaves bytes nobody refers to;
- one process at a time appends to a pack: it holds the system's lock on it, which dies with the process;
- nothing written is ever changed, so readers take no lock. They read with `pread`, never through a memory map: a file
  cut short by someone else is a short read, where a map would be the end of the process (SIGBUS);
- every value is checked against its checksum each time it is read. What does not fit counts as absent, is computed
  again and appended; of several entries of a key the youngest counts.

Packs that were not used for longest are deleted when the store grows beyond its limit. A disk that is full or read-only
turns writing off, never reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eyetune.files import WRITING_ERRORS

KEY_BYTES = 16

_ENTRY = np.dtype(
    [
        ("key", "<u8", 2),
        ("offset", "<u8"),
        ("written", "<u8"),  # nanoseconds of the wall clock: the younger entry of a key counts
        ("length", "<u4"),
        ("crc", "<u4"),
        ("kind", "<u8"),
        ("check", "<u8"),
    ]
)
_WORDS = _ENTRY.itemsize // 8 - 1
# Odd multipliers: a change of any one word changes the sum.
_MULTIPLIERS = np.array([(0x9E3779B97F4A7C15 * (2 * n + 1)) % 2**64 | 1 for n in range(_WORDS)], np.uint64)

_LEAST_PACK = 256 * 2**20
"""Bytes a pack may grow to, unless the store is very small or very large."""

_PACKS = 128
"""A large store is about this many packs, and so open files."""

_KEEP_FREE = 2**30
"""Bytes of the disk, or a twentieth of it where that is less, that the store leaves to others."""


class Kind(IntEnum):
    """What a value is, for `info`."""

    FILE = 1
    SQUARE = 2
    FEATURES = 3
    LOOK = 4


class Item(NamedTuple):
    """One value to store."""

    key: bytes
    kind: Kind
    value: bytes


@dataclass(frozen=True)
class Info:
    """What a store holds."""

    folder: Path
    bytes: int
    limit: int
    packs: int
    counts: dict[Kind, int] = field(default_factory=dict)
    sizes: dict[Kind, int] = field(default_factory=dict)


@dataclass
class _Pack:
    """A pack as a reader sees it."""

    name: str
    known: int = 0
    """Bytes of its index that were read."""
    handle: int | None = None
    touched: bool = False


@dataclass
class _Writer:
    """A pack this process appends to. `pid`: a forked child must not go on writing where its parent does."""

    name: str
    pid: int
    pack: int
    index: int
    size: int
    index_size: int


class Store:
    """Values by key, in a folder.

    Args:
        folder: where; made when the first value is stored.
        limit: bytes the packs may take together.
        say: takes the one line that is said when writing has to stop.
        private: only this user may enter the folder, when it is made here.

    Thread-safe; may be pickled (another process opens the folder anew) and forked.
    """

    def __init__(self, folder: Path, limit: int, say: Callable[[str], None], *, private: bool = False) -> None:
        self.folder = folder
        self.private = private
        self.limit = limit
        self.say = say
        self.stopped = False
        """Whether nothing is stored any more: the disk is full or read-only, or the limit is reached."""
        self._lock = threading.RLock()
        self._packs: dict[str, _Pack] = {}
        self._order: list[str] = []
        self._entries = np.empty(0, _ENTRY)
        self._heads = np.empty(0, np.uint64)
        self._place = np.empty(0, np.int64)
        self._total: int | None = None
        """Bytes of all packs, as of the last count and what this process has added since."""
        self._recent: dict[bytes, tuple[str, int, int, int] | None] = {}
        """Entries of this process since the last refresh; None marks a damaged one."""
        self._writer: _Writer | None = None
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        names = ("folder", "limit", "say", "private", "stopped")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stopped = state.pop("stopped")
        self.__init__(**state)  # type: ignore[misc]
        self.stopped = stopped

    # -- reading -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take note of what other processes have stored, or deleted, since the last time."""
        with self._lock:
            fresh: list[npt.NDArray[Any]] = []
            places: list[npt.NDArray[np.int64]] = []
            for name in self._names():
                found = self._read_index(self._pack(name))
                if len(found):
                    fresh.append(found)
                    places.append(np.full(len(found), self._order.index(name)))
            if fresh:
                entries = np.concatenate([self._entries, *fresh])
                place = np.concatenate([self._place, *places])
                order = np.lexsort((entries["written"], entries["key"][:, 0]))
                self._entries, self._place = entries[order], place[order]
                self._heads = np.ascontiguousarray(self._entries["key"][:, 0])
            # What this process wrote is among them now; what it found damaged stays so until it is written anew.
            self._recent = {key: found for key, found in self._recent.items() if found is None}

    def _names(self) -> list[str]:
        try:
            return sorted(path.stem for path in self.folder.glob("*.idx"))
        except OSError:
            return []

    def _read_index(self, pack: _Pack) -> npt.NDArray[Any]:
        """The entries added to a pack's index since the last time, without those that cannot be right."""
        none = np.empty(0, _ENTRY)
        try:
            with open(self._path(pack.name, "idx"), "rb") as stream:
                stream.seek(pack.known)
                data = stream.read()
            size = os.stat(self._path(pack.name, "pack")).st_size
        except OSError:
            return none
        whole = len(data) // _ENTRY.itemsize
        pack.known += whole * _ENTRY.itemsize
        entries = np.frombuffer(data[: whole * _ENTRY.itemsize], _ENTRY)
        right = _check(entries) == entries["check"]
        # A pack that was cut: what lay beyond is gone, and is not asked for.
        right &= (entries["offset"] <= size) & (entries["offset"] + entries["length"] <= size)
        return entries[right]

    def _find(self, key: bytes) -> tuple[str, int, int, int] | None:
        if key in self._recent:
            return self._recent[key]
        first, second = (np.uint64(int.from_bytes(key[n : n + 8], "little")) for n in (0, 8))
        at = int(np.searchsorted(self._heads, first, side="right")) - 1
        while at >= 0 and self._heads[at] == first:
            entry = self._entries[at]
            if entry["key"][1] == second:
                name = self._order[int(self._place[at])]
                return name, int(entry["offset"]), int(entry["length"]), int(entry["crc"])
            at -= 1
        return None

    def has(self, key: bytes) -> bool:
        """Whether there is an entry of `key`. (Whether its value is whole is seen when it is read.)"""
        with self._lock:
            found = self._find(key)
            if found is None:
                return False
            self._touch(found[0])
            return True

    def get(self, key: bytes) -> npt.NDArray[np.uint8] | None:
        """The value of `key`, uint8[length], writable; None when there is none or it is damaged."""
        with self._lock:
            found = self._find(key)
            if found is None:
                return None
            name, offset, length, crc = found
            handle = self._open(name)
        value = np.empty(length, np.uint8)
        whole = False
        with contextlib.suppress(OSError):
            whole = handle is not None and os.preadv(handle, [value.data], offset) == length
        if not whole or zlib.crc32(value.data) != crc:
            with self._lock:
                self._recent[key] = None
            return None
        return value

    def _open(self, name: str) -> int | None:
        pack = self._touch(name)
        if pack.handle is None:
            with contextlib.suppress(OSError):
                pack.handle = os.open(self._path(name, "pack"), os.O_RDONLY)
        return pack.handle

    def _touch(self, name: str) -> _Pack:
        """The pack, noted as used: by this process, and by the time of its index for others."""
        pack = self._pack(name)
        if not pack.touched:
            pack.touched = True
            with contextlib.suppress(OSError):  # a read-only store is read all the same
                os.utime(self._path(name, "idx"))
        return pack

    def _pack(self, name: str) -> _Pack:
        if name not in self._packs:
            self._packs[name] = _Pack(name)
            self._order.append(name)
        return self._packs[name]

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, items: Sequence[Item]) -> None:
        """Store values whose keys have none yet. Whatever prevents it is said once and turns writing off."""
        with self._lock:
            new = [item for item in items if not self.has(item.key)]
            if not new or self.stopped:
                return
            try:
                writer = self._writer_for(sum(len(item.value) for item in new))
                if writer is not None:
                    self._append(writer, new)
            except OSError as error:
                self._stop(WRITING_ERRORS.get(error.errno or 0, str(error)).partition(":")[0])

    def _append(self, writer: _Writer, items: Sequence[Item]) -> None:
        entries = np.zeros(len(items), _ENTRY)
        offset, now = writer.size, time.time_ns()
        for entry, item in zip(entries, items, strict=True):
            entry["key"] = np.frombuffer(item.key, "<u8")
            entry["offset"], entry["written"], entry["length"] = offset, now, len(item.value)
            entry["crc"], entry["kind"] = zlib.crc32(item.value), item.kind
            offset += len(item.value)
        entries["check"] = _check(entries)
        try:
            _write(writer.pack, b"".join(item.value for item in items), writer.size)
            _write(writer.index, entries.tobytes(), writer.index_size)
        except OSError:
            with contextlib.suppress(OSError):  # a part of a value helps nobody, least of all on a full disk
                os.ftruncate(writer.index, writer.index_size)
                os.ftruncate(writer.pack, writer.size)
            raise
        for item, entry in zip(items, entries, strict=True):
            self._recent[item.key] = writer.name, int(entry["offset"]), int(entry["length"]), int(entry["crc"])
        writer.size = offset
        writer.index_size += entries.nbytes

    def _writer_for(self, size: int) -> _Writer | None:
        """A pack with room for `size` bytes, locked by this process; None when the store is not to grow."""
        if self._writer is not None and self._writer.pid != os.getpid():
            self._drop_writer()
        if self._writer is not None and self._writer.size + size > self._pack_size:
            self._drop_writer()
        if self._writer is None:
            self.folder.mkdir(mode=0o700 if self.private else 0o777, parents=True, exist_ok=True)
            self._total = None
        if (self._total is None or self._total + size > self.limit) and not self._make_room(size):
            return None
        disk = shutil.disk_usage(self.folder)
        if disk.free - size < min(_KEEP_FREE, disk.total // 20):
            self._stop("the disk is nearly full")
            return None
        if self._writer is None:
            self._writer = self._lock_existing(size) or self._new_pack()
        self._total = (self._total or 0) + size
        return self._writer

    @property
    def _pack_size(self) -> int:
        return max(min(_LEAST_PACK, self.limit // 4), self.limit // _PACKS)

    def _lock_existing(self, size: int) -> _Writer | None:
        for name in reversed(self._names()):
            with contextlib.suppress(OSError):
                if os.stat(self._path(name, "pack")).st_size + size <= self._pack_size:
                    writer = self._lock_pack(name, os.O_RDWR)
                    if writer is not None:
                        return writer
        return None

    def _new_pack(self) -> _Writer:
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        writer = self._lock_pack(name, os.O_RDWR | os.O_CREAT)
        if writer is None:  # someone was quick to lock what we made: it is theirs
            return self._new_pack()
        return writer

    def _lock_pack(self, name: str, flags: int) -> _Writer | None:
        """Open and lock a pack for appending; None when another process has it, or it was deleted meanwhile."""
        pack = os.open(self._path(name, "pack"), flags, 0o666)
        try:
            fcntl.flock(pack, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(pack).st_nlink == 0:
                raise BlockingIOError
            index = os.open(self._path(name, "idx"), flags, 0o666)
        except OSError as error:
            os.close(pack)
            if isinstance(error, (BlockingIOError, FileNotFoundError)):
                return None
            raise
        # A process killed while it wrote may have left a part of an entry: ours goes over it.
        index_size = os.fstat(index).st_size // _ENTRY.itemsize * _ENTRY.itemsize
        self._touch(name)
        return _Writer(name, os.getpid(), pack, index, os.fstat(pack).st_size, index_size)

    def close(self) -> None:
        """Let go of the pack being written to, so that other processes may append to it. Storing opens one again."""
        with self._lock:
            self._drop_writer()

    def _drop_writer(self) -> None:
        if self._writer is not None:
            os.close(self._writer.pack)
            os.close(self._writer.index)
            self._writer = None

    def _make_room(self, size: int) -> bool:
        """Delete what was not used for longest until `size` more bytes fit. False, said once, when they cannot."""
        used = []
        for name in self._names():
            with contextlib.suppress(OSError):
                bytes_ = os.stat(self._path(name, "pack")).st_size
                used.append((os.stat(self._path(name, "idx")).st_mtime_ns, bytes_, name))
        self._total = sum(bytes_ for _, bytes_, _ in used)
        for _, bytes_, name in sorted(used):
            if self._total + size <= self.limit:
                break
            # Never what this process has used: data larger than the limit would push itself out, again and again.
            if not self._pack(name).touched and self._delete(name):
                self._total -= bytes_
        if self._total + size > self.limit:
            self._stop(f"it has reached its limit of {self.limit / 2**30:.3g} GiB (data.cache_limit)")
            return False
        return True

    def _delete(self, name: str) -> bool:
        """Delete a pack unless a process writes to it. Who reads from it keeps it open and is not disturbed."""
        try:
            handle = os.open(self._path(name, "pack"), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path(name, "idx").unlink(missing_ok=True)
            self._path(name, "pack").unlink(missing_ok=True)
            return True
        except OSError:
            return False
        finally:
            os.close(handle)

    def _stop(self, why: str) -> None:
        self.stopped = True
        self._drop_writer()
        self.say(f"nothing more is kept in the image cache {self.folder}: {why}. Going on without.")

    # -- looking after it --------------------------------------------------------------------------------------------

    def info(self) -> Info:
        """What is stored now. Raises nothing: a folder that is not there is an empty store."""
        self.refresh()
        with self._lock:
            newest = _newest(self._entries)
            counts = {kind: int((newest["kind"] == kind).sum()) for kind in Kind}
            sizes = {kind: int(newest["length"][newest["kind"] == kind].sum()) for kind in Kind}
        return Info(self.folder, _folder_size(self.folder.glob("*.*")), self.limit, len(self._names()), counts, sizes)

    def clear(self) -> int:
        """Delete everything that no process is writing to; returns how many bytes that was. Raises OSError."""
        self.close()
        before = _folder_size(self.folder.glob("*.*"))
        for name in self._names():
            self._delete(name)
        for pack in self._packs.values():
            if pack.handle is not None:
                os.close(pack.handle)
        self.__init__(self.folder, self.limit, self.say, private=self.private)  # type: ignore[misc]
        return before - _folder_size(self.folder.glob("*.*"))

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}.{suffix}"


def _check(entries: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """The checksum of each entry: uint64[N]."""
    words = np.ascontiguousarray(entries).view(np.uint64).reshape(len(entries), _WORDS + 1)[:, :_WORDS]
    mixed = words ^ (words >> np.uint64(29))
    total = (mixed * _MULTIPLIERS).sum(axis=1, dtype=np.uint64) + np.uint64(0xEE)
    result: npt.NDArray[np.uint64] = total ^ (total >> np.uint64(31))
    return result


def _newest(entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One entry a key, of entries sorted by the first half of their keys, then by age."""
    _, last = np.unique(entries["key"][::-1], axis=0, return_index=True)
    return entries[::-1][last] if len(entries) else entries


def _folder_size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _write(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done
