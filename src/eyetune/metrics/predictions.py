"""The tables everything after training works on: one row an image, with its truth and what the model said.

:class:`Predictions` for one class an image, :class:`LabelPredictions` for several yes-or-no labels,
:class:`ValuePredictions` for a number. :func:`read_table` reads whichever a file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eyetune.errors import DataError, did_you_mean, listing
from eyetune.metrics.table import KNOWN, Cells, Table, read_cells, refuse_not_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNKNOWN = -1
"""The target of an image whose label is not known."""

LABEL_THRESHOLD = 0.5
"""A label is called present when its probability is above this."""

COLUMNS = (*KNOWN, "target", "predicted")
LOGIT, PROBABILITY = "logit_", "prob_"
TARGET, PREDICTED = "target_", "predicted_"


@dataclass(frozen=True, eq=False)
class Predictions(Table):
    """What a model said of N images, in K classes.

    Args:
        images, patients, eyes: as for :class:`eyetune.metrics.table.Table`.
        targets: int64[N], 0..K-1, or -1 where not known.
        logits: float64[N, K], finite: what the network gave before the softmax. Heads that know the order of the
            classes give the logarithms of their probabilities.
        classes: K different, non-empty names, K >= 2; the order is the order of the logits.
        calls: int64[N], 0..K-1: the class the model's own rule calls, where that may be another than the most
            probable one; None: the most probable one.
        ordered: whether the order of the classes means something; None: as their names say.

    Raises:
        DataError: the parts do not fit together, a logit is not finite, or a target is outside -1..K-1.
    """

    targets: NDArray[np.int64]
    logits: NDArray[np.float64]
    classes: Sequence[str]
    calls: NDArray[np.int64] | None = None
    ordered: bool | None = None

    task: ClassVar[str] = "classification"
    WHOLE: ClassVar[frozenset[str]] = frozenset({"classes", "ordered"})

    def __post_init__(self) -> None:
        import numpy as np

        super().__post_init__()
        parts: dict[str, Any] = {
            "targets": _whole_numbers(self.targets),
            "logits": np.array(self.logits, dtype=np.float64),
            "classes": tuple(str(name) for name in self.classes),
            "calls": None if self.calls is None else _whole_numbers(self.calls),
        }
        if not self.images:
            parts["logits"] = parts["logits"].reshape(0, len(parts["classes"]))
        for name, value in parts.items():
            object.__setattr__(self, name, value)
        self._validate()
        for array in (self.targets, self.logits, self.calls):
            if array is not None:
                array.flags.writeable = False

    def _validate(self) -> None:
        import numpy as np

        if len(self.classes) < 2 or "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise DataError(f"predictions need at least two classes with different names, got {list(self.classes)}.")
        rows, width = len(self.images), len(self.classes)
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
        if self.calls is not None and (
            self.calls.shape != (rows,) or not ((self.calls >= 0) & (self.calls < width)).all()
        ):
            raise DataError(f"calls must be one class an image, int[{rows}] of 0..{width - 1}.")
        refuse_not_finite(self.images, self.logits)

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
        """int64[N], 0..K-1: what the model calls: `calls`, else the most probable class (the first of equals)."""
        import numpy as np

        if self.calls is not None:
            return self.calls
        result = self.probabilities.argmax(axis=1).astype(np.int64)
        result.flags.writeable = False
        return result

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return tuple(self.classes)

    @property
    def known(self) -> NDArray[np.bool_]:
        """bool[N]: whether the target is known."""
        known: NDArray[np.bool_] = self.targets != UNKNOWN
        return known

    def calibrated(self, temperature: float, bias: Sequence[float] | None = None) -> Predictions:
        """The same table with calibrated probabilities: logits / temperature + bias.

        Args:
            temperature: above 0; above 1 makes the probabilities less sure, and never changes which class is the most
                probable (Guo et al., "On Calibration of Modern Neural Networks", 2017).
            bias: K numbers, a shift of each class's log-odds (Alexandari et al., 2020); this one may change it, and
                then takes the place of the model's own rule (`calls`).
        """
        import numpy as np

        if not 0 < temperature < np.inf:
            raise ValueError(f"a temperature is a number above 0, not {temperature}")
        # A temperature below 1 may push the largest of finite floats beyond them: that is as sure as can be.
        largest = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            logits = np.clip(self.logits / temperature, -largest, largest)
        if bias is None:
            return replace(self, logits=logits)
        return replace(self, logits=logits + np.asarray(bias, dtype=np.float64), calls=None)

    def columns(self) -> list[str]:
        """`target, predicted, logit_<class>…, prob_<class>…`."""
        logits, shares = ([prefix + name for name in self.classes] for prefix in (LOGIT, PROBABILITY))
        return ["target", "predicted", *logits, *shares]

    def truth(self, row: int) -> dict[str, str]:
        """`target`: the class's name, empty where not known."""
        return {"target": (*self.classes, "")[self.targets[row]]}  # the last one is found by index -1, UNKNOWN

    def said(self, row: int) -> dict[str, str]:
        """`predicted`: the name of the class called."""
        return {"predicted": self.classes[self.predicted[row]]}

    def numbers(self, row: int) -> dict[str, str]:
        """`logit_<class>…` and `prob_<class>…`."""
        logits = {
            LOGIT + name: repr(value) for name, value in zip(self.classes, self.logits[row].tolist(), strict=True)
        }
        return logits | {
            PROBABILITY + name: repr(value)
            for name, value in zip(self.classes, self.probabilities[row].tolist(), strict=True)
        }

    @classmethod
    def from_csv(cls, path: Path) -> Predictions:
        """Read a table that :meth:`to_csv` wrote.

        The classes and their order are those of the `logit_` columns. The probabilities follow from the logits and are
        not read; `predicted` is where it differs from the most probable class: these are then `calls`. `patient`,
        `eye` and `predicted` may be missing. Raises DataError for a file that is missing or is no such table, naming
        the row.
        """
        cells = read_cells(path)
        if not any(name.startswith(LOGIT) for name in cells.header):
            cells.needed("image", "target", f"{LOGIT}<class>")
        return _read_classes(cells)


