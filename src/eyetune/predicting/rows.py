"""What a model says of photographs, a row each: class, probabilities, what to doubt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.data.fundus import load_square
from eyetune.data.quality import read_quality
from eyetune.data.readable import Workers, choose_workers, find_faults
from eyetune.data.record import Record
from eyetune.errors import DataError, RunError, UserError, did_you_mean
from eyetune.metrics.calibration import Calibration, LabelCalibration
from eyetune.metrics.predictions import PREDICTED, PROBABILITY, LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.ranges import ValueCalibration, ends
from eyetune.metrics.scores import REFERABLE_GRADE, is_graded_dr
from eyetune.metrics.table import OOD
from eyetune.predicting.model import heat_map, why_no_heat_maps
from eyetune.predicting.output import Cell
from eyetune.progress import counted_by, track

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.metrics.fitted import Fitted
    from eyetune.metrics.operating import OperatingPoint
    from eyetune.metrics.ranges import Interval
    from eyetune.metrics.strangeness import Strangeness
    from eyetune.metrics.table import Table
    from eyetune.predicting.model import TrainedModel

_LONGEST_NAME = 60
"""Signs of a photograph's name that its heat map keeps."""

FLAGGED = "out_of_distribution"
"""The column that says whether the `ood` score is above its threshold."""


def choose_points(model: TrainedModel, calibration: Fitted | None, wanted: str) -> dict[str, OperatingPoint]:
    """The thresholds that make a yes or a no of a photograph, by the column they fill: `referable` or `positive`, and
    of several labels `positive_<label>` for each; empty where the model has none and none was named.

    Args:
        model: the trained model.
        calibration: where thresholds are kept.
        wanted: "specificity" or "sensitivity": that of referable disease for the grades of diabetic retinopathy, of the
            second class for two, of every label; or the name of a point in calibration.json.

    Raises RunError when a point was named and is not there.
    """
    plain = wanted in ("specificity", "sensitivity")
    if isinstance(calibration, LabelCalibration):
        of_labels = {f"positive_{name}": one for name, one in calibration.labels.items()}
        if plain:
            chosen = {column: one.point(one.classes[1], wanted) for column, one in of_labels.items()}
            return {column: point for column, point in chosen.items() if point is not None}
        known = {point.name: (column, point) for column, one in of_labels.items() for point in one.operating_points}
        if wanted in known:
            return dict([known[wanted]])
        raise _no_point(model, wanted, list(known))
    known_points = calibration.operating_points if isinstance(calibration, Calibration) else ()
    graded = is_graded_dr(model.classes)
    if plain:
        question = f"grade >= {REFERABLE_GRADE}" if graded else model.classes[1] if len(model.classes) == 2 else None
        found = next((one for one in known_points if one.positive == question and wanted in one.target), None)
    else:
        found = next((point for point in known_points if point.name == wanted), None)
        if found is None:
            raise _no_point(model, wanted, [point.name for point in known_points])
    if found is None:
        return {}
    return {"referable" if graded and found.positive == f"grade >= {REFERABLE_GRADE}" else "positive": found}


def _no_point(model: TrainedModel, wanted: str, names: Sequence[str]) -> RunError:
    known = f" There are: {'; '.join(names)}." if names else " It has none: they are chosen on labelled validation."
    return RunError(
        f"{model.name} has no operating point {wanted!r}.{did_you_mean(wanted, names)}{known} Or say specificity "
        "or sensitivity."
    )


