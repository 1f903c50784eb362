"""Reading an LMDB database without mapping it into memory, so that a damaged file is an error and not a crash.

The library maps the file: where it was cut short, the system ends the process (SIGBUS), and where its pages are
damaged, the library may follow a number out of bounds. Here every page is read with `pread` and every number is checked
against the size of the file. Only what databases of one table need is understood: plain keys, values of any size.

The format is that of lmdb.h and mdb.c of LMDB 0.9 (magic 0xBEEFC0DE, version 1) on little-endian machines of 64 bits.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eyetune.errors import DataError

FILE = "data.mdb"
"""The file of a database in its folder."""

_MAGIC = 0xBEEFC0DE
_VERSION = 1
_HEAD = 16
"""Bytes of a page's header: its number, padding, flags, and where its free room begins and ends."""
_META = struct.Struct("<IIQQ")
_TREE = struct.Struct("<IHHQQQQQ")
_TREES_AT = _HEAD + _META.size
_PAGE = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG, _SUB, _DUP = 1, 2, 4
_EMPTY = 2**64 - 1
_SIZES = (512, 65_536)
_DEEPEST = 20
"""Levels of a tree. Six hold more than any disk."""


class Item(NamedTuple):
    """A key, how long its value is, and where in the file that begins."""

    key: bytes
    length: int
    offset: int


