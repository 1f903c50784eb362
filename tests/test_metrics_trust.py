"""Reliability, operating points, selective prediction and conformal sets against slow, obvious references."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]
from sklearn.calibration import calibration_curve

from eyetune.metrics.calibration import fit_calibration, trust
from eyetune.metrics.conformal import LEVEL, Conformal, conformal_scores, fit_conformal, quantile
from eyetune.metrics.intervals import Clusters, intervals, resampled, share_entries, shares, wilson
from eyetune.metrics.operating import OperatingPoint, choose_points, point_scores, questions, threshold_for
from eyetune.metrics.outcomes import Outcomes, Ranking
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.reliability import error_by_chance, reliability_bins
from eyetune.metrics.scores import METRICS, score
from eyetune.metrics.selective import RiskCoverage, selective_scores
from eyetune.metrics.site import JUDGED
from eyetune.metrics.trust_plots import reliability, risk_coverage

GRADES = ("0", "1", "2", "3", "4")


def sample(n: int, k: int, seed: int, *, sharpness: float = 1.0) -> Outcomes:
    """Outcomes that are perfectly calibrated at sharpness 1."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(n, k))
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.array([rng.choice(k, p=one) for one in honest])
    said = honest**sharpness
    return Outcomes(targets, said / said.sum(axis=1, keepdims=True))


def table(outcomes: Outcomes, classes: tuple[str, ...], patients: list[str | None] | None = None) -> Predictions:
    names = [str(i) for i in range(len(outcomes))]
    none: list[str | None] = [None] * len(names)
    return Predictions(names, patients or none, none, outcomes.targets, np.log(outcomes.probabilities), classes)


def alone(outcomes: Outcomes) -> Clusters:
    return Clusters.of([None] * len(outcomes), outcomes.targets)


# -- reliability -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.booleans(), st.integers(0, 2**32 - 1))
def test_equal_mass_error_does_not_care_for_the_order_of_the_rows(n: int, ties: bool, seed: int) -> None:
    outcomes = sample(n, 3, seed)
    if ties:
        rough = np.round(outcomes.probabilities * 4) / 4 + 1e-3
        outcomes = Outcomes(outcomes.targets, rough / rough.sum(axis=1, keepdims=True))
    found = METRICS.get("ece_equal_mass")(outcomes)
    shuffled = outcomes.take(np.random.default_rng(seed).permutation(n))
    assert METRICS.get("ece_equal_mass")(shuffled) == pytest.approx(found, abs=1e-12)


def test_bins_are_those_of_scikit_learn() -> None:
    outcomes = sample(500, 4, seed=3)
    rows = reliability_bins(outcomes, np.arange(500))
    correct = outcomes.predicted == outcomes.targets
    accuracy, confidence = calibration_curve(correct, outcomes.probabilities.max(axis=1), n_bins=15)
    assert [row["accuracy"] for row in rows] == pytest.approx(accuracy)
    assert [row["confidence"] for row in rows] == pytest.approx(confidence)
    assert sum(row["n"] for row in rows) == 500
    ece = sum(row["n"] / 500 * abs(row["accuracy"] - row["confidence"]) for row in rows)
    assert METRICS.get("ece")(outcomes) == pytest.approx(ece)
    assert all(row["low"] < row["confidence"] <= row["high"] for row in rows)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (3, 7), (7, 7), (40, 90)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    ends = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx([ends.low, ends.high], abs=1e-12)


def test_eyes_of_a_patient_are_one_observation() -> None:
    outcomes = sample(60, 2, seed=0)
    twice = outcomes.take(np.repeat(np.arange(60), 2))
    once = reliability_bins(outcomes, np.arange(60))
    both = reliability_bins(twice, np.repeat(np.arange(60), 2))
    assert [row["ci"] for row in both] == [row["ci"] for row in once]
    assert [row["n"] for row in both] == [2 * row["n"] for row in once]


