"""The table everything after training works on: one row an image, with its target and its logits."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune import files
from eyetune.errors import DataError, did_you_mean, listing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNKNOWN = -1
"""The target of an image whose label is not known."""

COLUMNS = ("image", "patient", "eye", "target", "predicted")
LOGIT, PROBABILITY = "logit_", "prob_"


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said of N images, in K classes.

    Args:
        images: N names, as in the user's table.
        patients: N patient identifiers; None (or an empty string, which becomes None) where not known.
        eyes: N eyes ("left", "right", or however the table says it); None where not known.
        targets: int64[N], 0..K-1, or -1 where not known.
        logits: float64[N, K], finite: what the network gave before the softmax.
        classes: K different, non-empty names, K >= 2; the order is the order of the logits.

    Sequences become tuples, arrays are copied and cannot be written to.

    Raises:
        DataError: the parts do not fit together, a logit is not finite, or a target is outside -1..K-1.
    """

    images: Sequence[str]
    patients: Sequence[str | None]
    eyes: Sequence[str | None]
    targets: NDArray[np.int64]
    logits: NDArray[np.float64]
    classes: Sequence[str]

    def __post_init__(self) -> None:
        import numpy as np

        parts: dict[str, Any] = {
            "images": tuple(str(image) for image in self.images),
            "patients": tuple(str(patient) if patient not in {None, ""} else None for patient in self.patients),
            "eyes": tuple(str(eye) if eye not in {None, ""} else None for eye in self.eyes),
            "targets": _whole_numbers(self.targets),
            "logits": np.array(self.logits, dtype=np.float64),
            "classes": tuple(str(name) for name in self.classes),
        }
        if not parts["images"]:
            parts["logits"] = parts["logits"].reshape(0, len(parts["classes"]))
        for name, value in parts.items():
            object.__setattr__(self, name, value)
        self._validate()
        self.targets.flags.writeable = False
        self.logits.flags.writeable = False

    def _validate(self) -> None:
        import numpy as np

        if len(self.classes) < 2 or "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise DataError(f"predictions need at least two classes with different names, got {list(self.classes)}.")
        rows, width = len(self.images), len(self.classes)
        for name in ("patients", "eyes"):
            if len(getattr(self, name)) != rows:
                raise DataError(f"predictions of {rows} images came with {len(getattr(self, name))} {name}.")
        if self.targets.shape != (rows,):
            raise DataError(f"targets must be one number an image, int[{rows}], got shape {self.targets.shape}.")
        if self.logits.shape != (rows, width):
            raise DataError(
                f"logits must be one number an image and class, float[{rows}, {width}], got shape {self.logits.shape}."
            )
        outside = np.flatnonzero((self.targets < UNKNOWN) | (self.targets >= width))
        if outside.size:
            faults = [f"{self.images[row]}: target {self.targets[row]}" for row in outside.tolist()]
            raise DataError(f"targets must be 0..{width - 1}, or -1 where not known:\n{listing(faults)}")
        broken = np.flatnonzero(~np.isfinite(self.logits).all(axis=1))
        if broken.size:
            raise DataError(
                f"the model gave NaN or infinite outputs for {broken.size} of {rows} images: training has diverged "
                "(a lower train.lr, or --precision fp32, may mend it), or the weights are damaged:\n"
                f"{listing(self.images[row] for row in broken.tolist())}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """float64[N, K]: the softmax of the logits; rows sum to 1."""
        import numpy as np

        # Two finite logits may lie further apart than the largest float: that difference is -inf, its share 0.
        with np.errstate(over="ignore"):
            shares = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        result: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
        result.flags.writeable = False
        return result

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """int64[N], 0..K-1: the most probable class (the first of equals)."""
        import numpy as np

        result = self.probabilities.argmax(axis=1).astype(np.int64)
        result.flags.writeable = False
        return result

    def take(self, rows: Any) -> Predictions:
        """The table with only these rows (int[M], repeats allowed, or bool[N]), in this order."""
        import numpy as np

        rows = np.asarray(rows)
        # An empty list arrives as float64, which indexes nothing.
        chosen = np.arange(len(self))[rows if rows.size else rows.astype(np.int64)].tolist()
        return Predictions(
            images=[self.images[row] for row in chosen],
            patients=[self.patients[row] for row in chosen],
            eyes=[self.eyes[row] for row in chosen],
            targets=self.targets[chosen],
            logits=self.logits[chosen],
            classes=self.classes,
        )

    def labelled(self) -> Predictions:
        """The rows whose target is known."""
        return self if (self.targets != UNKNOWN).all() else self.take(self.targets != UNKNOWN)

    def to_csv(self, path: Path) -> None:
        """Write the table, atomically: `image, patient, eye, target, predicted, logit_<class>…, prob_<class>…`.

        `target` and `predicted` hold class names; what is not known is empty. Numbers are written so that reading
        gives the same float64. Raises UserError when the file cannot be written.
        """
        header = [*COLUMNS, *(LOGIT + name for name in self.classes), *(PROBABILITY + name for name in self.classes)]
        names = (*self.classes, "")  # the last one is found by index -1, UNKNOWN
        logits, probabilities = self.logits.tolist(), self.probabilities.tolist()
        with (
            files.atomic(Path(path)) as temporary,
            # surrogateescape: a file name that is not valid UTF-8 comes back as it was.
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
        ):
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            for row, image in enumerate(self.images):
                known = [image, self.patients[row] or "", self.eyes[row] or ""]
                judged = [names[self.targets[row]], names[self.predicted[row]]]
                writer.writerow([*known, *judged, *map(repr, logits[row]), *map(repr, probabilities[row])])

    @classmethod
    def from_csv(cls, path: Path) -> Predictions:
        """Read a table that :meth:`to_csv` wrote.

        The classes and their order are those of the `logit_` columns. `predicted` and the probabilities follow from
        the logits and are not read; `patient` and `eye` may be missing. Raises DataError for a file that is missing
        or is no such table, naming the row.
        """
        try:
            # utf-8-sig: spreadsheets put a byte-order mark in front.
            with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
                rows = list(csv.reader(stream))
        except (OSError, csv.Error) as error:
            raise DataError(f"cannot read the predictions {path}: {error}.") from error
        if not rows:
            raise DataError(f"{path} is empty: a table of predictions was expected.")
        header, body = rows[0], rows[1:]
        classes = [name.removeprefix(LOGIT) for name in header if name.startswith(LOGIT)]
        missing = [name for name in ("image", "target") if name not in header]
        if missing or not classes:
            missing += [] if classes else [f"{LOGIT}<class>"]
            raise DataError(
                f"{path} is not a table of predictions: no column {', '.join(missing)}; it has {', '.join(header)}."
            )
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: the column {', '.join(repeated)} stands there twice.")
        return _parse(path, header, body, classes)


def _parse(path: Path, header: list[str], body: list[list[str]], classes: list[str]) -> Predictions:
    import numpy as np

    index = {name: position for position, name in enumerate(classes)} | {"": UNKNOWN}
    images, patients, eyes = [], [], []
    targets: list[int] = []
    logits: list[list[float]] = []
    for number, cells in enumerate(body, start=2):
        if len(cells) != len(header):
            raise DataError(f"{path} row {number} has {len(cells)} cells where the header has {len(header)}.")
        row = dict(zip(header, cells, strict=True))
        if row["target"] not in index:
            hint = did_you_mean(row["target"], classes)
            raise DataError(
                f"{path} row {number}: the target {row['target']!r} is none of the classes {', '.join(classes)}.{hint}"
            )
        try:
            logits.append([float(row[LOGIT + name]) for name in classes])
        except ValueError as error:
            raise DataError(f"{path} row {number}: a logit is not a number ({error}).") from error
        images.append(row["image"])
        patients.append(row.get("patient") or None)
        eyes.append(row.get("eye") or None)
        targets.append(index[row["target"]])
    try:
        return Predictions(images, patients, eyes, np.array(targets, dtype=np.int64), np.array(logits), classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _whole_numbers(values: Any) -> NDArray[np.int64]:
    """`values` as int64 of their own (a copy). Raises DataError for what is not whole numbers."""
    import numpy as np

    given = np.asarray(values)
    try:
        with np.errstate(invalid="ignore"):  # NaN becomes some number, which the comparison below finds out
            whole = given.astype(np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"targets must be whole numbers: {error}.") from error
    if not np.array_equal(given, whole):
        raise DataError(f"targets must be whole numbers, got {given.dtype} that are not.")
    return whole
