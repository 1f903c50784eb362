"""Paired comparisons against slow, obvious references, a published example, and what must be so."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eyetune.metrics.intervals import Clusters, bias_corrected
from eyetune.metrics.labels import LabelOutcomes
from eyetune.metrics.metric import of_task
from eyetune.metrics.outcomes import Counted, Outcomes
from eyetune.metrics.paired import (
    area_columns,
    areas,
    delong,
    holm,
    permutation,
    placements,
    resampled_means,
)
from eyetune.metrics.scores import METRICS, Undefined
from eyetune.metrics.values import ValueOutcomes

QWK = METRICS.get("qwk")


def outcomes(rng: np.random.Generator, targets: NDArray[np.int64], classes: int, skill: float) -> Outcomes:
    """What a model of this skill says, rounded so that scores tie."""
    logits = rng.normal(size=(len(targets), classes)) + skill * np.eye(classes)[targets]
    shares = np.exp(np.round(logits, 1))
    return Outcomes(targets, shares / shares.sum(axis=1, keepdims=True))


def by_patient(rng: np.random.Generator, images: int, patients: int, targets: NDArray[np.int64]) -> Clusters:
    return Clusters.of([f"p{n}" for n in rng.integers(0, patients, images)], targets)


# --- DeLong -------------------------------------------------------------------------------------------------------


def slow_placements(positives: list[float], negatives: list[float]) -> tuple[list[float], list[float]]:
    """Every positive against every negative."""

    def beats(x: float, y: float) -> float:
        return 1.0 if x > y else 0.5 if x == y else 0.0

    above = [sum(beats(x, y) for y in negatives) / len(negatives) for x in positives]
    below = [sum(beats(x, y) for x in positives) / len(positives) for y in negatives]
    return above, below


def slow_covariance(positive: list[bool], first: list[float], second: list[float]) -> float:
    """DeLong, DeLong and Clarke-Pearson (1988), equations 4 to 6, sum by sum."""
    found = []
    for scores in (first, second):
        above, below = slow_placements(
            [s for s, is_one in zip(scores, positive, strict=True) if is_one],
            [s for s, is_one in zip(scores, positive, strict=True) if not is_one],
        )
        found.append((above, below, sum(above) / len(above)))
    total = 0.0
    for side in (0, 1):
        one, other = found[0][side], found[1][side]
        products = [(a - found[0][2]) * (b - found[1][2]) for a, b in zip(one, other, strict=True)]
        total += sum(products) / (len(products) - 1) / len(products)
    return total


def slow_obuchowski(positive: list[bool], scores: list[float], patients: list[int]) -> float:
    """Obuchowski (1997): sums over patients of what their positives and negatives deviate, and of both together."""
    above, below = slow_placements(
        [s for s, is_one in zip(scores, positive, strict=True) if is_one],
        [s for s, is_one in zip(scores, positive, strict=True) if not is_one],
    )
    theta = sum(above) / len(above)
    m, n = len(above), len(below)
    x, y = dict.fromkeys(patients, 0.0), dict.fromkeys(patients, 0.0)
    with_x, with_y = set(), set()
    ups, downs = iter(above), iter(below)
    for patient, is_one in zip(patients, positive, strict=True):
        if is_one:
            x[patient] += next(ups) - theta
            with_x.add(patient)
        else:
            y[patient] += next(downs) - theta
            with_y.add(patient)
    s10 = len(with_x) / ((len(with_x) - 1) * m) * sum(v * v for v in x.values())
    s01 = len(with_y) / ((len(with_y) - 1) * n) * sum(v * v for v in y.values())
    s11 = len(x) / (len(x) - 1) * sum(x[p] * y[p] for p in x)
    return s10 / m + s01 / n + 2 * s11 / (m * n)


scores_with_ties = st.lists(
    st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), min_size=6, max_size=30
).filter(lambda rows: 2 <= sum(row[0] for row in rows) <= len(rows) - 2)


@settings(max_examples=60, deadline=None)
@given(scores_with_ties)
def test_areas_are_delongs(rows: list[tuple[bool, int, int, int]]) -> None:
    truth = [row[0] for row in rows]
    models = [[float(row[place]) for row in rows] for place in (1, 2)]
    found = areas(np.array([truth, truth]), np.array(models))
    for place, scores in enumerate(models):
        pairs = list(zip(scores, truth, strict=True))
        above, _ = slow_placements([s for s, t in pairs if t], [s for s, t in pairs if not t])
        assert found.values[place] == pytest.approx(sum(above) / len(above), abs=1e-12)
    for i, j in itertools.product((0, 1), repeat=2):
        assert found.covariance[i, j] == pytest.approx(slow_covariance(truth, models[i], models[j]), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(scores_with_ties)
def test_areas_of_patients_are_obuchowskis(rows: list[tuple[bool, int, int, int]]) -> None:
    truth, scores = [row[0] for row in rows], [float(row[1]) for row in rows]
    patients = [row[3] for row in rows]
    if min(len({p for p, t in zip(patients, truth, strict=True) if t is side}) for side in (True, False)) < 2:
        return
    number = {patient: place for place, patient in enumerate(dict.fromkeys(patients))}
    found = areas(np.array([truth]), np.array([scores]), np.array([number[p] for p in patients]))
    assert found.covariance[0, 0] == pytest.approx(slow_obuchowski(truth, scores, patients), abs=1e-12)


def test_a_published_example() -> None:
    """109 CT images rated 1 to 5 (Hanley and McNeil, Radiology 143, 1982, table I). Area 0.893 there; Stata's manual
    (entry roctab, the same data) has 0.8932 and by DeLong the standard error 0.0307, interval 0.8330 to 0.9534."""
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    scores = np.repeat([1.0, 2, 3, 4, 5, 1, 2, 3, 4, 5], normal + abnormal)
    truth = np.repeat([False, True], [sum(normal), sum(abnormal)])
    found = areas(truth[None], scores[None])
    value, error = found.values[0], math.sqrt(found.covariance[0, 0])
    assert round(value, 4) == 0.8932
    assert round(error, 4) == 0.0307
    assert [round(value - 1.959964 * error, 4), round(value + 1.959964 * error, 4)] == [0.8330, 0.9534]


def test_placements_are_the_area() -> None:
    above, below = placements(np.array([3.0, 1, 2]), np.array([2.0, 0]))
    np.testing.assert_allclose(above, [1, 0.5, 0.75])
    np.testing.assert_allclose(below, [(1 + 0 + 0.5) / 3, 1])


def test_one_patient_alone_says_nothing_of_others() -> None:
    truth = np.array([True, True, False, False])
    found = areas(truth[None], np.array([[0.9, 0.2, 0.3, 0.1]]), np.array([0, 0, 1, 2]))
    assert math.isnan(found.covariance[0, 0])
    assert math.isnan(found.combined(np.array([1.0]))[1])
    model = Outcomes(truth.astype(np.int64), np.array([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3], [0.9, 0.1]]))
    told = delong([model], [model], "auroc_macro", Clusters.of(["a", "a", "b", "c"], model.targets))
    assert (told.p, told.reason) == (None, "the positives, or the negatives, are all of one patient")
    with pytest.raises(Undefined):
        areas(np.array([[True, True]]), np.array([[0.1, 0.2]]))


def test_the_mean_over_classes_is_the_metric() -> None:
    rng = np.random.default_rng(1)
    for classes, metric in ((2, "auroc_macro"), (5, "auroc_macro"), (5, "referable_auroc")):
        model = outcomes(rng, rng.integers(0, classes, 80), classes, 1.0)
        columns = area_columns(model, metric)
        found = areas(columns.positive, columns.scores)
        assert found.values.mean() == pytest.approx(METRICS.get(metric)(model), abs=1e-12)


def test_delong_of_classes_and_seeds_is_the_bootstraps() -> None:
    """Five classes, two seeds, patients of several images: the spread of the difference by another way."""
    rng = np.random.default_rng(2)
    targets = rng.integers(0, 5, 600)
    clusters = by_patient(rng, 600, 200, targets)
    first = [outcomes(rng, targets, 5, 1.0) for _ in range(2)]
    second = [outcomes(rng, targets, 5, 0.8) for _ in range(2)]
    found = delong(first, second, "auroc_macro", clusters)
    assert found.ci is not None
    drawn = resampled_means({"a": first, "b": second}, clusters, METRICS.get("auroc_macro"), resamples=300)
    spread = float(np.std(drawn["a"] - drawn["b"]))
    assert (found.ci[1] - found.ci[0]) / 2 / 1.96 == pytest.approx(spread, rel=0.15)


def labels(rng: np.random.Generator, targets: NDArray[np.int64], skill: float) -> LabelOutcomes:
    """What a model of this skill says of labels, some of them not known."""
    logits = np.round(rng.normal(size=targets.shape) + skill * (targets == 1), 1)
    return LabelOutcomes(targets, 1 / (1 + np.exp(-logits)))


def test_areas_of_labels_leave_out_what_is_not_known() -> None:
    """Each label alone, on the images where it is known, is DeLong's of two classes; the mean is the metric."""
    rng = np.random.default_rng(21)
    targets = rng.integers(-1, 2, (60, 3))
    targets[:, 2] = np.where(targets[:, 2] == 1, 0, targets[:, 2])  # a label nobody has is no curve
    model = labels(rng, targets, 1.0)
    clusters = by_patient(rng, 60, 25, np.zeros(60, dtype=np.int64))
    columns = area_columns(model, "auroc_macro")
    found = areas(columns.positive, columns.scores, clusters.of_image, columns.known)
    assert found.values.mean() == pytest.approx(METRICS.get("auroc_macro")(model), abs=1e-12)
    assert len(found.values) == 2
    for k in range(2):
        known = targets[:, k] >= 0
        truth, scores = (targets[known, k] == 1).tolist(), model.probabilities[known, k].tolist()
        patients = clusters.of_image[known].tolist()
        assert found.covariance[k, k] == pytest.approx(slow_obuchowski(truth, scores, patients), abs=1e-12)


