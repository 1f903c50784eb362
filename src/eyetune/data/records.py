"""Manifest: which photographs there are, what is known of each, and what the classes are.

Everything wrong with a table is said here, all faults of one kind together, with the rows they are in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from eyetune.data.record import SPLITS, Record
from eyetune.errors import DataError, did_you_mean, listing

if TYPE_CHECKING:
    from eyetune.data.config import DataConfig


@dataclass(frozen=True)
class Manifest(Sequence[Record]):
    """Records in the order of their source, the classes in their order, and what was noticed while reading.

    Attributes:
        records: the photographs.
        classes: class names; a record's label is an index into them.
        source: the table, folder or dataset, for messages.
        notes: remarks worth showing once ("label column: diagnosis", "3 unreadable images skipped: …").
        left_out: what of the source is not among the records: (why, how many images), in the order it happened.
    """

    records: tuple[Record, ...]
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()
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
        label_column: str | None = None,
        patient_column: str | None = None,
        eye_column: str | None = None,
        split_column: str | None = None,
        classes: Sequence[str] | None = None,
        labels_required: bool = True,
    ) -> Manifest:
        """Read a CSV, TSV or JSONL table; see :class:`eyetune.data.config.DataConfig` for the arguments.

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
        label_column: str | None = None,
        patient_column: str | None = None,
        eye_column: str | None = None,
        split_column: str | None = None,
        classes: Sequence[str] | None = None,
        labels_required: bool = True,
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
            )
        )

    @property
    def labels(self) -> tuple[int | None, ...]:
        """The label of every record, in order."""
        return tuple(record.label for record in self.records)

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
        if unknown := [name for name in self.classes if name not in order]:
            raise DataError(
                f"{self.source}: its classes {', '.join(unknown)} are none of {', '.join(order)}."
                + did_you_mean(unknown[0], order)
            )
        place = [order.index(name) for name in self.classes]
        records = [replace(r, label=None if r.label is None else place[r.label]) for r in self.records]
        return replace(self, records=tuple(records), classes=order)

    def class_counts(self) -> tuple[int, ...]:
        """Number of records of each class, int[K]; records without a label are not counted."""
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
        unknown = [record.row for record in train if record.label is None]
        if unknown:
            raise DataError(f"{len(unknown)} images to train on have no label:\n{listing(unknown)}")
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


def open_manifest(
    config: DataConfig, *, classes: Sequence[str] | None = None, labels_required: bool = True
) -> Manifest:
    """Read what `config.table` names: a table, a class folder, or hf:NAME.

    Args:
        config: the data section.
        classes: the classes a trained model knows; None to take `config.classes`, or to find them in the data.
        labels_required: False for prediction: the label column may be absent and its cells empty.

    Raises DataError: everything the readers raise.
    """
    classes = classes if classes is not None else config.classes
    columns = {
        "image_column": config.image_column,
        "label_column": config.label_column,
        "patient_column": config.patient_column,
        "eye_column": config.eye_column,
        "split_column": config.split_column,
    }
    if config.table.startswith("hf:"):
        return Manifest.from_huggingface(
            config.table.removeprefix("hf:"), **columns, classes=classes, labels_required=labels_required
        )
    path = Path(config.table)
    if path.is_dir():
        return Manifest.from_folder(path, classes=classes, labels_required=labels_required)
    return Manifest.from_table(path, images=config.images, **columns, classes=classes, labels_required=labels_required)
