"""Every metric, once, as a pure function of targets and probabilities; and the scores of a table of predictions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eyetune.metrics.intervals import RESAMPLES, Clusters, difference
from eyetune.metrics.labels import LabelOutcomes, rarest_label
from eyetune.metrics.metric import METRICS, Metric, Undefined, add_intervals, macro, metric, of_task
from eyetune.metrics.outcomes import Curve, Floats, Outcomes
from eyetune.metrics.predictions import LABEL_THRESHOLD, LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.reliability import CALIBRATION_BINS, width_bins
from eyetune.metrics.table import Table
from eyetune.metrics.values import ValueOutcomes

__all__ = [
    "METRICS",
    "Metric",
    "Undefined",
    "better",
    "generalization",
    "has_order",
    "is_graded_dr",
    "is_ordered",
    "metric",
    "primary_metric",
    "referable_curve",
    "score",
]

REFERABLE_GRADE = 2
"""Referable diabetic retinopathy: grade 2 (moderate) or worse on the international scale (Wilkinson et al., 2003)."""

REFERABLE_THRESHOLD = 0.5
"""An eye is called referable when the probabilities of the grades 2, 3 and 4 add up to at least this."""


# --- from the confusion matrix -----------------------------------------------------------------------------------


@metric("accuracy")
def accuracy(outcomes: Outcomes) -> float:
    """Share of images whose class is called right."""
    return float(outcomes.confusion.trace() / len(outcomes))


@metric("balanced_accuracy", macro=True)
def balanced_accuracy(outcomes: Outcomes) -> float:
    """Mean recall over the classes that have examples (Brodersen et al., 2010; scikit-learn, adjusted=False)."""
    return macro(outcomes.recall)


@metric("kappa", low=-1.0)
def kappa(outcomes: Outcomes) -> float:
    """Agreement beyond chance (Cohen, 1960)."""
    k = outcomes.num_classes
    return _weighted_kappa(outcomes, 1.0 - np.eye(k))


@metric("qwk", low=-1.0, scope="ordered")
def qwk(outcomes: Outcomes) -> float:
    """Agreement beyond chance where a miss costs the square of its distance in grades (Cohen, 1968)."""
    grades = np.arange(outcomes.num_classes, dtype=np.float64)
    return _weighted_kappa(outcomes, (grades[:, None] - grades[None, :]) ** 2)


@metric("precision_macro", macro=True, labels=True)
def precision_macro(outcomes: Outcomes) -> float:
    """Mean precision over the classes that have examples; 0 for one that is never predicted, as in scikit-learn."""
    return macro(np.where(outcomes.support > 0, outcomes.precision, np.nan))


@metric("recall_macro", macro=True, labels=True)
def recall_macro(outcomes: Outcomes) -> float:
    """Mean recall over the classes that have examples: the balanced accuracy under its other name."""
    return macro(outcomes.recall)


@metric("f1_macro", macro=True, labels=True)
def f1_macro(outcomes: Outcomes) -> float:
    """Mean F1 over the classes that have examples."""
    return macro(outcomes.f1)


@metric("precision_weighted")
def precision_weighted(outcomes: Outcomes) -> float:
    """Mean precision, each class weighted by its number of examples."""
    return _by_support(outcomes, outcomes.precision)


@metric("recall_weighted")
def recall_weighted(outcomes: Outcomes) -> float:
    """Mean recall, each class weighted by its number of examples: equal to the accuracy."""
    return _by_support(outcomes, outcomes.recall)


@metric("f1_weighted")
def f1_weighted(outcomes: Outcomes) -> float:
    """Mean F1, each class weighted by its number of examples."""
    return _by_support(outcomes, outcomes.f1)


# --- from the ranking --------------------------------------------------------------------------------------------


@metric("auroc_macro", uses="probabilities", macro=True, labels=True)
def auroc_macro(outcomes: Outcomes) -> float:
    """Mean area under the ROC curve, each class against the rest; for two classes, that of the second one."""
    return macro(outcomes.auroc, "a ROC curve needs examples of at least two classes")


@metric("auprc_macro", uses="probabilities", macro=True, labels=True, biased=True)
def auprc_macro(outcomes: Outcomes) -> float:
    """Mean average precision, each class against the rest, over the classes that have examples."""
    # Where every image is of the class, its precision is 1 whatever the model says.
    informative = np.where(outcomes.support < len(outcomes), outcomes.auprc, np.nan)
    return macro(informative, "a precision-recall curve needs examples of at least two classes")


# --- from the probabilities --------------------------------------------------------------------------------------


@metric("ece", higher_is_better=False, uses="probabilities", biased=True)
def ece(outcomes: Outcomes) -> float:
    """Expected calibration error: |accuracy - confidence| of the most probable class, averaged over the images in
    15 equal-width bins of confidence, upper ends included (Guo et al., 2017)."""
    confidence = outcomes.probabilities.max(axis=1)
    correct = outcomes.most_probable == outcomes.targets
    gaps = np.bincount(width_bins(confidence), weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(outcomes))


@metric("ece_equal_mass", higher_is_better=False, uses="probabilities", biased=True)
def ece_equal_mass(outcomes: Outcomes) -> float:
    """The same in 15 bins with as many images each (Nguyen and O'Connor, 2015): no bin rests on a handful."""
    return outcomes.equal_mass_error(CALIBRATION_BINS)


@metric("brier", higher_is_better=False, high=2.0, uses="probabilities")
def brier(outcomes: Outcomes) -> float:
    """Mean squared distance of the probabilities from the truth (Brier, 1950): summed over the classes, 0..2; for two
    classes that of the second one alone, 0..1, as in scikit-learn."""
    truth = np.eye(outcomes.num_classes)[outcomes.targets]
    squares = ((outcomes.probabilities - truth) ** 2).sum(axis=1)
    return float(squares.mean() / (2 if outcomes.num_classes == 2 else 1))


@metric("nll", higher_is_better=False, high=math.inf, uses="probabilities")
def nll(outcomes: Outcomes) -> float:
    """Mean negative natural logarithm of the true class's probability (log loss); a probability that underflowed to
    0 counts as the smallest normal float64, 2.2e-308."""
    of_truth = outcomes.probabilities[np.arange(len(outcomes)), outcomes.targets]
    return float(-np.log(np.clip(of_truth, np.finfo(np.float64).tiny, 1.0)).mean())


# --- referable diabetic retinopathy ------------------------------------------------------------------------------


@metric("referable_auroc", uses="probabilities", scope="graded")
def referable_auroc(outcomes: Outcomes) -> float:
    """Area under the ROC curve of grade >= 2 against less, by the summed probability of the grades 2, 3 and 4."""
    return _both_sides(referable_curve(outcomes)).auroc


@metric("referable_sensitivity", uses="probabilities", scope="graded")
def referable_sensitivity(outcomes: Outcomes) -> float:
    """Of the eyes of grade >= 2, the share whose probability of grade >= 2 is at least 0.5."""
    referable, called = _referable(outcomes)
    if not referable.any():
        raise Undefined("no image is of a referable grade (2 or worse)")
    return float(called[referable].mean())


@metric("referable_specificity", uses="probabilities", scope="graded")
def referable_specificity(outcomes: Outcomes) -> float:
    """Of the eyes of grade 0 and 1, the share whose probability of grade >= 2 is below 0.5."""
    referable, called = _referable(outcomes)
    if referable.all():
        raise Undefined("every image is of a referable grade (2 or worse)")
    return float(1 - called[~referable].mean())


@metric("referable_sensitivity_at_95_specificity", uses="probabilities", scope="graded")
def referable_sensitivity_at_95_specificity(outcomes: Outcomes) -> float:
    """The highest sensitivity for grade >= 2 at any threshold whose specificity is at least 0.95.

    The threshold is chosen on the very images it is scored on, so this describes the ROC curve: it is no promise of
    what a threshold fixed beforehand would reach.
    """
    curve = _both_sides(referable_curve(outcomes))
    # In whole numbers: 1 - alarms / negatives >= 0.95 without rounding.
    allowed = 100 * curve.alarms <= 5 * curve.alarms[-1]
    return float(curve.hits[allowed].max() / curve.hits[-1])


def referable_curve(outcomes: Outcomes) -> Curve:
    """The curve of grade >= 2 against less, for outcomes in the five grades."""
    return outcomes.curve_from(REFERABLE_GRADE)


def referable_probability(outcomes: Outcomes) -> Floats:
    """float64[N]: of grade 2 or worse, for outcomes in the five grades."""
    return outcomes.probabilities[:, REFERABLE_GRADE:].sum(axis=1)


def _referable(outcomes: Outcomes) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """bool[N] truth and bool[N] call."""
    return outcomes.targets >= REFERABLE_GRADE, referable_probability(outcomes) >= REFERABLE_THRESHOLD


def _both_sides(curve: Curve) -> Curve:
    if not curve.defined:
        raise Undefined("referable and non-referable images are both needed")
    return curve


def _by_support(outcomes: Outcomes, values: Floats) -> float:
    present = outcomes.support > 0
    return float((values[present] * outcomes.support[present]).sum() / len(outcomes))


def _weighted_kappa(outcomes: Outcomes, cost: Floats) -> float:
    """1 - cost / cost expected by chance, for `cost` float64[K, K] with a diagonal of 0."""
    confusion = outcomes.confusion
    expected = float((cost * np.outer(confusion.sum(axis=1), confusion.sum(axis=0))).sum()) / len(outcomes)
    if expected == 0:
        raise Undefined("truth and prediction are one and the same class for every image")
    return 1 - float((cost * confusion).sum()) / expected


# --- classes -----------------------------------------------------------------------------------------------------

_GRADE_NUMBER = re.compile(r"(?:dr|r|grade|level|class|icdr)?([0-4])(?:dr|grade)?")
_GRADE_NAMES = (
    re.compile(r"a?(?:no|none|normal|healthy)(?:apparent)?(?:dr|npdr|retinopathy|diabeticretinopathy)?"),
    re.compile(r"b?mild.*"),
    re.compile(r"c?moderate.*"),
    re.compile(r"d?severe.*"),
    re.compile(r"e?(?:pdr|pro|prodr|prolif.*)"),
)


def is_graded_dr(classes: Sequence[str]) -> bool:
    """Whether these are the five grades of diabetic retinopathy, in order.

    They are when the names are the numbers 0 to 4 ("0", "grade 0", "R0"), or say it in words ("no DR", "mild",
    "moderate NPDR", "severe", "PDR"; RETFound's "anodr" … "eprodr"), with or without a number in front.
    """
    if len(classes) != len(_GRADE_NAMES):
        return False
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in classes]
    numbers = [_GRADE_NUMBER.fullmatch(name) for name in plain]
    if all(number is not None and int(number[1]) == grade for grade, number in enumerate(numbers)):
        return True
    words = [re.sub(r"^[0-9]+", "", name) for name in plain]
    return all(pattern.fullmatch(word) for pattern, word in zip(_GRADE_NAMES, words, strict=True))


