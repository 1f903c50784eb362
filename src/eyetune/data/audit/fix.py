"""Which rows to leave out so that the audit passes, and the table without them."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eyetune.data.audit.reading import Sheet
from eyetune.data.audit.rows import KINDS, Entry, apart
from eyetune.data.audit.run import Audit
from eyetune.data.tables import read_separator
from eyetune.errors import DataError, UserError
from eyetune.files import write_text

_HELD_OUT = {"test": 0, "val": 1, "train": 2, None: 3}
"""Which copy stays: a test set keeps its images, and training gives way."""


@dataclass(frozen=True)
class Drop:
    """A row that is left out.

    Attributes:
        at: its position among the entries.
        why: in words.
        kept: the position of the row that stays in its place, if one does.
    """

    at: int
    why: str
    kept: int | None = None


def choose_drops(found: Audit, *, uncut: bool = False) -> list[Drop]:
    """The rows to leave out, each with its reason, by position. What stays passes the audit.

    Copies: the one held out stays (test before val before train), then the larger picture, then the first row; when
    labels differ none stays. Near copies of one known patient in one split are two photographs of one eye, and stay.
    Patients in two splits: the rows held out stay.

    Args:
        found: the audit.
        uncut: splits will be cut that keep copies together, so copies stay unless a row names the very same file, their
            labels differ, or they are in two splits already.
    """
    drops: dict[int, Drop] = {}

    def drop(at: int, why: str, kept: int | None = None) -> None:
        drops.setdefault(at, Drop(at, why, kept))

    for at, why in found.unreadable.items():
        drop(at, f"image: {why}")
    for at in found.blank:
        drop(at, "image: blank")
    for at, why in (*found.labels.items(), *found.splits.items()):
        drop(at, why)
    for at in found.unlabelled:
        if found.entries[at].split in ("train", None):
            drop(at, "no label")
    for group in found.groups:
        rows = [at for at in group.rows if at not in drops]
        entries = [found.entries[at] for at in rows]
        if len(rows) < 2:
            continue
        word = KINDS[group.kind]
        if group.conflicting:
            for at in rows:
                drop(at, f"{word} as {_others(found.entries, rows, at)}, with different labels")
            continue
        patients = {entry.record.patient for entry in entries}
        together = None not in patients and len(patients) == 1 and not _any_apart(entries)
        if group.kind == "near" and together:
            continue
        kept = min(rows, key=lambda at: _rank(found, at))
        for at in rows:
            if at != kept and not (uncut and not _needless(found.entries, kept, at)):
                drop(at, f"{word} as {found.entries[kept].record.row}", kept)
    _drop_leaking(found, drops)
    # What should have stayed may have had to go for another reason since.
    standing = [one if one.kept not in drops else Drop(one.at, one.why) for one in drops.values()]
    return sorted(standing, key=lambda one: one.at)


def _others(entries: Sequence[Entry], rows: Sequence[int], at: int) -> str:
    """The other rows of a group, the first three by name."""
    others = [entries[other].record.row for other in rows if other != at]
    return ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")


def _needless(entries: Sequence[Entry], kept: int, at: int) -> bool:
    """Whether one of two copies has to go before splits are cut that keep copies together."""
    return entries[kept].record.image == entries[at].record.image or apart(entries[kept], entries[at])


def _rank(found: Audit, at: int) -> tuple[int, int, int]:
    look = found.looks.get(at)
    return _HELD_OUT[found.entries[at].split], -(look.width * look.height if look else 0), at


def _any_apart(entries: Sequence[Entry]) -> bool:
    return any(apart(entries[0], other) for other in entries[1:])


def _drop_leaking(found: Audit, drops: dict[int, Drop]) -> None:
    """Of each patient, the rows that are apart from those held out."""
    rows: dict[str, list[int]] = defaultdict(list)
    for at, entry in enumerate(found.entries):
        if entry.record.patient is not None and at not in drops:
            rows[entry.record.patient].append(at)
    for own in rows.values():
        first = min(own, key=lambda at: (_HELD_OUT[found.entries[at].split], at))
        for at in own:
            if apart(found.entries[first], found.entries[at]):
                place = found.entries[first].part
                drops[at] = Drop(at, f"its patient is in {place} ({found.entries[first].record.row})")


def check_outputs(found: Sequence[Sheet], outputs: Mapping[int, Path], *more: Path) -> None:
    """Raise UserError where an output is a source, or two outputs are one file. Outputs by the sheet's position."""
    sources = [Path(sheet.source) for sheet in found if sheet.is_table]
    written = [*outputs.values(), *more]
    for out in written:
        for source in sources:
            if out.resolve() == source.resolve() or (out.exists() and source.exists() and out.samefile(source)):
                raise UserError(
                    f"{out} is the table that is audited: name another file. A source is never overwritten."
                )
        if out.is_dir():
            raise UserError(f"{out} is a folder: name a file.")
    if len({out.resolve() for out in written}) < len(written):
        raise UserError(f"two tables would be written to one file: {', '.join(map(str, written))}.")


