"""Tables as they are: rows that the readers would refuse are kept, with what is wrong with each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eyetune.data import labels as label_words
from eyetune.data.config import DataConfig
from eyetune.data.images import Finder
from eyetune.data.record import SPLITS, Record
from eyetune.data.records import Manifest, open_manifest
from eyetune.data.tables import choose_columns, make_records, read_rows, split_word
from eyetune.errors import DataError, listing

GAP = 2
"""As many unused numbers below a label, and it is taken for a slip of the pen, not for a class without images."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row before any file is opened.

    Attributes:
        kind: "unnamed", "missing", "ambiguous", "label", "unlabelled" or "split".
        said: what is wrong, in words.
    """

    kind: str
    said: str


@dataclass(frozen=True)
class Sheet:
    """One table, class folder or dataset, mistakes included.

    Attributes:
        source: as the user named it.
        name: short and unlike that of the other sheets, for messages.
        records: every row, in order. A row that names no image has the path of the folder.
        classes: class names; a record's label is an index into them.
        label: what the labels are: the column's name, or "folders"; None without labels.
        faults: by the row's position.
        divided: whether the rows have splits.
        root: the folder that image names are relative to.
        notes: which columns were taken, as the readers note it.
        split_column: the column with the splits, where there is one.
    """

    source: str
    name: str
    records: tuple[Record, ...]
    classes: tuple[str, ...]
    label: str | None
    faults: dict[int, list[Fault]] = field(default_factory=dict)
    divided: bool = False
    root: Path | None = None
    notes: tuple[str, ...] = ()
    split_column: str | None = None

    @property
    def is_table(self) -> bool:
        """Whether it is a file of rows, which can be written again without some of them."""
        return not self.source.startswith("hf:") and not Path(self.source).is_dir()

    def split_of(self, record: Record) -> str | None:
        """train, val or test; of a table without splits that is called so (`train.csv`), its name says it."""
        return record.split or (None if self.divided else split_word(Path(self.source).stem))


def read_sheets(configs: Sequence[DataConfig]) -> list[Sheet]:
    """Read every source; see :func:`read_sheet`. Raises DataError when one is given twice, too."""
    seen: dict[str, str] = {}
    for config in configs:
        key = config.table if config.table.startswith("hf:") else str(Path(config.table).resolve())
        if key in seen:
            raise DataError(f"{config.table} is named twice: name each table once.")
        seen[key] = config.table
    return [read_sheet(config, name) for config, name in zip(configs, _short_names(configs), strict=True)]


def read_sheet(config: DataConfig, name: str) -> Sheet:
    """Read one source with its mistakes.

    Args:
        config: table, image folder, columns, classes.
        name: what the sheet is called in messages.

    Raises DataError for what is no table at all, for columns that are not there, and when no image is found.
    """
    path = Path(config.table)
    if config.table.startswith("hf:") or path.is_dir():
        found = open_manifest(config, labels_required=False)
        label = "folders" if path.is_dir() else str(config.label_column or "label")
        return _of_manifest(found, config.table, name, label if found.classes else None)
    names, rows = read_rows(path)
    wanted = {part: getattr(config, f"{part}_column") for part in ("image", "label", "patient", "eye", "split")}
    chosen, notes = choose_columns(names, wanted, str(path), labels_required=config.label_column not in (None, "none"))

    def cells(part: str) -> list[str]:
        return [row[chosen[part]].strip() if part in chosen else "" for row, _ in rows]

    faults = _Faults()
    image_files, root = _find(Finder(path, config.images), cells("image"), [where for _, where in rows], faults)
    words = cells("label")
    labelled = any(not label_words.is_missing(word) for word in words)
    labels, classes, remarks = _labels(words, config.classes, faults if labelled else _Faults())
    splits = [split_word(cell) for cell in cells("split")]
    for index, (split, cell) in enumerate(zip(splits, cells("split"), strict=True)):
        if "split" in chosen and split is None:
            faults.add(index, "split", f"split {cell!r} is none of {', '.join(SPLITS)}")
    return Sheet(
        config.table,
        name,
        tuple(make_records(rows, image_files, cells("image"), chosen, labels=labels, splits=splits)),
        classes,
        chosen.get("label") if labelled else None,
        dict(faults),
        divided="split" in chosen,
        root=root,
        notes=(*notes, *remarks),
        split_column=chosen.get("split"),
    )


class _Faults(dict[int, list[Fault]]):
    """Faults by the row's position."""

    def add(self, index: int, kind: str, said: str) -> None:
        self.setdefault(index, []).append(Fault(kind, said))