def is_ordered(classes: Sequence[str]) -> bool:
    """Whether the order of the classes means something: two classes, grades, or rising whole numbers as names."""
    if len(classes) == 2 or is_graded_dr(classes):
        return True
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in classes):
        return False
    numbers = [int(name) for name in classes]
    return numbers == sorted(set(numbers))


def has_order(predictions: Predictions) -> bool:
    """Whether the order of a table's classes means something: as the table says, else by :func:`is_ordered`."""
    return is_ordered(predictions.classes) if predictions.ordered is None else predictions.ordered


def primary_metric(classes: Sequence[str]) -> str:
    """The metric that chooses the best epoch when the user names none.

    "qwk" for the grades of diabetic retinopathy, "auroc_macro" for two classes, else "f1_macro" (which has a value
    even where a small validation split lacks a class).
    """
    if is_graded_dr(classes):
        return "qwk"
    return "auroc_macro" if len(classes) == 2 else "f1_macro"


def better(name: str, a: float | None, b: float | None) -> bool:
    """Whether `a` is strictly better than `b` by the metric `name`. No value (None, NaN) is worse than any value.

    Raises UserError for an unknown metric.
    """
    higher = METRICS.get(name).higher_is_better
    if a is None or math.isnan(a):
        return False
    if b is None or math.isnan(b):
        return True
    return a > b if higher else a < b