def _read_classes(cells: Cells) -> Predictions:
    import numpy as np

    cells.needed("image", "target")
    classes = [name.removeprefix(LOGIT) for name in cells.header if name.startswith(LOGIT)]
    logits = cells.numbers([LOGIT + name for name in classes], "a logit")
    targets = _class_column(cells, "target", classes)
    parts = (*cells.known(), np.array(targets, dtype=np.int64), np.array(logits), classes)
    try:
        table = Predictions(*parts, **cells.further())
        if "predicted" not in cells.header:
            return table
        said = np.array(_class_column(cells, "predicted", classes), dtype=np.int64)
        said = np.where(said == UNKNOWN, table.predicted, said)
        return table if np.array_equal(said, table.predicted) else replace(table, calls=said)
    except DataError as error:
        raise DataError(f"{cells.path}: {error}") from error


def _class_column(cells: Cells, column: str, classes: Sequence[str]) -> list[int]:
    """Indices of the classes a column names; -1 where it is empty."""
    index = {name: position for position, name in enumerate(classes)} | {"": UNKNOWN}
    for number, row in enumerate(cells.rows, start=2):
        if row[column] not in index:
            raise DataError(
                f"{cells.path} row {number}: the {column} {row[column]!r} is none of the classes {', '.join(classes)}."
                f"{did_you_mean(row[column], classes)}"
            )
    return [index[row[column]] for row in cells.rows]