def test_delong_of_labels_is_the_bootstraps() -> None:
    rng = np.random.default_rng(22)
    targets = rng.integers(-1, 2, (500, 2))
    clusters = by_patient(rng, 500, 180, np.zeros(500, dtype=np.int64))
    first, second = labels(rng, targets, 1.0), labels(rng, targets, 0.8)
    found = delong([first], [second], "auroc_macro", clusters)
    assert found.ci is not None
    drawn = resampled_means({"a": [first], "b": [second]}, clusters, METRICS.get("auroc_macro"), resamples=300)
    spread = float(np.std(drawn["a"] - drawn["b"]))
    assert (found.ci[1] - found.ci[0]) / 2 / 1.96 == pytest.approx(spread, rel=0.15)


def test_delong_of_a_model_with_itself() -> None:
    rng = np.random.default_rng(3)
    model = outcomes(rng, rng.integers(0, 2, 50), 2, 1.0)
    found = delong([model], [model], "auroc_macro")
    assert (found.difference, found.p) == (0.0, 1.0)


# --- permutation --------------------------------------------------------------------------------------------------


def slow_permutation(first: list[Outcomes], second: list[Outcomes], clusters: Clusters, metric: str) -> float:
    """Every exchange of every patient, with the metric computed anew."""
    score = METRICS.get(metric)

    def difference(exchanged: tuple[bool, ...]) -> float:
        total = 0.0
        for one, other in zip(first, second, strict=True):
            rows = [exchanged[patient] for patient in clusters.of_image.tolist()]
            a = [(other if e else one).probabilities[row] for row, e in enumerate(rows)]
            b = [(one if e else other).probabilities[row] for row, e in enumerate(rows)]
            total += score(Outcomes(one.targets, np.array(a))) - score(Outcomes(one.targets, np.array(b)))
        return total / len(first)

    patients = int(clusters.of_image.max()) + 1
    observed = abs(difference((False,) * patients))
    every = [difference(signs) for signs in itertools.product((False, True), repeat=patients)]
    return sum(abs(value) >= observed - 1e-12 for value in every) / len(every)


