"""Targets beside probabilities, and what most metrics need of them, computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from eyetune.metrics.predictions import Predictions

Floats = NDArray[np.float64]

UNTOLD = -2
"""Target of an image in :class:`Counted`, which knows how many there are and not which."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """N >= 0 images whose class is known, and what a model gave for each.

    Args:
        targets: int64[N], 0..K-1.
        probabilities: float64[N, K], rows sum to 1.
        calls: int64[N], 0..K-1: the class called, where that may be another than the most probable one; None: that one.
    """

    targets: NDArray[np.int64]
    probabilities: Floats
    calls: NDArray[np.int64] | None = field(default=None, kw_only=True)

    @classmethod
    def of_table(cls, table: Predictions) -> Outcomes:
        """The outcomes of the rows of a table whose target is known."""
        known = table.labelled()
        return Outcomes(known.targets, known.probabilities, calls=known.calls)

    @property
    def num_classes(self) -> int:
        return int(self.probabilities.shape[1])

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Any) -> Outcomes:
        """These rows (int[M], repeats allowed, or bool[N])."""
        calls = None if self.calls is None else self.calls[rows]
        return Outcomes(self.targets[rows], self.probabilities[rows], calls=calls)

    def drawn(self, counts: NDArray[np.int64]) -> Outcomes:
        """The same images, image i `counts[i]` times, int64[N]: what a resampling drew."""
        rows = np.repeat(np.arange(len(self)), counts)
        calls = None if self.calls is None else self.calls[rows]
        result = Resample(self.targets[rows], self.probabilities[rows], self, counts, calls=calls)
        result.__dict__["most_probable"] = self.most_probable[rows]
        return result

    def where(self, rows: NDArray[np.bool_], other: Outcomes) -> Outcomes:
        """These images, those of `rows` bool[N] with what `other`, of the same images, says of them."""
        probabilities = np.where(rows[:, None], other.probabilities, self.probabilities)
        if self.calls is None and other.calls is None:
            return Outcomes(self.targets, probabilities)
        return Outcomes(self.targets, probabilities, calls=np.where(rows, other.predicted, self.predicted))

    def differs(self, other: Outcomes) -> NDArray[np.bool_]:
        """bool[N]: of which of these images `other` says something else."""
        same = (self.probabilities == other.probabilities).all(axis=1) & (self.predicted == other.predicted)
        return np.asarray(~same)

    @cached_property
    def most_probable(self) -> NDArray[np.int64]:
        """int64[N]: the class of the highest probability (the first of equals)."""
        return self.probabilities.argmax(axis=1)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """int64[N]: what the model calls: `calls`, else the most probable class."""
        return self.most_probable if self.calls is None else self.calls

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """int64[K, K]: images by truth (rows) and prediction (columns)."""
        k = self.num_classes
        return np.bincount(self.targets * k + self.predicted, minlength=k * k).reshape(k, k)

    @cached_property
    def support(self) -> NDArray[np.int64]:
        """int64[K]: images of each class."""
        return self.confusion.sum(axis=1)

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """K curves, each class against the rest."""
        return tuple(ranking.curve() for ranking in self.rankings)

    def curve_from(self, k: int) -> Curve:
        """The curve of class >= k against less, by the summed probability of the classes >= k; for 1 <= k < K."""
        return self.upward[k].curve()

    @cached_property
    def rankings(self) -> tuple[Ranking, ...]:
        """K rankings, each class against the rest."""
        return tuple(Ranking.of(self.targets == k, self.probabilities[:, k]) for k in range(self.num_classes))

    @cached_property
    def upward(self) -> Mapping[int, Ranking]:
        """The ranking of class >= k against less, by k in 1..K-1, sorted when first asked for."""
        return _Upward(self)

    @cached_property
    def certainty(self) -> Certainty:
        """The images by the probability of their most probable class."""
        return Certainty.of(self)

    def equal_mass_error(self, bins: int) -> float:
        """As :meth:`Certainty.equal_mass_error`; N >= 1."""
        return self.certainty.equal_mass_error(bins)

    @cached_property
    def precision(self) -> Floats:
        """float64[K]: of those called k, the share that are; 0 for a class never predicted."""
        return ratio(self.confusion.diagonal(), self.confusion.sum(axis=0), otherwise=0.0)

    @cached_property
    def recall(self) -> Floats:
        """float64[K]: of those that are k, the share called so (sensitivity); NaN for a class without examples."""
        return ratio(self.confusion.diagonal(), self.support)

    @cached_property
    def specificity(self) -> Floats:
        """float64[K]: of those that are not k, the share not called so; NaN when every image is k."""
        others = len(self) - self.support
        return ratio(others - (self.confusion.sum(axis=0) - self.confusion.diagonal()), others)

    @cached_property
    def f1(self) -> Floats:
        """float64[K]: harmonic mean of precision and recall; NaN for a class without examples."""
        hits = 2 * self.confusion.diagonal()
        return np.where(self.support > 0, ratio(hits, self.confusion.sum(axis=0) + self.support), np.nan)

    @cached_property
    def auroc(self) -> Floats:
        """float64[K]: each class against the rest; NaN where one side is empty."""
        if self.num_classes == 2:
            # One curve for both, so that the two sides of a rounded softmax cannot disagree.
            return np.repeat(self.curves[1].auroc, 2)
        return np.array([curve.auroc for curve in self.curves])

    @cached_property
    def auprc(self) -> Floats:
        """float64[K]: average precision of each class against the rest; NaN for a class without examples."""
        return np.array([curve.average_precision for curve in self.curves])


@dataclass(frozen=True, eq=False)
class Resample(Outcomes):
    """Images of other outcomes, each as often as a resampling drew it. What was sorted once is not sorted again.

    Args:
        base: the outcomes drawn from.
        counts: int64[N], >= 0: how often each image was drawn.
    """

    base: Outcomes
    counts: NDArray[np.int64]

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """K curves, each class against the rest."""
        return tuple(ranking.curve(self.counts) for ranking in self.base.rankings)

    def curve_from(self, k: int) -> Curve:
        """The curve of class >= k against less."""
        return self.base.upward[k].curve(self.counts)

    def equal_mass_error(self, bins: int) -> float:
        """As :meth:`Certainty.equal_mass_error`."""
        return self.base.certainty.equal_mass_error(bins, self.counts)


class Counted(Outcomes):
    """Outcomes of which only the confusion matrix is known: enough for metrics of what is called."""

    @classmethod
    def counting(cls, confusion: NDArray[np.int64]) -> Counted:
        """From int64[K, K], rows = truth, columns = prediction."""
        made = cls(np.broadcast_to(np.int64(UNTOLD), int(confusion.sum())), np.empty((0, len(confusion))))
        made.__dict__["confusion"] = confusion
        return made


@dataclass(frozen=True, eq=False)
class Ranking:
    """N images sorted by falling score.

    Args:
        order: int64[N], the images.
        positive: bool[N], their truth, in that order.
        last_of_equals: int64[M], where each run of equal scores ends.
        thresholds: float64[M + 1]: +inf, then the different scores, falling.
    """

    order: NDArray[np.int64]
    positive: NDArray[np.bool_]
    last_of_equals: NDArray[np.int64]
    thresholds: Floats

    @classmethod
    def of(cls, positive: NDArray[np.bool_], scores: Floats) -> Ranking:
        """The ranking of `scores` float64[N] for the truth `positive` bool[N]."""
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        last_of_equals = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)) if len(scores) else order
        return cls(order, positive[order], last_of_equals, np.concatenate([[np.inf], falling[last_of_equals]]))

    def curve(self, counts: NDArray[np.int64] | None = None) -> Curve:
        """The curve, each image counted once, or as often as `counts` int64[N] (in the images' own order) says."""
        drawn = np.ones_like(self.order) if counts is None else counts[self.order]
        hits = np.cumsum(drawn * self.positive)[self.last_of_equals]
        called = np.cumsum(drawn)[self.last_of_equals]
        start = np.zeros(1, dtype=np.int64)
        return Curve(self.thresholds, np.concatenate([start, hits]), np.concatenate([start, called - hits]))


@dataclass(frozen=True, eq=False)
class Certainty:
    """N images sorted by rising certainty, the probability of their most probable class.

    Args:
        order: int64[N], the images.
        value: float64[N], the certainty, in that order.
        correct: bool[N], whether it came true, in that order.
        starts: int64[M], where each run of equal certainties begins.
    """

    order: NDArray[np.int64]
    value: Floats
    correct: NDArray[np.bool_]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, outcomes: Outcomes) -> Certainty:
        """The certainty of the most probable class."""
        value = outcomes.probabilities.max(axis=1)
        order = np.argsort(value, kind="stable")
        rising = value[order]
        starts = np.flatnonzero(np.append(True, rising[1:] != rising[:-1])) if len(order) else order
        return cls(order, rising, (outcomes.most_probable == outcomes.targets)[order], starts)

    def equal_mass_error(self, bins: int, counts: NDArray[np.int64] | None = None) -> float:
        """|accuracy - certainty| averaged over the images in so many bins with as many images each.

        An image falls into the bin in which the middle of all images of its certainty lies: equals stay together, and
        the order of the table does not matter. Image i counts `counts[i]` times, int64[N]; None is once.
        """
        drawn = np.ones(len(self.order)) if counts is None else counts[self.order].astype(np.float64)
        mass = np.add.reduceat(drawn, self.starts)
        gaps = np.add.reduceat(drawn * (self.correct - self.value), self.starts)
        upto = np.cumsum(mass)
        middle = (upto - mass / 2) / upto[-1]
        places = np.minimum((middle * bins).astype(np.int64), bins - 1)
        return float(np.abs(np.bincount(places, weights=gaps, minlength=bins)).sum() / upto[-1])


