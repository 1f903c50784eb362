"""Selective prediction: leave the images the model is least certain of to a reader, and err less on the rest.

Images are kept by falling certainty, the (calibrated) probability of the most probable class; the risk is the share of
wrong calls among those kept (Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", 2017). AURC is
the mean risk over the coverages 1/N, 2/N, … 1 (Geifman, Uziel and El-Yaniv, 2019). Images of equal certainty come in
random order: the mean over all orders is taken, exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eyetune.metrics.intervals import Clusters, resampled
from eyetune.metrics.outcomes import Floats, Outcomes

COVERAGES = (0.8, 0.9)
"""Coverages whose error is reported."""

_POINTS = 100
"""Points of the curve in metrics.json."""


class RiskCoverage:
    """The risk of N labelled images at every coverage.

    Args:
        certainty: float64[N].
        wrong: bool[N], whether the call was wrong.
    """

    def __init__(self, certainty: Floats, wrong: NDArray[np.bool_]) -> None:
        self.order = np.argsort(-certainty, kind="stable")
        falling = certainty[self.order]
        self.starts = np.flatnonzero(np.append(True, falling[1:] != falling[:-1]))
        self.wrong = wrong[self.order]

    @classmethod
    def of(cls, outcomes: Outcomes) -> RiskCoverage:
        """By the probability of the most probable class; wrong is what the model calls wrong."""
        return cls(outcomes.probabilities.max(axis=1), outcomes.predicted != outcomes.targets)

    def groups(self, counts: NDArray[np.int64] | None = None) -> tuple[Floats, Floats]:
        """Images and wrong calls among them, float64[M] each, of every different certainty, falling; image i counted
        `counts[i]` times."""
        drawn = np.ones(len(self.order)) if counts is None else counts[self.order].astype(np.float64)
        return np.add.reduceat(drawn, self.starts), np.add.reduceat(drawn * self.wrong, self.starts)

    def aurc(self, counts: NDArray[np.int64] | None = None) -> float:
        """Mean risk over all coverages."""
        images, errors = self.groups(counts)
        images, errors = images[images > 0], errors[images > 0]
        upto, wrong = np.cumsum(images), np.cumsum(errors)
        total = int(upto[-1])
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, total + 1))])
        before = (upto - images).astype(np.int64)
        # After t of a group of m images with e errors, on average: (errors before + e t / m) / (images before + t).
        rate = errors / images
        start = (wrong - errors) - rate * before
        risks = errors + start * (harmonic[upto.astype(np.int64)] - harmonic[before])
        return float(risks.sum() / total)

    def risk_at(self, coverages: Floats, counts: NDArray[np.int64] | None = None) -> Floats:
        """The risk of the most certain share of the images, float64[C] for coverages float64[C], 0 < c <= 1."""
        images, errors = self.groups(counts)
        upto = np.concatenate([[0.0], np.cumsum(images)])
        wrong = np.concatenate([[0.0], np.cumsum(errors)])
        kept = coverages * upto[-1]
        risk: Floats = np.interp(kept, upto, wrong) / kept
        return risk


def selective_scores(outcomes: Outcomes, clusters: Clusters, *, resamples: int, seed: int = 0) -> dict[str, Any]:
    """Selective prediction as it stands in metrics.json under `selective`.

    Returns `aurc`; `aurc_of_chance`, what it would be if certainty said nothing (the error over all images);
    `aurc_of_best`, if every wrong call were less certain than every right one; `error_at` {coverage: metric}; `curve`.
    """
    curve = RiskCoverage.of(outcomes)
    wrong = outcomes.predicted != outcomes.targets
    wanted = np.array(COVERAGES)
    statistics = {
        "aurc": lambda counts: np.array([curve.aurc(counts)]),
        "error_at": lambda counts: curve.risk_at(wanted, counts),
    }
    found = resampled(clusters, statistics, resamples=resamples, seed=seed)
    grid = np.unique(np.ceil(np.linspace(0, 1, _POINTS + 1)[1:] * len(outcomes))) / len(outcomes)
    return {
        "certainty": "probability of the most probable class",
        "aurc": found["aurc"][0],
        "aurc_of_chance": float(wrong.mean()),
        "aurc_of_best": RiskCoverage(-wrong.astype(np.float64), wrong).aurc(),
        "error_at": {f"{c:g}": entry for c, entry in zip(COVERAGES, found["error_at"], strict=True)},
        "curve": [
            {"coverage": float(c), "risk": float(risk)} for c, risk in zip(grid, curve.risk_at(grid), strict=True)
        ],
    }