def test_error_by_chance_is_what_calibrated_probabilities_show() -> None:
    errors = [METRICS.get("ece")(sample(80, 3, seed)) for seed in range(150)]
    mass = [METRICS.get("ece_equal_mass")(sample(80, 3, seed)) for seed in range(150)]
    chance = error_by_chance(sample(80, 3, seed=999))
    assert chance["ece"] == pytest.approx(np.mean(errors), rel=0.15)
    assert chance["ece_equal_mass"] == pytest.approx(np.mean(mass), rel=0.15)
    assert chance["ece"] > 0.05  # with 80 images, though nothing is wrong


# -- shares and their intervals ----------------------------------------------------------------------------------------


def test_shares_are_counted_and_get_the_intervals_of_the_slow_way() -> None:
    rng = np.random.default_rng(0)
    part, whole = rng.random((50, 3)) < 0.5, rng.random((50, 3)) < 0.7
    whole[:, 2] = False
    counts = rng.integers(0, 4, 50)
    found = shares(part, whole)(counts)
    for column in range(2):
        rows = np.repeat(np.arange(50), counts)
        inside = rows[whole[rows, column]]
        assert found[column] == pytest.approx(part[inside, column].mean())
    assert np.isnan(found[2])

    outcomes = sample(50, 2, seed=1)
    clusters = Clusters.of([str(i // 2) for i in range(50)], outcomes.targets)
    right = (outcomes.predicted == outcomes.targets)[:, None]
    fast = resampled(clusters, {"a": shares(right, np.ones_like(right))}, resamples=200, seed=5)["a"][0]
    slow = intervals(outcomes, clusters, {"a": METRICS.get("accuracy")}, resamples=200, seed=5)["a"]
    assert fast["ci"] == pytest.approx(slow)
    assert fast["value"] == pytest.approx(right.mean())


def test_shares_near_their_ends_have_intervals_worth_the_name() -> None:
    """30 of 30 patients is not certainty; eyes that resemble each other are worth less than as many patients."""
    clusters = Clusters.of([str(i // 2) for i in range(60)], np.zeros(60, dtype=np.int64))
    whole = np.ones((60, 1), dtype=bool)
    found = share_entries(clusters, whole, whole, resamples=50)[0]
    assert found == {"value": 1.0, "ci": pytest.approx(wilson(1.0, 30))}
    alike = np.repeat(np.arange(30) % 3 > 0, 2)[:, None]
    apart = (np.arange(60) % 3 > 0)[:, None]
    one, other = (share_entries(clusters, part, whole, resamples=2000)[0]["ci"] for part in (alike, apart))
    assert one == pytest.approx(wilson(2 / 3, 30), abs=0.01)
    assert other[1] - other[0] < one[1] - one[0]
    assert share_entries(clusters, whole, ~whole, resamples=50) == [{"value": None, "ci": [None, None]}]
    assert share_entries(clusters, whole, whole, resamples=0)[0]["ci"] == [None, None]


# -- operating points --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.sampled_from([50, 90, 95]), st.booleans(), st.integers(0, 2**32 - 1))
def test_thresholds_are_the_best_that_a_search_finds(n: int, percent: int, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.append(rng.random(n) < 0.4, [True, False])
    scores = np.clip(rng.normal(0.4 + 0.2 * truth, 0.2), 0, 1)
    scores = np.round(scores, 1) if ties else scores
    curve = Ranking.of(truth, scores).curve()

    def both(threshold: float) -> tuple[Fraction, Fraction]:
        called = scores >= threshold
        hits, spared = int((called & truth).sum()), int((~called & ~truth).sum())
        return Fraction(hits, int(truth.sum())), Fraction(spared, int((~truth).sum()))

    every = [both(one) for one in [*np.unique(scores), 2.0]]
    wanted = Fraction(percent, 100)
    for target, other in (("specificity", 0), ("sensitivity", 1)):
        best = max((one for one in every if one[1 - other] >= wanted), key=lambda one: (one[other], one[1 - other]))
        found = threshold_for(curve, target, percent)
        if best[0] == 0:
            assert found is None
        else:
            assert found is not None
            assert both(found) == best


def test_questions_follow_the_classes() -> None:
    assert questions(("no", "yes"), graded=False, ordered=True) == {"yes": (1,)}
    assert list(questions(GRADES, graded=True, ordered=True)) == [f"grade >= {k}" for k in (1, 2, 3, 4)]
    assert questions(("0", "1", "2"), graded=False, ordered=True) == {"1 or higher": (1, 2), "2 or higher": (2,)}
    assert questions(("a", "b", "c"), graded=False, ordered=False) == {"a": (0,), "b": (1,), "c": (2,)}
    assert questions([str(k) for k in range(21)], graded=False, ordered=False) == {}


def test_points_are_chosen_here_and_scored_there() -> None:
    here, there = sample(2000, 5, seed=1), sample(600, 5, seed=2)
    points, warnings = choose_points(here, questions(GRADES, graded=True, ordered=True), "val")
    assert [point.name for point in points[2:4]] == ["grade >= 2 at 95% specificity", "grade >= 2 at 95% sensitivity"]
    assert warnings == []
    rows = point_scores(points, there, alone(there), resamples=50)
    for point, row in zip(points, rows, strict=True):
        truth, called = point.is_positive(there.targets), point.called(there.probabilities)
        assert row["sensitivity"]["value"] == pytest.approx((called & truth).sum() / truth.sum())
        assert row["specificity"]["value"] == pytest.approx((~called & ~truth).sum() / (~truth).sum())
        assert row["ppv"]["value"] == pytest.approx(truth[called].mean())
        assert row["npv"]["value"] == pytest.approx((~truth)[~called].mean())
        assert row["positives"] == truth.sum()
        (target,) = point.target
        on_val = point_scores([point], here, alone(here), resamples=0)[0][target]["value"]
        assert on_val >= 0.95
    assert rows[2]["specificity"]["value"] == pytest.approx(0.95, abs=0.04)


def test_points_that_cannot_be_are_named() -> None:
    outcomes = Outcomes(np.array([0, 0, 1]), np.array([[0.2, 0.8], [0.9, 0.1], [0.6, 0.4]]))
    points, warnings = choose_points(outcomes, {"yes": (1,)}, "val")
    assert [list(point.target) for point in points] == [["sensitivity"]]
    assert "no threshold for yes reaches 95% specificity" in warnings[0]
    assert "chosen on 1 positive images" in warnings[1]
    nothing, said = choose_points(outcomes.take([0, 1]), {"yes": (1,)}, "val")
    assert nothing == []
    assert "no image of val is positive" in said[0]


# -- selective prediction ----------------------------------------------------------------------------------------------


def aurc_by_hand(certainty: list[float], wrong: list[bool]) -> float:
    """The mean over every order that the certainties allow."""
    values = []
    for order in itertools.permutations(range(len(wrong))):
        if all(certainty[a] >= certainty[b] for a, b in itertools.pairwise(order)):
            errors = np.cumsum([wrong[i] for i in order])
            values.append(np.mean(errors / np.arange(1, len(order) + 1)))
    return float(np.mean(values))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.booleans()), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders(rows: list[tuple[float, bool]]) -> None:
    certainty, wrong = [row[0] for row in rows], [row[1] for row in rows]
    curve = RiskCoverage(np.array(certainty), np.array(wrong))
    assert curve.aurc() == pytest.approx(aurc_by_hand(certainty, wrong))
    counts = np.arange(len(rows)) % 3
    if counts.sum():
        repeated = RiskCoverage(np.repeat(certainty, counts), np.repeat(wrong, counts))
        assert curve.aurc(counts) == pytest.approx(repeated.aurc())
        some = np.array([0.3, 0.8, 1.0])
        assert curve.risk_at(some, counts) == pytest.approx(repeated.risk_at(some))


def test_selective_scores() -> None:
    outcomes = sample(400, 4, seed=7)
    found = selective_scores(outcomes, alone(outcomes), resamples=100)
    wrong = outcomes.predicted != outcomes.targets
    order = np.argsort(-outcomes.probabilities.max(axis=1))
    assert found["error_at"]["0.8"]["value"] == pytest.approx(wrong[order[:320]].mean())
    assert found["error_at"]["0.9"]["value"] == pytest.approx(wrong[order[:360]].mean())
    assert found["aurc_of_best"] < found["aurc"]["value"] < found["aurc_of_chance"] == pytest.approx(wrong.mean())
    assert found["aurc"]["ci"][0] < found["aurc"]["value"] < found["aurc"]["ci"][1]
    assert found["curve"][-1] == {"coverage": 1.0, "risk": pytest.approx(wrong.mean())}
    assert len(found["curve"]) == 100
    assert len(selective_scores(outcomes.take([0, 1]), alone(outcomes.take([0, 1])), resamples=0)["curve"]) == 2


# -- conformal sets ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.5, 0.8, 0.9]), st.integers(0, 2**32 - 1))
def test_the_quantile_of_single_images_is_the_usual_one(n: int, level: float, seed: int) -> None:
    scores = np.random.default_rng(seed).random(n)
    rank = math.ceil(round(level * (n + 1), 9))
    expected = None if rank > n else np.sort(scores)[rank - 1]
    assert quantile(scores, np.arange(n), level) == expected


def test_a_patient_counts_once() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.9, 0.8])
    patients = np.array([0, 1, 2, 3, 3])
    # Five clusters with the unknown one; 0.6 of them are three: those of 0.1, 0.2 and 0.3.
    assert quantile(scores, patients, 0.6) == 0.3
    assert quantile(scores, patients, 0.7) == 0.8
    assert quantile(scores, patients, 0.8) == 0.9
    assert quantile(scores, patients, 0.81) is None
    assert quantile(scores[:0], patients[:0], 0.5) is None


def two_eyes(patients: int, seed: int) -> tuple[Outcomes, list[str | None]]:
    """Patients with one to three images that resemble each other."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    targets = rng.integers(0, 3, patients)[of]
    logits = 1.5 * np.eye(3)[targets] + 1.5 * rng.normal(size=(patients, 3))[of] + 0.5 * rng.normal(size=(len(of), 3))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Outcomes(targets, shares), [str(i) for i in of]


def test_coverage_is_as_promised_for_new_patients() -> None:
    """Over many validation sets; each realised one scatters. The naive count of images would fall below."""
    covered = []
    for seed in range(150):
        here, patients = two_eyes(40, seed)
        fitted, _ = fit_conformal(here, Clusters.of(patients, here.targets), "val")
        there, others = two_eyes(200, 10_000 + seed)
        hit = fitted.sets(there.probabilities)[np.arange(len(there)), there.targets]
        weight = 1 / np.unique(others, return_counts=True)[1][np.unique(others, return_inverse=True)[1]]
        covered.append((hit * weight).sum() / weight.sum())
    error = np.std(covered) / math.sqrt(len(covered))
    assert np.mean(covered) >= LEVEL - 3 * error
    assert np.mean(covered) < LEVEL + 0.03  # and not by taking in everything


def test_sets_by_class_cover_each_class() -> None:
    here, there = sample(4000, 3, seed=1), sample(4000, 3, seed=2)
    fitted, warnings = fit_conformal(here, alone(here), "val")
    found = conformal_scores(fitted, there, alone(there), ("a", "b", "c"), resamples=50)
    assert warnings == []
    assert found["marginal"]["coverage"]["value"] == pytest.approx(LEVEL, abs=0.02)
    for name, k in (("a", 0), ("b", 1), ("c", 2)):
        assert found["by_class"]["by_class"][name]["value"] == pytest.approx(LEVEL, abs=0.03)
        inside = fitted.sets(there.probabilities, by_class=True)[there.targets == k, k]
        assert found["by_class"]["by_class"][name]["value"] == pytest.approx(inside.mean())
    sizes = fitted.sets(there.probabilities).sum(axis=1)
    assert found["marginal"]["mean_size"] == pytest.approx(sizes.mean())
    assert found["marginal"]["single"] == pytest.approx((sizes == 1).mean())
    assert found["marginal"]["empty"] == pytest.approx((sizes == 0).mean())


def test_a_class_with_too_few_images_is_in_every_set_and_said_so() -> None:
    outcomes = sample(60, 3, seed=0)
    few = outcomes.take(np.append(np.flatnonzero(outcomes.targets != 2), np.flatnonzero(outcomes.targets == 2)[:8]))
    fitted, warnings = fit_conformal(few, alone(few), "val")
    assert fitted.by_class[2] is None
    assert fitted.sets(few.probabilities, by_class=True)[:, 2].all()
    assert "1 class is in every set" in warnings[0]
    assert "9 images of a class" in warnings[0]


# -- all of it ---------------------------------------------------------------------------------------------------------


def test_trust_is_json_with_the_agreed_keys() -> None:
    val, test = table(sample(200, 5, 1, sharpness=2), GRADES), table(sample(300, 5, 2, sharpness=2), GRADES)
    calibration = fit_calibration(val, "val", resamples=50)
    assert calibration is not None
    assert calibration.point("grade >= 2", "specificity") is not None
    assert calibration.point("grade >= 9", "specificity") is None
    found = trust(test, calibration, resamples=50)
    json.dumps(found, allow_nan=False)
    assert found["calibrated_by"]["dataset"] == "val"
    assert set(found) == {
        "calibrated_by",
        "calibrated_metrics",
        "reliability",
        "operating_points",
        "selective",
        "conformal",
    }
    assert tuple(found["calibrated_metrics"]) == JUDGED
    raw = score(test, resamples=0)["metrics"]
    assert found["calibrated_metrics"]["nll"]["value"] < raw["nll"]["value"]
    assert found["calibrated_metrics"]["ece"]["value"] < raw["ece"]["value"]
    assert set(found["reliability"]) == {"before", "after", "by_chance_before", "by_chance_after"}
    assert found["operating_points"][0]["chosen_on"] == "val"
    unlabelled = test.take(np.arange(5))
    blank = Predictions(
        *(unlabelled.images, unlabelled.patients, unlabelled.eyes), np.full(5, -1), unlabelled.logits, GRADES
    )
    assert trust(blank, calibration) == {}
    assert set(trust(test, None, resamples=10)) == {"reliability", "selective"}


def test_one_image_is_enough_for_numbers() -> None:
    calibration = fit_calibration(table(sample(100, 5, 1), GRADES), "val", resamples=20)
    json.dumps(trust(table(sample(1, 5, 3), GRADES), calibration, resamples=20), allow_nan=False)


def test_what_a_file_may_not_say() -> None:
    with pytest.raises(ValueError, match="threshold"):
        OperatingPoint(name="a", positive="a", classes=(1,), threshold=1.5, chosen_on="val", target={})
    with pytest.raises(ValueError, match="level"):
        Conformal(level=1.0, marginal=None, by_class=())


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("calibrated", [True, False])
def test_pictures_are_drawn(rows: int, calibrated: bool, tmp_path: Path) -> None:
    calibration = fit_calibration(table(sample(100, 5, 1), GRADES), "val", resamples=20) if calibrated else None
    test = table(sample(rows, 5, 2), GRADES)
    found = score(test, resamples=0) | trust(test, calibration, resamples=20)
    reliability(found, tmp_path / "a.png", title="one")
    risk_coverage(found["selective"], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
