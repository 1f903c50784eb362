"""From the bytes of photographs to what a model says of them, by the code of `eyetune predict`; and its heat maps."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsBytes

import cv2
import numpy as np

from eyetune.data.fundus import decode_square
from eyetune.data.photo import decode_image
from eyetune.data.quality import SHORT_SIDE, quality
from eyetune.errors import DataError, RunError
from eyetune.metrics.calibration import Calibration
from eyetune.metrics.predictions import Predictions
from eyetune.predicting import Predictor
from eyetune.predicting.model import heat_map, why_no_heat_maps
from eyetune.predicting.output import Cell, encode
from eyetune.predicting.rows import choose_points

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.metrics.fitted import Fitted
    from eyetune.metrics.operating import OperatingPoint
    from eyetune.metrics.table import Table
    from eyetune.predicting.model import TrainedModel

PREVIEW = 800
"""Longer side of the picture that is shown, in pixels."""

NOTICE = "research use, not a diagnosis"
"""What stands beside every result, in the table too."""

_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 82]
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
"""What a spreadsheet takes for the beginning of a formula."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What came of one photograph.

    Attributes:
        table: calibrated, with this photograph at `row`.
        row: its place there.
        flags: words of :data:`eyetune.data.quality.WORDS`.
        preview: the photograph as a small JPEG.
        square: what the network saw, as PNG; heat maps are made of it.
    """

    table: Table
    row: int
    flags: tuple[str, ...]
    preview: bytes
    square: bytes


class Reader:
    """A model that reads photographs in memory.

    Args:
        model: the trained model; it must keep no cache, for nothing may be left on disk.
        calibration: makes its probabilities mean what they say; None leaves them as they are.
        point: the operating point that counts unless another one is asked for.
        most_pixels: of a photograph.

    Attributes:
        points: what each operating point decides by, by its name: column -> threshold. The first one counts unless
            another one is asked for. There is one without thresholds where the model has none.

    Raises RunError when there is no such point.
    """

    def __init__(
        self, model: TrainedModel, *, calibration: Fitted | None, point: str = "specificity", most_pixels: int
    ) -> None:
        assert model.cache is None, "photographs of a page are kept nowhere"
        self.model = model
        self.calibration = calibration
        self.most_pixels = most_pixels
        self.points = known_points(model, calibration, point)
        self._predictors = {
            name: Predictor(model, calibration=calibration, points=points, quality=True, workers=0)
            for name, points in self.points.items()
        }

    @property
    def point(self) -> str:
        """The operating point that counts unless another one is asked for."""
        return next(iter(self.points))

    def predictor(self, point: str) -> Predictor:
        """That of an operating point. Raises RunError."""
        if point not in self._predictors:
            raise RunError(f"there is no operating point {point!r} here.")
        return self._predictors[point]

    def read(self, files: Sequence[tuple[str, SupportsBytes]]) -> list[tuple[Reading | None, str | None]]:
        """What came of each (name, bytes), in order: a reading, or why there is none. Whatever is wrong with one, the
        others are read."""
        looks = [self._look(name, bytes(data)) for name, data in files]
        good = [look for look in looks if isinstance(look, _Look)]
        judged = dict(zip(map(id, good), self._judge(good), strict=True))
        return [judged[id(look)] if isinstance(look, _Look) else (None, look) for look in looks]

    def _look(self, name: str, data: bytes) -> _Look | str:
        """A photograph prepared, or what is wrong with its file."""
        bits = self.model.settings.bits
        try:
            photo = decode_image(data, name, short_side=SHORT_SIDE, bits=bits, name=name, most_pixels=self.most_pixels)
            flags, preview = quality(photo).flags, _encoded(".jpg", _at_most(photo, PREVIEW), _JPEG)
            del photo
            return _Look(decode_square(data, name, self.model.settings, name=name), flags, preview)
        except DataError as error:
            return str(error)
        except Exception as error:  # of one file; the next one may be read
            return unexpected(error)

    def _judge(self, looks: Sequence[_Look]) -> list[tuple[Reading | None, str | None]]:
        """What the model says of prepared photographs: of all together, or where that fails of each alone."""
        if not looks:
            return []
        try:
            # No names: what goes wrong in there is said without them.
            numbers = [str(number) for number in range(len(looks))]
            table = self._predictors[self.point].table_of(numbers, [look.square for look in looks])
        except Exception as error:
            if len(looks) > 1:
                return [judged for look in looks for judged in self._judge([look])]
            return [(None, str(error) if isinstance(error, DataError) else unexpected(error))]
        return [
            (Reading(table, row, look.flags, look.preview, _encoded(".png", look.square)), None)
            for row, look in enumerate(looks)
        ]

    def why_no_heat_maps(self) -> str | None:
        """Why this model has none, in a sentence; None where it has."""
        return why_no_heat_maps(self.model)

    def heat(self, reading: Reading) -> bytes:
        """A JPEG of the photograph, as large as its preview, with where the network looked over it: for the class that
        was called, as `eyetune predict --heatmaps` has it."""
        from eyetune.heatmaps import on_photograph, overlay

        table = reading.table
        target = table.said(reading.row)["predicted"] if isinstance(table, Predictions) else None
        values = heat_map(self.model, _decoded(reading.square), target=target).values
        photo = _decoded(reading.preview)
        picture = overlay(photo, on_photograph(values, photo, self.model.settings))
        return _encoded(".jpg", picture, _JPEG)

    def row(self, point: str, name: str, reading: Reading | None, error: str | None) -> dict[str, Cell]:
        """The row that `eyetune predict` writes of a photograph, and the notice."""
        predictor = self.predictor(point)
        if reading is None:
            return predictor.row(name, error=error) | {"notice": NOTICE}
        return predictor.row(name, reading.table, reading.row, flags=reading.flags) | {"notice": NOTICE}

    def header(self, point: str) -> bytes:
        """The first line of a table, as CSV."""
        columns = [*self.predictor(point).columns, "notice"]
        return encode(dict(zip(columns, columns, strict=True)), columns, "csv")

    def line(self, point: str, row: Mapping[str, Cell]) -> bytes:
        """A row as CSV, of which no spreadsheet makes a formula: a text that begins like one gets a ' in front."""
        safe = {
            name: f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
            for name, cell in row.items()
        }
        return encode(safe, [*self.predictor(point).columns, "notice"], "csv")


