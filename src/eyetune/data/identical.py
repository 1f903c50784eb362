"""Files with the same bytes, and things that belong together: what costs nothing and every run can look at."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from eyetune.data.cache import Cache, file_digest


def same_bytes(paths: Sequence[Path], cache: Cache | None = None) -> list[list[int]]:
    """Groups of two and more positions whose files hold the same bytes. Files that are not there are left out.

    Args:
        paths: the files.
        cache: it knows the content of files that it has seen before without reading them again.
    """
    digest: Callable[[Path], bytes] = cache.digest if cache is not None else file_digest
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, path in enumerate(paths):
        try:
            by_size[os.stat(path).st_size].append(index)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            continue
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for group in by_size.values():
        if len(group) > 1:
            for index in group:
                try:
                    by_content[digest(paths[index])].append(index)
                except OSError:
                    continue
    return sorted(group for group in by_content.values() if len(group) > 1)


def join(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of two and more among `count` things of which some pairs belong together, each sorted (union-find)."""
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(count):
        groups[root(index)].append(index)
    return [group for group in groups.values() if len(group) > 1]
