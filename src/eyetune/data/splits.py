"""Train, validation and test: stratified by label, grouped by patient, seeded, written down."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eyetune import files
from eyetune.data.identical import join, same_bytes
from eyetune.data.photo import has_dicom_mark, read_header
from eyetune.data.record import SPLITS, check_consistent
from eyetune.data.records import Manifest
from eyetune.errors import DataError, listing

if TYPE_CHECKING:
    from eyetune.data.cache import Cache
    from eyetune.data.config import DataConfig

COLUMNS = ("image", "split", "patient", "eye")


def split_configured(manifest: Manifest, data: DataConfig, seed: int, cache: Cache | None = None) -> Manifest:
    """As :func:`split`, with the shares of a configuration; files with the same bytes go together.

    Notes say which such files are in two splits of the table, or have two labels. Raises DataError as :func:`split`.
    """
    same = same_bytes([record.image for record in manifest], cache)
    # Files that are no pictures (empty, a web page saved by mistake) are alike without being copies.
    groups = [group for group in same if _opens(manifest[group[0]].image)]
    return _note_identical(split(manifest, data.val, data.test, seed, together=groups), groups)


def _opens(image: Path) -> bool:
    return read_header(image) is not None or has_dicom_mark(image)


def _note_identical(manifest: Manifest, groups: Sequence[Sequence[int]]) -> Manifest:
    crossing = sum(len({manifest[i].split for i in group}) > 1 for group in groups)
    conflicting = sum(len({manifest[i].truth for i in group}) > 1 for group in groups)
    notes = []
    if crossing:
        notes.append(
            f"{crossing} photographs are in more than one split (files with the same bytes), so that the test meets "
            f"what was trained on; which: eyetune data audit {manifest.source}"
        )
    if conflicting:
        notes.append(
            f"{conflicting} photographs are there twice with different labels (files with the same bytes); which: "
            f"eyetune data audit {manifest.source}"
        )
    return manifest.with_records(manifest.records, *notes)


def split(
    manifest: Manifest, val: float, test: float, seed: int, *, together: Iterable[Sequence[int]] = ()
) -> Manifest:
    """Give every record a split. Existing splits stay; a missing val or test is cut from train.

    Records of one patient go together (a record without a patient stands alone), the classes keep their proportions,
    and the result depends on the records and the seed, not on the order of the rows.

    Args:
        manifest: records with no split at all, or all with one.
        val: share of the images that can be cut (all, or those of train) for validation, 0 <= val < 1.
        test: the same for the test.
        seed: another seed, another cut.
        together: positions of records that are cut to one side, such as copies of one photograph; with them go all
            records of their patients.

    Raises DataError when there are too few patients to cut from, when a class is left out of train, or when the
    existing splits overlap.
    """
    check_consistent(manifest.records, manifest.source)
    have = manifest.splits
    if have and "train" not in have:
        raise DataError(f"{manifest.source} has {', '.join(have)} but no train split.")
    shares = {name: share for name, share in (("val", val), ("test", test)) if share > 0 and name not in have}
    pool = [record for record in manifest.records if record.split in (None, "train")]
    places = {record.name: index for index, record in enumerate(pool)}
    joined = [[places[name] for name in (manifest[i].name for i in group) if name in places] for group in together]
    assigned = _cut(manifest.with_records(pool), shares, seed, joined) if shares else {}
    records = [replace(r, split=assigned.get(r.name, "train")) if r.split in (None, "train") else r for r in manifest]
    result = manifest.with_records(records)
    result.check_trainable()
    return result.with_records(records, *_remarks(result))


def _remarks(manifest: Manifest) -> list[str]:
    notes = []
    for name in manifest.splits:
        part = manifest.select(name)
        absent = [c for c, count in zip(manifest.classes, part.class_counts(), strict=True) if not count]
        if absent and any(one is not None for record in part for one in record.truth):
            notes.append(f"the {name} split has no image of {', '.join(absent)}: its scores say nothing of that")
    if all(record.patient is None for record in manifest):
        notes.append(
            "no patient column: every image counts as a patient of its own, so two photographs of one patient may fall "
            "into train and test and make the scores too good; name the column in data.patient_column"
        )
    sizes = ", ".join(f"{name} {len(manifest.select(name))}" for name in manifest.splits)
    return [f"images: {sizes}", *notes]


def _cut(pool: Manifest, shares: Mapping[str, float], seed: int, together: Sequence[Sequence[int]]) -> dict[str, str]:
    """Split of each record by name: groups in order of size go where their classes are most wanted."""
    source, (strata, width) = pool.source, pool.strata()
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, record in enumerate(pool):
        key = ("image", record.name) if record.patient is None else ("patient", record.patient)
        groups[key].append(index)
    _merge(groups, together)
    names = ["train", *shares]
    what = "patients" if any(kind == "patient" for kind, _ in groups) else "images"
    if len(groups) < len(names):
        raise DataError(
            f"{source}: {len(groups)} {what} cannot be cut into {', '.join(names)}; give more, or ask for no "
            "share of val or test (data.val or data.test 0, in data split --val or --test 0)."
        )
    order = sorted(groups, key=lambda key: (-len(groups[key]), _shuffle(seed, key)))
    # A column a class, one for records without a label, and one for the total, which settles what rounding leaves open.
    # (Of labels a column for having each and one for having it not: Sechidis et al., ECML 2011.)
    counts = np.zeros((len(order), width + 1))
    for index, key in enumerate(order):
        for member in groups[key]:
            counts[index, list(strata[member])] += 1
        counts[index, -1] = len(groups[key])
    targets = _targets(counts, np.array([1 - sum(shares.values()), *shares.values()]))
    # Every class weighs the same, and the total as much as a class.
    weights = 1 / np.maximum(counts.sum(axis=0), 1)
    filled = np.zeros_like(targets)
    assigned: dict[str, str] = {}
    for index, key in enumerate(order):
        group = counts[index]
        # Squared distance to the targets, after minus before: rises least where the group is most wanted.
        rise = ((2 * (filled - targets) + group) * group * weights).sum(axis=1)
        best = int(np.argmin(rise))
        filled[best] += group
        assigned.update((pool[member].name, names[best]) for member in groups[key])
    empty = [name for name, total in zip(names, filled[:, -1], strict=True) if not total]
    if empty:
        raise DataError(
            f"{source}: {len(groups)} {what} leave nothing for {', '.join(empty)}; raise "
            f"{' and '.join(f'data.{name}' for name in empty if name != 'train') or f'the number of {what}'}."
        )
    return assigned


def draw_patients(patients: Iterable[str], share: float, seed: int) -> set[str]:
    """A share of some patients, one or more, by the hash of their names: who is drawn does not depend on the order.

    Args:
        patients: names; repeats count once.
        share: above 0 and below 1.
        seed: another seed, other patients.
    """
    order = sorted(set(patients), key=lambda name: _shuffle(seed, ("patient", name)))
    return set(order[: max(1, round(share * len(order)))])


def _merge(groups: dict[tuple[str, str], list[int]], together: Sequence[Sequence[int]]) -> None:
    """Make one group of those that hold records to be kept together, under the first of their keys."""
    keys = sorted(groups)
    place = {member: index for index, key in enumerate(keys) for member in groups[key]}
    pairs = []
    for members in together:
        known = [place[member] for member in members]
        pairs += [(known[0], other) for other in known[1:]]
    for first, *rest in join(len(keys), pairs):
        for other in rest:
            groups[keys[first]] += groups.pop(keys[other])


def _targets(counts: npt.NDArray[np.float64], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Wanted number of each column in each split, [S, C]: at least one of a class wherever its groups suffice."""
    targets = shares[:, None] * counts.sum(axis=0)[None, :]
    enough = (counts > 0).sum(axis=0) >= len(shares)
    raised = np.maximum(targets[1:], enough)
    targets[0] -= (raised - targets[1:]).sum(axis=0)
    targets[1:] = raised
    return targets