@dataclass(frozen=True, eq=False)
class _Look:
    """A photograph prepared: the square uint8[P, P, 3] for the network, quality flags, a small JPEG to show."""

    square: NDArray[np.uint8]
    flags: tuple[str, ...]
    preview: bytes


def known_points(
    model: TrainedModel, calibration: Fitted | None, first: str
) -> dict[str, Mapping[str, OperatingPoint]]:
    """The operating points of a model by name, `first` in front: what each decides by, column -> threshold.

    `specificity` and `sensitivity` are those `eyetune predict` knows; of one class an image all others of the
    calibration follow. Raises RunError when `first` was named and is not there.
    """
    found: dict[str, Mapping[str, OperatingPoint]] = {first: choose_points(model, calibration, first)}
    others = calibration.operating_points if isinstance(calibration, Calibration) else ()
    for name in ("specificity", "sensitivity", *(point.name for point in others)):
        points = choose_points(model, calibration, name)
        if points and points not in found.values():
            found[name] = points
    return found if found[first] or len(found) == 1 else {name: one for name, one in found.items() if name != first}


def _at_most(photo: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The photograph uint8[H, W, 3], its longer side at most so many pixels."""
    height, width = photo.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), np.uint8)


def _encoded(suffix: str, picture: NDArray[np.uint8], options: Sequence[int] = ()) -> bytes:
    done: bytes = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), list(options))[1].tobytes()
    return done


def _decoded(picture: bytes) -> NDArray[np.uint8]:
    found = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert found is not None
    return np.asarray(cv2.cvtColor(found, cv2.COLOR_BGR2RGB), np.uint8)


def unexpected(error: Exception) -> str:
    """What to say of an error that is EyeTune's own; where it arose goes to stderr, without its text, which might name
    a patient."""
    where = "".join(traceback.format_tb(error.__traceback__))
    print(f"eyetune: {type(error).__name__} while reading a photograph\n{where}", file=sys.stderr, flush=True)
    return f"could not be read, by a fault of EyeTune ({type(error).__name__}); the server's window says more."
