"""What the tables of predictions share: images, patients, eyes; rows taken out; CSV written and read back exactly."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from eyetune import files
from eyetune.errors import DataError, listing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KNOWN = ("image", "patient", "eye")
"""The first columns of every table."""

TRAIT = "by_"
"""Before the name of a further column of the user's table that is kept, for scores by its values."""

OOD = "ood"
"""The column that says how unlike the training images an image is."""


@dataclass(frozen=True, eq=False)
class Table(ABC):
    """What a model said of N images; what it said is the subclass's.

    Args:
        images: N names, as in the user's table.
        patients: N patient identifiers; None (or an empty string, which becomes None) where not known.
        eyes: N eyes ("left", "right", or however the table says it); None where not known.
        traits: further columns of the user's table, N texts each, empty where not known: sex, camera, age.
        ood: float64[N], finite: how unlike the training images the network found each (out of distribution); None where
            it was not asked.

    Sequences become tuples, arrays are copied and cannot be written to. Raises DataError where parts do not fit.
    """

    images: Sequence[str]
    patients: Sequence[str | None]
    eyes: Sequence[str | None]
    traits: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)
    ood: NDArray[np.float64] | None = field(default=None, kw_only=True)

    task: ClassVar[str]
    """What is predicted: "classification" (a class an image), "multilabel" (several yes-or-no labels), "regression"
    (a number)."""

    WHOLE: ClassVar[frozenset[str]] = frozenset()
    """Fields that belong to the table as a whole; every other has an entry a row."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(str(image) for image in self.images))
        for name in ("patients", "eyes"):
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(str(one) if one not in {None, ""} else None for one in given))
            if len(given) != len(self.images):
                raise DataError(f"predictions of {len(self.images)} images came with {len(given)} {name}.")
        traits = {str(name): tuple(str(cell) for cell in cells) for name, cells in self.traits.items()}
        object.__setattr__(self, "traits", traits)
        for name, cells in traits.items():
            if len(cells) != len(self.images):
                raise DataError(f"predictions of {len(self.images)} images came with {len(cells)} cells of {name}.")
        if self.ood is not None:
            object.__setattr__(self, "ood", _one_each(self.images, self.ood))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Any) -> Self:
        """The table with only these rows (int[M], repeats allowed, or bool[N]), in this order."""
        import numpy as np

        rows = np.asarray(rows)
        # An empty list arrives as float64, which indexes nothing.
        chosen = np.arange(len(self))[rows if rows.size else rows.astype(np.int64)]
        changes: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "traits":
                changes["traits"] = {name: [cells[row] for row in chosen.tolist()] for name, cells in value.items()}
            elif one.name not in self.WHOLE and value is not None:
                whole = isinstance(value, np.ndarray)
                changes[one.name] = value[chosen] if whole else [value[row] for row in chosen.tolist()]
        return replace(self, **changes)

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the classes, of the labels, or of the number."""

    def same_truth(self, other: Table) -> bool:
        """Whether both are of the same images, in the same order, with the same truth in the same terms."""
        alike = self.task == other.task and self.names == other.names and self.images == other.images
        return alike and all(self.truth(row) == other.truth(row) for row in range(len(self)))

    @property
    @abstractmethod
    def known(self) -> NDArray[np.bool_]:
        """bool[N]: whether anything is known of the image's truth."""

    def labelled(self) -> Self:
        """The rows of whose truth something is known."""
        known = self.known
        return self if known.all() else self.take(known)

    @abstractmethod
    def truth(self, row: int) -> dict[str, str]:
        """The columns that say the truth of a row, by name; what is not known is empty."""

    @abstractmethod
    def said(self, row: int) -> dict[str, str]:
        """The columns that say what the model called a row: as a reader wants them, without logits."""

    @abstractmethod
    def numbers(self, row: int) -> dict[str, str]:
        """The columns behind what was said: logits, probabilities; written so that reading gives the same float64."""

    def to_csv(self, path: Path) -> None:
        """Write the table, atomically: `image, patient, eye`, the truth, what was said, the numbers behind it, `ood`
        where there is one, the traits (`by_<column>`).

        Numbers are written so that reading gives the same float64. Raises UserError when the file cannot be written.
        """
        with (
            files.atomic(Path(path)) as temporary,
            # surrogateescape: a file name that is not valid UTF-8 comes back as it was.
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
        ):
            writer = csv.writer(stream, lineterminator="\n")
            ood = [] if self.ood is None else [[repr(value)] for value in self.ood.tolist()]
            writer.writerow([*KNOWN, *self.columns(), *([OOD] if ood else []), *(TRAIT + name for name in self.traits)])
            for row, image in enumerate(self.images):
                known = [image, self.patients[row] or "", self.eyes[row] or ""]
                cells = {**self.truth(row), **self.said(row), **self.numbers(row)}
                traits = [texts[row] for texts in self.traits.values()]
                writer.writerow([*known, *cells.values(), *(ood[row] if ood else []), *traits])

    def told(self, row: int) -> dict[str, str]:
        """What somebody who asks for a prediction wants to know of a row: what was called, and the probabilities."""
        wanted = set(self.told_columns())
        return {name: cell for name, cell in {**self.said(row), **self.numbers(row)}.items() if name in wanted}

    def told_columns(self) -> list[str]:
        """The columns of :meth:`told`: neither truth nor logits."""
        return [name for name in self.columns() if not name.startswith(("target", "logit_"))]

    @abstractmethod
    def columns(self) -> list[str]:
        """The names of the columns after `image, patient, eye`, in the order in which :meth:`to_csv` writes them."""


