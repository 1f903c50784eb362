"""From the words in a label column to class indices."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eyetune.errors import DataError, did_you_mean, listing

MISSING = frozenset({"", "nan", "na", "n/a", "<na>", "null"})
AS_THEY_STAND: tuple[str, ...] = ()
"""In the place of classes: take the labels of the source as they are, for a label map to read."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def is_missing(cell: str) -> bool:
    """Whether a cell is empty or one of the usual marks for nothing. (`none` is not: it may name a class.)"""
    return cell.strip().lower() in MISSING


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that reads digits as numbers: grade2 before grade10, 2 before 10."""
    parts = re.split(r"(\d+)", name.lower())
    return (
        *((0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part) for part in parts if part),
        (2, 0, name),
    )


def encode(
    cells: Sequence[str], rows: Sequence[str], source: str, *, classes: Sequence[str] | None, required: bool
) -> tuple[list[int | None], tuple[str, ...], list[str]]:
    """Class indices for `cells`, the classes, and notes.

    Numbers are the indices 0..K-1 themselves (`3.0` counts as 3); anything else names its class. With `classes` given,
    a cell must be one of those names, or, when none of the cells is, an index into them. With :data:`AS_THEY_STAND`
    every different cell is a class of its own name, numbers too.

    Raises DataError for empty cells when `required`, words among numbers, fractions, and labels outside the classes.
    """
    faults: list[str] = []
    found: list[str]
    notes: list[str]
    known = [(_plain(cell), row) for cell, row in zip(cells, rows, strict=True) if not is_missing(cell)]
    empty = [row for cell, row in zip(cells, rows, strict=True) if is_missing(cell)]
    if empty and required:
        faults.append(f"{len(empty)} rows have no label; fill them in or remove them:\n{listing(empty)}")
    if classes == AS_THEY_STAND:
        names = tuple(sorted({cell for cell, _ in known}, key=natural))
        mapping, found, notes = {name: index for index, name in enumerate(names)}, [], []
    elif classes is not None:
        mapping, names, found = _given(known, tuple(str(name) for name in classes))
        notes = []
    else:
        mapping, names, found, notes = _found(known)
    faults += found
    if faults:
        raise DataError(f"{source}: " + "\n".join(faults))
    return [None if is_missing(cell) else mapping[_plain(cell)] for cell in cells], names, notes


def _plain(cell: str) -> str:
    """The cell without surrounding space, and whole numbers without sign, leading zeros or `.0`."""
    cell = cell.strip()
    if _NUMBER.fullmatch(cell) and float(cell).is_integer():
        return str(int(float(cell)))
    return cell


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", cell) is not None


def _given(known: list[tuple[str, str]], classes: tuple[str, ...]) -> tuple[dict[str, int], tuple[str, ...], list[str]]:
    by_name = {_plain(name): index for index, name in enumerate(classes)}
    if not any(cell in by_name for cell, _ in known):
        by_index = {str(index): index for index in range(len(classes))}
        if any(cell in by_index for cell, _ in known):
            by_name = by_index
    wrong = [f"{row}: {cell!r}" for cell, row in known if cell not in by_name]
    if not wrong:
        return by_name, classes, []
    first = next(cell for cell, _ in known if cell not in by_name)
    return (
        by_name,
        classes,
        [
            f"{len(wrong)} labels are none of the classes {', '.join(classes)}.{did_you_mean(first, by_name)}\n"
            + listing(wrong)
        ],
    )


def _found(known: list[tuple[str, str]]) -> tuple[dict[str, int], tuple[str, ...], list[str], list[str]]:
    numbers = [(cell, row) for cell, row in known if _NUMBER.fullmatch(cell)]
    if not numbers:
        names = tuple(sorted({cell for cell, _ in known}, key=natural))
        notes = [f"classes, in this order: {', '.join(names)}"] if names else []
        return {name: index for index, name in enumerate(names)}, names, [], notes
    faults = []
    words = [f"{row}: {cell!r}" for cell, row in known if not _NUMBER.fullmatch(cell)]
    if words:
        few, many = ("words", "numbers") if len(words) <= len(numbers) else ("numbers", "words")
        shown = words if few == "words" else [f"{row}: {cell!r}" for cell, row in numbers]
        faults.append(f"{len(shown)} labels are {few} where the others are {many}:\n{listing(shown)}")
    fractions = [f"{row}: {cell}" for cell, row in numbers if not _is_whole(cell)]
    if fractions:
        faults.append(f"{len(fractions)} labels are fractions; a class is a whole number 0..K-1:\n{listing(fractions)}")
    negative = [f"{row}: {cell}" for cell, row in numbers if _is_whole(cell) and int(cell) < 0]
    if negative:
        faults.append(f"{len(negative)} labels are below 0; classes are numbered 0..K-1:\n{listing(negative)}")
    if faults:
        return {}, (), faults, []
    seen = sorted({int(cell) for cell, _ in numbers})
    top = seen[-1]
    if top >= max(100, 2 * len(seen)):
        far = [f"{row}: {cell}" for cell, row in numbers if int(cell) == top]
        return (
            {},
            (),
            [
                f"the highest label is {top} but only {len(seen)} different labels occur. Labels must be 0..K-1; is "
                f"data.label_column the right one?\n{listing(far)}"
            ],
            [],
        )
    holes = [str(index) for index in range(top) if index not in seen]
    notes = [f"no image has label {', '.join(holes)} (labels run 0..{top})"] if holes else []
    return {str(i): i for i in range(top + 1)}, tuple(str(i) for i in range(top + 1)), [], notes
