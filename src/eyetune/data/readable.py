"""Which photographs can be read at all: every file decoded once, by threads, before anything rests on it."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eyetune.data.photo import read_image
from eyetune.errors import DataError, listing
from eyetune.progress import track

if TYPE_CHECKING:
    from eyetune.data.cache import Cache
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.records import Manifest

Workers = int | Literal["auto"]
"""How many processes or threads read images."""

_MOST_WORKERS = 8

_TINY = 64
"""Below this many images starting processes costs more than it saves."""


def choose_workers(workers: Workers, count: int, processes: int = 1) -> int:
    """How many loading processes: the number asked for, or one a core up to 8, none for few images or on macOS.

    Several training processes share the cores; each has one at least.
    """
    if workers != "auto":
        return workers
    if count < _TINY or sys.platform == "darwin":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // processes), _MOST_WORKERS)


def check_readable(
    manifest: Manifest,
    skip: bool,
    *,
    workers: Workers = "auto",
    cache: Cache | None = None,
    settings: FundusSettings | None = None,
) -> Manifest:
    """Decode every image once, into the cache if there is one, and return the manifest of those that can be read.

    Args:
        manifest: the records.
        skip: leave unreadable images out and say so in the notes, instead of raising.
        workers, cache, settings: as for :func:`find_faults`.

    Raises DataError naming file and row of the unreadable images, or when none can be read.
    """
    faults = find_faults(manifest, workers=workers, cache=cache, settings=settings)
    bad = [f"{record.row}: {fault}" for record, fault in zip(manifest, faults, strict=True) if fault]
    if not bad:
        return manifest
    if len(bad) == len(manifest):
        raise DataError(f"{manifest.source}: none of the {len(manifest)} images can be read:\n{listing(bad)}")
    said = f"{len(bad)} of {len(manifest)} images cannot be read:\n{listing(bad)}"
    if not skip:
        raise DataError(f"{manifest.source}: {said}\nTo go on without them: --skip-unreadable")
    kept = [record for record, fault in zip(manifest, faults, strict=True) if not fault]
    return manifest.without("cannot be read", kept, f"skipped: {said}")


def find_faults(
    manifest: Manifest,
    *,
    workers: Workers = "auto",
    cache: Cache | None = None,
    settings: FundusSettings | None = None,
) -> list[str | None]:
    """Decode every image once: what is wrong with each, in order; None where it can be read.

    Args:
        manifest: the records.
        workers: threads, or "auto".
        cache: what is decoded is kept there for the loader, and what is there already is not decoded; None only looks.
        settings: how a photograph becomes a square; needed with a cache.
    """
    threads = max(1, choose_workers(workers, len(manifest)))
    paths = [record.image for record in manifest]
    if cache is not None and settings is not None:
        return cache.fill(paths, settings, threads=threads)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(_fault, paths, [settings and settings.bits] * len(paths))
        return list(track(found, len(manifest), "Checking images"))


def _fault(path: Path, bits: int | None) -> str | None:
    try:
        read_image(path, short_side=1, bits=bits)
    except DataError as error:
        return str(error)
    return None