class Predictor:
    """Makes rows of records.

    Args:
        model: a run, or a file exported from one.
        calibration: makes its probabilities mean what they say; None leaves them as the network gives them.
        points: as :func:`choose_points` gives them: the thresholds behind the columns of yes and no.
        quality: look at the quality of each photograph, which costs a second look at its file.
        mirrored: also predict each photograph mirrored left to right, and take the mean of the logits.
        heat_maps: folder for a heat map of each photograph.
        workers: processes that read images, or "auto".
        batch_size: images in one forward pass.

    Attributes:
        columns: of a row, in order.

    Raises UserError when heat maps are wanted of a network that has none.
    """

    def __init__(
        self,
        model: TrainedModel,
        *,
        calibration: Fitted | None = None,
        points: Mapping[str, OperatingPoint] | None = None,
        quality: bool = False,
        mirrored: bool = False,
        heat_maps: Path | None = None,
        workers: Workers = "auto",
        batch_size: int = 32,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.points = dict(points or {})
        self.quality = quality
        self.mirrored = mirrored
        self.heat_maps = heat_maps
        self.workers = workers
        self.batch_size = batch_size
        self.columns = self._columns()
        if heat_maps is not None and (why := why_no_heat_maps(model)):
            raise UserError(why)

    def _columns(self) -> list[str]:
        found = ["image", *self.model.nothing().told_columns()]
        found += [] if self.interval is None else ["low", "high"]
        found += self.points
        found += [] if self.strangeness is None else [OOD, FLAGGED]
        found += ["quality"] if self.quality else []
        found += ["heat_map"] if self.heat_maps is not None else []
        return [*found, "error"]

    @property
    def strangeness(self) -> Strangeness | None:
        """The model's own rule for what is out of distribution; another site's calibration leaves it as it is."""
        return None if self.model.calibration is None else self.model.calibration.ood

    @property
    def interval(self) -> Interval | None:
        """How far to either side of a predicted number the true one lies; None without such an interval."""
        found = self.calibration.interval if isinstance(self.calibration, ValueCalibration) else None
        return None if found is None or found.half_width is None else found

    @property
    def has_probabilities(self) -> bool:
        """Whether the model gives probabilities, to calibrate and to draw a line through."""
        return self.model.reads != "value"

    def rows(
        self, records: Sequence[Record], *, first: int = 0, update: Callable[[int], None] = lambda done: None
    ) -> list[dict[str, Cell]]:
        """One row a record, in order; a photograph that cannot be read has a row that says why in `error`.

        Args:
            records: the photographs; each process gives the same.
            first: the number of the first one among all, for the names of heat maps.
            update: called with how many of the records are done.
        """
        stages = 2 if self.heat_maps is None else 3
        with counted_by(lambda done: update(done // stages)):
            faults, words = self._look(records)
        with counted_by(lambda done: update((len(records) + done) // stages)):
            table, good = self._predict(records, faults)
        found: list[dict[str, Cell]] = []
        place = {index: row for row, index in enumerate(good)}
        maps: dict[int, str] = {}
        if self.heat_maps is not None:
            with counted_by(lambda done: update((2 * len(records) + done) // stages)):
                maps = self._draw(records, table, good, first)
        for index, record in enumerate(records):
            predicted = table if index in place else None
            row = self.row(record.name, predicted, place.get(index, 0), flags=words[index], error=faults[index])
            if index in maps:
                row["heat_map"] = maps[index]
            found.append(row)
        update(len(records))
        return found

    def row(
        self,
        name: str,
        table: Table | None = None,
        place: int = 0,
        *,
        flags: tuple[str, ...] | None = None,
        error: str | None = None,
    ) -> dict[str, Cell]:
        """The row of one photograph: what the row at `place` of a table, calibrated, says of it, its quality flags, or
        why there is nothing."""
        row: dict[str, Cell] = dict.fromkeys(self.columns)
        row |= {"image": name, "error": error} | ({} if table is None else self.said(table, place))
        return row | ({"quality": flags} if self.quality else {})

    def table_of(self, names: Sequence[str], squares: Sequence[NDArray[np.uint8]]) -> Table:
        """The table, calibrated, of photographs that are squares uint8[P, P, 3] already, as the model's settings make
        them; :meth:`said` makes cells of its rows."""
        table = self.model.table_of(names, squares, batch_size=self.batch_size, mirrored=self.mirrored)
        return table if self.calibration is None else self.calibration.apply(table)

    def _look(self, records: Sequence[Record]) -> tuple[list[str | None], list[tuple[str, ...] | None]]:
        """What is wrong with each file, None where it can be read; and its quality flags. The processes share it."""
        runtime = self.model.runtime
        mine = records[runtime.rank :: runtime.processes]
        faults: list[str | None] = [None] * len(records)
        words: list[tuple[str, ...] | None] = [None] * len(records)
        if self.quality:
            threads = max(1, choose_workers(self.workers, len(mine), processes=runtime.processes))
            with ThreadPoolExecutor(threads) as pool:
                looks = pool.map(lambda record: _look_at(record.image, self.model.settings.bits), mine)
                seen = list(track(looks, len(mine)))
        else:
            seen = [(fault, None) for fault in self._faults(mine)]
        for rank, part in enumerate(runtime.gather(seen)):
            faults[rank :: runtime.processes] = [fault for fault, _ in part]
            words[rank :: runtime.processes] = [flags for _, flags in part]
        return faults, words

    def _faults(self, records: Sequence[Record]) -> list[str | None]:
        manifest = self.model.unlabelled(records)
        return find_faults(manifest, workers=self.workers, cache=self.model.cache, settings=self.model.settings)

    def _predict(self, records: Sequence[Record], faults: list[str | None]) -> tuple[Table | None, list[int]]:
        """The table of those that can be read, and which they are. A file that has become unreadable since it was
        looked at gets its fault now."""
        while good := [index for index, fault in enumerate(faults) if fault is None]:
            chosen = [records[index] for index in good]
            try:
                table = self.model.table(
                    self.model.unlabelled(chosen),
                    workers=self.workers,
                    batch_size=self.batch_size,
                    mirrored=self.mirrored,
                )
            except DataError:
                late = self._faults(chosen)
                if not any(late):
                    raise
                for index, fault in zip(good, late, strict=True):
                    faults[index] = fault
            else:
                if self.calibration is not None:
                    table = self.calibration.apply(table)
                return table, good
        return None, []

    def said(self, table: Table, row: int) -> dict[str, Cell]:
        """The cells that the row of a table, calibrated, has to say of its photograph."""
        cells: dict[str, Cell] = {name: _typed(table, name, text) for name, text in table.told(row).items()}
        for column, point in self.points.items():
            cells[column] = bool(point.called(_shares(table, row, column))[0])
        if self.interval is not None and isinstance(table, ValuePredictions):
            cells["low"], cells["high"] = ends(self.interval, float(table.predicted[row]))
        if self.strangeness is not None and table.ood is not None:
            cells[OOD] = float(table.ood[row])
            cells[FLAGGED] = bool(self.strangeness.flagged(table.ood[row : row + 1])[0])
        return cells

    def _draw(self, records: Sequence[Record], table: Table | None, good: Sequence[int], first: int) -> dict[int, str]:
        """A heat map of each photograph that was predicted, for the class it was called; index -> name of its file.
        A photograph that has become unreadable since has none. The processes share it."""
        from eyetune.heatmaps import save_png, side_by_side

        assert self.heat_maps is not None
        runtime = self.model.runtime
        names: dict[int, str] = {}
        for row in track(range(runtime.rank, len(good), runtime.processes)):
            assert table is not None
            index = good[row]
            record = records[index]
            stem = re.sub(r"[^\w.-]", "_", Path(record.name).stem)[:_LONGEST_NAME]
            name = f"{first + index + 1:06d}_{stem}.png"
            target = table.said(row)["predicted"] if isinstance(table, Predictions) else None
            try:
                square = prepared(self.model, record.image)
            except DataError:
                continue
            save_png(self.heat_maps / name, side_by_side(heat_map(self.model, square, target=target)))
            names[index] = name
        return {index: name for part in runtime.gather(names) for index, name in part.items()}


def _shares(table: Table, row: int, column: str) -> NDArray[np.float64]:
    """float64[1, K]: the probabilities that the threshold behind a column is for: of a label, lacking and having it."""
    assert isinstance(table, (Predictions, LabelPredictions))
    if isinstance(table, Predictions):
        return table.probabilities[row][None]
    has = float(table.probabilities[row, list(table.labels).index(column.removeprefix("positive_"))])
    return np.array([[1 - has, has]])


def _typed(table: Table, name: str, text: str) -> Cell:
    """A cell of a table as what it is: the name of a class, a yes or a no, a number."""
    if name.startswith(PROBABILITY) or table.task == "regression":
        return float(text)
    return text == "1" if name.startswith(PREDICTED) else text


def prepared(model: TrainedModel, path: Path) -> NDArray[np.uint8]:
    """The square that a model sees of a photograph, uint8[P, P, 3] RGB. Raises DataError."""
    return load_square(path, model.settings) if model.cache is None else model.cache.square(path, model.settings)


def _look_at(path: Path, bits: int | None) -> tuple[str | None, tuple[str, ...] | None]:
    """(what is wrong with a file, its quality flags); one of them is None."""
    try:
        return None, read_quality(path, bits=bits).flags
    except DataError as error:
        return str(error), None


def describe(predictor: Predictor) -> dict[str, Any]:
    """What the rows depend on beside the photographs, as JSON: to go on with a file needs the same."""
    model, calibration = predictor.model, predictor.calibration
    return {
        "model": model.digest,
        "calibration": None if calibration is None else calibration.to_dict(),
        "points": {column: point.name for column, point in predictor.points.items()},
        "mirrored": predictor.mirrored,
        "settings": model.settings.to_dict(),
    }
