"""Metrics of labels and of numbers: the contract of every metric, and agreement with scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from eyetune.metrics.labels import LabelOutcomes, rarest_label
from eyetune.metrics.metric import METRICS, Undefined, of_task
from eyetune.metrics.predictions import LabelPredictions, ValuePredictions
from eyetune.metrics.scores import generalization, score
from eyetune.metrics.values import ValueOutcomes

LABELS, VALUES = of_task("multilabel"), of_task("regression")


def labels(n: int, width: int, seed: int, *, ties: bool = False, skill: float = 1.0, gaps: float = 0.0) -> Any:
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, width)) < np.linspace(0.2, 0.5, width)).astype(np.int64)
    targets[0], targets[1] = 0, 1  # every label has both sides
    logits = rng.normal(size=(n, width)) + skill * (2 * targets - 1)
    probabilities = 1 / (1 + np.exp(-logits))
    unknown = rng.random((n, width)) < gaps
    unknown[:2] = False
    return LabelOutcomes(np.where(unknown, -1, targets), np.round(probabilities, 1) if ties else probabilities)


def values(n: int, seed: int, *, ties: bool = False, skill: float = 1.0) -> ValueOutcomes:
    rng = np.random.default_rng(seed)
    truth = rng.normal(50, 10, n)
    said = 50 + skill * (truth - 50) + rng.normal(1, 5, n)
    return ValueOutcomes(*(np.round(side, -1) for side in (truth, said))) if ties else ValueOutcomes(truth, said)


def sample(name: str, seed: int, *, n: int = 60, ties: bool = False, skill: float = 1.0) -> Any:
    if name in VALUES:
        return values(n, seed, ties=ties, skill=skill)
    return labels(n, 3, seed, ties=ties, skill=skill, gaps=0.1 if ties else 0.0)


@pytest.mark.parametrize("name", [*LABELS, *VALUES])
def test_in_range_and_blind_to_order(name: str) -> None:
    entry = METRICS.get(name)
    for seed in range(6):
        one = sample(name, seed, ties=seed % 2 == 1)
        value = entry(one)
        assert entry.low <= value <= entry.high
        shuffled = one.take(np.random.default_rng(seed).permutation(60))
        assert entry(shuffled) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", [*LABELS, *VALUES])
def test_perfect_beats_skilled_beats_chance(name: str) -> None:
    entry = METRICS.get(name)
    if entry.descriptive:
        return
    skilled, chance = sample(name, 1, n=1000, skill=2 if name in LABELS else 1), sample(name, 1, n=1000, skill=0)
    perfect: Any = (
        ValueOutcomes(skilled.targets, skilled.targets)
        if name in VALUES
        else LabelOutcomes(skilled.targets, skilled.targets * 0.9 + 0.05)
    )
    best = entry.high if entry.higher_is_better else entry.low
    assert entry(perfect) == pytest.approx(best, abs=1e-12)
    sign = 1 if entry.higher_is_better else -1
    assert sign * entry(skilled) > sign * entry(chance) + 0.02


@pytest.mark.parametrize("name", [*LABELS, *VALUES])
def test_a_resample_scores_as_its_images_written_out(name: str) -> None:
    rng = np.random.default_rng(5)
    for ties in (False, True):
        base = sample(name, 3, ties=ties)
        counts = np.bincount(rng.integers(0, 60, 60), minlength=60)
        written_out = base.take(np.repeat(np.arange(60), counts))
        assert METRICS.get(name)(base.drawn(counts)) == pytest.approx(METRICS.get(name)(written_out), abs=1e-12)


REFERENCES: dict[str, Callable[[Any], float]] = {
    "mae": lambda o: sk.mean_absolute_error(o.targets, o.predicted),
    "rmse": lambda o: sk.root_mean_squared_error(o.targets, o.predicted),
    "r2": lambda o: sk.r2_score(o.targets, o.predicted),
    "pearson": lambda o: scipy.stats.pearsonr(o.targets, o.predicted).statistic,
    "spearman": lambda o: scipy.stats.spearmanr(o.targets, o.predicted).statistic,
    "bias": lambda o: np.mean(o.predicted) - np.mean(o.targets),
    "loa_low": lambda o: np.mean(o.predicted - o.targets) - 1.96 * np.std(o.predicted - o.targets, ddof=1),
    "loa_high": lambda o: np.mean(o.predicted - o.targets) + 1.96 * np.std(o.predicted - o.targets, ddof=1),
    # Lin's other form: correlation times how far scale and place differ.
    "ccc": lambda o: (
        scipy.stats.pearsonr(o.targets, o.predicted).statistic
        * 2
        / (
            np.std(o.targets) / np.std(o.predicted)
            + np.std(o.predicted) / np.std(o.targets)
            + (np.mean(o.targets) - np.mean(o.predicted)) ** 2 / (np.std(o.targets) * np.std(o.predicted))
        )
    ),
    "auroc_macro": lambda o: sk.roc_auc_score(o.targets, o.probabilities, average="macro"),
    "auroc_micro": lambda o: sk.roc_auc_score(o.targets, o.probabilities, average="micro"),
    "auprc_macro": lambda o: sk.average_precision_score(o.targets, o.probabilities, average="macro"),
    "auprc_micro": lambda o: sk.average_precision_score(o.targets, o.probabilities, average="micro"),
    "f1_macro": lambda o: sk.f1_score(o.targets, o.probabilities > 0.5, average="macro"),
    "f1_micro": lambda o: sk.f1_score(o.targets, o.probabilities > 0.5, average="micro"),
    "precision_macro": lambda o: sk.precision_score(o.targets, o.probabilities > 0.5, average="macro", zero_division=0),
    "recall_macro": lambda o: sk.recall_score(o.targets, o.probabilities > 0.5, average="macro"),
    "exact_match": lambda o: sk.accuracy_score(o.targets, o.probabilities > 0.5),
    "hamming_loss": lambda o: sk.hamming_loss(o.targets, o.probabilities > 0.5),
}


@pytest.mark.parametrize("name", [*LABELS, *VALUES])
def test_agrees_with_scikit_learn_and_scipy(name: str) -> None:
    for seed in range(8):
        for n in (30, 300):
            one = values(n, seed, ties=seed % 2 == 1) if name in VALUES else labels(n, 4, seed, ties=seed % 2 == 1)
            assert METRICS.get(name)(one) == pytest.approx(REFERENCES[name](one), abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=12),
    st.sampled_from([1e-9, 1.0, 1e12]),
)
@settings(max_examples=60, deadline=None)
def test_numbers_of_any_size_and_with_ties(pairs: list[tuple[int, int]], unit: float) -> None:
    x, y = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    one, large = ValueOutcomes(x, y), ValueOutcomes(x * unit, y * unit)
    for name in ("r2", "pearson", "spearman", "ccc"):
        expected = METRICS.get(name).or_none(one)
        found = METRICS.get(name).or_none(large)
        assert (found is None) == (expected is None)
        assert found is None or found == pytest.approx(expected, abs=1e-9)


def test_numbers_without_a_value() -> None:
    same, other = np.full(4, 0.1), np.array([0.1, 0.2, 0.3, 0.4])
    for name in ("r2", "pearson", "spearman"):
        with pytest.raises(Undefined):
            METRICS.get(name)(ValueOutcomes(same, other))
    with pytest.raises(Undefined):
        METRICS.get("ccc")(ValueOutcomes(same, same))
    with pytest.raises(Undefined):
        METRICS.get("loa_low")(ValueOutcomes(same[:1], same[:1]))
    assert METRICS.get("ccc")(ValueOutcomes(same, other)) == pytest.approx(0)


def test_unknown_cells_count_nowhere() -> None:
    """Leaving a cell open gives what scikit-learn says of the cells that are left, label by label."""
    one = labels(200, 3, 4, gaps=0.3)
    known = one.targets >= 0
    expected = [sk.roc_auc_score(one.targets[k, j], one.probabilities[k, j]) for j, k in enumerate(known.T)]
    assert METRICS.get("auroc_macro")(one) == pytest.approx(np.mean(expected), abs=1e-12)
    pooled = sk.average_precision_score(one.targets[known], one.probabilities[known])
    assert METRICS.get("auprc_micro")(one) == pytest.approx(pooled, abs=1e-12)
    wrong = (one.probabilities > 0.5) != (one.targets == 1)
    assert METRICS.get("hamming_loss")(one) == pytest.approx(wrong[known].mean(), abs=1e-12)
    whole = known.all(axis=1)
    assert METRICS.get("exact_match")(one) == pytest.approx((~wrong[whole].any(axis=1)).mean(), abs=1e-12)


def table_of_labels(one: LabelOutcomes, patients: list[str | None] | None = None) -> LabelPredictions:
    n, width = one.targets.shape
    logits = np.log(one.probabilities / (1 - one.probabilities))
    names = [f"{i}.png" for i in range(n)]
    return LabelPredictions(names, patients or names, [None] * n, one.targets, logits, [f"l{k}" for k in range(width)])


def test_scores_of_labels() -> None:
    one = labels(120, 3, 7, gaps=0.1)
    one.targets[5] = -1
    one.targets[one.targets[:, 2] == 1, 2] = 0  # nobody has the last one
    found = score(table_of_labels(one), resamples=60)
    assert (found["task"], found["n"], found["unlabelled"], found["labels"]) == (
        "multilabel",
        119,
        1,
        ["l0", "l1", "l2"],
    )
    assert set(found["metrics"]) == set(LABELS)
    assert "leaves out labels without examples: l2" in found["metrics"]["f1_macro"]["note"]
    low, high = found["metrics"]["auroc_macro"]["ci"]
    assert low < found["metrics"]["auroc_macro"]["value"] < high
    assert found["intervals"]["unit"] == "patient"
    alone = found["per_label"]["l0"]
    assert alone["classes"] == ["no l0", "l0"]
    assert alone["n"] == int((one.targets[:, 0] >= 0).sum())
    mean = np.mean([found["per_label"][name]["metrics"]["auroc_macro"]["value"] for name in ("l0", "l1")])
    assert found["metrics"]["auroc_macro"]["value"] == pytest.approx(mean, abs=1e-12)
    assert found["per_label"]["l2"]["metrics"]["auroc_macro"]["value"] is None


def table_of_values(one: ValueOutcomes, patients: list[str | None] | None = None) -> ValuePredictions:
    names = [f"{i}.png" for i in range(len(one))]
    return ValuePredictions(names, patients or names, [None] * len(one), one.targets, one.predicted, "age")


def test_scores_of_numbers() -> None:
    found = score(table_of_values(values(100, 3)), resamples=200)
    assert (found["task"], found["target"], found["n"]) == ("regression", "age", 100)
    assert set(found["metrics"]) == set(VALUES)
    for entry in found["metrics"].values():
        assert entry["ci"][0] < entry["value"] < entry["ci"][1]
    # The interval of the bias is that of a mean: 1.96 standard errors to either side.
    errors = values(100, 3).errors
    low, high = found["metrics"]["bias"]["ci"]
    assert high - low == pytest.approx(2 * 1.96 * errors.std(ddof=1) / 10, rel=0.2)


def test_fellow_eyes_are_drawn_together() -> None:
    """Two copies of every eye under one patient tell no more than one: the interval is as wide."""
    one = values(60, 2)
    twice = ValueOutcomes(np.repeat(one.targets, 2), np.repeat(one.predicted, 2))
    patients: list[str | None] = [str(i // 2) for i in range(120)]
    single = score(table_of_values(one), resamples=300)["metrics"]["mae"]
    both = score(table_of_values(twice, patients), resamples=300)["metrics"]["mae"]
    assert both["value"] == pytest.approx(single["value"])
    assert both["ci"] == pytest.approx(single["ci"], rel=0.05)


def test_gaps_between_datasets_leave_out_what_only_describes() -> None:
    scores = {name: score(table_of_values(values(80, 4, skill=s)), resamples=50) for name, s in (("test", 1), ("b", 0))}
    gaps = generalization("test", scores)["external"]["b"]
    assert set(gaps) == {name for name, entry in VALUES.items() if not entry.descriptive}
    assert gaps["mae"]["value"] > 0
    assert gaps["ccc"]["value"] > 0


def test_strata_keep_the_rarest_label() -> None:
    targets = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [-1, -1, 0]])
    assert rarest_label(targets).tolist() == [1, 2, 3, 0, 0]