def _find(finder: Finder, cells: Sequence[str], rows: Sequence[str], faults: _Faults) -> tuple[list[Path], Path]:
    """The file of each row, there or not, and the folder they are in."""
    candidates, root = finder.look_up([cell or "\0" for cell in cells])
    if not any(candidates):
        finder.find(cells, rows)  # says where it looked
    files = []
    for index, (cell, found) in enumerate(zip(cells, candidates, strict=True)):
        if not cell:
            faults.add(index, "unnamed", "names no image")
        elif not found:
            faults.add(index, "missing", f"{cell}: no such file")
        elif len(found) > 1:
            faults.add(index, "ambiguous", f"{cell} may be {' or '.join(file.name for file in found)}")
        files.append(found[0] if len(found) == 1 else root / cell)
    return files, root


def _labels(
    words: Sequence[str], given: Sequence[str] | None, faults: _Faults
) -> tuple[list[int | None], tuple[str, ...], list[str]]:
    """Label of each row, the classes, and notes."""
    judged = label_words.judge(words, given)
    for wrong in judged.wrong:
        for index in wrong.cells:
            if wrong.empty:
                faults.add(index, "unlabelled", "no label")
            else:
                faults.add(index, "label", f"label {words[index]!r}: {_without_count(wrong.said)}")
    labels, classes = list(judged.labels), judged.classes
    if given is None:
        last = _last_before_gap(labels)
        for index in _beyond_a_gap(labels, classes):
            faults.add(index, "label", f"label {words[index]!r}: the others run 0..{last} (if it counts: --classes)")
            labels[index] = None
        if classes and classes[0] == "0":
            classes = classes[: last + 1]
    return labels, classes, [note for note in judged.notes if "has label" not in note]


def _of_manifest(found: Manifest, source: str, name: str, label: str | None) -> Sheet:
    faults = {
        index: [Fault("unlabelled", "no label")]
        for index, record in enumerate(found)
        if record.label is None and any(one is not None for one in found.labels)
    }
    root = None if source.startswith("hf:") else Path(source)
    return Sheet(source, name, found.records, found.classes, label, faults, bool(found.splits), root, found.notes)


def _without_count(said: str) -> str:
    """ "3 labels are below 0; …" -> "below 0; …": said of one row."""
    return said.partition("labels are ")[2] or said


def _last_before_gap(labels: Sequence[int | None]) -> int:
    """The last of the numbers 0, 1, … before GAP or more of them are used by nobody."""
    used = sorted({label for label in labels if label is not None})
    for number, following in itertools.pairwise(used):
        if following - number > GAP:
            return number
    return used[-1] if used else -1


def _beyond_a_gap(labels: Sequence[int | None], classes: Sequence[str]) -> list[int]:
    """Rows whose number lies beyond a gap: 9 where the others are 0..4. (Words have no gaps.)"""
    if list(classes) != [str(index) for index in range(len(classes))]:
        return []
    last = _last_before_gap(labels)
    return [index for index, label in enumerate(labels) if label is not None and label > last]


def _short_names(configs: Sequence[DataConfig]) -> list[str]:
    """File names, with their folders where two are alike."""
    paths = [Path(config.table) if not config.table.startswith("hf:") else None for config in configs]
    plain = [path.name or str(path) if path else config.table for path, config in zip(paths, configs, strict=True)]
    return [
        (f"{path.parent.name}/{name}" if path is not None and path.parent.name else configs[index].table)
        if plain.count(name) > 1
        else name
        for index, (path, name) in enumerate(zip(paths, plain, strict=True))
    ]


def check_comparable(sheets: Sequence[Sheet]) -> list[str]:
    """Notes on sheets whose labels cannot be compared: another column, or no class in common."""
    apart = [
        f"{one.name} ({one.label}) and {other.name} ({other.label})"
        for index, one in enumerate(sheets)
        for other in sheets[index + 1 :]
        if one.label and other.label and not comparable(one, other)
    ]
    return [f"labels are not compared between\n{listing(apart)}"] if apart else []


def comparable(one: Sheet, other: Sheet) -> bool:
    """Whether labels of two sheets mean the same: columns of one name with a class in common, or two class folders."""
    if one is other:
        return True
    if one.label is None or other.label is None:
        return False
    return one.label.lower() == other.label.lower() and bool(set(one.classes) & set(other.classes))
