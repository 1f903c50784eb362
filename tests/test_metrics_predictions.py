from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyetune.errors import DataError, UserError
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions, read_table
from eyetune.metrics.scores import score


def table(**changes: Any) -> Predictions:
    parts: dict[str, Any] = {
        "images": ["a.jpg", 'b "the, second".png', "c.png"],
        "patients": ["007", None, ""],
        "eyes": ["left", None, "right"],
        "targets": np.array([1, -1, 0]),
        "logits": np.array([[0.1, 1 / 3], [1e-300, -1e300], [2.0**-1074, np.float32(0.1)]]),
        "classes": ("none, or little", "glaucoma"),
    }
    return Predictions(**(parts | changes))


def test_csv_round_trip_is_exact(tmp_path: Path) -> None:
    before = table()
    before.to_csv(tmp_path / "new" / "test.csv")
    after = Predictions.from_csv(tmp_path / "new" / "test.csv")
    assert (after.images, after.classes) == (before.images, before.classes)
    assert after.patients == ("007", None, None)
    assert after.eyes == ("left", None, "right")
    assert after.targets.tolist() == [1, -1, 0]
    assert after.logits.tobytes() == before.logits.tobytes()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["test.csv"]


def test_csv_has_the_columns_users_rely_on(tmp_path: Path) -> None:
    table().to_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("image", "patient", "eye", "target", "predicted"),
        *("logit_none, or little", "logit_glaucoma", "prob_none, or little", "prob_glaucoma"),
    ]
    assert [row["target"] for row in rows] == ["glaucoma", "", "none, or little"]
    assert [row["predicted"] for row in rows] == ["glaucoma", "none, or little", "glaucoma"]
    assert float(rows[1]["prob_none, or little"]) == 1.0


def test_spreadsheet_and_hand_made_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("\ufeffimage,target,logit_0,logit_1\r\nx,1,0,1e-3\r\n", encoding="utf-8")
    read = Predictions.from_csv(tmp_path / "p.csv")
    assert (read.images, read.patients, read.eyes) == (("x",), (None,), (None,))
    assert read.logits.tolist() == [[0.0, 0.001]]


def test_no_rows(tmp_path: Path) -> None:
    table().take([]).to_csv(tmp_path / "p.csv")
    read = Predictions.from_csv(tmp_path / "p.csv")
    assert (len(read), read.probabilities.shape, read.predicted.shape) == (0, (0, 2), (0,))


@pytest.mark.filterwarnings("error")
def test_probabilities_are_stable() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4], [-1e308, 1e308, 0], [0, 0, 0]])
    found = table(logits=logits, classes=("a", "b", "c")).probabilities
    np.testing.assert_allclose(found[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0], rtol=1e-12)
    assert found[1].tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-15)
    assert table(logits=logits, classes=("a", "b", "c")).predicted.tolist() == [0, 1, 0]


def test_take_and_labelled() -> None:
    chosen = table().take([2, 0, 0])
    assert chosen.images == ("c.png", "a.jpg", "a.jpg")
    assert chosen.targets.tolist() == [0, 1, 1]
    assert chosen.logits[1].tolist() == [0.1, 1 / 3]
    assert table().labelled().images == ("a.jpg", "c.png")
    assert chosen.labelled() is chosen


