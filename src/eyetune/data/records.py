"""Manifest: which photographs there are, what is known of each, and what the classes are.

Everything wrong with a table is said here, all faults of one kind together, with the rows they are in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from eyetune.data.record import SPLITS, Kind, Record
from eyetune.errors import DataError, did_you_mean, listing

if TYPE_CHECKING:
    import numpy.typing as npt

    from eyetune.data.config import DataConfig


@dataclass(frozen=True)
class Manifest(Sequence[Record]):
    """Records in the order of their source, the classes in their order, and what was noticed while reading.

    Attributes:
        records: the photographs.
        classes: class names; a record's label is an index into them.
        source: the table, folder or dataset, for messages.
        notes: remarks worth showing once ("label column: diagnosis", "3 unreadable images skipped: …").
        kind: what is known of each: "classes", one of `classes`; "labels", which of `classes` it has; "value", a
            number, whose name is the only one of `classes`.
        left_out: what of the source is not among the records: (why, how many images), in the order it happened.
    """

    records: tuple[Record, ...]
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()
    kind: Kind = "classes"
    left_out: tuple[tuple[str, int], ...] = ()

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...
    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @classmethod
    def from_table(
        cls,
        path: str | Path,
        *,
        images: str | Path | None = None,
        image_column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        patient_column: str | None = None,
        eye_column: str | None = None,
        split_column: str | None = None,
        classes: Sequence[str] | None = None,
        labels_required: bool = True,
        kind: Kind | None = None,
    ) -> Manifest:
        """Read a CSV, TSV or JSONL table; see :class:`eyetune.data.config.DataConfig` for the arguments.

        `kind` says what the label column holds; None = "labels" where it is several columns, else "classes".

        Raises DataError for a missing table, folder, column or image, for labels that make no sense, for duplicate
        rows, and for a patient or an image in two splits.
        """
        from eyetune.data.tables import read

        return cls(
            *read(
                Path(path),
                images=None if images is None else Path(images),
                columns={
                    "image": image_column,
                    "label": label_column,
                    "patient": patient_column,
                    "eye": eye_column,
                    "split": split_column,
                },
                classes=classes,
                labels_required=labels_required,
                kind=kind or kind_of(label_column),
            )
        )

    from_csv = from_table

    @classmethod
    def from_folder(
        cls, path: str | Path, *, classes: Sequence[str] | None = None, labels_required: bool = True
    ) -> Manifest:
        """Read class folders: `root/class/*.jpg` or `root/{train,val,test}/class/*.jpg`.

        The order of the classes is natural (2 before 10) unless `classes` gives it. Without labels_required a folder
        of plain images will do. Raises DataError for a missing or empty folder and for folders not in `classes`.
        """
        from eyetune.data.folders import read

        return cls(*read(Path(path), classes=classes, labels_required=labels_required))

    @classmethod
    def from_images(cls, path: str | Path) -> Manifest:
        """Every image below a folder, whatever its subfolders are called; without labels.

        Raises DataError for a missing folder or one without images.
        """
        from eyetune.data.folders import read_images

        return cls(*read_images(Path(path)))

    @classmethod
    def from_huggingface(
        cls,
        name: str,
        *,
        image_column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        patient_column: str | None = None,
        eye_column: str | None = None,
        split_column: str | None = None,
        classes: Sequence[str] | None = None,
        labels_required: bool = True,
        kind: Kind | None = None,
    ) -> Manifest:
        """Read a Hugging Face dataset: a local folder, or a name on the hub (streamed; extra `hub`)."""
        from eyetune.data.hub import read

        return cls(
            *read(
                name,
                columns={
                    "image": image_column,
                    "label": label_column,
                    "patient": patient_column,
                    "eye": eye_column,
                    "split": split_column,
                },
                classes=classes,
                labels_required=labels_required,
                kind=kind or kind_of(label_column),
            )
        )

    @property
    def labels(self) -> tuple[int | None, ...]:
        """The label of every record, in order."""
        return tuple(record.label for record in self.records)

    def targets(self) -> npt.NDArray[Any]:
        """What is to be learnt, in order: of classes int64[N], -1 where not known; of labels float64[N, L], 1 or 0,
        and of a number float64[N], both NaN where not known."""
        import numpy as np

        if self.kind == "classes":
            return np.array([-1 if label is None else label for label in self.labels], dtype=np.int64)
        none = (None,) * len(self.classes)
        found = np.array([r.values or none for r in self.records], dtype=np.float64).reshape(
            len(self), len(self.classes)
        )
        return found if self.kind == "labels" else found[:, 0]

    def strata(self) -> tuple[list[tuple[int, ...]], int]:
        """The groups each record counts in when images are shared out evenly, and how many groups there are.

        Of classes: its class. Of labels: for each that is known, having it or not. Of a number: which fifth of the
        known numbers it is in. A record of which nothing is known is in a group of its own, the last.
        """
        import numpy as np

        if self.kind == "classes":
            last = len(self.classes)
            return [(last if label is None else label,) for label in self.labels], last + 1
        targets = self.targets()
        if self.kind == "labels":
            last = 2 * len(self.classes)
            cells = [[2 * k + int(v) for k, v in enumerate(row) if v == v] for row in targets.tolist()]  # noqa: PLR0124
            return [tuple(row) or (last,) for row in cells], last + 1
        known = targets[~np.isnan(targets)]
        edges = np.unique(np.quantile(known, [0.2, 0.4, 0.6, 0.8])) if len(known) else np.zeros(0)
        fifth = np.where(np.isnan(targets), len(edges) + 1, np.searchsorted(edges, targets, side="right"))
        return [(int(one),) for one in fifth], len(edges) + 2

    def truth_columns(self) -> list[str]:
        """The columns in which a table says the truth of a record: `target`, or `target_<label>` for each label."""
        return [f"target_{name}" for name in self.classes] if self.kind == "labels" else ["target"]

    def truth_cells(self, record: Record) -> list[str]:
        """What stands in those columns: the class by name, 1 or 0, the number; empty where not known."""
        if self.kind == "classes":
            return ["" if record.label is None else self.classes[record.label]]
        shown = "{:.0f}" if self.kind == "labels" else "{!r}"
        return ["" if value is None else shown.format(value) for value in record.values or [None] * len(self.classes)]

    @property
    def splits(self) -> tuple[str, ...]:
        """Which of train, val and test have records, in that order."""
        present = {record.split for record in self.records}
        return tuple(name for name in SPLITS if name in present)

    def select(self, split: str) -> Manifest:
        """The records of one split, with the same classes. Raises DataError when there is none."""
        chosen = tuple(record for record in self.records if record.split == split)
        if not chosen:
            have = ", ".join(self.splits) or "no splits"
            raise DataError(f"{self.source} has no {split} images (it has {have}).")
        return replace(self, records=chosen, notes=())

    def with_records(self, records: Iterable[Record], *notes: str) -> Manifest:
        """The same manifest with other records, and `notes` added."""
        return replace(self, records=tuple(records), notes=(*self.notes, *notes))

    def without(self, why: str, records: Iterable[Record], *notes: str) -> Manifest:
        """The manifest with only these of its records, the others counted in `left_out`, and `notes` added."""
        kept = self.with_records(records, *notes)
        return replace(kept, left_out=(*self.left_out, (why, len(self) - len(kept))))

    def with_classes(self, classes: Sequence[str]) -> Manifest:
        """The same photographs with their labels as indexes into `classes`, matched by name.

        Raises DataError when a class of this manifest is none of `classes`.
        """
        order = tuple(classes)
        if self.kind != "classes":
            return self._with_names(order)
        if unknown := [name for name in self.classes if name not in order]:
            raise DataError(
                f"{self.source}: its classes {', '.join(unknown)} are none of {', '.join(order)}."
                + did_you_mean(unknown[0], order)
            )
        place = [order.index(name) for name in self.classes]
        records = [replace(r, label=None if r.label is None else place[r.label]) for r in self.records]
        return replace(self, records=tuple(records), classes=order)

    def _with_names(self, order: tuple[str, ...]) -> Manifest:
        """Labels in another order, those that are not there being not known; a number under its name."""
        if self.kind == "value":
            return replace(self, classes=order)
        if unknown := [name for name in self.classes if name not in order]:
            raise DataError(
                f"{self.source}: its labels {', '.join(unknown)} are none of {', '.join(order)}."
                + did_you_mean(unknown[0], order)
            )
        place = {name: k for k, name in enumerate(self.classes)}
        records = [
            replace(r, values=tuple(r.values[place[name]] if name in place else None for name in order))
            for r in self.records
        ]
        return replace(self, records=tuple(records), classes=order)

    def class_counts(self) -> tuple[int, ...]:
        """Number of records of each class, int[K]; records without a label are not counted.

        Of labels: how many have each; of a number: how many are known."""
        if self.kind != "classes":
            wanted = (1.0,) if self.kind == "labels" else None
            return tuple(
                sum(record.values[k] in wanted if wanted else record.values[k] is not None for record in self.records)
                for k in range(len(self.classes))
            )
        counts = Counter(self.labels)
        return tuple(counts[index] for index in range(len(self.classes)))

    def class_weights(self) -> tuple[float, ...]:
        """Weight of each class in the loss, n / (K n_class): 1 on average over the records; 0 for an absent class."""
        counts = self.class_counts()
        present = sum(count > 0 for count in counts)
        return tuple(sum(counts) / (present * count) if count else 0.0 for count in counts)

    def check_trainable(self) -> None:
        """Raise DataError unless the train split (before splitting: all) has two or more classes, none absent."""
        train = [record for record in self.records if record.split in ("train", None)]
        if not train:
            raise DataError(f"{self.source} has no train images.")
        unknown = [record.row for record in train if all(one is None for one in record.truth)]
        if unknown:
            raise DataError(f"{len(unknown)} images to train on have no label:\n{listing(unknown)}")
        if self.kind != "classes":
            self._check_varied(train)
            return
        counts = Counter(record.label for record in train)
        if len(counts) == 1:
            only = self.classes[next(iter(counts))]  # type: ignore[index]
            raise DataError(
                f"{self.source}: every image to train on has the label {only!r}. Training needs two classes or more: "
                "check data.label_column, or add images of the other classes."
            )
        absent = [name for index, name in enumerate(self.classes) if index not in counts]
        if absent:
            raise DataError(
                f"{self.source}: no image to train on has the label {', '.join(absent)}. "
                f"Labels seen: {', '.join(self.classes[i] for i in sorted(k for k in counts if k is not None))}. "
                "Add images of that class, renumber the labels 0..K-1, or name the classes that count in data.classes."
            )

    def _check_varied(self, train: Sequence[Record]) -> None:
        """Raise DataError when a label, or the number, is the same in every record of `train`."""
        for k, name in enumerate(self.classes):
            seen = {record.values[k] for record in train} - {None}
            if len(seen) < 2:
                what = f"label {name!r}" if self.kind == "labels" else f"number {name!r}"
                said = f"{seen.pop():g} in every image" if seen else "not known of any image"
                raise DataError(
                    f"{self.source}: the {what} is {said} to train on: there is nothing to learn. Check "
                    "data.label_column, or add other images."
                )


def kind_of(label_column: str | Sequence[str] | None) -> Kind:
    """What a label column holds when nobody says: several columns are labels, one is of classes."""
    return "classes" if label_column is None or isinstance(label_column, str) else "labels"


def open_manifest(
    config: DataConfig,
    *,
    classes: Sequence[str] | None = None,
    labels_required: bool = True,
    kind: Kind | None = None,
) -> Manifest:
    """Read what `config.table` names: a table, a class folder, or hf:NAME.

    Args:
        config: the data section.
        classes: the classes a trained model knows; None to take `config.classes`, or to find them in the data.
        labels_required: False for prediction: the label column may be absent and its cells empty.
        kind: what the labels are (`Config.reads`); None = by :func:`kind_of`.

    Raises DataError: everything the readers raise, and for labels or a number from class folders.
    """
    classes = classes if classes is not None else config.classes
    kind = kind or kind_of(config.label_column)
    columns: dict[str, Any] = {
        "image_column": config.image_column,
        "label_column": config.label_column,
        "patient_column": config.patient_column,
        "eye_column": config.eye_column,
        "split_column": config.split_column,
        "kind": kind,
    }
    if config.table.startswith("hf:"):
        return Manifest.from_huggingface(
            config.table.removeprefix("hf:"), **columns, classes=classes, labels_required=labels_required
        )
    path = Path(config.table)
    if path.is_dir():
        if kind != "classes" and labels_required:
            raise DataError(f"{path}: class folders say one class an image; several labels, or a number, need a table.")
        return Manifest.from_folder(path, classes=classes, labels_required=labels_required)
    return Manifest.from_table(path, images=config.images, **columns, classes=classes, labels_required=labels_required)