class Database:
    """A database of one table, read-only.

    Args:
        folder: holds data.mdb.

    Raises DataError, naming the file: missing, not an LMDB database, cut short, damaged, of another machine.

    May be pickled and forked; nothing of it is held in memory but the place of the file's first page.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / FILE
        self._handle: int | None = None
        self._page_size, self._root, self.count = self._open_tree()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; reading opens it again."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            os.close(handle)

    def __len__(self) -> int:
        return self.count

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None when there is none. Raises DataError when it is damaged."""
        number = self._root
        for _ in range(_DEEPEST):
            if number == _EMPTY:
                return None
            page, flags, nodes = self._page(number)
            found = _search(page, nodes, key)
            if flags & _LEAF:
                if found < 0 or _key(page, nodes[found]) != key:
                    return None
                return self._value(self._item(page, nodes[found]))
            # (The first key of a branch is empty: it stands for whatever is smaller than the second.)
            number = _child(page, nodes[max(found, 0)])
        raise self._damaged()

    def value(self, item: Item) -> bytes:
        """The value of an item of :meth:`items`."""
        return self._value(item)

    def items(self) -> Iterator[Item]:
        """Every key in the order of its bytes; of the values only where they are, each wholly inside the file."""
        before: bytes | None = None
        seen = 0
        for page, nodes in self._leaves(self._root, _DEEPEST):
            for node in nodes:
                item = self._item(page, node)
                if before is not None and item.key <= before:
                    raise self._damaged()
                before, seen = item.key, seen + 1
                if seen > self.count:
                    raise self._damaged()
                yield item
        if seen != self.count:
            raise self._damaged()

    # -- pages -------------------------------------------------------------------------------------------------------

    def _open_tree(self) -> tuple[int, int, int]:
        """Page size, root page and number of entries of the main tree, by the younger of the two heads."""
        first = self._read(0, _TREES_AT + 2 * _TREE.size)
        if _META.unpack_from(first, _HEAD)[0] != _MAGIC:
            raise DataError(f"{self.path} is not an LMDB database.")
        size = _TREE.unpack_from(first, _TREES_AT)[0]
        if not (_SIZES[0] <= size <= _SIZES[1] and size & (size - 1) == 0):
            raise self._damaged()
        heads = []
        for number in (0, 1):
            head = self._read(number * size, _TREES_AT + 2 * _TREE.size + 16)
            magic, version, *_ = _META.unpack_from(head, _HEAD)
            if magic != _MAGIC or version != _VERSION or not _PAGE.unpack_from(head)[2] & _META_PAGE:
                raise self._damaged()
            transaction = struct.unpack_from("<Q", head, _TREES_AT + 2 * _TREE.size + 8)[0]
            heads.append((transaction, _TREE.unpack_from(head, _TREES_AT + _TREE.size)))
        _, (_, flags, _, _, _, _, entries, root) = max(heads, key=lambda head: head[0])
        if flags:
            raise DataError(f"{self.path} is an LMDB database of another kind: its keys are not in one plain table.")
        return size, root, entries

    def _read(self, offset: int, length: int) -> bytes:
        if self._handle is None:
            try:
                self._handle = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                raise DataError(f"no LMDB database in {self.path.parent} (it has no {FILE}).") from None
            except OSError as error:
                raise DataError(f"cannot read {self.path}: {error.strerror}.") from None
        size = os.fstat(self._handle).st_size
        if offset + length > size:
            raise DataError(
                f"{self.path} is cut short: {size:,} bytes, but something in it lies at {offset + length:,}. Copy it "
                "again, or make it anew with eyetune clip prepare."
            )
        try:
            data = os.pread(self._handle, length, offset)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}.") from None
        if len(data) != length:
            raise self._damaged()
        return data

    def _page(self, number: int) -> tuple[bytes, int, tuple[int, ...]]:
        """A page of the tree, its flags, and where its nodes begin."""
        page = self._read(number * self._page_size, self._page_size)
        stated, _, flags, lower, _ = _PAGE.unpack_from(page)
        count = (lower - _HEAD) // 2
        kind = flags & (_BRANCH | _LEAF | _OVERFLOW | _META_PAGE)
        if stated != number or kind not in (_BRANCH, _LEAF) or lower < _HEAD or lower > self._page_size or not count:
            raise self._damaged()
        nodes = struct.unpack_from(f"<{count}H", page, _HEAD)
        if max(nodes) + _NODE.size > self._page_size:
            raise self._damaged()
        return page, flags, nodes

    def _leaves(self, number: int, deepest: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        if number == _EMPTY:
            return
        if not deepest:
            raise self._damaged()
        page, flags, nodes = self._page(number)
        if flags & _LEAF:
            yield page, nodes
            return
        for node in nodes:
            yield from self._leaves(_child(page, node), deepest - 1)

    def _item(self, page: bytes, node: int) -> Item:
        """The entry at a node of a leaf; its value lies wholly inside the file."""
        low, high, flags, key_size = _NODE.unpack_from(page, node)
        length = low | high << 16
        at = node + _NODE.size + key_size
        number = int.from_bytes(page[:8], "little")
        if flags & (_SUB | _DUP):
            raise DataError(f"{self.path} is an LMDB database of another kind: it holds tables in a table.")
        if not flags & _BIG:
            if at + length > self._page_size:
                raise self._damaged()
            return Item(page[node + _NODE.size : at], length, number * self._page_size + at)
        if at + 8 > self._page_size:
            raise self._damaged()
        offset = int.from_bytes(page[at : at + 8], "little") * self._page_size
        # The end of the value is looked at before anybody asks for it: a file cut short is found when it is opened.
        self._read(offset + _HEAD + max(length - 1, 0), 1)
        return Item(page[node + _NODE.size : at], length, offset + _HEAD)

    def _value(self, item: Item) -> bytes:
        return self._read(item.offset, item.length)

    def _damaged(self) -> DataError:
        return DataError(f"{self.path} is damaged. Copy it again, or make it anew with eyetune clip prepare.")


def _key(page: bytes, node: int) -> bytes:
    size = int.from_bytes(page[node + 6 : node + 8], "little")
    return page[node + _NODE.size : node + _NODE.size + size]


def _child(page: bytes, node: int) -> int:
    low, high, upper, _ = _NODE.unpack_from(page, node)
    return low | high << 16 | upper << 32


def _search(page: bytes, nodes: tuple[int, ...], key: bytes) -> int:
    """The last node whose key is `key` or smaller; -1 when there is none."""
    low, high = 0, len(nodes)
    while low < high:
        middle = (low + high) // 2
        if _key(page, nodes[middle]) <= key:
            low = middle + 1
        else:
            high = middle
    return low - 1