def _shuffle(seed: int, key: tuple[str, str]) -> bytes:
    """A random order that belongs to the group itself, so that the order of the rows plays no part."""
    return hashlib.sha256(f"{seed}\0{key[0]}\0{key[1]}".encode()).digest()


def write_splits(manifest: Manifest, path: Path) -> None:
    """Write image, split, patient, eye and target of every record as CSV, atomically: the class by name, the number, or
    a column a label."""
    with files.atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*COLUMNS, *manifest.truth_columns()])
        for record in manifest:
            known = [record.name, record.split or "", record.patient or "", record.eye or ""]
            writer.writerow([*known, *manifest.truth_cells(record)])


def read_splits(path: Path, manifest: Manifest) -> Manifest:
    """`manifest` with the splits written at `path`.

    Raises DataError when the file is missing or damaged, or when the two do not name the same images.
    """
    from eyetune.data.tables import read_rows

    names, rows = read_rows(path)
    if not {"image", "split"} <= set(names):
        raise DataError(f"{path} has no columns image and split (it has {', '.join(names)}).")
    wanted = {row["image"]: row["split"] for row, _ in rows}
    wrong = [where for row, where in rows if row["split"] not in SPLITS]
    if wrong:
        raise DataError(f"{path}: {len(wrong)} rows do not say {', '.join(SPLITS)}:\n{listing(wrong)}")
    new = [record.name for record in manifest if record.name not in wanted]
    gone = sorted(wanted.keys() - {record.name for record in manifest})
    faults = []
    if new:
        faults.append(f"{len(new)} images of {manifest.source} are not in it:\n{listing(new)}")
    if gone:
        faults.append(f"{len(gone)} images in it are not in {manifest.source}:\n{listing(gone)}")
    if faults:
        raise DataError(f"{path}: " + "\n".join(faults))
    records = [replace(record, split=wanted[record.name]) for record in manifest]
    check_consistent(records, str(path))
    return manifest.with_records(records)
