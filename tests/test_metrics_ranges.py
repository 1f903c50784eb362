"""What is fitted for several labels and for a number: against slow references, and what must be so."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from eyetune.metrics.calibration import LabelCalibration, fit_calibration, read_calibration, trust
from eyetune.metrics.patients import EITHER_EYE, MEAN_NUMBER, by_patient, patient_level
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.ranges import ValueCalibration, ends


def numbers(patients: int, seed: int, spread: float = 1.0) -> ValuePredictions:
    """Two photographs a patient whose errors resemble each other."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(50, 10, 2 * patients)
    errors = np.repeat(rng.normal(size=patients), 2) + 0.3 * rng.normal(size=2 * patients)
    names = [f"{n}.jpg" for n in range(2 * patients)]
    people = [f"p{n // 2}" for n in range(2 * patients)]
    eyes = ["left", "right"] * patients
    return ValuePredictions(names, people, eyes, truth, truth + spread * errors, "age")


def labels(patients: int, seed: int, sharpness: float = 1.0) -> LabelPredictions:
    """Two labels told with the right odds, but `sharpness` times too sure; a fifth of the cells not known."""
    rng = np.random.default_rng(seed)
    count = 2 * patients
    logits = rng.normal(size=(count, 2)) * 2
    targets = (rng.random((count, 2)) < 1 / (1 + np.exp(-logits))).astype(int)
    targets[rng.random((count, 2)) < 0.2] = -1
    people = [f"p{n // 2}" for n in range(count)]
    return LabelPredictions(
        [f"{n}.jpg" for n in range(count)],
        people,
        ["left", "right"] * patients,
        targets,
        sharpness * logits,
        ["a", "b"],
    )


def test_an_interval_holds_nine_in_ten_other_patients() -> None:
    """Over many validation splits: the promise of split conformal prediction, by patient."""
    held = []
    for seed in range(60):
        found = fit_calibration(numbers(40, seed), "val")
        assert isinstance(found, ValueCalibration)
        there = numbers(100, 1000 + seed)
        held.append(np.mean(np.abs(there.predicted - there.targets) <= found.interval.half_width))
    assert 0.9 <= np.mean(held) <= 0.93


