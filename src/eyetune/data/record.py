"""Record: one photograph and what is known of it; and what holds for the records of any source."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from eyetune.errors import DataError, listing

SPLITS = ("train", "val", "test")

Kind = Literal["classes", "labels", "value"]
"""What is known of a photograph: one class, several yes-or-no labels, or a number."""


@dataclass(frozen=True)
class Record:
    """One photograph.

    Attributes:
        image: the file.
        label: index into the manifest's classes; None when unknown.
        name: the image as the table names it; unique in a manifest.
        row: where the record stands, for messages ("train.csv row 17"; the header is row 1, as a spreadsheet counts).
        patient: patient identifier, as in the table.
        eye: "left" or "right" when the table's word for it is known, else the word itself.
        split: "train", "val", "test", or None when not assigned yet.
        extra: the other columns of the table, as text.
        values: where the manifest holds labels, 1 or 0 for each, None where not known; where it holds a number, that
            number, or None.
    """

    image: Path
    label: int | None
    name: str
    row: str
    patient: str | None = None
    eye: str | None = None
    split: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict, repr=False)
    values: tuple[float | None, ...] = ()

    @property
    def truth(self) -> tuple[float | None, ...]:
        """What is known of the photograph, to compare two records by: its class, its labels or its number."""
        return self.values or (self.label,)


class Reading(NamedTuple):
    """What a reader found in a source: the fields of a :class:`eyetune.data.records.Manifest`."""

    records: tuple[Record, ...]
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()
    kind: Kind = "classes"


def check_consistent(records: Sequence[Record], source: str) -> None:
    """Raise DataError for an image given twice, or a patient in two splits. Patients are not named in the message."""
    faults = [*_repeated_images(records), *_shared_patients(records)]
    if faults:
        raise DataError(f"{source}: " + "\n".join(faults))


def _repeated_images(records: Sequence[Record]) -> list[str]:
    by_image: dict[str, list[Record]] = {}
    for record in records:
        by_image.setdefault(os.path.normpath(record.image), []).append(record)
    kinds: dict[str, list[str]] = {
        "have two different labels; decide which is right": [],
        "are in two splits; keep each in one": [],
        "are listed more than once; remove the repeats": [],
    }
    conflicting, crossing, repeated = kinds.values()
    for same in by_image.values():
        if len(same) > 1:
            where = f"{same[0].name}: " + ", ".join(record.row for record in same)
            if len({record.truth for record in same}) > 1:
                conflicting.append(where)
            elif len({record.split for record in same}) > 1:
                crossing.append(where)
            else:
                repeated.append(where)
    return [f"{len(found)} images {said}:\n{listing(found)}" for said, found in kinds.items() if found]


def _shared_patients(records: Sequence[Record]) -> list[str]:
    by_patient: dict[str, dict[str, Record]] = {}
    for record in records:
        if record.patient is not None and record.split is not None:
            by_patient.setdefault(record.patient, {}).setdefault(record.split, record)
    shared = [
        ", ".join(f"{record.row} ({split})" for split, record in first.items())
        for first in by_patient.values()
        if len(first) > 1
    ]
    if not shared:
        return []
    return [
        f"{len(shared)} patients are in more than one split, so a test would meet eyes it was trained on; move each "
        f'patient to one split, or set data.split_column to "none" to cut new splits:\n{listing(shared)}'
    ]
