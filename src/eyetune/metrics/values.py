"""A number an image: its outcomes, and the metrics of error, association and agreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eyetune.metrics.metric import Undefined, metric
from eyetune.metrics.outcomes import Floats, midranks
from eyetune.metrics.predictions import ValuePredictions

NORMAL_95 = 1.96
"""Bland and Altman's factor: 95% of normally distributed differences lie within so many standard deviations."""


@dataclass(frozen=True, eq=False)
class ValueOutcomes:
    """N >= 0 images whose number is known, and what a model gave for each.

    Args:
        targets: float64[N].
        predicted: float64[N].
    """

    targets: Floats
    predicted: Floats

    @classmethod
    def of_table(cls, table: ValuePredictions) -> ValueOutcomes:
        """The outcomes of the rows of a table whose number is known."""
        known = table.labelled()
        return cls(known.targets, known.predicted)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Any) -> ValueOutcomes:
        """These rows (int[M], repeats allowed, or bool[N])."""
        return ValueOutcomes(self.targets[rows], self.predicted[rows])

    def drawn(self, counts: NDArray[np.int64]) -> ValueOutcomes:
        """The same images, image i `counts[i]` times, int64[N]."""
        return self.take(np.repeat(np.arange(len(self)), counts))

    def where(self, rows: NDArray[np.bool_], other: ValueOutcomes) -> ValueOutcomes:
        """These images, those of `rows` bool[N] with what `other`, of the same images, says of them."""
        return ValueOutcomes(self.targets, np.where(rows, other.predicted, self.predicted))

    def differs(self, other: ValueOutcomes) -> NDArray[np.bool_]:
        """bool[N]: of which of these images `other` says something else."""
        return self.predicted != other.predicted

    @property
    def errors(self) -> Floats:
        """float64[N]: predicted less true."""
        return self.predicted - self.targets


INFINITY = float("inf")


@metric("mae", higher_is_better=False, high=INFINITY, scope="values")
def mae(outcomes: ValueOutcomes) -> float:
    """Mean absolute error, in the units of the number."""
    return float(np.abs(outcomes.errors).mean())


@metric("rmse", higher_is_better=False, high=INFINITY, scope="values")
def rmse(outcomes: ValueOutcomes) -> float:
    """Root of the mean squared error, in the units of the number."""
    return float(np.sqrt((outcomes.errors**2).mean()))


@metric("r2", low=-INFINITY, scope="values")
def r2(outcomes: ValueOutcomes) -> float:
    """Share of the variance explained: 1 - squared error / that of always saying the mean; below 0 when worse."""
    if _constant(outcomes.targets):
        raise Undefined("the true number is the same in every image")
    total = float(((outcomes.targets - outcomes.targets.mean()) ** 2).sum())
    return 1 - float((outcomes.errors**2).sum()) / total


@metric("pearson", low=-1.0, scope="values")
def pearson(outcomes: ValueOutcomes) -> float:
    """Linear correlation (Pearson, 1895): association, not agreement; a model wrong by a constant factor has 1."""
    return _correlation(outcomes.targets, outcomes.predicted)


@metric("spearman", low=-1.0, scope="values")
def spearman(outcomes: ValueOutcomes) -> float:
    """Correlation of the ranks, equal numbers sharing theirs (Spearman, 1904)."""
    return _correlation(midranks(outcomes.targets), midranks(outcomes.predicted))


@metric("ccc", low=-1.0, scope="values")
def ccc(outcomes: ValueOutcomes) -> float:
    """Concordance correlation: closeness to the line of identity (Lin, Biometrics 45, 1989; variances over N)."""
    x, y = outcomes.targets, outcomes.predicted
    if _constant(x) and _constant(y):
        raise Undefined("truth and prediction are the same numbers for every image")
    covariance = float(((x - x.mean()) * (y - y.mean())).mean())
    return 2 * covariance / float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)


@metric("bias", higher_is_better=False, low=-INFINITY, high=INFINITY, scope="values", descriptive=True)
def bias(outcomes: ValueOutcomes) -> float:
    """Mean of predicted less true: how far the model is off on the whole."""
    return float(outcomes.errors.mean())


@metric("loa_low", higher_is_better=False, low=-INFINITY, high=INFINITY, scope="values", descriptive=True)
def loa_low(outcomes: ValueOutcomes) -> float:
    """Lower limit of agreement: bias - 1.96 standard deviations of the errors (Bland and Altman, Lancet 1986). Of
    normally distributed errors 95% lie between the two limits."""
    return bias(outcomes) - NORMAL_95 * _spread(outcomes)


@metric("loa_high", higher_is_better=False, low=-INFINITY, high=INFINITY, scope="values", descriptive=True)
def loa_high(outcomes: ValueOutcomes) -> float:
    """Upper limit of agreement: bias + 1.96 standard deviations of the errors (Bland and Altman, Lancet 1986)."""
    return bias(outcomes) + NORMAL_95 * _spread(outcomes)


def _constant(values: Floats) -> bool:
    return bool(values.max() == values.min())


def _spread(outcomes: ValueOutcomes) -> float:
    if len(outcomes) < 2:
        raise Undefined("limits of agreement need two images at least")
    return float(outcomes.errors.std(ddof=1))


def _correlation(x: Floats, y: Floats) -> float:
    if _constant(x) or _constant(y):
        raise Undefined("a correlation needs two different numbers at least, both true and predicted")
    x, y = x - x.mean(), y - y.mean()
    # Each scaled by its own largest value first: the squares of small numbers would vanish.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()), -1.0, 1.0))