class _Upward(dict[int, Ranking]):
    """Rankings of the upper classes against the lower ones, made when they are first looked up."""

    def __init__(self, outcomes: Outcomes) -> None:
        super().__init__()
        self.outcomes = outcomes

    def __missing__(self, k: int) -> Ranking:
        outcomes = self.outcomes
        self[k] = Ranking.of(outcomes.targets >= k, outcomes.probabilities[:, k:].sum(axis=1))
        return self[k]


@dataclass(frozen=True, eq=False)
class Curve:
    """Hits and false alarms as the threshold falls through the scores.

    Entry 0 is "nothing is called positive"; entry i >= 1 calls positive every image with a score >= thresholds[i].
    Images with equal scores enter together.

    Args:
        thresholds: float64[M + 1], falling, the first is +inf.
        hits: int64[M + 1], true positives.
        alarms: int64[M + 1], false positives.
    """

    thresholds: Floats
    hits: NDArray[np.int64]
    alarms: NDArray[np.int64]

    @property
    def defined(self) -> bool:
        """Whether there are both positives and negatives."""
        return bool(self.hits[-1] and self.alarms[-1])

    @property
    def sensitivity(self) -> Floats:
        """float64[M + 1], rising from 0 to 1; NaN without positives."""
        return ratio(self.hits, np.full_like(self.hits, self.hits[-1]))

    @property
    def specificity(self) -> Floats:
        """float64[M + 1], falling from 1 to 0; NaN without negatives."""
        return 1 - ratio(self.alarms, np.full_like(self.alarms, self.alarms[-1]))

    @property
    def auroc(self) -> float:
        """Area under the ROC curve by trapezoids, exact in whole numbers (= Mann-Whitney U); NaN if not defined."""
        if not self.defined:
            return float("nan")
        doubled = int((np.diff(self.alarms) * (self.hits[1:] + self.hits[:-1])).sum())
        return doubled / (2 * int(self.hits[-1]) * int(self.alarms[-1]))

    @property
    def average_precision(self) -> float:
        """Area under the precision-recall curve in steps, without interpolation; NaN without positives."""
        if not self.hits[-1]:
            return float("nan")
        precision = ratio(self.hits[1:], self.hits[1:] + self.alarms[1:], otherwise=0.0)
        return float((np.diff(self.hits) * precision).sum() / self.hits[-1])


def midranks(values: Floats) -> Floats:
    """float64[N]: 1 for the least; equal numbers share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def ratio(part: NDArray[Any], whole: NDArray[Any], otherwise: float = float("nan")) -> Floats:
    """`part / whole`, with `otherwise` where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), otherwise), where=whole > 0)
