"""Which photographs to look at: the mistakes it was surest of, those furthest off; and where their files are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.data.cache import Cache
from eyetune.data.fundus import FundusSettings, load_square
from eyetune.errors import DataError, UserError
from eyetune.metrics.predictions import UNKNOWN, LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.scores import has_order
from eyetune.pages.page import picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.data.records import Manifest
    from eyetune.metrics.table import Table
    from eyetune.report.facts import Facts
    from eyetune.train.rundir import RunDir

#: Pictures of each kind and dataset: enough to see a pattern, few enough to be looked at.
MOST = 8
#: Longer side of a picture, in pixels.
SIDE = 200


@dataclass(frozen=True)
class Case:
    """One photograph of a dataset and what was said of it.

    Attributes:
        row: its row in predictions/NAME.csv, counted as a spreadsheet does (the header is row 1).
        image: its name in the table.
        truth, called: class names; of a label "no NAME" and "NAME"; of a number the number.
        probability: of what was called, 0..1; None of a number.
        distance: classes between the two, or how far off the number is; None where neither makes sense.
        output: the class, the label or the number that a heat map of it is of.
    """

    row: int
    image: str
    truth: str
    called: str
    probability: float | None
    distance: float | None
    output: str


def surest_mistakes(table: Table, most: int = MOST) -> list[Case]:
    """The wrong answers with the highest probability, surest first; of several labels, as many of each. A number has no
    probability: none."""
    if isinstance(table, LabelPredictions):
        each = max(1, most // len(table.labels))
        found = [case for name in table.labels for case in _of_label(table, name, surest_mistakes, each)]
        return sorted(found, key=lambda case: -(case.probability or 0.0))[:most]
    if not isinstance(table, Predictions):
        return []
    wrong = _wrong(table)
    order = np.argsort(-_confidence(table)[wrong], kind="stable")
    return [_case(table, int(index)) for index in wrong[order][:most]]


def furthest_mistakes(table: Table, most: int = MOST) -> list[Case]:
    """The answers furthest from the label: of grades two classes or more, the surer of equals first; of a number the
    largest errors; none where there is no order."""
    if isinstance(table, ValuePredictions):
        order = np.argsort(-_errors(table), kind="stable")
        return [_number(table, int(index)) for index in order[: min(most, int(table.known.sum()))]]
    if not isinstance(table, Predictions) or len(table.classes) < 3 or not has_order(table):
        return []
    wrong = _wrong(table)
    distance = np.abs(table.predicted - table.targets)[wrong]
    wrong, distance = wrong[distance >= 2], distance[distance >= 2]
    order = np.lexsort((-_confidence(table)[wrong], -distance))
    return [_case(table, int(index)) for index in wrong[order][:most]]


def examples(table: Table, each: int = 1) -> list[Case]:
    """What heat maps are of. The surest right answers of each class, then as many of the surest mistakes or more; of
    several labels the surest answer to have each, then mistakes; of a number the nearest and the furthest off."""
    if isinstance(table, LabelPredictions):
        having = [case for name in table.labels for case in _of_label(table, name, _surest_right, each)]
        return having + surest_mistakes(table, max(len(having), MOST - len(having)))
    if isinstance(table, ValuePredictions):
        order = np.argsort(_errors(table), kind="stable")
        near = order[max(0, len(table) - int(table.known.sum())) :][: MOST // 2]
        return [_number(table, int(index)) for index in near] + furthest_mistakes(table, MOST - MOST // 2)
    if not isinstance(table, Predictions):
        return []
    right = np.flatnonzero(table.predicted == table.targets)
    confidence = _confidence(table)
    chosen: list[int] = []
    for k in range(len(table.classes)):
        of_class = right[table.targets[right] == k]
        chosen += of_class[np.argsort(-confidence[of_class], kind="stable")][:each].tolist()
    return [_case(table, index) for index in chosen] + surest_mistakes(table, max(len(chosen), MOST - len(chosen)))


def shown(table: Table) -> list[Case]:
    """Every photograph that a report may show, each once."""
    cases = [*surest_mistakes(table), *furthest_mistakes(table), *examples(table)]
    return list({case.row: case for case in cases}.values())


def _of_label(table: LabelPredictions, name: str, choose: Callable[[Predictions, int], list[Case]], most: int) -> Any:
    """The cases of one label: having it is an output of the network, lacking it is not."""
    return [replace(case, output=name, distance=None) for case in choose(table.label(name), most)]


def _surest_right(table: Predictions, most: int) -> list[Case]:
    """The surest right answers of the second class."""
    right = np.flatnonzero((table.predicted == 1) & (table.targets == 1))
    return [_case(table, int(index)) for index in right[np.argsort(-_confidence(table)[right], kind="stable")][:most]]


def remember(folder: RunDir, tables: Mapping[str, Table], manifests: Mapping[str, Manifest]) -> None:
    """Keep in `data.json` where the files lie of the photographs that a report may show, for it to be made again."""
    places: dict[str, dict[str, str]] = {}
    for name, manifest in manifests.items():
        where = {record.name: record.image for record in manifest}
        table = tables[name]
        cases = [case for case in shown(table) if case.image in where]
        places[name] = {case.image: os.path.abspath(where[case.image]) for case in cases}
    folder.update_data(pictures=places)


class Album:
    """The photographs of a run, as the network saw them, while their files are still where they were.

    Args:
        facts: the run.
        wanted: False shows none.
    """

    def __init__(self, facts: Facts, wanted: bool = True) -> None:
        self.wanted = wanted
        self.missing = 0
        self._places: Mapping[str, Any] = facts.data.get("pictures", {})
        self._settings = FundusSettings.from_dict(facts.card.fundus) if facts.card is not None else None
        self._cache = _cache(facts)

    def place(self, dataset: str, image: str) -> Path | None:
        """The file of a photograph; None where it is not known, or not there any more."""
        known = self._places.get(dataset, {}).get(image) if isinstance(self._places.get(dataset), dict) else None
        return Path(known) if isinstance(known, str) and os.path.isfile(known) else None

    def square(self, dataset: str, image: str) -> NDArray[np.uint8] | None:
        """uint8[P, P, 3] of a photograph; None (and counted as missing) where it cannot be had."""
        path = self.place(dataset, image)
        if path is None or self._settings is None:
            self.missing += 1
            return None
        try:
            load = self._cache.square if self._cache is not None else load_square
            return load(path, self._settings)
        except DataError:
            self.missing += 1
            return None

    def gallery(self, dataset: str, cases: Iterable[Case]) -> list[dict[str, Any]]:
        """Each case with its `picture` as a data URI, None where it cannot be had or none is wanted."""
        found = []
        for case in cases:
            square = self.square(dataset, case.image) if self.wanted else None
            found.append({"case": case, "picture": None if square is None else picture(square, side=SIDE)})
        return found


def _cache(facts: Facts) -> Cache | None:
    if facts.config is None:
        return None
    try:
        return Cache.of(facts.config.data)
    except (UserError, OSError):  # its folder is gone, or not ours: the photographs are decoded anew
        return None


def _wrong(predictions: Predictions) -> NDArray[np.int64]:
    return np.flatnonzero((predictions.targets != UNKNOWN) & (predictions.predicted != predictions.targets))


def _confidence(predictions: Predictions) -> NDArray[np.float64]:
    """float64[N]: the probability of the class called."""
    found: NDArray[np.float64] = predictions.probabilities[np.arange(len(predictions)), predictions.predicted]
    return found


def _case(predictions: Predictions, index: int) -> Case:
    target, called = int(predictions.targets[index]), int(predictions.predicted[index])
    return Case(
        row=index + 2,
        image=predictions.images[index],
        truth=predictions.classes[target],
        called=predictions.classes[called],
        probability=float(predictions.probabilities[index, called]),
        distance=abs(called - target) if has_order(predictions) else None,
        output=predictions.classes[called],
    )


def _errors(table: ValuePredictions) -> NDArray[np.float64]:
    """float64[N]: how far off each is; -1, below all, where the truth is not known."""
    found: NDArray[np.float64] = np.where(table.known, np.abs(table.predicted - table.targets), -1.0)
    return found


def _number(table: ValuePredictions, index: int) -> Case:
    truth, called = float(table.targets[index]), float(table.predicted[index])
    return Case(
        row=index + 2,
        image=table.images[index],
        truth=f"{truth:.4g}",
        called=f"{called:.4g}",
        probability=None,
        distance=abs(called - truth),
        output=table.name,
    )
