"""One prediction a patient, from all photographs of both eyes.

Screening refers people, not eyes, and by the worse eye: the pivotal trial of the first autonomous system counted a
participant as diseased with disease "in at least one eye" (Abràmoff et al., npj Digital Medicine 1, 2018). Where
classes have an order of severity the worse eye so speaks for the patient. Where they have none, no eye is worse, and
the eyes' probabilities are averaged. A label is a finding: who has it in one eye has it. A number is averaged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eyetune.metrics.intervals import RESAMPLES
from eyetune.metrics.labelmap import YES_OR_NO
from eyetune.metrics.outcomes import Floats
from eyetune.metrics.predictions import UNKNOWN, LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.scores import is_graded_dr, score
from eyetune.metrics.table import Table

WORSE_EYE = (
    "the worse eye: photographs of one eye are averaged, then the eye with the highest expected grade (the mean of the "
    "grades, weighted by their probabilities) speaks for the patient; the true grade is the highest of the patient's"
)
MEAN = (
    "the mean: photographs of one eye are averaged, then the eyes; patients whose photographs have different labels "
    "are left out, as the classes have no order that says which counts"
)

EITHER_EYE = (
    "either eye: for each label photographs of one eye are averaged, then the eye with the highest probability speaks "
    "for the patient, who has the label where any photograph has it; photographs count where it is known"
)
MEAN_NUMBER = "the mean: photographs of one eye are averaged, then the eyes, true and predicted numbers alike"


class Joined(NamedTuple):
    """What :func:`by_patient` found: a row a patient, how it was made, and how many patients were left out."""

    predictions: Table
    rule: str
    conflicting: int


def is_severity(classes: Sequence[str]) -> bool:
    """Whether a later class is a worse one: grades, whole numbers that rise from 0, or merged grades."""
    numbers = all(re.fullmatch(r"[0-9]{1,3}", name) for name in classes)
    rising = numbers and [int(name) for name in classes] == list(range(len(classes)))
    return is_graded_dr(classes) or rising or tuple(classes) in YES_OR_NO


def by_patient(predictions: Table, *, severity: bool | None = None) -> Joined | None:
    """The labelled photographs of each patient, whatever the visit, joined to one row.

    Args:
        predictions: rows without a patient or a target are left aside.
        severity: of classes: a later class is a worse one; None = as the table says (`ordered`), else by
            :func:`is_severity`.

    Where the model calls classes by a rule of its own, the patient's call is that of the photographs that speak for
    them: of one photograph its own, of several the median (the worse of two).

    Returns None when no patient has two labelled photographs: there is nothing to join.
    """
    rows: dict[str, list[int]] = {}
    for row, (patient, known) in enumerate(zip(predictions.patients, predictions.known.tolist(), strict=True)):
        if patient is not None and known:
            rows.setdefault(patient, []).append(row)
    if all(len(members) < 2 for members in rows.values()):
        return None
    if isinstance(predictions, LabelPredictions):
        return Joined(_labels(predictions, rows), EITHER_EYE, 0)
    if isinstance(predictions, ValuePredictions):
        return Joined(_values(predictions, rows), MEAN_NUMBER, 0)
    if not isinstance(predictions, Predictions):
        raise TypeError(f"nothing is known of how to join {type(predictions).__name__}")
    return _classes(predictions, rows, severity)


def _eyes(table: Table, members: Sequence[int]) -> list[list[int]]:
    """The rows of each eye; a photograph of an eye that is not named stands for itself."""
    eyes: dict[Any, list[int]] = {}
    for row in members:
        eyes.setdefault(table.eyes[row] or row, []).append(row)
    return list(eyes.values())


def _classes(predictions: Predictions, rows: Mapping[str, list[int]], severity: bool | None) -> Joined | None:
    if severity is None:
        severity = bool(predictions.ordered) or is_severity(predictions.classes)
    grades = np.arange(len(predictions.classes))
    kept, targets, shares, calls = [], [], [], []
    for patient, members in rows.items():
        truth = predictions.targets[members]
        if not severity and len(set(truth.tolist())) > 1:
            continue
        eyes = _eyes(predictions, members)
        means = np.array([predictions.probabilities[own].mean(axis=0) for own in eyes])
        kept.append(patient)
        targets.append(int(truth.max()))
        worst = int(np.argmax(means @ grades))
        shares.append(means[worst] if severity else means.mean(axis=0))
        speaking = np.sort(predictions.predicted[eyes[worst] if severity else members])
        calls.append(int(speaking[len(speaking) // 2]))
    if not kept:
        return None
    joined = Predictions(
        images=kept,
        patients=kept,
        eyes=[None] * len(kept),
        targets=np.array(targets),
        logits=_log(np.array(shares)),
        classes=predictions.classes,
        calls=None if predictions.calls is None else np.array(calls),
        ordered=predictions.ordered,
    )
    return Joined(joined, WORSE_EYE if severity else MEAN, len(rows) - len(kept))


def _labels(table: LabelPredictions, rows: Mapping[str, list[int]]) -> LabelPredictions:
    targets = np.full((len(rows), len(table.labels)), UNKNOWN)
    shares = np.full(targets.shape, 0.5)
    for place, members in enumerate(rows.values()):
        for k in range(len(table.labels)):
            known = [row for row in members if table.targets[row, k] != UNKNOWN]
            if known:
                targets[place, k] = table.targets[known, k].max()
                shares[place, k] = max(table.probabilities[own, k].mean() for own in _eyes(table, known))
    nobody = [None] * len(rows)
    return LabelPredictions(list(rows), list(rows), nobody, targets, _log(shares) - _log(1 - shares), table.labels)


def _values(table: ValuePredictions, rows: Mapping[str, list[int]]) -> ValuePredictions:
    def mean(numbers: Floats) -> list[float]:
        return [float(np.mean([numbers[own].mean() for own in _eyes(table, members)])) for members in rows.values()]

    nobody = [None] * len(rows)
    targets, predicted = np.array(mean(table.targets)), np.array(mean(table.predicted))
    return ValuePredictions(list(rows), list(rows), nobody, targets, predicted, table.name)


def _log(shares: Floats) -> Floats:
    """The logarithm of probabilities that may have underflowed to 0."""
    found: Floats = np.log(np.clip(shares, np.finfo(np.float64).tiny, 1.0))
    return found


def patient_level(predictions: Table, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any] | None:
    """The scores by patient, as they stand in metrics.json under `patient_level`; None when nothing is to be joined.

    Returns `n` (patients), `rule`, `metrics`, and `conflicting`: patients left out for contradicting labels.
    """
    joined = by_patient(predictions)
    if joined is None:
        return None
    scores = score(joined.predictions, resamples=resamples, seed=seed)
    found = {"n": scores["n"], "rule": joined.rule, "metrics": scores["metrics"]}
    return found | ({"conflicting": joined.conflicting} if joined.conflicting else {})
