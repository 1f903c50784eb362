"""What the page says of one photograph, in plain words, as JSON; every number stands in the table, too.

The words say what was computed and on what it rests. None of them tells a reader what to do with a patient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.metrics.calibration import Calibration, LabelCalibration
from eyetune.metrics.predictions import LABEL_THRESHOLD, LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.ranges import ends
from eyetune.metrics.scores import is_graded_dr
from eyetune.predicting.rows import FLAGGED
from eyetune.serving.eyes import guess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eyetune.metrics.operating import OperatingPoint
    from eyetune.serving.desk import Photograph
    from eyetune.serving.limits import Limits
    from eyetune.serving.reader import Reader, Reading

QUALITY = {
    "blurred": "Blurred",
    "dark": "Too dark",
    "bright": "Too bright",
    "low_contrast": "Little contrast",
    "small_field": "Small field of view",
    "no_field": "No field of view found, as fundus photographs have",
}
"""What the words of :mod:`eyetune.data.quality` mean."""


def about(reader: Reader, limits: Limits) -> dict[str, Any]:
    """What the page says of the model, once."""
    model, fitted = reader.model, reader.calibration
    return {
        "name": model.name.rstrip("/").rpartition("/")[2],
        "backbone": model.backbone,
        "licence": model.licence,
        "reads": model.reads,
        "classes": list(model.classes),
        "points": [{"name": name, "title": _titled(name, points)} for name, points in reader.points.items() if points],
        "no_heat_maps": reader.why_no_heat_maps(),
        "grounds": _grounds(reader),
        "limits": {"bytes": limits.upload, "pixels": limits.pixels, "results": limits.results},
        "calibrated": fitted is not None,
    }


def _titled(name: str, points: Mapping[str, OperatingPoint]) -> str:
    """An operating point for somebody who has to choose one."""
    point = next(iter(points.values()))
    target, share = next(iter(point.target.items()), ("", 0.0))
    plain = {"specificity": "Few false alarms", "sensitivity": "Few misses"}.get(name)
    return f"{plain}: {share:.0%} {target} on {point.chosen_on}" if plain else name


def _grounds(reader: Reader) -> list[str]:
    """What the numbers rest on, a sentence each."""
    fitted, said = reader.calibration, []
    if reader.model.reads == "value":
        pass
    elif fitted is None:
        said.append("Probabilities are as the network gives them: this model has no calibration.")
    else:
        said.append(f"Probabilities were calibrated on {fitted.fitted_on.n} images of {fitted.fitted_on.dataset}.")
    conformal = fitted.conformal if isinstance(fitted, Calibration) else None
    if conformal is not None and conformal.marginal is not None:
        said.append(f"“Plausible”: a set of classes that held the true one for {conformal.level:.0%} of validation.")
    if isinstance(fitted, LabelCalibration) and any(one.conformal for one in fitted.labels.values()):
        said.append("“Too close to tell”: labels of which both answers are in a set that held the true one for 90%.")
    interval = reader.predictor(reader.point).interval
    if interval is not None:
        said.append(f"The range held the true number for {interval.level:.0%} of validation.")
    if not any(reader.points.values()) and reader.model.reads != "value":
        said.append("There is no referral decision: this model has no operating point.")
    if reader.predictor(reader.point).strangeness is None:
        said.append("Photographs unlike those of training are not noticed: this model has nothing to compare with.")
    return said + (list(fitted.warnings) if fitted is not None else [])


def card(reader: Reader, photograph: Photograph, point: str) -> dict[str, Any]:
    """What the page says of a photograph now, at an operating point. Raises RunError for one that is not known."""
    eye = guess(photograph.name)
    content: dict[str, Any] = {
        "key": photograph.key,
        "name": photograph.name,
        "place": photograph.place,
        "state": photograph.state,
        "eye": None if eye is None else {"patient": eye.patient, "eye": eye.eye, "word": eye.word},
    }
    if photograph.error is not None:
        content["error"] = photograph.error.removeprefix(f"{photograph.name}: ")
    if photograph.reading is not None:
        content |= _result(reader, photograph.reading, point)
    return content


def _result(reader: Reader, reading: Reading, point: str) -> dict[str, Any]:
    said = reader.row(point, "", reading, None)
    table, row = reading.table, reading.row
    found: dict[str, Any] = {"bars": [], "decisions": [], "plausible": None}
    if isinstance(table, ValuePredictions):
        found |= _value(reader, table, row)
    elif isinstance(table, LabelPredictions):
        found |= _labels(reader, table, row)
    elif isinstance(table, Predictions):
        found |= _classes(reader, table, row)
    for column, threshold in reader.points[point].items():
        found["decisions"].append(_decision(table, row, column, threshold, bool(said[column])))
    found["flags"] = [QUALITY.get(word, word) for word in reading.flags]
    if said.get(FLAGGED):
        rule = reader.predictor(point).strangeness
        assert rule is not None
        found["unlike"] = (
            f"Unlike the training photographs (score {said['ood']:.2f}; up to {rule.threshold:.2f} is usual): "
            "less to be relied on."
        )
    return found


def _classes(reader: Reader, table: Predictions, row: int) -> dict[str, Any]:
    called = table.said(row)["predicted"]
    probabilities = table.probabilities[row]
    fitted = reader.calibration
    inside: Sequence[bool] | None = None
    if isinstance(fitted, Calibration) and fitted.conformal is not None and fitted.conformal.marginal is not None:
        inside = fitted.conformal.sets(probabilities[None])[0].tolist()
    bars = [
        {"name": name, "share": share, "called": name == called, "plausible": None if inside is None else inside[place]}
        for place, (name, share) in enumerate(zip(table.classes, probabilities.tolist(), strict=True))
    ]
    found: dict[str, Any] = {"title": _named(table.classes, called), "bars": bars}
    if inside is not None:
        assert isinstance(fitted, Calibration)
        assert fitted.conformal is not None
        names = [name for name, is_in in zip(table.classes, inside, strict=True) if is_in]
        found["plausible"] = {"names": names, "level": fitted.conformal.level}
    return found


def _named(classes: Sequence[str], name: str) -> str:
    """A class as a headline: a bare number is a grade."""
    return f"Grade {name}" if is_graded_dr(classes) and name.isdigit() else name


def _labels(reader: Reader, table: LabelPredictions, row: int) -> dict[str, Any]:
    fitted = reader.calibration
    bars = []
    for place, name in enumerate(table.labels):
        share, called = float(table.probabilities[row, place]), bool(table.predicted[row, place])
        alone = fitted.labels.get(name) if isinstance(fitted, LabelCalibration) else None
        undecided = None
        if alone is not None and alone.conformal is not None and alone.conformal.marginal is not None:
            undecided = bool(alone.conformal.sets(np.array([[1 - share, share]]))[0].all())
        bars.append({"name": name, "share": share, "called": called, "undecided": undecided})
    present = [str(bar["name"]) for bar in bars if bar["called"]]
    # (Called, that is; the operating points below may draw their lines elsewhere.)
    return {"title": f"{', '.join(present) or 'None'} above {LABEL_THRESHOLD:.0%}", "bars": bars}


def _value(reader: Reader, table: ValuePredictions, row: int) -> dict[str, Any]:
    value = float(table.predicted[row])
    interval = reader.predictor(reader.point).interval
    found: dict[str, Any] = {"title": f"{table.name}: {value:.4g}"}
    if interval is not None:
        low, high = ends(interval, value)
        found["range"] = {"low": low, "high": high, "level": interval.level}
    return found


def _decision(
    table: Predictions | LabelPredictions | Any, row: int, column: str, point: OperatingPoint, positive: bool
) -> dict[str, Any]:
    """The yes or no of an operating point, and what it rests on."""
    if isinstance(table, LabelPredictions):
        label = column.removeprefix("positive_")
        share, what = float(table.probabilities[row, list(table.labels).index(label)]), label
    else:
        share, what = float(point.scores(table.probabilities[row][None])[0]), point.positive
    return {
        "title": "Referable" if column == "referable" else what,
        "positive": positive,
        "what": what,
        "share": share,
        "threshold": point.threshold,
        "chosen_on": point.chosen_on,
    }