@pytest.mark.parametrize("metric", ["qwk", "auroc_macro", "f1_macro"])
def test_few_patients_are_exchanged_in_every_way(metric: str) -> None:
    rng = np.random.default_rng(5)
    targets = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 0])
    clusters = Clusters.of(["a", "a", "b", "b", "c", "c", "d", "e", "e", "f", None, None], targets)
    first = [outcomes(rng, targets, 3, 2.0) for _ in range(2)]
    second = [outcomes(rng, targets, 3, 0.5) for _ in range(2)]
    found = permutation(first, second, METRICS.get(metric), clusters)
    assert found.exact
    assert found.p == pytest.approx(slow_permutation(first, second, clusters, metric), abs=1e-12)


@pytest.mark.parametrize("task", ["numbers", "labels"])
def test_patients_are_exchanged_whatever_the_task(task: str) -> None:
    rng = np.random.default_rng(23)
    patients = ["a", "a", "b", "b", "c", "d", "d", "e", None]
    clusters = Clusters.of(patients, np.zeros(9, dtype=np.int64))
    if task == "numbers":
        name, truth = "mae", rng.normal(size=9)
        first, second = (ValueOutcomes(truth, truth + rng.normal(size=9) * spread) for spread in (0.5, 2.0))
    else:
        name, targets = "hamming_loss", rng.integers(-1, 2, (9, 2))
        first, second = (labels(rng, targets, skill) for skill in (2.0, -1.0))
    metric = METRICS.get(name)
    found = permutation([first], [second], metric, clusters)
    each = [
        metric(first.where(rows, second)) - metric(second.where(rows, first))
        for signs in itertools.product((False, True), repeat=6)
        if (rows := np.array(signs)[clusters.of_image]) is not None
    ]
    assert found.exact
    assert found.difference == metric(first) - metric(second)
    assert found.p == sum(abs(one) >= abs(found.difference) - 1e-12 for one in each) / 64


