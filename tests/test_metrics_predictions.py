from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyetune.errors import DataError, UserError
from eyetune.metrics.predictions import Predictions


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