@dataclass(frozen=True, eq=False)
class LabelPredictions(Table):
    """What a model said of N images and L labels, each of which an image has or has not.

    Args:
        images, patients, eyes: as for :class:`eyetune.metrics.table.Table`.
        targets: int64[N, L]: 1 has it, 0 has it not, -1 not known.
        logits: float64[N, L], finite: of having the label.
        labels: L different, non-empty names, L >= 1.
    """

    targets: NDArray[np.int64]
    logits: NDArray[np.float64]
    labels: Sequence[str]

    task: ClassVar[str] = "multilabel"
    WHOLE: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __post_init__(self) -> None:
        import numpy as np

        super().__post_init__()
        labels = tuple(str(name) for name in self.labels)
        shape = (len(self.images), len(labels))
        if not labels or "" in labels or len(set(labels)) < len(labels):
            raise DataError(f"predictions of labels need labels with different names, got {list(labels)}.")
        targets, logits = _whole_numbers(self.targets), np.array(self.logits, dtype=np.float64)
        if not self.images:
            targets, logits = targets.reshape(shape), logits.reshape(shape)
        for name, array in (("targets", targets), ("logits", logits)):
            if array.shape != shape:
                raise DataError(f"{name} must be one number an image and label, [{shape[0]}, {shape[1]}].")
            array.flags.writeable = False
        if not np.isin(targets, (UNKNOWN, 0, 1)).all():
            raise DataError("the targets of labels must be 0 or 1, or -1 where not known.")
        refuse_not_finite(self.images, logits)
        for name, value in (("labels", labels), ("targets", targets), ("logits", logits)):
            object.__setattr__(self, name, value)

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """float64[N, L], each of having the label; a row sums to anything."""
        import numpy as np

        # exp of what is not above 0, on either side: never too large for a float.
        small = np.exp(-np.abs(self.logits))
        result: NDArray[np.float64] = np.where(self.logits >= 0, 1.0, small) / (1.0 + small)
        result.flags.writeable = False
        return result

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """int64[N, L]: 1 where the probability is above 0.5."""
        import numpy as np

        result = (self.probabilities > LABEL_THRESHOLD).astype(np.int64)
        result.flags.writeable = False
        return result

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels."""
        return tuple(self.labels)

    @property
    def known(self) -> NDArray[np.bool_]:
        """bool[N]: whether any label of the image is known."""
        known: NDArray[np.bool_] = (self.targets != UNKNOWN).any(axis=1)
        return known

    def label(self, name: str) -> Predictions:
        """One label as a table of two classes, "no NAME" and "NAME": everything that works on two classes works on it.

        Raises DataError for another label.
        """
        import numpy as np

        if name not in self.labels:
            raise DataError(f"no label {name!r}.{did_you_mean(name, self.labels)} There are {', '.join(self.labels)}.")
        k = list(self.labels).index(name)
        logits = np.stack([np.zeros(len(self)), self.logits[:, k]], axis=1)
        return Predictions(self.images, self.patients, self.eyes, self.targets[:, k], logits, (f"no {name}", name))

    def calibrated(self, temperatures: Mapping[str, float]) -> LabelPredictions:
        """The same table with calibrated probabilities: the logit of each label divided by its temperature, above 0; of
        a label that is not named as it is."""
        import numpy as np

        if not all(0 < one < np.inf for one in temperatures.values()):
            raise ValueError(f"a temperature is a number above 0, not {dict(temperatures)}")
        divisors = np.array([temperatures.get(name, 1.0) for name in self.labels])
        largest = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            return replace(self, logits=np.clip(self.logits / divisors, -largest, largest))

    def columns(self) -> list[str]:
        """`target_<label>…, predicted_<label>…, logit_<label>…, prob_<label>…`."""
        return [prefix + name for prefix in (TARGET, PREDICTED, LOGIT, PROBABILITY) for name in self.labels]

    def truth(self, row: int) -> dict[str, str]:
        """`target_<label>…`: 0, 1 or empty."""
        known = self.targets[row].tolist()
        return {TARGET + n: "" if k == UNKNOWN else str(k) for n, k in zip(self.labels, known, strict=True)}

    def said(self, row: int) -> dict[str, str]:
        """`predicted_<label>…`: 0 or 1."""
        return {PREDICTED + n: str(k) for n, k in zip(self.labels, self.predicted[row].tolist(), strict=True)}

    def numbers(self, row: int) -> dict[str, str]:
        """`logit_<label>…` and `prob_<label>…`."""
        pairs = ((LOGIT, self.logits), (PROBABILITY, self.probabilities))
        return {p + n: repr(v) for p, of in pairs for n, v in zip(self.labels, of[row].tolist(), strict=True)}

    @classmethod
    def from_csv(cls, path: Path) -> LabelPredictions:
        """Read a table that :meth:`to_csv` wrote; what follows from the logits is not read. Raises DataError."""
        cells = read_cells(path)
        if not any(name.startswith(TARGET) for name in cells.header):
            cells.needed(f"{TARGET}<label>")
        return _read_labels(cells)


def _read_labels(cells: Cells) -> LabelPredictions:
    import numpy as np

    labels = [name.removeprefix(TARGET) for name in cells.header if name.startswith(TARGET)]
    cells.needed("image", *(LOGIT + name for name in labels))
    targets = cells.numbers([TARGET + name for name in labels], "a target", empty=UNKNOWN)
    logits = cells.numbers([LOGIT + name for name in labels], "a logit")
    try:
        return LabelPredictions(*cells.known(), np.array(targets), np.array(logits), labels, **cells.further())
    except DataError as error:
        raise DataError(f"{cells.path}: {error}") from error


@dataclass(frozen=True, eq=False)
class ValuePredictions(Table):
    """What a model said of N images: a number each, in the units of the user's table.

    Args:
        images, patients, eyes: as for :class:`eyetune.metrics.table.Table`.
        targets: float64[N], NaN where not known.
        predicted: float64[N], finite.
        name: what the number is, as the user's table calls it.
    """

    targets: NDArray[np.float64]
    predicted: NDArray[np.float64]
    name: str = "value"

    task: ClassVar[str] = "regression"
    WHOLE: ClassVar[frozenset[str]] = frozenset({"name"})

    def __post_init__(self) -> None:
        import numpy as np

        super().__post_init__()
        for name in ("targets", "predicted"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != (len(self.images),):
                raise DataError(f"{name} must be one number an image, [{len(self.images)}], got {array.shape}.")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if np.isinf(self.targets).any():
            raise DataError("a target is infinite.")
        refuse_not_finite(self.images, self.predicted)

    @property
    def names(self) -> tuple[str, ...]:
        """What the number is called, alone."""
        return (self.name,)

    @property
    def known(self) -> NDArray[np.bool_]:
        """bool[N]: whether the true number is known."""
        import numpy as np

        known: NDArray[np.bool_] = ~np.isnan(self.targets)
        return known

    def columns(self) -> list[str]:
        """`target, predicted`."""
        return ["target", "predicted"]

    def truth(self, row: int) -> dict[str, str]:
        """`target`; empty where not known."""
        target = float(self.targets[row])
        return {"target": repr(target) if target == target else ""}  # noqa: PLR0124 - NaN

    def said(self, row: int) -> dict[str, str]:
        """`predicted`."""
        return {"predicted": repr(float(self.predicted[row]))}

    def numbers(self, row: int) -> dict[str, str]:
        """Nothing is behind it."""
        return {}

    @classmethod
    def from_csv(cls, path: Path) -> ValuePredictions:
        """Read a table that :meth:`to_csv` wrote. Raises DataError, naming the row."""
        return _read_values(read_cells(path))


def _read_values(cells: Cells) -> ValuePredictions:
    import numpy as np

    cells.needed("image", "target", "predicted")
    targets = np.array(cells.numbers(["target"], "the target", empty=float("nan"))).reshape(-1)
    predicted = np.array(cells.numbers(["predicted"], "the prediction")).reshape(-1)
    try:
        return ValuePredictions(*cells.known(), targets, predicted, **cells.further())
    except DataError as error:
        raise DataError(f"{cells.path}: {error}") from error


def read_table(path: Path) -> Predictions | LabelPredictions | ValuePredictions:
    """Read predictions/NAME.csv of any task, told apart by its columns. Raises DataError as the tables' own readers."""
    cells = read_cells(path)
    if any(name.startswith(TARGET) for name in cells.header):
        return _read_labels(cells)
    return _read_classes(cells) if any(name.startswith(LOGIT) for name in cells.header) else _read_values(cells)


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