# --- the scores of a table ---------------------------------------------------------------------------------------


def score(
    predictions: Table,
    *,
    graded: bool | None = None,
    ordered: bool | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The scores of a table of predictions, as they stand in metrics.json under `datasets.NAME`.

    Args:
        predictions: the table; rows with an unknown target are left out and counted in `unlabelled`.
        graded: the classes are the five grades of diabetic retinopathy; None = by :func:`is_graded_dr`.
        ordered: the order of the classes means something; None = as the table says, else by :func:`is_ordered`.
        resamples: how many the intervals rest on; 0 computes none.
        seed: of the resampling.

    Returns:
        `task`, `n` (images scored), `unlabelled`, `patients` (different ones; None when no row names one),
        `metrics` {name: {"value": x, "ci": [low, high]}}, `intervals` (how they came about: see
        :mod:`eyetune.metrics.intervals`), and by task:
        classification: `classes`, `per_class` {class: {precision, recall (= sensitivity), specificity, f1, auroc,
        auprc, support}}, `per_class_ci` {class: {the same: [low, high], or None}}, `confusion_matrix` (rows = truth),
        for grades `referable` (from which grade, at which threshold), and `ordered` where the configuration alone
        says that the classes have an order;
        multilabel: `labels`, `threshold`, and `per_label` {label: the same as for a classification of two classes};
        regression: `target`, what the number is called.
        A value that is not defined is None, with its `reason`; a mean over classes that had to leave some out has a
        `note` that names them. JSON-serialisable, without NaN.
    """
    if isinstance(predictions, LabelPredictions):
        return _score_labels(predictions, resamples, seed)
    if isinstance(predictions, ValuePredictions):
        return _score_values(predictions, resamples, seed)
    if not isinstance(predictions, Predictions):
        raise TypeError(f"nothing is known of how to score {type(predictions).__name__}")
    classes = predictions.classes
    graded = is_graded_dr(classes) if graded is None else graded
    if graded and len(classes) != len(_GRADE_NAMES):
        raise ValueError(f"graded diabetic retinopathy has five classes, not {len(classes)}")
    ordered = has_order(predictions) if ordered is None else ordered
    known = predictions.labelled()
    outcomes = Outcomes.of_table(known)
    metrics = {
        name: entry.entry(outcomes, classes)
        if graded or ordered or entry.scope != "ordered"
        else {"value": None, "ci": [None, None], "reason": "the classes have no order that is known"}
        for name, entry in of_task("classification").items()
        if entry.scope != "graded" or graded
    }
    result = _counted(predictions, known) | {
        "classes": list(classes),
        "metrics": metrics,
        "per_class": _per_class(outcomes, classes),
        "confusion_matrix": outcomes.confusion.tolist(),
    }
    if resamples and len(known):
        _, clusters = sample(known)
        method = f"{_BOOTSTRAP}, stratified by class"
        also = _class_metrics(result["per_class"])
        result["intervals"] = add_intervals(
            metrics, outcomes, clusters, resamples=resamples, seed=seed, method=method, also=also
        )
        result["per_class_ci"] = {
            name: {column: also[f"{column} {name}"][1].get("ci") for column in CLASS_COLUMNS} for name in classes
        }
    if predictions.ordered:
        result["ordered"] = True
    if graded:
        result["referable"] = {"grade_at_least": REFERABLE_GRADE, "threshold": REFERABLE_THRESHOLD}
    return result


_BOOTSTRAP = "bias-corrected percentile bootstrap"


def _counted(table: Table, known: Table) -> dict[str, Any]:
    """What is said of every table first; `known` are its rows with a target."""
    patients = {patient for patient in known.patients if patient is not None}
    return {
        "task": table.task,
        "n": len(known),
        "unlabelled": len(table) - len(known),
        "patients": len(patients) or None,
    }


def sample(known: Table) -> tuple[Any, Clusters]:
    """The outcomes of a table whose every row is labelled, and what is drawn as one when it is resampled.

    Patients are drawn within strata: of their highest class, of their rarest label; for numbers all together.
    """
    if isinstance(known, LabelPredictions):
        return LabelOutcomes.of_table(known), Clusters.of(known.patients, rarest_label(known.targets))
    if isinstance(known, ValuePredictions):
        return ValueOutcomes.of_table(known), Clusters.of(known.patients, np.zeros(len(known), dtype=np.int64))
    if not isinstance(known, Predictions):
        raise TypeError(f"nothing is known of how to score {type(known).__name__}")
    return Outcomes.of_table(known), Clusters.of(known.patients, known.targets)


def _score_labels(table: LabelPredictions, resamples: int, seed: int) -> dict[str, Any]:
    known = table.labelled()
    outcomes = LabelOutcomes.of_table(known)
    metrics = {name: entry.entry(outcomes, table.labels, "labels") for name, entry in of_task("multilabel").items()}
    result = _counted(table, known) | {"labels": list(table.labels), "threshold": LABEL_THRESHOLD, "metrics": metrics}
    if resamples and len(known):
        _, clusters = sample(known)
        method = f"{_BOOTSTRAP}, stratified by the rarest label present"
        result["intervals"] = add_intervals(metrics, outcomes, clusters, resamples=resamples, seed=seed, method=method)
    alone = {name: score(table.label(name), resamples=resamples, seed=seed) for name in table.labels}
    return result | {"per_label": alone}


def _score_values(table: ValuePredictions, resamples: int, seed: int) -> dict[str, Any]:
    known = table.labelled()
    outcomes = ValueOutcomes.of_table(known)
    metrics = {name: entry.entry(outcomes) for name, entry in of_task("regression").items()}
    result = _counted(table, known) | {"target": table.name, "metrics": metrics}
    if resamples and len(known):
        _, clusters = sample(known)
        result["intervals"] = add_intervals(
            metrics, outcomes, clusters, resamples=resamples, seed=seed, method=_BOOTSTRAP
        )
    return result


CLASS_COLUMNS = ("precision", "recall", "specificity", "f1", "auroc", "auprc")
"""What is said of each class on its own; names of :class:`Outcomes`."""


def _of_class(column: str, k: int, outcomes: Outcomes) -> float:
    """One value of one class; NaN, which counts as no value, where it has none."""
    return float(getattr(outcomes, column)[k])


def _class_metrics(
    per_class: Mapping[str, Mapping[str, float | int | None]],
) -> dict[str, tuple[Metric, dict[str, Any]]]:
    """Every value of every class as a metric of its own, with an entry for its interval."""
    found: dict[str, tuple[Metric, dict[str, Any]]] = {}
    for k, (name, values) in enumerate(per_class.items()):
        for column in CLASS_COLUMNS:
            value_of = partial(_of_class, column, k)
            one = Metric(column, value_of, True, 0.0, 1.0, "probabilities", "any", False, biased=column == "auprc")
            found[f"{column} {name}"] = one, {"value": values[column]}
    return found


def _per_class(outcomes: Outcomes, classes: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
    never_seen = (outcomes.support == 0) & (outcomes.confusion.sum(axis=0) == 0)
    columns: dict[str, Floats] = {column: getattr(outcomes, column) for column in CLASS_COLUMNS}
    # Neither seen nor predicted: 0 would be a verdict on nothing.
    columns["precision"] = np.where(never_seen, np.nan, outcomes.precision)
    columns["auprc"] = np.where(outcomes.support < len(outcomes), outcomes.auprc, np.nan)
    return {
        name: {column: None if math.isnan(values[k]) else float(values[k]) for column, values in columns.items()}
        | {"support": int(outcomes.support[k])}
        for k, name in enumerate(classes)
    }


def generalization(
    reference: str, scores: Mapping[str, Mapping[str, Any]], externals: Sequence[str] | None = None
) -> dict[str, Any]:
    """How much is lost outside the reference dataset, as it stands in metrics.json under `generalization`.

    Args:
        reference: name of the dataset the others are held against (the run's own test split).
        scores: dataset name -> what :func:`score` returned, the reference among them.
        externals: the datasets to hold against it; None = all others in `scores`.

    Returns:
        {"reference": name, "external": {dataset: {metric: {"value": gap, "ci": [low, high]}}}}. The gap is in the
        metric's own units and positive when the external dataset is worse, whichever direction is better; None,
        with a `reason`, where one side has no value. Its interval follows from those of the two sides, whose patients
        must be different ones.
    """
    names = [name for name in scores if name != reference] if externals is None else list(externals)
    inside = scores[reference]["metrics"]
    return {
        "reference": reference,
        "external": {
            name: {
                key: _gap(key, inside[key], outside)
                for key, outside in scores[name]["metrics"].items()
                if key in inside and not METRICS.get(key).descriptive
            }
            for name in names
        },
    }


def _gap(name: str, inside: Mapping[str, Any], outside: Mapping[str, Any]) -> dict[str, Any]:
    sides = {"reference": inside, "external": outside}
    result: dict[str, Any] = {"value": None, "ci": [None, None]}
    for side, entry in sides.items():
        if entry["value"] is None:
            return result | {"reason": f"{side}: {entry.get('reason', 'no value')}"}
    first, second = (inside, outside) if METRICS.get(name).higher_is_better else (outside, inside)
    result["value"] = first["value"] - second["value"]
    if None not in (*first["ci"], *second["ci"]):
        result["ci"] = difference(first["value"], first["ci"], second["value"], second["ci"])
    notes = [f"{side}: {entry['note']}" for side, entry in sides.items() if "note" in entry]
    return result | ({"note": "; ".join(notes)} if notes else {})
