"""Scores by group and by patient, against slow obvious references."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from eyetune.errors import ConfigError, DataError
from eyetune.metrics.forest import forest
from eyetune.metrics.intervals import bias_allowing, bias_corrected
from eyetune.metrics.patients import by_patient, is_severity, patient_level
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import METRICS, score
from eyetune.metrics.subgroups import UNKNOWN, Grouping, groups, subgroups

GRADES = ("0", "1", "2", "3", "4")


def table(n: int, seed: int = 0, classes: tuple[str, ...] = GRADES, skill: float = 1.0, **parts: Any) -> Predictions:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, len(classes), n)
    values: dict[str, Any] = {
        "images": [f"{i}.png" for i in range(n)],
        "patients": [f"p{i // 2}" for i in range(n)],
        "eyes": ["left" if i % 2 else "right" for i in range(n)],
        "targets": targets,
        "logits": rng.normal(size=(n, len(classes))) + 2 * skill * np.eye(len(classes))[targets],
        "classes": classes,
    }
    return Predictions(**(values | parts))


# --- which group --------------------------------------------------------------------------------------------------


def test_words_are_groups_of_their_own() -> None:
    assert groups(Grouping("sex"), ["F", " F", "m", "", "NA", None]) == (
        ["F", "F", "m", UNKNOWN, UNKNOWN, UNKNOWN],
        None,
    )
    assert groups(Grouping("grade"), ["1", "2", "1"]) == (["1", "2", "1"], None)


def test_ages_are_cut_at_decades_and_said() -> None:
    names, bins = groups(Grouping("Age (years)"), ["39", "40", "49.9", "62", "80", "", "71", "55"])
    assert names == ["< 40", "40 to < 50", "40 to < 50", "60 to < 70", ">= 80", UNKNOWN, "70 to < 80", "50 to < 60"]
    assert bins is not None
    assert bins["40 to < 50"] == "40 <= Age (years) < 50"


def test_other_numbers_are_cut_into_quarters() -> None:
    names, bins = groups(Grouping("quality"), [str(i / 100) for i in range(100)])
    assert bins is not None
    assert [names.count(name) for name in bins] == pytest.approx([25] * 4, abs=2)


def test_edges_can_be_said() -> None:
    assert Grouping.parse(["sex, camera", "age:40:60.5"]) == [
        *(Grouping("sex"), Grouping("camera")),
        Grouping("age", (40.0, 60.5)),
    ]
    names, _ = groups(Grouping("age", (40.0, 60.5)), ["12", "40", "60.5"])
    assert names == ["< 40", "40 to < 60.5", ">= 60.5"]


@pytest.mark.parametrize("word", ["", "age:old", "age:60:40", "age:40:40", "age:nan", "sex,sex", "sex,,camera"])
def test_groupings_that_mean_nothing(word: str) -> None:
    with pytest.raises(ConfigError, match="--by"):
        Grouping.parse([word])


def test_identifiers_are_no_groups() -> None:
    with pytest.raises(DataError, match="30 different values"):
        groups(Grouping("id"), [f"x{i}" for i in range(30)])
    with pytest.raises(DataError, match="cannot be cut"):
        groups(Grouping("sex", (3.0,)), ["F", "4"])


# --- their scores -------------------------------------------------------------------------------------------------


def test_groups_have_the_scores_of_their_rows() -> None:
    data = table(80)
    cells = ["a" if i < 50 else "b" for i in range(80)]
    found = subgroups(data, Grouping("camera"), cells, resamples=50)
    for name, rows in (("a", slice(None, 50)), ("b", slice(50, None))):
        expected = score(data.take(np.arange(80)[rows]), resamples=0)
        assert found["groups"][name]["n"] == expected["n"]
        assert found["groups"][name]["patients"] == expected["patients"]
        for key, entry in found["groups"][name]["metrics"].items():
            assert entry["value"] == expected["metrics"][key]["value"]
    accuracy = {name: one["metrics"]["accuracy"]["value"] for name, one in found["groups"].items()}
    assert found["gap"]["accuracy"]["value"] == pytest.approx(max(accuracy.values()) - min(accuracy.values()))
    assert found["gap"]["accuracy"]["between"] == sorted(accuracy, key=accuracy.__getitem__, reverse=True)
    json.dumps(found, allow_nan=False)


def test_small_groups_are_shown_and_have_no_part_in_the_gap() -> None:
    targets = np.array([0] * 20 + [i % 5 for i in range(40)] + [1, 0] * 3)
    data = table(66, targets=targets)
    cells = ["one class"] * 20 + ["a"] * 20 + ["b"] * 20 + ["few"] * 6
    found = subgroups(data, Grouping("site"), cells, resamples=20)
    assert found["groups"]["few"]["too_small"] == "fewer than 10 images"
    assert found["groups"]["one class"]["too_small"] == "all images are of class 0"
    assert (found["groups"]["few"]["n"], found["groups"]["few"]["metrics"]) == (6, {})
    assert set(found["gap"]["accuracy"]["between"]) == {"a", "b"}
    alone = subgroups(data, Grouping("site"), ["a"] * 20 + ["b"] * 46, resamples=20)
    assert alone["gap"] == {}


def test_patients_are_drawn_jointly() -> None:
    """Fellow eyes that are alike: the gap between left and right is exactly known, however few patients there are."""
    one = table(40, patients=[f"p{i}" for i in range(40)])
    both = Predictions(
        images=[f"{i}" for i in range(80)],
        patients=[*one.patients, *one.patients],
        eyes=["left"] * 40 + ["right"] * 40,
        targets=np.tile(one.targets, 2),
        logits=np.tile(one.logits, (2, 1)),
        classes=GRADES,
    )
    found = subgroups(both, Grouping("eye"), list(map(str, both.eyes)), resamples=100)
    for name, gap in found["gap"].items():
        if gap["ci"][0] is not None:
            assert gap["ci"] == pytest.approx([0, 0], abs=1e-12), name
    low, high = found["groups"]["left"]["metrics"]["accuracy"]["ci"]
    assert high - low > 0.1


def test_the_gap_of_separate_groups_is_that_of_separate_studies() -> None:
    """Against square-and-add, which knows nothing of the joint resampling."""
    from eyetune.metrics.intervals import difference

    n = 600
    data = table(n, patients=[f"p{i}" for i in range(n)], classes=("no", "yes"), skill=0.6)
    cells = ["a"] * 300 + ["b"] * 300
    found = subgroups(data, Grouping("site"), cells, resamples=600)
    gap = found["gap"]["accuracy"]
    high, low = (found["groups"][name]["metrics"]["accuracy"] for name in gap["between"])
    assert gap["ci"] == pytest.approx(difference(high["value"], high["ci"], low["value"], low["ci"]), abs=0.012)


def test_unknown_targets_and_cells() -> None:
    targets = np.array([-1] * 10 + [i % 5 for i in range(50)])
    found = subgroups(table(60, targets=targets), Grouping("sex"), ["x"] * 10 + ["F"] * 30 + [""] * 20, resamples=10)
    assert {name: one["n"] for name, one in found["groups"].items()} == {"F": 30, UNKNOWN: 20}


def test_a_forest_is_drawn_even_of_nothing(tmp_path: Any) -> None:
    data = table(40)
    cells = ["a camera with quite a long name, $5"] * 25 + ["b"] * 15
    found = subgroups(data, Grouping("camera"), cells, resamples=20)
    forest(found, score(data, resamples=20)["metrics"], ("qwk", "accuracy"), tmp_path / "f.png", title="x")
    assert (tmp_path / "f.png").stat().st_size > 5000
    none = subgroups(data.take(range(6)), Grouping("camera"), cells[:6], resamples=20)
    forest(none, {}, ("qwk",), tmp_path / "g.png")
    assert (tmp_path / "g.png").is_file()


# --- patients -----------------------------------------------------------------------------------------------------


def slow_worse_eye(data: Predictions) -> dict[str, tuple[int, list[float]]]:
    found = {}
    for patient in {p for p in data.patients if p is not None}:
        rows = [i for i, p in enumerate(data.patients) if p == patient and data.targets[i] >= 0]
        if not rows:
            continue
        best: tuple[float, list[float]] = (-1, [])
        for eye in {data.eyes[i] for i in rows}:
            mean = sum(data.probabilities[i] for i in rows if data.eyes[i] == eye) / sum(
                data.eyes[i] == eye for i in rows
            )
            best = max(best, (sum(k * p for k, p in enumerate(mean)), list(mean)), key=lambda one: one[0])
        found[patient] = max(int(data.targets[i]) for i in rows), best[1]
    return found


def test_the_worse_eye_speaks_for_the_patient() -> None:
    rng = np.random.default_rng(1)
    targets = np.where(rng.random(60) < 0.1, -1, rng.integers(0, 5, 60))
    data = table(60, targets=targets, patients=[f"p{i}" for i in rng.integers(0, 20, 60)])
    joined = by_patient(data)
    assert joined is not None
    expected = slow_worse_eye(data)
    assert set(joined.predictions.patients) == set(expected)
    for row, patient in enumerate(joined.predictions.patients):
        target, shares = expected[str(patient)]
        assert joined.predictions.targets[row] == target
        assert joined.predictions.probabilities[row] == pytest.approx(shares, abs=1e-12)
    assert joined.rule.startswith("the worse eye")


def test_without_an_order_eyes_are_averaged_and_contradictions_left_out() -> None:
    classes = ("glaucoma", "normal")
    data = table(6, classes=classes, targets=np.array([0, 0, 0, 1, 1, 1]))
    joined = by_patient(data)
    assert joined is not None
    assert joined.conflicting == 1  # the second patient: one eye of each
    assert joined.predictions.targets.tolist() == [0, 1]
    assert joined.predictions.probabilities[0] == pytest.approx(data.probabilities[:2].mean(axis=0))


def test_what_is_severity() -> None:
    assert is_severity(GRADES)
    assert is_severity(("0", "1"))
    assert is_severity(("not referable", "referable"))
    assert not is_severity(("glaucoma", "normal"))
    assert not is_severity(("1", "2"))


def test_patients_with_one_photograph_need_no_joining() -> None:
    assert patient_level(table(20, patients=[f"p{i}" for i in range(20)])) is None
    assert patient_level(table(20, patients=[None] * 20)) is None


def test_patient_level_has_its_intervals() -> None:
    found = patient_level(table(80), resamples=100)
    assert found is not None
    assert found["n"] == 40
    low, high = found["metrics"]["qwk"]["ci"]
    assert low <= found["metrics"]["qwk"]["value"] <= high
    json.dumps(found, allow_nan=False)


def test_a_gap_allows_for_bias_as_its_metric_does() -> None:
    values = np.random.default_rng(3).normal(0.1, 0.02, 400)
    assert METRICS.get("ece").gap_interval(values, 0.05) == bias_allowing(values, 0.05, -1.0, 1.0)
    assert METRICS.get("accuracy").gap_interval(values, 0.05) == bias_corrected(values, 0.05)
    found = subgroups(table(120), Grouping("half"), ["a"] * 60 + ["b"] * 60, resamples=60)
    low, high = found["gap"]["ece"]["ci"]
    assert -1 <= low <= found["gap"]["ece"]["value"] <= high <= 1