@dataclass(frozen=True)
class Cells:
    """A table of predictions as text.

    Args:
        path: the file, for messages.
        header: the names of its columns.
        rows: each a mapping from column to cell, all columns there.
    """

    path: Path
    header: Sequence[str]
    rows: Sequence[dict[str, str]]

    def known(self) -> tuple[list[str], list[str | None], list[str | None]]:
        """Images, patients and eyes; the last two may be missing."""
        return (
            [row["image"] for row in self.rows],
            [row.get("patient") or None for row in self.rows],
            [row.get("eye") or None for row in self.rows],
        )

    def further(self) -> dict[str, Any]:
        """What any table may have besides, as arguments: `traits`, by their names in the user's table, and `ood`."""
        traits = {
            name.removeprefix(TRAIT): [row[name] for row in self.rows] for name in self.header if name.startswith(TRAIT)
        }
        if OOD not in self.header:
            return {"traits": traits}
        return {"traits": traits, "ood": [value for (value,) in self.numbers([OOD], "an ood score")]}

    def needed(self, *names: str) -> None:
        """Raise DataError when one of these columns is missing."""
        missing = [name for name in names if name not in self.header]
        if missing:
            raise DataError(
                f"{self.path} is not a table of predictions: no column {', '.join(missing)}; it has "
                f"{', '.join(self.header)}."
            )

    def numbers(self, names: Sequence[str], what: str, *, empty: float | None = None) -> list[list[float]]:
        """The cells of these columns as numbers, a list a row; an empty cell as `empty`, where that is allowed.

        Raises DataError naming the row, calling a cell `what`.
        """
        found = []
        for number, row in enumerate(self.rows, start=2):
            try:
                found.append([empty if empty is not None and row[name] == "" else float(row[name]) for name in names])
            except ValueError as error:
                raise DataError(f"{self.path} row {number}: {what} is not a number ({error}).") from error
        return found


def read_cells(path: Path) -> Cells:
    """Read a table that :meth:`Table.to_csv` wrote, as text. Raises DataError for a file that is no such table."""
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front.
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            rows = list(csv.reader(stream))
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read the predictions {path}: {error}.") from error
    if not rows:
        raise DataError(f"{path} is empty: a table of predictions was expected.")
    header, body = rows[0], rows[1:]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: the column {', '.join(repeated)} stands there twice.")
    for number, cells in enumerate(body, start=2):
        if len(cells) != len(header):
            raise DataError(f"{path} row {number} has {len(cells)} cells where the header has {len(header)}.")
    return Cells(Path(path), header, [dict(zip(header, cells, strict=True)) for cells in body])


def _one_each(images: Sequence[str], values: Any) -> NDArray[np.float64]:
    """`values` as float64[N] of their own. Raises DataError where they are not one an image, or not finite."""
    import numpy as np

    given = np.array(values, dtype=np.float64)
    if given.shape != (len(images),):
        raise DataError(f"ood must be one number an image, float[{len(images)}], got shape {given.shape}.")
    refuse_not_finite(images, given)
    given.flags.writeable = False
    return given


def refuse_not_finite(images: Sequence[str], values: NDArray[np.float64]) -> None:
    """Raise DataError, naming the images, where `values` float64[N, …] are NaN or infinite."""
    import numpy as np

    broken = np.flatnonzero(~np.isfinite(values.reshape(len(images), -1)).all(axis=1)) if len(images) else np.array([])
    if broken.size:
        raise DataError(
            f"the model gave NaN or infinite outputs for {broken.size} of {len(images)} images: training has diverged "
            "(a lower train.lr, or --precision fp32, may mend it), or the weights are damaged:\n"
            f"{listing(images[row] for row in broken.tolist())}"
        )
