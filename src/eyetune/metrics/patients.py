"""One prediction a patient, from all photographs of both eyes.

Screening refers people, not eyes, and by the worse eye: the pivotal trial of the first autonomous system counted a
participant as diseased with disease "in at least one eye" (Abràmoff et al., npj Digital Medicine 1, 2018). Where
classes have an order of severity the worse eye so speaks for the patient. Where they have none, no eye is worse, and
the eyes' probabilities are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eyetune.metrics.intervals import RESAMPLES
from eyetune.metrics.labelmap import YES_OR_NO
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import is_graded_dr, score

WORSE_EYE = (
    "the worse eye: photographs of one eye are averaged, then the eye with the highest expected grade (the mean of the "
    "grades, weighted by their probabilities) speaks for the patient; the true grade is the highest of the patient's"
)
MEAN = (
    "the mean: photographs of one eye are averaged, then the eyes; patients whose photographs have different labels "
    "are left out, as the classes have no order that says which counts"
)


class Joined(NamedTuple):
    """What :func:`by_patient` found: a row a patient, how it was made, and how many patients were left out."""

    predictions: Predictions
    rule: str
    conflicting: int


def is_severity(classes: Sequence[str]) -> bool:
    """Whether a later class is a worse one: grades, whole numbers that rise from 0, or merged grades."""
    numbers = all(re.fullmatch(r"[0-9]{1,3}", name) for name in classes)
    rising = numbers and [int(name) for name in classes] == list(range(len(classes)))
    return is_graded_dr(classes) or rising or tuple(classes) in YES_OR_NO


def by_patient(predictions: Predictions, *, severity: bool | None = None) -> Joined | None:
    """The labelled photographs of each patient, whatever the visit, joined to one row.

    Args:
        predictions: rows without a patient or a target are left aside.
        severity: a later class is a worse one; None = as the table says (`ordered`), else by :func:`is_severity`.

    Where the model calls classes by a rule of its own, the patient's call is that of the photographs that speak for
    them: of one photograph its own, of several the median (the worse of two).

    Returns None when no patient has two labelled photographs: there is nothing to join.
    """
    if severity is None:
        severity = bool(predictions.ordered) or is_severity(predictions.classes)
    rows: dict[str, list[int]] = {}
    for row, patient in enumerate(predictions.patients):
        if patient is not None and predictions.targets[row] >= 0:
            rows.setdefault(patient, []).append(row)
    if all(len(members) < 2 for members in rows.values()):
        return None
    grades = np.arange(len(predictions.classes))
    kept, targets, shares, calls = [], [], [], []
    for patient, members in rows.items():
        truth = predictions.targets[members]
        if not severity and len(set(truth.tolist())) > 1:
            continue
        eyes: dict[Any, list[int]] = {}
        for row in members:
            # A photograph of an eye that is not named stands for itself.
            eyes.setdefault(predictions.eyes[row] or row, []).append(row)
        means = np.array([predictions.probabilities[own].mean(axis=0) for own in eyes.values()])
        kept.append(patient)
        targets.append(int(truth.max()))
        worst = int(np.argmax(means @ grades))
        shares.append(means[worst] if severity else means.mean(axis=0))
        speaking = np.sort(predictions.predicted[list(eyes.values())[worst] if severity else members])
        calls.append(int(speaking[len(speaking) // 2]))
    if not kept:
        return None
    joined = Predictions(
        images=kept,
        patients=kept,
        eyes=[None] * len(kept),
        targets=np.array(targets),
        logits=np.log(np.clip(np.array(shares), np.finfo(np.float64).tiny, 1.0)),
        classes=predictions.classes,
        calls=None if predictions.calls is None else np.array(calls),
        ordered=predictions.ordered,
    )
    return Joined(joined, WORSE_EYE if severity else MEAN, len(rows) - len(kept))


def patient_level(predictions: Predictions, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any] | None:
    """The scores by patient, as they stand in metrics.json under `patient_level`; None when nothing is to be joined.

    Returns `n` (patients), `rule`, `metrics`, and `conflicting`: patients left out for contradicting labels.
    """
    joined = by_patient(predictions)
    if joined is None:
        return None
    scores = score(joined.predictions, resamples=resamples, seed=seed)
    found = {"n": scores["n"], "rule": joined.rule, "metrics": scores["metrics"]}
    return found | ({"conflicting": joined.conflicting} if joined.conflicting else {})