def test_an_interval_is_the_slow_quantile_and_is_kept() -> None:
    table = ValuePredictions(["a", "b", "c", "d"] * 5, list("abcdefghij") * 2, [None] * 20, np.arange(20.0),
                             np.arange(20.0) + np.array([0.1 * n for n in range(20)]), "vcdr")  # fmt: skip
    found = fit_calibration(table, "val", model="m")
    assert isinstance(found, ValueCalibration)
    errors = sorted(zip(np.abs(table.predicted - table.targets).tolist(), table.patients, strict=True))
    reached, slow = 0.0, math.inf
    for error, _ in errors:  # each of the ten patients has two images that weigh one half
        reached += 0.5
        if reached >= 0.9 * 11 - 1e-9:
            slow = error
            break
    assert found.interval.half_width == pytest.approx(slow)
    again = read_calibration(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert found.apply(table) is table
    low, high = ends(found.interval, 3.0)
    assert (low, high) == (3.0 - slow, 3.0 + slow)
    with pytest.raises(TypeError, match="not for predictions of a multilabel task"):
        found.apply(labels(5, 0))
    trusted = trust(table, found, resamples=50)["prediction_interval"]
    assert trusted["coverage"]["value"] == np.mean(np.abs(table.predicted - table.targets) <= slow)
    few = fit_calibration(table.take([0, 1, 2]), "val")
    assert isinstance(few, ValueCalibration)
    assert few.interval.half_width is None
    assert "too few" in few.warnings[0]
    assert ends(few.interval, 3.0) == (None, None)
    assert "prediction_interval" not in trust(table, few, resamples=5)


def test_every_label_has_a_temperature_of_its_own() -> None:
    table = labels(400, 1)
    sure = LabelPredictions(
        table.images, table.patients, table.eyes, table.targets, table.logits * [3.0, 1.0], table.labels
    )
    found = fit_calibration(sure, "val", resamples=20)
    assert isinstance(found, LabelCalibration)
    for name in "ab":
        alone = fit_calibration(sure.label(name), "val", resamples=20)
        assert alone is not None
        assert found.labels[name].to_dict() == alone.to_dict(), "the same as of two classes"
    assert found.labels["a"].temperature.value == pytest.approx(3.0, rel=0.25)
    assert found.labels["b"].temperature.value == pytest.approx(1.0, rel=0.25)
    assert read_calibration(json.loads(json.dumps(found.to_dict()))) == found
    applied = found.apply(sure)
    np.testing.assert_array_equal(applied.predicted, sure.predicted)
    np.testing.assert_allclose(applied.logits[:, 0], sure.logits[:, 0] / found.labels["a"].temperature.value)
    trusted = trust(sure, found, resamples=20)["per_label"]
    for name in "ab":
        alone = trust(sure.label(name), fit_calibration(sure.label(name), "val", resamples=20), resamples=20)
        assert trusted[name] == alone
    assert trusted["a"]["calibrated_metrics"]["nll"]["value"] < 0.9  # of 3 times too sure it is far above


def test_a_label_nobody_knows_has_no_calibration() -> None:
    table = labels(20, 2)
    targets = table.targets.copy()
    targets[:, 1] = -1
    bare = LabelPredictions(table.images, table.patients, table.eyes, targets, table.logits, table.labels)
    found = fit_calibration(bare, "val", resamples=5)
    assert isinstance(found, LabelCalibration)
    assert list(found.labels) == ["a"]
    assert found.warnings[0] == "b: no image of val says whether it has it"
    np.testing.assert_array_equal(found.apply(bare).logits[:, 1], bare.logits[:, 1])
    assert trust(bare, found, resamples=5)["per_label"]["b"] == {}


def slow_join(table: Any, patient: str) -> tuple[Any, Any]:
    """One patient's truth and prediction, image by image."""
    rows = [row for row, one in enumerate(table.patients) if one == patient]
    eyes = sorted({table.eyes[row] for row in rows})
    if isinstance(table, ValuePredictions):
        mean = [
            [np.mean([of[row] for row in rows if table.eyes[row] == eye]) for eye in eyes]
            for of in (table.targets, table.predicted)
        ]
        return np.mean(mean[0]), np.mean(mean[1])
    truth, called = [], []
    for k in range(2):
        known = [row for row in rows if table.targets[row, k] >= 0]
        truth.append(max((table.targets[row, k] for row in known), default=-1))
        by_eye = [
            np.mean(of)
            for eye in eyes
            if (of := [table.probabilities[row, k] for row in known if table.eyes[row] == eye])
        ]
        called.append(max(by_eye, default=0.5))
    return truth, called


@pytest.mark.parametrize("task", ["labels", "number"])
def test_the_photographs_of_a_patient_are_joined(task: str) -> None:
    table: Any = labels(30, 3) if task == "labels" else numbers(30, 3)
    three = table.take(np.append(np.arange(len(table)), [0, 1, 5]))  # some eyes were taken twice
    joined = by_patient(three)
    assert joined is not None
    assert joined.rule == (EITHER_EYE if task == "labels" else MEAN_NUMBER)
    found: Any = joined.predictions
    for row, patient in enumerate(found.patients):
        truth, called = slow_join(three, patient)
        np.testing.assert_array_equal(found.targets[row], truth) if task == "labels" else None
        given = found.probabilities[row] if task == "labels" else [found.targets[row], found.predicted[row]]
        np.testing.assert_allclose(given, called if task == "labels" else [truth, called], atol=1e-12)
    scores = patient_level(three, resamples=20)
    assert scores is not None
    assert scores["n"] == len(found.labelled())
    assert scores["metrics"]["auroc_macro" if task == "labels" else "mae"]["ci"][0] is not None
    assert not isinstance(found, Predictions)
    alone = [f"p{row}" for row in range(len(table))]
    assert by_patient(type(table)(table.images, alone, table.eyes, *_rest(table))) is None


def _rest(table: Any) -> tuple[Any, ...]:
    if isinstance(table, LabelPredictions):
        return table.targets, table.logits, table.labels
    return table.targets, table.predicted
