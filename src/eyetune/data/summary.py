"""What came in and what was left out, for the run folder to keep: counts, remarks, files that are one and the same."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from eyetune.data.cache import file_digest
from eyetune.data.record import Record
from eyetune.data.records import Manifest


def summary(manifest: Manifest) -> dict[str, Any]:
    """Content of `data.json` before training.

    Returns `source`; `rows` (photographs the source names); `left_out` [{"why", "images"}]; `images` (that remain);
    `notes` (what was remarked on the way); `identical`: files that hold the same bytes, as `groups` (how many) and the
    image names of the groups that lie in more than one split (`across_splits`) or have several labels
    (`other_labels`). JSON-serialisable.
    """
    groups = identical(manifest.records)
    return {
        "source": manifest.source,
        "rows": len(manifest) + sum(count for _, count in manifest.left_out),
        "left_out": [{"why": why, "images": count} for why, count in manifest.left_out],
        "images": len(manifest),
        "notes": list(manifest.notes),
        "identical": {
            "groups": len(groups),
            "across_splits": [_names(group) for group in groups if len({one.split for one in group}) > 1],
            "other_labels": [_names(group) for group in groups if len({one.label for one in group}) > 1],
        },
    }


def identical(records: Sequence[Record]) -> list[list[Record]]:
    """Groups of two or more records whose files hold the same bytes, in the order of the records.

    Files of different size differ: only those of one size are read. A file that cannot be read is in no group.
    """
    by_size: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        try:
            by_size[os.path.getsize(record.image)].append(record)
        except OSError:
            continue
    groups: list[list[Record]] = []
    for same in by_size.values():
        if len(same) < 2:
            continue
        by_content: dict[bytes, list[Record]] = defaultdict(list)
        for record in same:
            try:
                by_content[file_digest(record.image)].append(record)
            except OSError:
                continue
        groups += [group for group in by_content.values() if len(group) > 1]
    return groups


def _names(group: Sequence[Record]) -> list[str]:
    return [record.name for record in group]