def write_sheet(sheet: Sheet, without: set[int], out: Path, splits: Sequence[str | None] | None = None) -> int:
    """Write a sheet again without some rows; returns how many there are.

    A table keeps its columns, its cells and its kind (CSV, TSV, JSONL); class folders and datasets become a CSV of
    image, label, split, patient, eye. With `splits`, the column of
    the splits is set, or one called `split` added.

    Args:
        sheet: the sheet.
        without: positions of the rows to leave out.
        out: file to write, atomically.
        splits: the split of every row of the sheet.

    Raises DataError when nothing would be left, or the file has changed since it was read.
    """
    left = [index for index in range(len(sheet.records)) if index not in without]
    if not left:
        raise DataError(f"{sheet.source}: no row is left to write; correct the table instead.")
    if not sheet.is_table:
        text = _new_table(sheet, left, splits)
    elif Path(sheet.source).suffix.lower() in (".jsonl", ".ndjson"):
        text = _json_lines(sheet, left, splits)
    else:
        text = _delimited(sheet, left, splits)
    write_text(out, text)
    return len(left)


def _new_table(sheet: Sheet, left: Sequence[int], splits: Sequence[str | None] | None) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["image", "label", "split", "patient", "eye"])
    for index in left:
        record = sheet.records[index]
        name = record.name if sheet.root is not None else str(record.image)
        label = "" if record.label is None else sheet.classes[record.label]
        split = record.split if splits is None else splits[index]
        writer.writerow([name, label, split or "", record.patient or "", record.eye or ""])
    return stream.getvalue()


def _json_lines(sheet: Sheet, left: Sequence[int], splits: Sequence[str | None] | None) -> str:
    lines = [line for line in _text(sheet).splitlines() if line.strip()]
    _check_unchanged(sheet, len(lines))
    if splits is None:
        return "".join(lines[index] + "\n" for index in left)
    column = sheet.split_column or "split"
    rows = [{**json.loads(lines[index]), column: splits[index]} for index in left]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _delimited(sheet: Sheet, left: Sequence[int], splits: Sequence[str | None] | None) -> str:
    text = _text(sheet)
    separator = read_separator(Path(sheet.source), text)
    header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    _check_unchanged(sheet, len(rows))
    if splits is not None:
        names, column = [name.strip() for name in header], sheet.split_column or "split"
        place = names.index(column) if column in names else len(header)
        header = [*header[:place], column, *header[place + 1 :]]
        rows = [
            [*[*row, *[""] * place][:place], str(splits[index]), *row[place + 1 :]] for index, row in enumerate(rows)
        ]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows[index] for index in left)
    return stream.getvalue()


def _text(sheet: Sheet) -> str:
    return Path(sheet.source).read_bytes().decode("utf-8-sig")


def _check_unchanged(sheet: Sheet, rows: int) -> None:
    if rows != len(sheet.records):
        raise DataError(f"{sheet.source} has changed since it was read ({len(sheet.records)} rows, now {rows}).")


def write_drops(found: Audit, drops: Sequence[Drop], out: Path) -> None:
    """Write table, row, image, why and the row kept in its place, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "row", "image", "why", "kept"])
    for one in drops:
        entry = found.entries[one.at]
        kept = "" if one.kept is None else found.entries[one.kept].record.row
        writer.writerow([found.sheets[entry.sheet].name, entry.record.row, entry.record.name, one.why, kept])
    write_text(out, stream.getvalue())
