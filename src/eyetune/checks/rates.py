"""Images a second of one setting of the loader."""

from __future__ import annotations

from dataclasses import dataclass

DECODE, READ = "decoding", "from the cache"
"""Where the prepared photographs come from."""


@dataclass(frozen=True)
class Rate:
    """One setting of the loader.

    Attributes:
        workers: reading processes.
        source: "decoding" every photograph, or "from the cache".
        prefetch: batches ahead a process.
        pinned: whether batches wait in pinned memory.
        images: a second, on the device; None when the setting could not run.
        start: seconds to the first batch.
        problem: why it could not run.
    """

    workers: int
    source: str
    prefetch: int
    pinned: bool
    images: float | None
    start: float
    problem: str = ""
