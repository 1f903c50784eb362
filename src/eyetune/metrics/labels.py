"""Several yes-or-no labels an image: their outcomes, and what is scored of them together.

What is scored of each label alone is what is scored of two classes: see `LabelPredictions.label`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eyetune.metrics.metric import Undefined, metric
from eyetune.metrics.outcomes import Curve, Floats, Ranking, ratio
from eyetune.metrics.predictions import LABEL_THRESHOLD, LabelPredictions


@dataclass(frozen=True, eq=False)
class LabelOutcomes:
    """N >= 0 images and L labels, and what a model gave for each.

    Args:
        targets: int64[N, L]: 1, 0, or -1 where not known: such a cell counts nowhere.
        probabilities: float64[N, L].
        counts: int64[N]: how often each image counts; None: once.
        base: the outcomes these were drawn from: what was sorted once is not sorted again.
    """

    targets: NDArray[np.int64]
    probabilities: Floats
    counts: NDArray[np.int64] | None = None
    base: LabelOutcomes | None = None

    @classmethod
    def of_table(cls, table: LabelPredictions) -> LabelOutcomes:
        """The outcomes of a table."""
        return cls(table.targets, table.probabilities)

    def __len__(self) -> int:
        """Images of which any label is known, as often as they count."""
        return int((self.weights.max(axis=1, initial=0)).sum())

    def take(self, rows: NDArray[np.int64]) -> LabelOutcomes:
        """These rows (int[M], repeats allowed, or bool[N])."""
        return LabelOutcomes(self.targets[rows], self.probabilities[rows])

    def drawn(self, counts: NDArray[np.int64]) -> LabelOutcomes:
        """The same images, image i `counts[i]` times, int64[N]."""
        return LabelOutcomes(self.targets, self.probabilities, counts, self.base or self)

    def where(self, rows: NDArray[np.bool_], other: LabelOutcomes) -> LabelOutcomes:
        """These images, those of `rows` bool[N] with what `other`, of the same images, says of them."""
        return LabelOutcomes(self.targets, np.where(rows[:, None], other.probabilities, self.probabilities))

    def differs(self, other: LabelOutcomes) -> NDArray[np.bool_]:
        """bool[N]: of which of these images `other` says something else."""
        return np.asarray((self.probabilities != other.probabilities).any(axis=1))

    @cached_property
    def weights(self) -> NDArray[np.int64]:
        """int64[N, L]: how often each cell counts; 0 where it is not known."""
        known = (self.targets >= 0).astype(np.int64)
        return known if self.counts is None else known * self.counts[:, None]

    @cached_property
    def called(self) -> NDArray[np.bool_]:
        """bool[N, L]: probability above 0.5."""
        return self.probabilities > LABEL_THRESHOLD

    @cached_property
    def support(self) -> NDArray[np.int64]:
        """int64[L]: images that have the label."""
        return (self.weights * (self.targets == 1)).sum(axis=0)

    @cached_property
    def hits(self) -> NDArray[np.int64]:
        """int64[L]: images that have the label and are called so."""
        return (self.weights * ((self.targets == 1) & self.called)).sum(axis=0)

    @cached_property
    def calls(self) -> NDArray[np.int64]:
        """int64[L]: images called to have the label, of those where it is known."""
        return (self.weights * self.called).sum(axis=0)

    @property
    def precision(self) -> Floats:
        """float64[L]: of those called, the share that have it; 0 for a label never called."""
        return ratio(self.hits, self.calls, otherwise=0.0)

    @property
    def recall(self) -> Floats:
        """float64[L]: of those that have it, the share called; NaN for a label nobody has."""
        return ratio(self.hits, self.support)

    @property
    def f1(self) -> Floats:
        """float64[L]: harmonic mean of the two; NaN for a label nobody has."""
        return np.where(self.support > 0, ratio(2 * self.hits, self.calls + self.support), np.nan)

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """L curves, having the label against not."""
        rankings = (self.base or self)._rankings
        return tuple(ranking.curve(self.weights[:, k]) for k, ranking in enumerate(rankings))

    @cached_property
    def pooled(self) -> Curve:
        """The curve of all cells together."""
        return (self.base or self)._pooled_ranking.curve(self.weights.ravel())

    @cached_property
    def _rankings(self) -> tuple[Ranking, ...]:
        truth = self.targets == 1
        return tuple(Ranking.of(truth[:, k], self.probabilities[:, k]) for k in range(truth.shape[1]))

    @cached_property
    def _pooled_ranking(self) -> Ranking:
        return Ranking.of((self.targets == 1).ravel(), self.probabilities.ravel())

    @property
    def auroc(self) -> Floats:
        """float64[L]; NaN where one side is empty."""
        return np.array([curve.auroc for curve in self.curves])

    @property
    def auprc(self) -> Floats:
        """float64[L]: average precision; NaN where one side is empty."""
        return np.array([curve.average_precision if curve.defined else np.nan for curve in self.curves])


@metric("auroc_micro", uses="probabilities", scope="labels")
def auroc_micro(outcomes: LabelOutcomes) -> float:
    """Area under the ROC curve of all cells of images and labels together."""
    return _both_sides(outcomes.pooled).auroc


@metric("auprc_micro", uses="probabilities", scope="labels")
def auprc_micro(outcomes: LabelOutcomes) -> float:
    """Average precision of all cells of images and labels together."""
    return _both_sides(outcomes.pooled).average_precision


@metric("f1_micro", scope="labels")
def f1_micro(outcomes: LabelOutcomes) -> float:
    """F1 of all cells together, a label called where its probability is above 0.5."""
    both = int(outcomes.calls.sum() + outcomes.support.sum())
    if not both:
        raise Undefined("no image has a label, and none is called")
    return 2 * int(outcomes.hits.sum()) / both


@metric("exact_match", scope="labels")
def exact_match(outcomes: LabelOutcomes) -> float:
    """Share of images whose every label is called right, of those whose every label is known (subset accuracy)."""
    whole = (outcomes.targets >= 0).all(axis=1)
    right = (outcomes.called == (outcomes.targets == 1)).all(axis=1)
    counts = whole.astype(np.int64) if outcomes.counts is None else whole * outcomes.counts
    if not counts.sum():
        raise Undefined("of no image every label is known")
    return float((counts * right).sum() / counts.sum())


@metric("hamming_loss", higher_is_better=False, scope="labels")
def hamming_loss(outcomes: LabelOutcomes) -> float:
    """Share of the known cells of images and labels that are called wrong (Schapire and Singer, 1999)."""
    wrong = outcomes.called != (outcomes.targets == 1)
    return float((outcomes.weights * wrong).sum() / outcomes.weights.sum())


def _both_sides(curve: Curve) -> Curve:
    if not curve.defined:
        raise Undefined("images with a label and without are both needed")
    return curve


def rarest_label(targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[N] for `targets` int64[N, L]: the place, 1..L by falling frequency, of the rarest label an image has; 0 for
    none. Images drawn within these strata keep as many of the rarest label as there are."""
    has = targets == 1
    place = np.empty(has.shape[1], dtype=np.int64)
    place[np.argsort(-has.sum(axis=0), kind="stable")] = np.arange(1, has.shape[1] + 1)
    return (has * place).max(axis=1, initial=0)
