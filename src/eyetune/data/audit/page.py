"""The audit as one HTML page: verdicts, counts, and pictures of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eyetune import __version__
from eyetune.data.audit.copies import AGREE
from eyetune.data.audit.fix import Drop
from eyetune.data.audit.judge import FIELD
from eyetune.data.audit.rows import Group
from eyetune.data.audit.run import Audit, verdict
from eyetune.data.photo import Photo, read_image
from eyetune.errors import DataError
from eyetune.pages.page import picture, write_page

SIDE = 320
"""Pixels of a picture on the page."""

MOST_GROUPS, MOST_PICTURES = 60, 6
"""Groups with pictures, and pictures of a group; the rest is listed in the JSON."""

MOST_ROWS = 500
"""Rows of a table on the page."""

_STATUS = {"pass": "good", "warn": "warn", "FAIL": "bad", "skip": "faint"}


def write(found: Audit, path: Path, *, drops: Sequence[Drop] = (), command: str = "") -> Path:
    """Write the page, atomically; returns the path. Raises UserError when it cannot be written.

    Args:
        found: the audit.
        path: the HTML file.
        drops: rows that were left out of a cleaned table, if one was written.
        command: what was typed.
    """
    worst_first = sorted(found.groups, key=lambda group: (not group.crossing, not group.biases, -len(group.rows)))
    odd = [at for at in found.looks if at in found.blank or found.looks[at].lit < FIELD]
    return write_page(
        path,
        "audit.html.j2",
        title=f"Audit of {', '.join(sheet.name for sheet in found.sheets)}",
        verdict=verdict(found),
        passed=found.report.passed,
        sheets=[
            {"source": sheet.source, "rows": len(sheet.records), "images": sheet.root, "labels": sheet.label}
            for sheet in found.sheets
        ],
        findings=[
            {
                "name": finding.name,
                "status": finding.status.value.lower(),
                "colour": _STATUS[finding.status.value],
                "lines": finding.why.splitlines(),
                "advice": finding.advice,
            }
            for finding in found.report.findings
        ],
        parts=_class_rows(found),
        groups=[_group(found, group) for group in worst_first[:MOST_GROUPS]],
        more_groups=max(0, len(found.groups) - MOST_GROUPS),
        odd=[_figure(found, at) for at in odd[:MOST_GROUPS]],
        unreadable=[(found.entries[at].where, why) for at, why in found.unreadable.items()],
        drops=[
            (found.entries[one.at].where, one.why, "" if one.kept is None else found.entries[one.kept].where)
            for one in drops
        ],
        command=command,
        agree=AGREE,
        most_rows=MOST_ROWS,
        version=__version__,
    )


def _class_rows(found: Audit) -> list[dict[str, Any]]:
    """A row a part and class: count, share of the part, and a bar's length in percent of the largest count."""
    classes = next(finding for finding in found.report.findings if finding.name == "classes")
    counts: dict[str, dict[str, int]] = dict(classes.values.get("counts", {}))
    most = max((n for of in counts.values() for n in of.values()), default=1) or 1
    return [
        {
            "part": part or "all",
            "total": sum(of.values()),
            "imbalance": classes.values["imbalance"][part],
            "classes": [
                {"name": name, "n": n, "share": n / max(1, sum(of.values())), "bar": round(100 * n / most, 1)}
                for name, n in of.items()
            ],
        }
        for part, of in counts.items()
    ]


def _group(found: Audit, group: Group) -> dict[str, Any]:
    return {
        "title": group.said.capitalize(),
        "bad": group.biases,
        "how": group.how,
        "figures": [_figure(found, at) for at in group.rows[:MOST_PICTURES]],
        "more": max(0, len(group.rows) - MOST_PICTURES),
    }


def _figure(found: Audit, at: int) -> dict[str, str]:
    entry, look = found.entries[at], found.looks.get(at)
    size = f"{look.width}x{look.height} {look.mode}" if look else ""
    return {"uri": _shown(entry.record.image), "name": entry.record.name, "where": entry.where, "size": size}


def _shown(path: Path) -> str:
    try:
        image: Photo = read_image(path, short_side=SIDE)
    except DataError:
        image = np.full((SIDE, SIDE, 3), 128, np.uint8)
    return picture(image, side=SIDE)
