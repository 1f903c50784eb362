"""Bytes in memory of their own, which the system has back at once."""

from __future__ import annotations

import mmap


class Held:
    """The bytes of one photograph, until it has been read.

    Not in the memory of Python's other objects: there this program keeps what is freed (see runtime.py), and between
    blocks of ten megabytes that come and go much of it would lie idle. Never on disk.

    Args:
        most: bytes that may come; only those that do take room.
    """

    def __init__(self, most: int) -> None:
        self._memory = mmap.mmap(-1, max(1, most))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return self._memory[: self._size]

    def add(self, part: bytes) -> None:
        """Put some behind what is there. Raises ValueError when they are more than may come."""
        self._memory.write(part)
        self._size += len(part)

    def close(self) -> None:
        """Let go of them."""
        self._memory.close()