def test_many_patients_are_exchanged_at_random() -> None:
    """The p-value of random exchanges is near that of all, never 0, and the same for the same seed."""
    rng = np.random.default_rng(6)
    targets = rng.integers(0, 3, 13)
    clusters = Clusters.of([None] * 13, targets)
    first, second = outcomes(rng, targets, 3, 1.5), outcomes(rng, targets, 3, 0.2)
    every = permutation([first], [second], QWK, clusters, exchanges=2**13)
    some = permutation([first], [second], QWK, clusters, exchanges=400, seed=4)
    assert every.exact
    assert not some.exact
    assert every.p is not None
    assert some.p is not None
    assert some.p == pytest.approx(every.p, abs=4 * math.sqrt(every.p * (1 - every.p) / 400))
    assert some == permutation([first], [second], QWK, clusters, exchanges=400, seed=4)
    better = outcomes(rng, rng.integers(0, 3, 300), 3, 9.0)
    worse = outcomes(rng, better.targets, 3, 0.0)
    none = permutation([better], [worse], QWK, Clusters.of([None] * 300, better.targets), exchanges=199)
    assert none.p == 1 / 200


def test_a_model_is_no_better_than_itself() -> None:
    rng = np.random.default_rng(7)
    model = outcomes(rng, rng.integers(0, 3, 40), 3, 1.0)
    found = permutation([model], [model], QWK, Clusters.of([None] * 40, model.targets))
    assert (found.difference, found.p, found.exact) == (0.0, 1.0, True)


def test_counts_are_enough_for_metrics_of_the_predicted_class() -> None:
    rng = np.random.default_rng(8)
    model = outcomes(rng, rng.integers(0, 5, 60), 5, 1.0)
    counted = Counted.counting(model.confusion)
    for name, metric in of_task("classification").items():
        if metric.uses == "predicted":
            assert metric(counted) == pytest.approx(metric(model), abs=1e-12), name


def test_clustering_is_heeded() -> None:
    """The same images, as patients of their own or as eyes of ten patients that agree: less is known then."""
    rng = np.random.default_rng(9)
    targets = np.repeat(rng.integers(0, 2, 30), 6)
    first, second = (outcomes(rng, targets[::6], 2, skill) for skill in (2.0, 0.6))
    first, second = (Outcomes(targets, np.repeat(one.probabilities, 6, axis=0)) for one in (first, second))
    apart, together = Clusters.of([None] * 180, targets), Clusters.of([str(n // 6) for n in range(180)], targets)
    for test in (
        lambda clusters: delong([first], [second], "auroc_macro", clusters).p,
        lambda clusters: permutation([first], [second], QWK, clusters, exchanges=999).p,
    ):
        assert test(together) > 2 * test(apart)


# --- the rest -----------------------------------------------------------------------------------------------------


def test_holm() -> None:
    """By hand: 0.01 * 4, 0.02 * 3 (not below the one before), 0.03 * 2, 0.5 * 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, None, 0.04]) == [0.08, None, 0.08]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_the_steps_of_1979_do(values: list[float]) -> None:
    rejected, going = set(), True
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        going = going and values[place] * (len(values) - rank) <= 0.05
        if going:
            rejected.add(place)
    assert {place for place, p in enumerate(holm(values)) if p is not None and p <= 0.05} == rejected


def test_resampled_patients_are_the_same_for_every_model() -> None:
    rng = np.random.default_rng(10)
    targets = rng.integers(0, 3, 60)
    clusters = by_patient(rng, 60, 30, targets)
    first, second = outcomes(rng, targets, 3, 1.0), outcomes(rng, targets, 3, 0.5)
    drawn = resampled_means({"a": [first], "b": [first, second], "c": [second]}, clusters, QWK, resamples=50, seed=1)
    np.testing.assert_allclose(drawn["b"], (drawn["a"] + drawn["c"]) / 2)
    alone = resampled_means({"c": [second]}, clusters, QWK, resamples=50, seed=1)
    np.testing.assert_array_equal(alone["c"], drawn["c"])
    interval = bias_corrected(drawn["a"] - drawn["a"], 0.0)
    assert interval == [0.0, 0.0]


def test_what_a_head_calls_is_exchanged_too() -> None:
    """Two models of the same probabilities that call otherwise, as heads for grades do: quick and slow way agree."""
    rng = np.random.default_rng(11)
    targets = rng.integers(0, 3, 14)
    shares = outcomes(rng, targets, 3, 0.5).probabilities
    first = Outcomes(targets, shares, calls=targets.copy())
    second = Outcomes(targets, shares)
    clusters = Clusters.of([None] * 14, targets)
    found = permutation([first], [second], QWK, clusters)
    slow = permutation([first], [second], replace(QWK, uses="probabilities"), clusters)
    assert found.difference > 0
    assert found == slow
