"""Reading a CSV, TSV or JSONL table into records: separators, columns by any name, image names without extension."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from eyetune.data import labels as label_words
from eyetune.data.config import IGNORE
from eyetune.data.images import Finder
from eyetune.data.record import SPLITS, Kind, Reading, Record, check_consistent
from eyetune.errors import DataError, did_you_mean, listing

STANDARD: Mapping[str, tuple[str, ...]] = {
    "image": (
        "image", "id_code", "image_id", "image_name", "image_path", "filename", "file_name", "file", "path", "img",
        "image name", "id",
    ),
    "label": (
        "label", "diagnosis", "dr_grade", "grade", "level", "retinopathy grade", "retinopathy_grade",
        "adjudicated_dr_grade", "class", "target", "category",
    ),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "pid"),
    "eye": ("eye", "laterality", "side", "eye_side"),
    "split": ("split", "set", "subset", "fold_name", "partition"),
}  # fmt: skip
"""Column names that are understood without being told, most usual first; compared without case."""

_SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
EYE_WORDS = {
    "left": "left", "l": "left", "os": "left", "le": "left",
    "right": "right", "r": "right", "od": "right", "re": "right",
}  # fmt: skip

Columns = Mapping[str, str | Sequence[str] | None]
"""The column that plays each part, by name: image, label, patient, eye, split; None to find it by its usual name. For
several labels a list of columns."""

LABELS = "label "
"""What stands before the place, from 0, of one of several label columns: "label 0", "label 1"."""

Row = tuple[dict[str, str], str]
"""The cells of a row by column, and where it stands ("train.csv row 17")."""


def split_word(cell: str) -> str | None:
    """train, val or test for the usual words, without case; None for any other word."""
    return _SPLIT_WORDS.get(cell.strip().lower())


def read(
    path: Path,
    *,
    images: Path | None,
    columns: Columns,
    classes: Sequence[str] | None,
    labels_required: bool,
    kind: Kind = "classes",
) -> Reading:
    """The photographs of a table; see :meth:`Manifest.from_table`."""
    names, rows = read_rows(path)
    chosen, notes = choose_columns(names, columns, str(path), labels_required=labels_required)
    finder = Finder(path, images)
    cells = [row[chosen["image"]].strip() for row, _ in rows]
    unnamed = [where for cell, (_, where) in zip(cells, rows, strict=True) if not cell]
    if unnamed:
        raise DataError(f"{path}: {len(unnamed)} rows name no image:\n{listing(unnamed)}")
    files, found_notes = finder.find(cells, [where for _, where in rows], all_there=labels_required)
    return build(
        rows=rows,
        files=files,
        names=cells,
        chosen=chosen,
        source=str(path),
        classes=classes,
        labels_required=labels_required,
        notes=[*notes, *found_notes],
        kind=kind,
    )


def build(
    *,
    rows: Sequence[Row],
    files: Sequence[Path],
    names: Sequence[str],
    chosen: Mapping[str, str],
    source: str,
    classes: Sequence[str] | None,
    labels_required: bool,
    notes: Sequence[str],
    kind: Kind = "classes",
) -> Reading:
    """Records from rows whose images were found; checks labels, splits, repeats."""
    labels, values, class_names, label_notes = _truths(
        rows, chosen, source, classes=classes, required=labels_required, kind=kind
    )
    splits = _splits(rows, chosen, source)
    records = make_records(rows, files, names, chosen, labels=labels, values=values, splits=splits)
    if labels_required:  # for prediction, each row is a question of its own
        check_consistent(records, source)
    return Reading(tuple(records), class_names, source, (*notes, *label_notes), kind)


def make_records(
    rows: Sequence[Row],
    files: Sequence[Path],
    names: Sequence[str],
    chosen: Mapping[str, str],
    *,
    labels: Sequence[int | None],
    values: Sequence[tuple[float | None, ...]] | None = None,
    splits: Sequence[str | None],
) -> list[Record]:
    """A record of every row, whose label (or values) and split were read already."""
    used = set(chosen.values())
    return [
        Record(
            image=files[i],
            label=labels[i],
            name=names[i],
            row=place,
            patient=_optional(row, chosen, "patient"),
            eye=_eye(_optional(row, chosen, "eye")),
            split=splits[i],
            extra={key: value for key, value in row.items() if key not in used},
            values=values[i] if values else (),
        )
        for i, (row, place) in enumerate(rows)
    ]


def _truths(
    rows: Sequence[Row],
    chosen: Mapping[str, str],
    source: str,
    *,
    classes: Sequence[str] | None,
    required: bool,
    kind: Kind,
) -> tuple[list[int | None], list[tuple[float | None, ...]], tuple[str, ...], list[str]]:
    """The class of each row, or its values; the names of classes, labels or the number; and notes."""
    where = [place for _, place in rows]

    def cells(part: str) -> list[str]:
        return [row[chosen[part]] if part in chosen else "" for row, _ in rows]

    if kind == "classes":
        labels, names, notes = label_words.encode(cells("label"), where, source, classes=classes, required=required)
        return labels, [()] * len(rows), names, notes
    none: list[int | None] = [None] * len(rows)
    if kind == "value":
        name = chosen.get("label") or (classes[0] if classes else "value")
        values = label_words.encode_numbers(cells("label"), where, source, required=required)
        return none, values, (name,), [f"a number to learn: {name}"]
    parts = [part for part in chosen if part.startswith(LABELS)]
    names = tuple(classes) if classes is not None else tuple(chosen[part] for part in parts)
    # Of a model's labels a table for prediction may lack some, or all.
    named = [f"{LABELS}{place}" for place in range(len(names))]
    values = label_words.encode_flags([cells(part) for part in named], names, where, source, required=required)
    return none, values, names, [f"labels, in this order: {', '.join(names)}"]


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Column names and rows of a table, every cell as text.

    Raises DataError when the file is missing, empty, not UTF-8, or not a table.
    """
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"no table at {path}.{near}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}). If it is a spreadsheet, save it as CSV UTF-8; if it is a "
            f"text in another encoding: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    if not text.strip():
        raise DataError(f"{path} is empty.")
    if "\0" in text:
        raise DataError(f"{path} holds zero bytes: it is no text, or UTF-16. Save it as CSV UTF-8.")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        names, rows = _parse_jsonl(path, text)
    else:
        names, rows = _parse_delimited(path, text)
    if not rows:
        raise DataError(f"{path} has a header but no rows.")
    return names, rows


