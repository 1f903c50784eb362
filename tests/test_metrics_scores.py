"""The contract every metric keeps, and agreement with scikit-learn or a slow obvious reference."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from eyetune.errors import UserError
from eyetune.metrics.metric import of_task
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import (
    METRICS,
    Undefined,
    better,
    generalization,
    is_graded_dr,
    is_ordered,
    primary_metric,
    score,
)

GRADES = ("0", "1", "2", "3", "4")
NAMES = tuple(of_task("classification"))
FOR_GRADES = tuple(name for name, entry in METRICS if entry.scope == "graded")
pytestmark = pytest.mark.filterwarnings("error")


def outcomes(n: int, k: int, seed: int, *, ties: bool = False, skill: float = 1.0) -> Outcomes:
    """`n` random outcomes of some skill; every class present when n >= k; with ties, coarse probabilities."""
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(k), rng.integers(0, k, max(n - k, 0))])[:n]
    logits = rng.normal(size=(n, k)) + skill * np.eye(k)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:
        probabilities = rng.multinomial(8, probabilities) / 8
    order = rng.permutation(n)
    return Outcomes(targets[order], probabilities[order])


def certain(targets: list[int], predicted: list[int], k: int) -> Outcomes:
    return Outcomes(np.array(targets), np.eye(k)[predicted])


def predictions(sample: Outcomes, classes: tuple[str, ...], **parts: Any) -> Predictions:
    n = len(sample)
    return Predictions(
        images=[f"{i}.png" for i in range(n)],
        patients=parts.get("patients", [None] * n),
        eyes=[None] * n,
        targets=parts.get("targets", sample.targets),
        logits=np.log(np.clip(sample.probabilities, 1e-12, 1)),
        classes=classes,
    )


# --- the contract of every metric ---------------------------------------------------------------------------------


def test_names_are_the_contract() -> None:
    expected = """accuracy balanced_accuracy kappa qwk precision_macro recall_macro f1_macro precision_weighted
        recall_weighted f1_weighted auroc_macro auprc_macro ece brier nll referable_auroc referable_sensitivity
        referable_specificity referable_sensitivity_at_95_specificity"""
    assert set(expected.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_metric_says_what_it_is(name: str) -> None:
    entry = METRICS.get(name)
    assert entry.name == name
    assert entry.low < entry.high
    assert (entry.function.__doc__ or "").strip()


@pytest.mark.parametrize(
    ("name", "k"), [(name, k) for name in NAMES for k in (2, 5, 12) if k == 5 or name not in FOR_GRADES]
)
def test_in_range_and_blind_to_order(name: str, k: int) -> None:
    entry = METRICS.get(name)
    for seed in range(6):
        sample = outcomes(70, k, seed, ties=seed % 2 == 1)
        value = entry(sample)
        assert entry.low <= value <= entry.high
        shuffled = sample.take(np.random.default_rng(seed).permutation(70))
        assert entry(shuffled) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_perfect_predictions_get_the_best_value(name: str) -> None:
    entry = METRICS.get(name)
    targets = [0, 1, 2, 3, 4, 4, 2, 0]
    best = entry.high if entry.higher_is_better else entry.low
    assert entry(certain(targets, targets, 5)) == pytest.approx(best, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_perfect_beats_skilled_beats_chance(name: str) -> None:
    entry = METRICS.get(name)
    chance, skilled = outcomes(4000, 5, 1, skill=0), outcomes(4000, 5, 1, skill=2)
    perfect = certain(skilled.targets.tolist(), skilled.targets.tolist(), 5)
    assert better(name, entry(perfect), entry(skilled))
    if name != "referable_specificity":  # by chance four of ten are called referable: nearly all specificity is free
        assert better(name, entry(skilled), entry(chance))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("accuracy", 0.2), ("balanced_accuracy", 0.2), ("kappa", 0), ("qwk", 0), ("auroc_macro", 0.5)),
        *(("auprc_macro", 0.2), ("referable_auroc", 0.5), ("referable_sensitivity_at_95_specificity", 0.05)),
    ],
)
def test_chance_has_its_known_value(name: str, value: float) -> None:
    assert METRICS.get(name)(outcomes(20000, 5, 3, skill=0)) == pytest.approx(value, abs=0.015)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_labelled_has_no_value(name: str) -> None:
    with pytest.raises(Undefined, match="no image has a known class"):
        METRICS.get(name)(Outcomes(np.zeros(0, np.int64), np.zeros((0, 5))))


@pytest.mark.parametrize("name", NAMES)
def test_one_class_only_has_a_defined_fate(name: str) -> None:
    """Every image is grade 3 and called so: shares are 1, comparisons with other classes have no value."""
    entry, sample = METRICS.get(name), certain([3] * 6, [3] * 6, 5)
    comparing = {"kappa", "qwk", "auroc_macro", "auprc_macro", "referable_auroc", "referable_specificity"}
    if name in comparing | {"referable_sensitivity_at_95_specificity"}:
        with pytest.raises(Undefined):
            entry(sample)
    else:
        assert entry(sample) == (1 if entry.higher_is_better else 0)


@pytest.mark.parametrize("name", NAMES)
def test_one_image_gives_a_value_or_a_reason(name: str) -> None:
    found = score(predictions(outcomes(1, 5, 0), GRADES))["metrics"][name]
    entry = METRICS.get(name)
    assert entry.low <= found["value"] <= entry.high if found["value"] is not None else len(found["reason"]) > 10


# --- agreement ----------------------------------------------------------------------------------------------------


def average(function: Callable[..., float], how: str) -> Callable[[Outcomes], float]:
    return lambda s: function(s.targets, s.predicted, labels=np.unique(s.targets), average=how, zero_division=0.0)  # type: ignore[no-any-return]


def one_hot(s: Outcomes) -> np.ndarray:
    return np.eye(s.num_classes)[s.targets]


def slow_ece(s: Outcomes) -> float:
    total, width = 0.0, 1 / 15
    for b in range(15):
        inside = [
            i
            for i in range(len(s))
            if b * width < max(s.probabilities[i]) <= (b + 1) * width + (1e-12 if b == 14 else 0)
        ]
        if inside:
            confidence = sum(max(s.probabilities[i]) for i in inside) / len(inside)
            right = sum(int(np.argmax(s.probabilities[i])) == s.targets[i] for i in inside) / len(inside)
            total += len(inside) / len(s) * abs(right - confidence)
    return total


def slow_sensitivity_at_95(s: Outcomes) -> float:
    truth, chance = s.targets >= 2, s.probabilities[:, 2] + s.probabilities[:, 3] + s.probabilities[:, 4]
    best = 0.0
    for threshold in [*chance, 2.0]:
        called = chance >= threshold
        if np.mean(~called[~truth]) >= 0.95 - 1e-12:
            best = max(best, float(np.mean(called[truth])))
    return best


def referable(s: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    return s.targets >= 2, s.probabilities[:, 2:].sum(axis=1)


def slow_ece_equal_mass(s: Outcomes) -> float:
    """In fractions, image by image."""
    rows = [(p.max(), int(p.argmax()) == t) for p, t in zip(s.probabilities, s.targets, strict=True)]
    n = len(rows)
    bins: dict[int, float] = {}
    for value, correct in rows:
        below, equal = sum(other < value for other, _ in rows), sum(other == value for other, _ in rows)
        place = min(14, math.floor(15 * (below + Fraction(equal, 2)) / n))
        bins[place] = bins.get(place, 0.0) + correct - value
    return sum(map(abs, bins.values())) / n


REFERENCES: dict[str, Callable[[Outcomes], float]] = {
    "accuracy": lambda s: sk.accuracy_score(s.targets, s.predicted),
    "balanced_accuracy": lambda s: sk.balanced_accuracy_score(s.targets, s.predicted),
    "kappa": lambda s: sk.cohen_kappa_score(s.targets, s.predicted),
    "qwk": lambda s: sk.cohen_kappa_score(
        s.targets, s.predicted, weights="quadratic", labels=list(range(s.num_classes))
    ),
    "precision_macro": average(sk.precision_score, "macro"),
    "recall_macro": average(sk.recall_score, "macro"),
    "f1_macro": average(sk.f1_score, "macro"),
    "precision_weighted": average(sk.precision_score, "weighted"),
    "recall_weighted": average(sk.recall_score, "weighted"),
    "f1_weighted": average(sk.f1_score, "weighted"),
    "auroc_macro": lambda s: (
        sk.roc_auc_score(s.targets, s.probabilities[:, 1])
        if s.num_classes == 2
        else sk.roc_auc_score(s.targets, s.probabilities, multi_class="ovr")
    ),
    "auprc_macro": lambda s: sk.average_precision_score(one_hot(s), s.probabilities, average="macro"),
    "ece": slow_ece,
    "ece_equal_mass": slow_ece_equal_mass,
    "brier": lambda s: sk.brier_score_loss(s.targets, s.probabilities, labels=list(range(s.num_classes))),
    "nll": lambda s: float(
        -np.mean([math.log(max(s.probabilities[i, t], sys.float_info.min)) for i, t in enumerate(s.targets)])
    ),
    "referable_auroc": lambda s: sk.roc_auc_score(*referable(s)),
    "referable_sensitivity": lambda s: sk.recall_score(s.targets >= 2, referable(s)[1] >= 0.5),
    "referable_specificity": lambda s: sk.recall_score(s.targets >= 2, referable(s)[1] >= 0.5, pos_label=False),
    "referable_sensitivity_at_95_specificity": slow_sensitivity_at_95,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_the_reference(name: str, ties: bool) -> None:
    for seed, (n, k) in enumerate([(12, 5), (200, 5), (301, 5), (90, 2), (150, 12)]):
        if name in FOR_GRADES and k != 5:
            continue
        sample = outcomes(n, k, seed, ties=ties)
        assert METRICS.get(name)(sample) == pytest.approx(REFERENCES[name](sample), abs=1e-9)


@pytest.mark.parametrize("name", ["balanced_accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_weighted"])
def test_class_without_examples_is_left_out(name: str) -> None:
    sample = certain([0, 0, 1, 1, 3], [0, 2, 1, 0, 3], 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of the class that is predicted but has no examples
        expected = REFERENCES[name](sample)
    assert METRICS.get(name)(sample) == pytest.approx(expected, abs=1e-12)


def test_hand_computed_values() -> None:
    sample = certain([0, 0, 1, 2], [0, 1, 1, 0], 3)
    assert METRICS.get("qwk")(sample) == pytest.approx(1 - (1 + 4) / ((2 * 2 * 1 + 1 * 2 + 1 * 2 * 1 + 1 * 2 * 4) / 4))
    two = Outcomes(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]))
    assert METRICS.get("brier")(two) == pytest.approx((0.01 + 0.36 + 0.04) / 3)
    assert METRICS.get("nll")(two) == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.8)) / 3)
    assert METRICS.get("auroc_macro")(two) == 1.0
    certain_and_wrong = METRICS.get("nll")(certain([0, 1], [1, 0], 2))
    assert certain_and_wrong == pytest.approx(708.396, abs=1e-3)


def test_referable_threshold_includes_one_half() -> None:
    sample = Outcomes(np.array([2, 1]), np.array([[0.5, 0, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25, 0]]))
    assert METRICS.get("referable_sensitivity")(sample) == 1
    assert METRICS.get("referable_specificity")(sample) == 0


def test_fast_enough_for_a_bootstrap() -> None:
    """Every metric on 1,000 images, many times. Processor time, and generous: a busy machine is no defect."""
    sample = outcomes(1000, 5, 0)
    started = time.process_time()
    for _ in range(20):
        again = sample.take(slice(None))
        for name in NAMES:
            METRICS.get(name)(again)
    assert (time.process_time() - started) / 20 < 0.02


# --- the scores of a table ----------------------------------------------------------------------------------------


def test_scores_have_the_shape_of_metrics_json() -> None:
    sample = outcomes(60, 5, 0)
    targets = sample.targets.copy()
    targets[:10] = -1
    patients = [f"p{i // 3}" for i in range(59)] + [None]
    found = score(predictions(sample, GRADES, targets=targets, patients=patients), resamples=0)
    assert (found["n"], found["unlabelled"], found["classes"]) == (50, 10, list(GRADES))
    assert found["patients"] == len({i // 3 for i in range(10, 59)})
    assert list(found["metrics"]) == list(NAMES)
    assert all(entry == {"value": entry["value"], "ci": [None, None]} for entry in found["metrics"].values())
    assert found["metrics"]["accuracy"]["value"] == METRICS.get("accuracy")(sample.take(slice(10, None)))
    assert found["referable"] == {"grade_at_least": 2, "threshold": 0.5}
    assert np.array(found["confusion_matrix"]).sum() == 50
    json.dumps(found, allow_nan=False)


def test_per_class_agrees_with_scikit_learn() -> None:
    sample = outcomes(200, 5, 4)
    found = score(predictions(sample, GRADES))["per_class"]
    p, r, f, support = sk.precision_recall_fscore_support(sample.targets, sample.predicted)
    for k, name in enumerate(GRADES):
        truth, called = sample.targets == k, sample.predicted == k
        expected = {
            "precision": p[k],
            "recall": r[k],
            "specificity": np.mean(~called[~truth]),
            "f1": f[k],
            "auroc": sk.roc_auc_score(truth, sample.probabilities[:, k]),
            "auprc": sk.average_precision_score(truth, sample.probabilities[:, k]),
            "support": support[k],
        }
        assert found[name] == pytest.approx(expected, abs=1e-9)


def test_rows_of_the_confusion_matrix_are_the_truth() -> None:
    assert score(predictions(certain([0, 0, 1], [1, 1, 1], 2), ("a", "b")))["confusion_matrix"] == [[0, 2], [0, 1]]


def test_absent_class_is_said() -> None:
    found = score(predictions(certain([0, 0, 1, 3], [0, 2, 1, 3], 5), GRADES))
    assert found["metrics"]["f1_macro"]["note"].endswith("without examples: 2, 4")
    assert "note" not in found["metrics"]["accuracy"]
    assert found["per_class"]["2"] == {
        **dict.fromkeys(("recall", "f1", "auroc", "auprc")),
        **{"precision": 0.0, "specificity": 0.75, "support": 0},
    }
    assert found["per_class"]["4"]["precision"] is None
    json.dumps(found, allow_nan=False)


def test_one_class_and_no_labels_have_reasons() -> None:
    one = score(predictions(certain([1, 1], [1, 1], 2), ("a", "b")))
    assert one["metrics"]["auroc_macro"]["value"] is None
    assert "two classes" in one["metrics"]["auroc_macro"]["reason"]
    assert one["patients"] is None
    assert one["per_class"]["b"] == {
        **{"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2},
        **dict.fromkeys(("specificity", "auroc", "auprc")),
    }
    none = score(predictions(certain([0, 1], [0, 1], 2), ("a", "b"), targets=np.array([-1, -1])))
    assert none["n"] == 0
    assert {entry["value"] for entry in none["metrics"].values()} == {None}
    json.dumps([one, none], allow_nan=False)


def test_order_and_grades_decide_what_is_scored() -> None:
    flowers = ("rose", "tulip", "daisy")
    sample = outcomes(30, 3, 0)
    found = score(predictions(sample, flowers), resamples=0)["metrics"]
    assert found["qwk"]["value"] is None
    assert "order" in found["qwk"]["reason"]
    assert not set(FOR_GRADES) & set(found)
    assert score(predictions(sample, flowers), ordered=True, resamples=0)["metrics"]["qwk"]["value"] == METRICS.get(
        "qwk"
    )(sample)
    assert not set(FOR_GRADES) & set(
        score(predictions(outcomes(30, 5, 0), GRADES), graded=False, resamples=0)["metrics"]
    )
    words = tuple("vwxyz")
    assert set(FOR_GRADES) < set(score(predictions(outcomes(30, 5, 0), words), graded=True, resamples=0)["metrics"])
    with pytest.raises(ValueError, match="five classes"):
        score(predictions(sample, flowers), graded=True)


@pytest.mark.parametrize(
    "classes",
    [
        GRADES,
        ("anodr", "bmilddr", "cmoderatedr", "dseveredr", "eprodr"),
        ("No DR", "Mild", "Moderate", "Severe", "Proliferative DR"),
        ("0_no_dr", "1_mild_npdr", "2_moderate_npdr", "3_severe_npdr", "4_pdr"),
        ("no apparent retinopathy", "mild NPDR", "moderate", "severe non-proliferative", "proliferative"),
        ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
        ("R0", "R1", "R2", "R3", "R4"),
    ],
)
def test_grades_are_recognised(classes: tuple[str, ...]) -> None:
    assert is_graded_dr(classes)
    assert is_ordered(classes)
    assert primary_metric(classes) == "qwk"
    assert not is_graded_dr(classes[::-1])


@pytest.mark.parametrize(
    "classes",
    [
        ("0", "1", "2", "3"),
        ("mild", "moderate", "no_dr", "proliferative", "severe"),
        ("normal", "amd", "glaucoma", "dr", "other"),
        ("1", "2", "3", "4", "5"),
    ],
)
def test_other_classes_are_not_grades(classes: tuple[str, ...]) -> None:
    assert not is_graded_dr(classes)
    assert primary_metric(classes) == "f1_macro"


def test_order_and_primary_metric() -> None:
    assert is_ordered(("0", "1", "2", "10"))
    assert not is_ordered(("0", "1", "10", "2"))
    assert is_ordered(("healthy", "glaucoma"))
    assert not is_ordered(("a", "b", "c"))
    assert primary_metric(("healthy", "glaucoma")) == "auroc_macro"


def test_better_knows_the_direction_and_the_undefined() -> None:
    assert better("qwk", 0.8, 0.7)
    assert not better("qwk", 0.7, 0.7)
    assert better("nll", 0.3, 0.4)
    assert better("nll", 0.3, None)
    assert better("qwk", -1.0, math.nan)
    assert not better("qwk", None, None)
    assert not better("qwk", math.nan, 0.1)
    with pytest.raises(UserError, match=r"Did you mean 'auroc_m[ai]cro'"):
        better("auroc", 1, 0)


def test_generalization_is_positive_when_worse_outside() -> None:
    inside, outside = outcomes(300, 5, 0, skill=3), outcomes(300, 5, 0, skill=1)
    lonely = certain([2, 2], [2, 2], 5)
    sides = {"test": inside, "b": outside, "one": lonely}
    scores = {name: score(predictions(s, GRADES), resamples=0) for name, s in sides.items()}
    found = generalization("test", scores)
    assert found["reference"] == "test"
    assert list(found["external"]) == ["b", "one"]
    gaps = found["external"]["b"]
    assert list(gaps) == list(NAMES)
    assert all(gaps[name]["value"] > 0 for name in ("qwk", "auroc_macro", "nll", "brier"))
    a, b = (scores[name]["metrics"] for name in ("test", "b"))
    assert gaps["qwk"] == {"value": a["qwk"]["value"] - b["qwk"]["value"], "ci": [None, None]}
    assert gaps["nll"]["value"] == b["nll"]["value"] - a["nll"]["value"]
    assert found["external"]["one"]["qwk"]["value"] is None
    assert found["external"]["one"]["qwk"]["reason"].startswith("external: ")
    assert found["external"]["one"]["f1_macro"]["note"].startswith("external: ")
    assert list(generalization("test", scores, ["b"])["external"]) == ["b"]
    json.dumps(found, allow_nan=False)