def test_arrays_are_copies_nobody_can_change() -> None:
    logits = np.zeros((3, 2))
    held = table(logits=logits)
    logits[0, 0] = 9
    assert held.logits[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        held.logits[0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.array([[0, 1], [0, np.nan], [np.inf, 0]])}, r"for 2 of 3 images(?s:.)*b \"the, second"),
        ({"logits": np.zeros((3, 3))}, r"float\[3, 2\], got shape \(3, 3\)"),
        ({"logits": np.zeros(3)}, r"got shape \(3,\)"),
        ({"targets": np.array([0, 1])}, r"int\[3\], got shape \(2,\)"),
        ({"targets": np.array([0, 2, -2])}, r"0\.\.1(?s:.)*target 2(?s:.)*c\.png: target -2"),
        ({"targets": np.array([0.0, 0.5, 1.0])}, "whole numbers"),
        ({"targets": np.array([0.0, np.nan, 1.0])}, "whole numbers"),
        ({"targets": ["0", "x", "1"]}, "whole numbers"),
        ({"patients": [None]}, "3 images came with 1 patients"),
        ({"eyes": []}, "3 images came with 0 eyes"),
        ({"classes": ("a", "a")}, "different names"),
        ({"classes": ("a", "")}, "different names"),
        ({"classes": ("a",), "logits": np.zeros((3, 1))}, "at least two"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        table(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("image,label\na,1\n", "no column target, logit_<class>; it has image, label"),
        ("image,target,logit_a,logit_b\nx,b,0\n", "row 2 has 3 cells where the header has 4"),
        ("image,target,logit_a,logit_b\nx,a,0,1\ny,a,0,much\n", "row 3: a logit is not a number.*much"),
        ("image,target,logit_mild,logit_severe\nx,sever,0,1\n", "row 2: the target 'sever'.*Did you mean 'severe'"),
        ("image,target,logit_a,logit_b,logit_a\nx,a,0,1,2\n", "logit_a stands there twice"),
        ("image,target,logit_a,logit_b\nx,a,0,nan\n", r"p\.csv: .*NaN or infinite"),
    ],
)
def test_tables_that_are_something_else_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        Predictions.from_csv(tmp_path / "p.csv")


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the predictions"):
        Predictions.from_csv(tmp_path / "absent.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        table().to_csv(tmp_path / "file" / "p.csv")


# -- calls: the class a head's own rule names --------------------------------------------------------------------------


def test_calls_are_what_is_predicted_and_come_back_from_the_file(tmp_path: Path) -> None:
    held = table(calls=np.array([0, 0, 1]))
    assert held.predicted.tolist() == [0, 0, 1]
    assert held.probabilities.argmax(axis=1).tolist() == [1, 0, 1]
    held.to_csv(tmp_path / "p.csv")
    read = Predictions.from_csv(tmp_path / "p.csv")
    assert read.calls is not None
    assert read.predicted.tolist() == [0, 0, 1]
    assert read.take([2, 0]).predicted.tolist() == [1, 0]
    assert read.labelled().predicted.tolist() == [0, 1]
    usual = table(calls=table().predicted)
    usual.to_csv(tmp_path / "usual.csv")
    assert Predictions.from_csv(tmp_path / "usual.csv").calls is None


def test_scores_follow_the_calls_and_the_calibration_the_probabilities() -> None:
    targets, logits = np.array([0, 0, 1, 1]), np.array([[2.0, 1], [1, 2], [1, 2], [2, 1]])
    names = ["a", "b", "c", "d"]
    parts: dict[str, Any] = {"images": names, "patients": names, "eyes": [None] * 4, "classes": ("0", "1")}
    plain = Predictions(**parts, targets=targets, logits=logits)
    called = Predictions(**parts, targets=targets, logits=logits, calls=targets)
    one, two = (score(one, resamples=50) for one in (plain, called))
    assert (one["metrics"]["accuracy"]["value"], two["metrics"]["accuracy"]["value"]) == (0.5, 1.0)
    assert two["confusion_matrix"] == [[2, 0], [0, 2]]
    assert two["metrics"]["accuracy"]["ci"] == [1.0, 1.0]
    for name in ("ece", "brier", "nll", "auroc_macro"):
        assert one["metrics"][name] == two["metrics"][name]


# -- labels and numbers ------------------------------------------------------------------------------------------------


def labels(**changes: Any) -> LabelPredictions:
    parts: dict[str, Any] = {
        "images": ["a", "b", "c"],
        "patients": ["1", None, "2"],
        "eyes": [None] * 3,
        "targets": np.array([[1, 0], [-1, 1], [-1, -1]]),
        "logits": np.array([[0.1, -800.0], [1 / 3, 800.0], [0.0, -1e-300]]),
        "labels": ("glaucoma", "dr, any"),
    }
    return LabelPredictions(**(parts | changes))


def values(**changes: Any) -> ValuePredictions:
    parts: dict[str, Any] = {
        "images": ["a", "b", "c"],
        "patients": ["1", None, "2"],
        "eyes": ["left", None, None],
        "targets": np.array([0.1, np.nan, 1 / 3]),
        "predicted": np.array([0.2, 1e-300, -5.0]),
        "name": "vcdr",
    }
    return ValuePredictions(**(parts | changes))


def test_labels_round_trip(tmp_path: Path) -> None:
    before = labels()
    before.to_csv(tmp_path / "p.csv")
    after = read_table(tmp_path / "p.csv")
    assert isinstance(after, LabelPredictions)
    assert (after.images, after.patients, after.labels) == (before.images, before.patients, before.labels)
    assert after.targets.tolist() == before.targets.tolist()
    assert after.logits.tobytes() == before.logits.tobytes()
    header = (tmp_path / "p.csv").read_text().splitlines()[0]
    assert header.startswith('image,patient,eye,target_glaucoma,"target_dr, any",predicted_glaucoma')
    assert before.labelled().images == ("a", "b")


@pytest.mark.filterwarnings("error")
def test_labels_have_probabilities_of_their_own() -> None:
    found = labels()
    np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-np.clip(found.logits, -700, 700))), atol=1e-15)
    assert found.predicted.tolist() == [[1, 0], [1, 1], [0, 0]]
    one = found.label("glaucoma")
    assert one.classes == ("no glaucoma", "glaucoma")
    assert one.targets.tolist() == [1, -1, -1]
    np.testing.assert_allclose(one.probabilities[:, 1], found.probabilities[:, 0], rtol=1e-12)
    assert one.predicted.tolist() == found.predicted[:, 0].tolist()
    with pytest.raises(DataError, match=r"Did you mean 'glaucoma'"):
        found.label("glaucma")


def test_values_round_trip(tmp_path: Path) -> None:
    before = values()
    before.to_csv(tmp_path / "p.csv")
    after = read_table(tmp_path / "p.csv")
    assert isinstance(after, ValuePredictions)
    assert after.predicted.tobytes() == before.predicted.tobytes()
    assert after.targets[[0, 2]].tolist() == [0.1, 1 / 3]
    assert np.isnan(after.targets[1])
    assert before.labelled().images == ("a", "c")
    table().to_csv(tmp_path / "classes.csv")
    assert isinstance(read_table(tmp_path / "classes.csv"), Predictions)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (labels, {"targets": np.full((3, 2), 2)}, "0 or 1"),
        (labels, {"targets": np.zeros((3, 3), np.int64)}, r"targets must be .*\[3, 2\]"),
        (labels, {"labels": ("a", "a")}, "different names"),
        (labels, {"logits": np.full((3, 2), np.nan)}, "NaN or infinite outputs for 3 of 3"),
        (values, {"predicted": np.array([0, np.inf, 0])}, "NaN or infinite outputs for 1 of 3"),
        (values, {"targets": np.array([0, np.inf, 0])}, "infinite"),
        (values, {"targets": np.zeros(2)}, r"targets must be one number an image, \[3\]"),
        (values, {"eyes": []}, "3 images came with 0 eyes"),
        (table, {"calls": np.array([0, 2, 0])}, r"calls must be one class an image, int\[3\] of 0..1"),
    ],
)
def test_tables_of_other_tasks_refuse_what_does_not_fit(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)
