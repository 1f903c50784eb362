"""Photographs and patients that a dataset shares with what a run was trained on: its scores then come out too good."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eyetune.data.cache import file_digest, photograph_id
from eyetune.data.record import Record
from eyetune.data.records import Manifest, open_manifest
from eyetune.errors import UserError

if TYPE_CHECKING:
    from eyetune.data.cache import Cache
    from eyetune.metrics.fitted import Fitted
    from eyetune.train.rundir import RunDir

LEARNT_FROM = ("train", "val")
"""The splits a run has seen: one taught it, the other chose its epoch."""


SAME_BYTES = "the very same bytes"
"""In every warning of photographs that were seen in training."""


@dataclass(frozen=True)
class Seen:
    """What a run learnt from.

    Args:
        records: the photographs, where they are still there.
        patients: their identifiers, as text.
        photographs: of a run that notes no records, what :func:`digests` says of its photographs.
        unknown: why photographs cannot be compared; empty when they can.
    """

    records: tuple[Record, ...] = ()
    patients: frozenset[str] = frozenset()
    photographs: frozenset[str] = frozenset()
    unknown: str = ""

    @classmethod
    def of_manifest(cls, manifest: Manifest, splits: Sequence[str] = LEARNT_FROM) -> Seen:
        """Of the records of a manifest that lie in these splits."""
        records = tuple(record for record in manifest if record.split in splits)
        return cls(records, frozenset(record.patient for record in records if record.patient is not None))

    @classmethod
    def of_run(cls, folder: RunDir) -> Seen:
        """What splits.csv lists; the photographs through the table that the configuration names, if it is there."""
        if not folder.splits_file.is_file():
            return cls(unknown="what the run was trained on is not known")
        with open(folder.splits_file, encoding="utf-8", newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row.get("split") in LEARNT_FROM]
        patients = frozenset(row["patient"] for row in rows if row.get("patient"))
        names = {row.get("image") for row in rows}
        try:
            config = folder.read_config()
            manifest = open_manifest(config.data, labels_required=False, kind=config.reads)
            records = tuple(record for record in manifest if record.name in names)
        except UserError:
            records = ()
        lost = len(names) - sum(record.image.is_file() for record in records)
        unknown = f"{lost} of {len(names)} training images are not where they were" if lost else ""
        return cls(records, patients, unknown=unknown)


def overlap(records: Sequence[Record], seen: Seen, cache: Cache | None = None) -> list[str]:
    """Warnings, each a sentence or two, for what `records` share with `seen`; empty when nothing is shared.

    Photographs are the same when their bytes are; only files of equal size are read. Copies that were saved again are
    not found here: `eyetune data audit` finds them.
    """
    found = []
    if seen.photographs:
        same = [one for one, known in zip(records, digests(records, cache), strict=True) if known in seen.photographs]
    else:
        same = same_photographs(records, seen.records, cache)
    if same:
        names = ", ".join(record.name for record in same[:3]) + (", …" if len(same) > 3 else "")
        found.append(
            f"{len(same)} of its {len(records)} photographs were among those the run was trained or chosen on "
            f"({SAME_BYTES}: {names}). Its scores come out too good; leave them out."
        )
    mine = {record.patient for record in records if record.patient is not None}
    if shared := mine & seen.patients:
        found.append(
            f"{len(shared)} of its {len(mine)} patient identifiers also stand for patients the run was trained or "
            "chosen on. If they are the same people its scores come out too good; if two sites count from 1, ignore "
            "this."
        )
    if seen.unknown:
        found.append(f"{seen.unknown}: whether it shares photographs with the training could not be looked at.")
    return found


def calibrated_on(records: Sequence[Record], site: Fitted | None, cache: Cache | None = None) -> list[str]:
    """Warnings for a dataset whose probabilities a site's calibration changes: that it does, and which of `records` it
    was fitted on; empty where the run's own is used."""
    if site is None:
        return []
    sample = site.fitted_on
    found = [
        f"its calibrated probabilities, operating points and sets rest on {sample.n} labelled images of "
        f"{sample.dataset}, not on the run's validation split."
    ]
    known = set(site.photographs)
    if same := sum(one in known for one in digests(records, cache)):
        found.append(
            f"{same} of its {len(records)} photographs were among those that this calibration was fitted on: what "
            "rests on it comes out too good. Leave them out."
        )
    return found


def digests(records: Sequence[Record], cache: Cache | None = None) -> list[str]:
    """What identifies the content of each photograph: 16 hexadecimal digits; empty where it cannot be read."""
    digest = file_digest if cache is None else cache.digest
    found = []
    for record in records:
        try:
            found.append(photograph_id(digest(record.image)))
        except OSError:
            found.append("")
    return found


def same_photographs(records: Sequence[Record], others: Sequence[Record], cache: Cache | None) -> list[Record]:
    """Those of `records` whose bytes are those of one of `others`; only files of equal size are read."""
    digest = file_digest if cache is None else cache.digest
    by_size: dict[int, list[Record]] = defaultdict(list)
    for record in others:
        try:
            by_size[os.path.getsize(record.image)].append(record)
        except OSError:
            continue
    digests: dict[int, set[bytes]] = {}
    same = []
    for record in records:
        try:
            size = os.path.getsize(record.image)
            if size not in by_size:
                continue
            if size not in digests:
                digests[size] = {digest(other.image) for other in by_size[size]}
            if digest(record.image) in digests[size]:
                same.append(record)
        except OSError:
            continue
    return same


def unnamed_patients(patients: Sequence[str | None]) -> list[str]:
    """Warnings that follow from the table itself: no patients are named, or only some are."""
    unnamed = sum(patient is None for patient in patients)
    if unnamed == len(patients):
        return [
            "no patients are named: every image counts as a patient of its own. Where fellow eyes or repeated "
            "photographs are among them, the intervals are too narrow."
        ]
    if unnamed:
        return [f"{unnamed} of its {len(patients)} images name no patient; each counts as a patient of its own."]
    return []
