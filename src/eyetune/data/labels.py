"""From the words in a label column to class indices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eyetune.errors import DataError, did_you_mean, listing

MISSING = frozenset({"", "nan", "na", "n/a", "<na>", "null"})
AS_THEY_STAND: tuple[str, ...] = ()
"""In the place of classes: take the labels of the source as they are, for a label map to read."""

_FLAGS = {"1": 1.0, "0": 0.0, "yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}
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


class Wrong(NamedTuple):
    """Cells that are no labels, and why."""

    said: str
    """What is wrong with them: "3 labels are below 0; …"."""
    cells: tuple[int, ...]
    """Their positions."""
    empty: bool = False
    """Nothing is in them."""


class Judged(NamedTuple):
    """A label column, cells that are no labels included."""

    labels: list[int | None]
    """Index into `classes` of every cell; None for those that are empty or wrong."""
    classes: tuple[str, ...]
    wrong: list[Wrong]
    notes: list[str]


def encode(
    cells: Sequence[str], rows: Sequence[str], source: str, *, classes: Sequence[str] | None, required: bool
) -> tuple[list[int | None], tuple[str, ...], list[str]]:
    """Class indices for `cells`, the classes, and notes.

    Numbers are the indices 0..K-1 themselves (`3.0` counts as 3); anything else names its class. With `classes` given,
    a cell must be one of those names, or, when none of the cells is, an index into them. With :data:`AS_THEY_STAND`
    every different cell is a class of its own name, numbers too.

    Raises DataError for empty cells when `required`, words among numbers, fractions, and labels outside the classes.
    """
    found = judge(cells, classes)
    faults = []
    for said, positions, empty in found.wrong:
        if required or not empty:
            shown = [rows[i] if empty else f"{rows[i]}: {_plain(cells[i])!r}" for i in positions]
            faults.append(f"{said}{'' if said.endswith(('?', '.')) else ':'}\n{listing(shown)}")
    if faults:
        raise DataError(f"{source}: " + "\n".join(faults))
    return found.labels, found.classes, found.notes


def judge(cells: Sequence[str], classes: Sequence[str] | None) -> Judged:
    """As :func:`encode`, but what is no label is listed and does not stop the rest from being read."""
    known = {i: _plain(cell) for i, cell in enumerate(cells) if not is_missing(cell)}
    wrong: list[Wrong] = []
    if len(known) < len(cells):
        empty = tuple(i for i in range(len(cells)) if i not in known)
        wrong.append(Wrong(f"{len(empty)} rows have no label; fill them in or remove them", empty, empty=True))
    found: list[Wrong] = []
    notes: list[str] = []
    if classes == AS_THEY_STAND:
        names = tuple(sorted(set(known.values()), key=natural))
        mapping = {name: index for index, name in enumerate(names)}
    elif classes is not None:
        mapping, names, found = _given(known, tuple(str(name) for name in classes))
    else:
        mapping, names, found, notes = _found(known)
    bad = {i for one in found for i in one.cells}
    labels = [mapping[known[i]] if i in known and i not in bad else None for i in range(len(cells))]
    return Judged(labels, names, [*wrong, *found], notes)


def encode_flags(
    columns: Sequence[Sequence[str]], names: Sequence[str], rows: Sequence[str], source: str, *, required: bool
) -> list[tuple[float | None, ...]]:
    """What each row says of every label, 1.0, 0.0 or None where its cell is empty.

    Args:
        columns: the cells of each label.
        names: of the labels.
        rows: where each row stands, for messages.
        source: the table, for messages.
        required: whether a row must know one label at least.

    Raises DataError for cells that are neither 0 nor 1 (nor yes, no, true, false), and for rows without any label
    when `required`.
    """
    if not columns:
        return [()] * len(rows)
    faults = []
    for name, cells in zip(names, columns, strict=True):
        wrong = [
            f"{row}: {cell!r}"
            for cell, row in zip(cells, rows, strict=True)
            if not is_missing(cell) and _plain(cell).lower() not in _FLAGS
        ]
        if wrong:
            faults.append(f"{len(wrong)} cells of the label {name!r} are neither 0 nor 1:\n{listing(wrong)}")
    if faults:
        raise DataError(f"{source}: " + "\n".join(faults))
    found = [
        tuple(None if is_missing(cell) else _FLAGS[_plain(cell).lower()] for cell in cells)
        for cells in zip(*columns, strict=True)
    ]
    empty = [row for values, row in zip(found, rows, strict=True) if all(value is None for value in values)]
    if empty and required:
        raise DataError(
            f"{source}: {len(empty)} rows have none of the labels {', '.join(names)}; fill them in or remove them:\n"
            f"{listing(empty)}"
        )
    return found


def encode_numbers(
    cells: Sequence[str], rows: Sequence[str], source: str, *, required: bool
) -> list[tuple[float | None, ...]]:
    """The number of each row, None where its cell is empty.

    Raises DataError for cells that are no finite numbers, and for empty ones when `required`.
    """
    wrong, found = [], []
    for cell, row in zip(cells, rows, strict=True):
        value = None
        if not is_missing(cell):
            text = cell.strip()
            value = float(text) if _NUMBER.fullmatch(text) else math.nan
            if not math.isfinite(value):
                wrong.append(f"{row}: {cell!r}")
        found.append((value,))
    if wrong:
        raise DataError(f"{source}: {len(wrong)} cells to learn a number from are no finite number:\n{listing(wrong)}")
    empty = [row for (value,), row in zip(found, rows, strict=True) if value is None]
    if empty and required:
        raise DataError(f"{source}: {len(empty)} rows have no number; fill them in or remove them:\n{listing(empty)}")
    return list(found)


def _plain(cell: str) -> str:
    """The cell without surrounding space, and whole numbers without sign, leading zeros or `.0`."""
    cell = cell.strip()
    if _NUMBER.fullmatch(cell) and float(cell).is_integer():
        return str(int(float(cell)))
    return cell


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", cell) is not None


def _given(known: Mapping[int, str], classes: tuple[str, ...]) -> tuple[dict[str, int], tuple[str, ...], list[Wrong]]:
    by_name = {_plain(name): index for index, name in enumerate(classes)}
    if not any(cell in by_name for cell in known.values()):
        by_index = {str(index): index for index in range(len(classes))}
        if any(cell in by_index for cell in known.values()):
            by_name = by_index
    wrong = tuple(i for i, cell in known.items() if cell not in by_name)
    if not wrong:
        return by_name, classes, []
    near = did_you_mean(known[wrong[0]], by_name)
    return by_name, classes, [Wrong(f"{len(wrong)} labels are none of the classes {', '.join(classes)}.{near}", wrong)]


def _found(known: Mapping[int, str]) -> tuple[dict[str, int], tuple[str, ...], list[Wrong], list[str]]:
    numbers = {i: cell for i, cell in known.items() if _NUMBER.fullmatch(cell)}
    words = {i: cell for i, cell in known.items() if i not in numbers}
    wrong = []
    if numbers and words:
        few, kinds = (words, "words where the others are numbers")
        if len(words) > len(numbers):
            few, kinds = (numbers, "numbers where the others are words")
        wrong.append(Wrong(f"{len(few)} labels are {kinds}", tuple(few)))
    if len(words) > len(numbers) or not numbers:
        names = tuple(sorted(set(words.values()), key=natural))
        notes = [f"classes, in this order: {', '.join(names)}"] if names else []
        return {name: index for index, name in enumerate(names)}, names, wrong, notes
    fractions = tuple(i for i, cell in numbers.items() if not _is_whole(cell))
    if fractions:
        advice = "" if len(fractions) < len(numbers) else "; to learn the numbers themselves: task.kind regression"
        wrong.append(
            Wrong(f"{len(fractions)} labels are fractions; a class is a whole number 0..K-1{advice}", fractions)
        )
    negative = tuple(i for i, cell in numbers.items() if _is_whole(cell) and int(cell) < 0)
    if negative:
        wrong.append(Wrong(f"{len(negative)} labels are below 0; classes are numbered 0..K-1", negative))
    whole = {i: int(cell) for i, cell in numbers.items() if i not in fractions and i not in negative}
    seen = sorted(set(whole.values()))
    if seen and seen[-1] >= max(100, 2 * len(seen)):
        far = tuple(i for i, number in whole.items() if number >= max(100, 2 * len(seen)))
        wrong.append(
            Wrong(
                f"the highest label is {seen[-1]} but only {len(seen)} different labels occur. Labels must be 0..K-1; "
                "is data.label_column the right one?",
                far,
            )
        )
        seen = [number for number in seen if number < max(100, 2 * len(seen))]
    top = seen[-1] if seen else -1
    holes = [str(index) for index in range(top) if index not in seen]
    notes = [f"no image has label {', '.join(holes)} (labels run 0..{top})"] if holes else []
    return {str(i): i for i in range(top + 1)}, tuple(str(i) for i in range(top + 1)), wrong, notes