def choose_columns(
    names: Sequence[str], wanted: Columns, source: str, *, labels_required: bool
) -> tuple[dict[str, str], list[str]]:
    """Which column plays which part, and notes on those that were found by their standard name.

    Raises DataError when a named column is not there, or none serves as image (or label, when required).
    """
    chosen: dict[str, str] = {}
    notes: list[str] = []
    faults: list[str] = []
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    for part, name in _one_by_one(wanted):
        if name is not None and name.lower() == IGNORE and name not in names:
            continue
        if name is not None:
            if name in names:
                chosen[part] = name
            elif name.lower() in by_lower:
                chosen[part] = by_lower[name.lower()]
            elif not part.startswith("label") or labels_required:
                several = " For several labels, name a list of columns: [a, b]." if "," in name else ""
                faults.append(
                    f"no column {name!r} (data.{part.split()[0]}_column).{did_you_mean(name, names)}{several}"
                )
            continue
        standard = next((by_lower[known] for known in STANDARD[part] if known in by_lower), None)
        if standard is not None:
            if standard in chosen.values():
                continue
            chosen[part] = standard
            notes.append(f"{part} column: {standard}")
        elif part == "image" or (part == "label" and labels_required):
            faults.append(f"no column with a usual name for the {part}; name it with data.{part}_column.")
    if faults:
        raise DataError(f"{source}: " + "\n".join(faults) + f"\nIts columns: {', '.join(names[:100])}.")
    return chosen, notes


def _one_by_one(wanted: Columns) -> Iterator[tuple[str, str | None]]:
    """The parts and their columns; of a list of label columns, each a part of its own."""
    for part, name in wanted.items():
        if name is None or isinstance(name, str):
            yield part, name
        else:
            yield from ((f"{LABELS}{place}", one) for place, one in enumerate(name))


def _parse_jsonl(path: Path, text: str) -> tuple[list[str], list[Row]]:
    names: dict[str, None] = {}
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}.") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
            raise DataError(f"{path} line {number} cannot be read as JSON ({type(error).__name__}).") from None
        if not isinstance(content, dict):
            raise DataError(f"{path} line {number} is not a JSON object ({{…}}).")
        row = {str(key): _as_text(value) for key, value in content.items()}
        if any("\0" in text or not is_unicode(text) for pair in row.items() for text in pair):
            raise DataError(f"{path} line {number} holds a character that no text has (\\u0000, or half a pair).")
        names.update(dict.fromkeys(row))
        rows.append((row, f"{path.name} line {number}"))
    return list(names), [({name: row.get(name, "") for name in names}, where) for row, where in rows]


def is_unicode(text: str) -> bool:
    """Whether a text can be written; JSON may escape the halves of a surrogate pair alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parse_delimited(path: Path, text: str) -> tuple[list[str], list[Row]]:
    separator = read_separator(path, text)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is not a well-formed table: {error}.") from None
    header = [name.strip() for name in lines[0]]
    repeated = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if repeated:
        raise DataError(f"{path} has two columns called {', '.join(repeated[:5])}; rename one.")
    rows: list[Row] = []
    ragged: list[str] = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path.name} row {number}"
        if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
            ragged.append(f"{where}: {len(cells)} cells")
        padded = [*cells, *[""] * (len(header) - len(cells))]
        rows.append((dict(zip(header, padded, strict=False)), where))
    if ragged:
        raise DataError(
            f"{path}: {len(ragged)} rows have more cells than the {len(header)} columns of the header; put quotes "
            f"around text that contains {separator!r}:\n{listing(ragged)}"
        )
    return header, rows


def read_separator(path: Path, text: str) -> str:
    """The separator: what the suffix says, unless the header has none of it and has another."""
    header = text.lstrip("\r\n").split("\n", 1)[0]
    preferred = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    if preferred in header:
        return preferred
    return max((";", "\t", ",", "|"), key=header.count) if any(s in header for s in ";\t,|") else preferred


def _splits(rows: Sequence[Row], chosen: Mapping[str, str], source: str) -> list[str | None]:
    if "split" not in chosen:
        return [None] * len(rows)
    words = [(row[chosen["split"]], where) for row, where in rows]
    wrong = [f"{where}: {cell!r}" for cell, where in words if split_word(cell) is None]
    if wrong:
        raise DataError(
            f"{source}: {len(wrong)} rows of the column {chosen['split']!r} do not say {', '.join(SPLITS)}; correct "
            f'them, or set data.split_column to "none" to cut new splits:\n{listing(wrong)}'
        )
    return [split_word(cell) for cell, _ in words]


def _optional(row: Mapping[str, str], chosen: Mapping[str, str], part: str) -> str | None:
    cell = row[chosen[part]].strip() if part in chosen else ""
    return None if label_words.is_missing(cell) else cell


def _eye(word: str | None) -> str | None:
    return None if word is None else EYE_WORDS.get(word.lower(), word)
