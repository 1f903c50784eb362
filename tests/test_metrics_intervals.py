"""Intervals: the resampling draws patients, its shortcuts change nothing, and the interval is what it says."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from eyetune.metrics.intervals import Clusters, bias_corrected, difference, intervals
from eyetune.metrics.metric import of_task
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import METRICS, Undefined, generalization, score

GRADES = ("0", "1", "2", "3", "4")


def sample(n: int, k: int, seed: int, *, ties: bool = False) -> Outcomes:
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    logits = rng.normal(size=(n, k)) + np.eye(k)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Outcomes(targets, rng.multinomial(8, probabilities) / 8 if ties else probabilities)


def value(name: str, outcomes: Outcomes) -> float | None:
    try:
        return METRICS.get(name)(outcomes)
    except Undefined:
        return None


@pytest.mark.parametrize("name", of_task("classification"))
@pytest.mark.parametrize("ties", [False, True])
def test_a_resample_scores_as_its_images_written_out(name: str, ties: bool) -> None:
    k = 5 if METRICS.get(name).scope == "graded" else 3
    base = sample(60, k, seed=1, ties=ties)
    rng = np.random.default_rng(2)
    for _ in range(20):
        counts = np.bincount(rng.integers(0, 60, 60), minlength=60)
        written_out = Outcomes(*(np.repeat(part, counts, axis=0) for part in (base.targets, base.probabilities)))
        assert value(name, base.drawn(counts)) == pytest.approx(value(name, written_out), abs=1e-12)


def test_a_resample_may_lose_a_class() -> None:
    base = sample(30, 3, seed=0)
    counts = np.where(base.targets == 2, 0, 1)
    assert value("auroc_macro", base.drawn(counts)) == value("auroc_macro", base.take(base.targets != 2))
    assert value("referable_auroc", sample(30, 5, seed=0).drawn(np.zeros(30, dtype=np.int64))) is None


def test_patients_are_drawn_whole_and_each_class_keeps_its_number() -> None:
    patients = ["a", "a", "b", "c", "c", None, "d", None]
    targets = np.array([0, 1, 0, 1, 1, 0, 0, 1])
    clusters = Clusters.of(patients, targets)
    assert clusters.unit == "patient"
    # Highest class: 1 of a, c and the last image; 0 of b, d and the sixth.
    of = clusters.of_image
    assert len(set(of.tolist())) == 6
    seen = set()
    for counts in clusters.draws(200, seed=0):
        assert counts[0] == counts[1]
        assert counts[3] == counts[4]
        by_cluster = dict(zip(of.tolist(), counts.tolist(), strict=True))
        assert sum(by_cluster[of[i]] for i in (0, 3, 7)) == 3
        assert sum(by_cluster[of[i]] for i in (2, 5, 6)) == 3
        seen.add(tuple(counts.tolist()))
    assert len(seen) > 50
    assert Clusters.of([None, None], np.array([0, 1])).unit == "image"


def test_fellow_eyes_add_no_certainty() -> None:
    """Every image twice under one patient: an interval by patient stays, one by image shrinks by the root of two."""
    once = sample(150, 3, seed=3)
    twice = Outcomes(np.repeat(once.targets, 2), np.repeat(once.probabilities, 2, axis=0))
    single = [str(i) for i in range(150)]
    pairs = [str(i // 2) for i in range(300)]
    accuracy = {"accuracy": METRICS.get("accuracy")}

    def width(outcomes: Outcomes, patients: list[str | None]) -> float:
        found = intervals(outcomes, Clusters.of(patients, outcomes.targets), accuracy, resamples=1500)["accuracy"]
        assert found is not None
        return found[1] - found[0]

    plain = width(once, list(single))
    assert width(twice, list(pairs)) == pytest.approx(plain, rel=0.1)
    assert width(twice, [None] * 300) == pytest.approx(plain / np.sqrt(2), rel=0.1)


def test_every_metric_of_a_table_has_its_interval() -> None:
    base = sample(120, 5, seed=4)
    table = Predictions(
        images=[f"{i}.png" for i in range(120)],
        patients=[str(i // 2) for i in range(120)],
        eyes=[None] * 120,
        targets=base.targets,
        logits=np.log(base.probabilities),
        classes=GRADES,
    )
    found = score(table, resamples=300)
    again = score(table, resamples=300)
    assert found == again
    assert found["metrics"] != score(table, resamples=300, seed=1)["metrics"]
    assert found["intervals"] == {
        "level": 0.95,
        "method": "bias-corrected percentile bootstrap, stratified by class",
        "allowing_for_bias": ["auprc_macro", "ece", "ece_equal_mass"],
        "unit": "patient",
        "resamples": 300,
        "seed": 0,
    }
    for name, entry in found["metrics"].items():
        low, high = entry["ci"]
        assert METRICS.get(name).low <= low < high <= METRICS.get(name).high
        assert low <= entry["value"] <= high
    none = score(table, resamples=0)
    assert "intervals" not in none
    assert Counter(str(entry["ci"]) for entry in none["metrics"].values()) == {"[None, None]": len(none["metrics"])}


def test_a_gap_has_the_interval_of_a_difference() -> None:
    """Against the obvious way: both sides resampled, the differences sorted."""
    rng = np.random.default_rng(0)
    first, second = rng.binomial(1, 0.9, 300), rng.binomial(1, 0.7, 200)
    means = [rng.choice(side, (4000, len(side))).mean(axis=1) for side in (first, second)]
    each = [bias_corrected(side, value.mean()) for side, value in zip(means, (first, second), strict=True)]
    assert each[0] is not None
    assert each[1] is not None
    found = difference(first.mean(), each[0], second.mean(), each[1])
    assert found == pytest.approx(np.percentile(means[0] - means[1], [2.5, 97.5]), abs=0.01)


def test_gaps_are_positive_when_outside_is_worse_and_so_are_their_intervals() -> None:
    inside = {"metrics": {name: {"value": 0.9, "ci": [0.8, 0.95]} for name in ("qwk", "brier")}}
    outside = {"metrics": {name: {"value": 0.6, "ci": [0.5, 0.7]} for name in ("qwk", "brier")}}
    gaps = generalization("test", {"test": inside, "far": outside})["external"]["far"]
    low, high = gaps["qwk"]["ci"]
    assert (low, high) == pytest.approx((0.3 - np.hypot(0.1, 0.1), 0.3 + np.hypot(0.05, 0.1)))
    assert gaps["brier"]["value"] == pytest.approx(-0.3)
    assert gaps["brier"]["ci"] == pytest.approx([-high, -low])


def test_too_few_values_make_no_interval() -> None:
    assert bias_corrected(np.array([1.0] * 90 + [np.nan] * 10), 1.0) is None
    assert bias_corrected(np.array([1.0] * 96 + [np.nan] * 4), 1.0) == [1.0, 1.0]


def test_the_bias_of_resampling_is_taken_out() -> None:
    """Against Efron's formula written out by hand, for resamples of which 30% lie below the estimate."""
    values = np.arange(1, 1001) / 1000
    low, high = bias_corrected(values, 0.3005) or (0, 0)
    z0 = -0.5244  # the normal distribution has 30% below
    assert low == pytest.approx(below_normal(2 * z0 - 1.96), abs=0.002)
    assert high == pytest.approx(below_normal(2 * z0 + 1.96), abs=0.002)
    # Without bias: the plain percentiles.
    assert bias_corrected(values, 0.5005) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.001)


def below_normal(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
