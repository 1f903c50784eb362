"""Two models on the same patients: does one do better, and by how much?

Everything here is about *these trained models on other patients*: patients are the unit, models are fixed. A model may
stand for several training seeds: its value is the mean over them, and a patient carries the predictions of all seeds.

- DeLong's variance and covariance of areas under ROC curves (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988),
  by ranks (Sun and Xu, IEEE Signal Processing Letters 21, 2014), for images in clusters (Obuchowski, Biometrics 53,
  1997): both eyes of a patient, photographed twice, are not four patients.
- A permutation test for any metric: where two models are equally good, which of them a patient's predictions came from
  does not matter, so they may be exchanged, patient by patient.
- Holm's correction for many comparisons (Holm, Scandinavian Journal of Statistics 6, 1979).
- Intervals of means over seeds and of differences, from one set of resampled patients for all models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from eyetune.metrics.intervals import RESAMPLES, Clusters, Scorable, Z
from eyetune.metrics.labels import LabelOutcomes
from eyetune.metrics.outcomes import Counted, Floats, Outcomes, midranks
from eyetune.metrics.scores import REFERABLE_GRADE, Metric, Undefined, referable_probability

PERMUTATIONS = 9_999
"""Random exchanges behind a p-value; where there are no more than that in all, every one is tried instead."""

_TIE = 1e-12
"""Differences closer than this are equal: the same counts may be added in another order."""

_CHUNK = 512
"""Exchanges whose confusion matrices are in memory at a time."""


class Answers(Scorable, Protocol):
    """N images with their truth and what a model said of each: outcomes of any task."""

    def where(self, rows: NDArray[np.bool_], other: Any) -> Any:
        """These images, those of `rows` bool[N] with what `other`, of the same images, says of them."""

    def differs(self, other: Any) -> NDArray[np.bool_]:
        """bool[N]: of which of these images `other` says something else."""


# --- areas under ROC curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Areas:
    """Areas under J ROC curves of the same images, and how they vary together over other patients.

    Args:
        values: float64[J], 0..1.
        covariance: float64[J, J]; NaN where a curve has positives, or negatives, of one patient only.
    """

    values: Floats
    covariance: Floats

    def combined(self, weights: Floats) -> tuple[float, float]:
        """(value, variance) of the sum of the areas times `weights` float64[J]."""
        # What rounding leaves of a variance of zero may be below it. NaN stays NaN, as Python's max would not have it.
        variance = np.maximum(0.0, weights @ self.covariance @ weights)
        return float(weights @ self.values), float(variance)


def areas(
    positive: NDArray[np.bool_],
    scores: Floats,
    clusters: NDArray[np.int64] | None = None,
    known: NDArray[np.bool_] | None = None,
) -> Areas:
    """Areas under ROC curves with DeLong's covariance, extended to clusters by Obuchowski.

    With every image a cluster of its own this is DeLong's estimate exactly. Curves may be of different models (other
    scores, the same truth) or of different questions (another truth): their covariance follows from the images they
    share.

    Args:
        positive: bool[J, N], the truth of each curve; both kinds must be there.
        scores: float64[J, N], higher = more likely positive.
        clusters: int64[N], 0..C-1, the patient of each image; None = every image is one of its own.
        known: bool[J, N], the images that count for each curve; None = all do.

    Raises Undefined when a curve lacks positives or negatives.
    """
    count = scores.shape[1]
    clusters = np.arange(count) if clusters is None else clusters
    known = np.ones_like(positive) if known is None else known
    size = int(clusters.max()) + 1 if count else 0
    values = np.empty(len(scores))
    # Of each cluster, what its positives and its negatives add to (area - its expectation).
    parts = np.zeros((2, len(scores), size))
    factors, whole = np.empty((2, len(scores))), np.empty(len(scores))
    for curve, (truth, score, counted) in enumerate(zip(positive, scores, known, strict=True)):
        having, lacking = truth & counted, ~truth & counted
        if not having.any() or not lacking.any():
            raise Undefined("a ROC curve needs positives and negatives")
        above, below = placements(score[having], score[lacking])
        values[curve] = above.mean()
        whole[curve] = _correction(len(np.unique(clusters[counted])))
        for side, (rows, share) in enumerate(((having, above), (lacking, below))):
            deviation = (share - values[curve]) / len(share)
            parts[side, curve] = np.bincount(clusters[rows], weights=deviation, minlength=size)
            factors[side, curve] = _correction(len(np.unique(clusters[rows])))
    within = sum(_outer(factors[side]) * (parts[side] @ parts[side].T) for side in (0, 1))
    across = parts[0] @ parts[1].T
    # Without this, 0 * NaN: images that are clusters of their own are never on both sides of one curve.
    between = _outer(whole) * (across + across.T) if across.any() else 0.0
    return Areas(values, np.asarray(within + between))


def placements(positives: Floats, negatives: Floats) -> tuple[Floats, Floats]:
    """Of each positive, the share of negatives it lies above; of each negative, the share of positives above it.

    Equal scores count half. float64[M], float64[N] -> float64[M], float64[N]; in M + N log time, by midranks.
    """
    m, n = len(positives), len(negatives)
    together = midranks(np.concatenate([positives, negatives]))
    return (together[:m] - midranks(positives)) / n, 1 - (together[m:] - midranks(negatives)) / m


class Columns(NamedTuple):
    """Curves, J of N images: the truth bool[J, N], the scores float64[J, N], the images that count bool[J, N]."""

    positive: NDArray[np.bool_]
    scores: Floats
    known: NDArray[np.bool_]


def area_columns(outcomes: Answers, metric: str) -> Columns:
    """The curves whose mean area is the metric `metric`, auroc_macro (of classes, or of labels) or referable_auroc.

    Raises Undefined when there is none, ValueError for another metric.
    """
    if isinstance(outcomes, LabelOutcomes) and metric == "auroc_macro":
        having, known = outcomes.targets.T == 1, outcomes.targets.T >= 0
        shown = having.any(axis=1) & (known & ~having).any(axis=1)
        if not shown.any():
            raise Undefined("a ROC curve needs images with a label and without it")
        return Columns(having[shown], outcomes.probabilities.T[shown], known[shown])
    if not isinstance(outcomes, Outcomes) or metric not in AREA_METRICS:
        raise ValueError(f"{metric} is no area under ROC curves")
    positive, scores = _class_columns(outcomes, metric)
    return Columns(positive, scores, np.ones_like(positive))


def _class_columns(outcomes: Outcomes, metric: str) -> tuple[NDArray[np.bool_], Floats]:
    if metric == "referable_auroc":
        return (outcomes.targets >= REFERABLE_GRADE)[None], referable_probability(outcomes)[None]
    support = outcomes.support
    shown = [k for k in range(outcomes.num_classes) if 0 < support[k] < len(outcomes)]
    shown = shown[-1:] if outcomes.num_classes == 2 else shown
    if not shown:
        raise Undefined("a ROC curve needs examples of at least two classes")
    return np.stack([outcomes.targets == k for k in shown]), outcomes.probabilities[:, shown].T


AREA_METRICS = ("auroc_macro", "referable_auroc")
"""The metrics that are (means of) areas under ROC curves: DeLong's test is theirs."""


