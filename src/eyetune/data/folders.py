"""Reading class folders: root/class/*.jpg, or root/{train,val,test}/class/*.jpg as RETFound publishes its data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from eyetune.data.images import is_image_name
from eyetune.data.labels import natural
from eyetune.data.record import SPLITS, Reading, Record, check_consistent
from eyetune.data.tables import split_word
from eyetune.errors import DataError, did_you_mean, listing

_JUNK = ("__macosx", "lost+found", "@eadir")


def read(root: Path, *, classes: Sequence[str] | None, labels_required: bool) -> Reading:
    """The photographs of a folder; see :meth:`Manifest.from_folder`."""
    if not root.is_dir():
        raise DataError(f"no folder at {root}.")
    top = _folders(root)
    divided = bool(top) and all(split_word(name) for name in top)
    places: list[tuple[str | None, Path]] = [(None, root)]
    if divided:
        places = sorted(
            ((split_word(name), root / name) for name in top), key=lambda place: SPLITS.index(str(place[0]))
        )
    names = sorted({name for _, folder in places for name in _folders(folder)}, key=natural)
    if not names:
        return _unlabelled(root, places, classes, labels_required)
    order = tuple(str(name) for name in classes) if classes else tuple(names)
    unknown = [name for name in names if name not in order]
    if unknown and labels_required:
        raise DataError(
            f"{root}: the folders {', '.join(unknown)} are none of the classes {', '.join(order)}."
            + did_you_mean(unknown[0], order)
        )
    records: list[Record] = []
    notes = [f"classes, in this order: {', '.join(order)}"]
    other = 0
    for split, folder in places:
        for name in sorted(_folders(folder), key=natural):
            label = order.index(name) if name in order else None
            for file in walk(folder / name):
                if is_image_name(file.name):
                    where = file.relative_to(root).as_posix()
                    records.append(Record(image=file, label=label, name=where, row=where, split=split))
                else:
                    other += not file.name.startswith(".")
    if other:
        notes.append(f"{other} files that are no images were left aside")
    if not records:
        raise DataError(f"{root}: no images in its class folders {', '.join(names)}.")
    check_consistent(records, str(root))
    return Reading(tuple(records), order, str(root), tuple(notes))


def read_images(root: Path) -> Reading:
    """Every image below a folder, without labels; see :meth:`Manifest.from_images`."""
    if not root.is_dir():
        raise DataError(f"no folder at {root}.")
    return _unlabelled(root, [(None, root)], None, labels_required=False)


def _unlabelled(
    root: Path, places: Sequence[tuple[str | None, Path]], classes: Sequence[str] | None, labels_required: bool
) -> Reading:
    files = [(split, file) for split, folder in places for file in walk(folder) if is_image_name(file.name)]
    if not files:
        raise DataError(f"{root}: no images in it.")
    if labels_required:
        tables = [path.name for path in sorted(root.iterdir()) if path.suffix.lower() in (".csv", ".tsv", ".jsonl")]
        advice = f" It holds tables; set data.table to one of them:\n{listing(tables)}" if tables else ""
        raise DataError(f"{root}: images but no class folders (expected {root.name}/CLASS/image.jpg).{advice}")
    records = []
    for split, file in files:
        name = file.relative_to(root).as_posix()
        records.append(Record(image=file, label=None, name=name, row=name, split=split))
    return Reading(tuple(records), tuple(str(name) for name in classes or ()), str(root))


def _folders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name.lower() not in _JUNK
    )


def walk(folder: Path) -> Iterator[Path]:
    """Files below `folder`, in an order that does not depend on the file system."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            yield Path(where) / name
