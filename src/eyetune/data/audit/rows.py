"""Rows of tables, and which of them show one photograph: what the findings and the fix speak of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eyetune.data.audit.reading import Sheet, comparable
from eyetune.data.record import Record
from eyetune.data.records import Manifest

KINDS = {"bytes": "the same file", "pixels": "the same pixels", "near": "nearly the same picture"}
"""What links copies, from strict to loose, in words."""


@dataclass(frozen=True)
class Entry:
    """One row, and where it belongs.

    Attributes:
        record: the photograph.
        part: what it is trained or scored with, for messages: "train", "train.csv", "labels.csv test".
        split: train, val or test; None where nothing says.
        label: the class's name; None when unknown.
        sheet: which of the sheets it is in.
    """

    record: Record
    part: str
    split: str | None
    label: str | None
    sheet: int = 0

    @property
    def where(self) -> str:
        """The row, its part and its label, for messages."""
        said = ", ".join(word for word in (self.part, self.label or "no label") if word)
        return f"{self.record.row} ({said})"


@dataclass(frozen=True)
class Group:
    """Rows that show one photograph.

    Attributes:
        rows: positions of the entries, two or more.
        kind: "bytes", "pixels" or "near": the loosest link that was needed to join them.
        how: how the copies differ, in words.
        conflicting: two of them have different labels.
        crossing: two of them are in different splits or tables.
        unsplit: they are in no split yet, and not all of one known patient: a random split would part them.
        place: where they are, in words.
    """

    rows: tuple[int, ...]
    kind: str
    how: str
    conflicting: bool
    crossing: bool
    unsplit: bool
    place: str

    @property
    def biases(self) -> bool:
        """Whether a score would come out wrong because of it."""
        return self.conflicting or self.crossing or self.unsplit

    @property
    def said(self) -> str:
        """What they are, where, and whether their labels agree, in words."""
        return f"{KINDS[self.kind]} {self.place}{', with different labels' if self.conflicting else ''}"


def entries_of(sheets: Sequence[Sheet]) -> list[Entry]:
    """Every row of every sheet."""
    found = []
    for number, sheet in enumerate(sheets):
        for record in sheet.records:
            split = sheet.split_of(record)
            words = [sheet.name] if len(sheets) > 1 else []
            words += [split] if split and (sheet.divided or len(sheets) == 1) else []
            label = None if record.label is None else sheet.classes[record.label]
            found.append(Entry(record, " ".join(words), split, label, number))
    return found


def entries_of_manifest(manifest: Manifest) -> list[Entry]:
    """Every record of a manifest that was read without complaint."""
    return [
        Entry(
            record, record.split or "", record.split, None if record.label is None else manifest.classes[record.label]
        )
        for record in manifest
    ]


def apart(one: Entry, other: Entry) -> bool:
    """Whether two rows are trained and scored separately: in other splits, or in other tables unless both have one."""
    if one.sheet == other.sheet or (one.split and other.split):
        return one.split != other.split
    return True


def make_group(
    entries: Sequence[Entry], rows: Sequence[int], kind: str, how: str, compared: Callable[[int, int], bool]
) -> Group:
    """What there is to say of rows that show one photograph.

    Args:
        entries: all rows.
        rows: the positions of these.
        kind, how: as in :class:`Group`.
        compared: whether the labels of two sheets mean the same.
    """
    members = [entries[row] for row in rows]
    # One row stands for all that are alike in what is compared, so that a picture there a thousand times costs no more.
    unlike = {(member.sheet, member.split, member.label): member for member in members}
    pairs = list(itertools.combinations(unlike.values(), 2))
    conflicting = any(
        one.label is not None and other.label is not None and one.label != other.label
        and compared(one.sheet, other.sheet)
        for one, other in pairs
    )  # fmt: skip
    crossing = any(apart(one, other) for one, other in pairs)
    patients = {member.record.patient for member in members}
    undecided = any(member.split is None for member in members)
    unsplit = undecided and not crossing and (len(patients) > 1 or None in patients)
    if crossing:
        place = "in different tables" if len({member.sheet for member in members}) > 1 else "in different splits"
    elif unsplit:
        place = "that a random split would part"
    else:
        place = "of one patient" if undecided else "in one split"
    return Group(tuple(rows), kind, how, conflicting, crossing, unsplit, place)


def same_scale(sheets: Sequence[Sheet]) -> Callable[[int, int], bool]:
    """Whether the labels of two sheets, by position, mean the same."""
    return lambda one, other: comparable(sheets[one], sheets[other])