# --- tests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """What came of a paired test.

    Args:
        difference: first minus second, of the means over seeds.
        p: two-sided; None where the test is not defined, for `reason`.
        ci: 95% interval of the difference where the test itself gives one.
        exchanges: of a permutation test, how many were looked at; 0 otherwise.
        exact: they were all there are.
        reason: why there is no p-value.
    """

    difference: float
    p: float | None
    ci: list[float] | None = None
    exchanges: int = 0
    exact: bool = False
    reason: str = ""


def delong(
    first: Sequence[Answers], second: Sequence[Answers], metric: str, clusters: Clusters | None = None
) -> Compared:
    """DeLong's paired test of two models by an area under ROC curves, both of the same images.

    Args:
        first, second: the outcomes of each seed; the value of a model is the mean over its seeds and, for auroc_macro,
            over the classes, or the labels.
        metric: auroc_macro or referable_auroc.
        clusters: the patients; None = every image is one of its own.

    Raises Undefined when there is no ROC curve.
    """
    columns, weights = [], []
    for sign, model in ((1.0, first), (-1.0, second)):
        for outcomes in model:
            columns.append(area_columns(outcomes, metric))
            count = len(columns[-1].scores)
            weights += [sign / len(model) / count] * count
    truths, scores, known = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    found = areas(truths, scores, None if clusters is None else clusters.of_image, known)
    difference, variance = found.combined(np.array(weights))
    if not math.isfinite(variance):
        return Compared(difference, None, reason="the positives, or the negatives, are all of one patient")
    spread = math.sqrt(variance)
    if spread < _TIE:
        same = abs(difference) < _TIE
        return Compared(difference, 1.0 if same else None, reason="" if same else "too few patients to see areas vary")
    p = 2 * NormalDist().cdf(-abs(difference) / spread)
    return Compared(difference, p, [difference - Z * spread, difference + Z * spread])


def permutation(
    first: Sequence[Answers],
    second: Sequence[Answers],
    metric: Metric,
    clusters: Clusters,
    *,
    exchanges: int = PERMUTATIONS,
    seed: int = 0,
) -> Compared:
    """A paired permutation test of two models by any metric, both of the same images.

    A patient's predictions of the two models are exchanged, of all images and seeds at once, and the difference of the
    means over seeds is computed anew. The p-value is the share of exchanges with a difference at least as large, in
    either direction. Where all exchanges are few enough, every one is tried and the test is exact; otherwise random
    ones are, and the p-value is (b + 1) / (n + 1), which keeps it valid (Phipson and Smyth, Statistical Applications in
    Genetics and Molecular Biology 9, 2010).

    Args:
        first, second: the outcomes of each seed.
        metric: any; of classes the ones that depend on what is called alone are computed from counts, a hundred
            times as fast.
        clusters: the patients.
        exchanges: random ones, at most.
        seed: of the random ones.

    Raises Undefined when the metric has no value for one of the models. An exchange that leaves it without one counts
    as at least as large.
    """
    observed = _mean(metric, first) - _mean(metric, second)
    a, b = ([one for one in side if isinstance(one, Outcomes)] for side in (first, second))
    if metric.uses == "predicted" and len(a) == len(first):
        exchange = _exchange_counts(a, b, metric, clusters)
    else:
        exchange = _exchange_images(first, second, metric, clusters)
    patients = len(exchange.active)
    exact = 2**patients <= exchanges + 1
    draws = _all_signs(patients) if exact else _random_signs(patients, exchanges, seed)
    as_large = total = 0
    for signs in draws:
        values = exchange.differences(signs)
        as_large += int(np.count_nonzero(~(np.abs(values) < abs(observed) - _TIE)))  # NaN counts
        total += len(values)
    p = as_large / total if exact else (as_large + 1) / (total + 1)
    return Compared(observed, p, exchanges=total, exact=exact)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for each other (Holm, 1979), in the order given; None stays None and does not count.

    Rejecting where the adjusted value is at most 0.05 keeps the chance of any false rejection below 5%.
    """
    known = sorted((p, place) for place, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted


# --- resampling ---------------------------------------------------------------------------------------------------


def resampled_means(
    models: Mapping[str, Sequence[Answers]],
    clusters: Clusters,
    metric: Metric,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Floats]:
    """The mean over seeds of a metric for resampled patients, the same ones for every model.

    Args:
        models: name -> the outcomes of each seed, all of the same images.
        clusters: of these images.

    Returns name -> float64[resamples], NaN where the metric has no value. The difference of two is that of the models;
    :func:`eyetune.metrics.intervals.bias_corrected` makes intervals of either.
    """
    values = {name: np.full(resamples, np.nan) for name in models}
    for place, counts in enumerate(clusters.draws(resamples, seed)):
        for name, seeds in models.items():
            try:
                values[name][place] = _mean(metric, [outcomes.drawn(counts) for outcomes in seeds])
            except Undefined:
                continue
    return values


# --- pieces -------------------------------------------------------------------------------------------------------


def _mean(metric: Metric, seeds: Sequence[Answers]) -> float:
    return float(np.mean([metric(outcomes) for outcomes in seeds]))


def _correction(clusters: int) -> float:
    return clusters / (clusters - 1) if clusters > 1 else math.nan


def _outer(factors: Floats) -> Floats:
    """The factor of a covariance of two curves: theirs when they agree, between them when they do not."""
    return np.sqrt(np.outer(factors, factors))


def _all_signs(count: int) -> Iterator[NDArray[np.bool_]]:
    numbers = np.arange(2**count)
    for start in range(0, len(numbers), _CHUNK):
        yield (numbers[start : start + _CHUNK, None] >> np.arange(count)) & 1 == 1


def _random_signs(count: int, exchanges: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    for start in range(0, exchanges, _CHUNK):
        yield rng.random((min(_CHUNK, exchanges - start), count)) < 0.5


@dataclass(frozen=True, eq=False)
class _Exchange:
    """Two models whose predictions are exchanged, patient by patient.

    Args:
        active: int64[A], the patients of whom the models say different things.
        differences: bool[R, A], which of these are exchanged -> float64[R], first minus second, NaN where not defined.
    """

    active: NDArray[np.int64]
    differences: Callable[[NDArray[np.bool_]], Floats]


def _exchange_images(
    first: Sequence[Answers], second: Sequence[Answers], metric: Metric, clusters: Clusters
) -> _Exchange:
    """The slow way, for any metric of any task: exchange the rows."""
    rows = clusters.of_image
    differs = np.zeros(len(rows), dtype=bool)
    for one, other in zip(first, second, strict=True):
        differs |= one.differs(other)
    active = np.unique(rows[differs])

    def differences(signs: NDArray[np.bool_]) -> Floats:
        exchanged = np.zeros(int(rows.max()) + 1, dtype=bool)
        found = np.empty(len(signs))
        for place, sign in enumerate(signs):
            exchanged[active] = sign
            taken = exchanged[rows]
            try:
                found[place] = np.mean(
                    [
                        metric(one.where(taken, other)) - metric(other.where(taken, one))
                        for one, other in zip(first, second, strict=True)
                    ]
                )
            except Undefined:
                found[place] = np.nan
        return found

    return _Exchange(active, differences)


def _exchange_counts(
    first: Sequence[Outcomes], second: Sequence[Outcomes], metric: Metric, clusters: Clusters
) -> _Exchange:
    """The quick way, for metrics of what is called: a patient moves counts from one confusion matrix to the
    other, and the matrices of many exchanges are one product."""
    k, rows = first[0].num_classes, clusters.of_image
    moves = []  # of each seed, float64[patients, K * K]: what second has in each cell over what first has
    for one, other in zip(first, second, strict=True):
        moved = np.zeros((int(rows.max()) + 1, k * k))
        np.add.at(moved, (rows, other.targets * k + other.predicted), 1.0)
        np.add.at(moved, (rows, one.targets * k + one.predicted), -1.0)
        moves.append(moved)
    active = np.flatnonzero(np.any([moved.any(axis=1) for moved in moves], axis=0))

    def values(counts: Floats) -> Floats:
        """float64[R, K * K] -> float64[R]."""
        found = np.empty(len(counts))
        for place, one in enumerate(np.rint(counts).astype(np.int64).reshape(-1, k, k)):
            try:
                found[place] = metric(Counted.counting(one))
            except Undefined:
                found[place] = np.nan
        return found

    def differences(signs: NDArray[np.bool_]) -> Floats:
        each = []
        for one, other, moved in zip(first, second, moves, strict=True):
            change = signs.astype(np.float64) @ moved[active]
            each.append(values(one.confusion.ravel() + change) - values(other.confusion.ravel() - change))
        return np.asarray(np.mean(each, axis=0))

    return _Exchange(active, differences)
