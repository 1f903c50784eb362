"""How far what a model says of its own certainty is from what comes true.

The certainty of an image is the probability of its most probable class, and it comes true when that class is the true
one. Bins of equal width: Naeini et al., 2015; Guo et al., 2017. Bins of equal mass: Nguyen and O'Connor, 2015; Nixon
et al., 2019.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eyetune.metrics.intervals import wilson
from eyetune.metrics.outcomes import Certainty, Floats, Outcomes

CALIBRATION_BINS = 15
"""Bins of certainty in the expected calibration errors and reliability diagrams, as in Guo et al., 2017."""

_CHANCE = 200
"""Draws that say which calibration error perfectly calibrated probabilities would show on as many images."""


def width_bins(certainty: Floats) -> NDArray[np.int64]:
    """float64[N] in 0..1 -> the bin of equal width, upper end included, int64[N] in 0..14."""
    return np.clip(np.ceil(certainty * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)


def reliability_bins(outcomes: Outcomes, clusters: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The bins of a reliability diagram, those without images left out.

    Args:
        outcomes: N images.
        clusters: int64[N], who an image is of: eyes of one patient are not two observations.

    Returns for each bin `low`, `high` (its ends), `n` (images), `confidence` (mean certainty), `accuracy`, and `ci`,
    the accuracy's 95% interval: Wilson's (1927), with patients for its number of observations.
    """
    value = outcomes.probabilities.max(axis=1)
    correct = outcomes.most_probable == outcomes.targets
    bins = width_bins(value)
    rows = []
    for place in np.unique(bins).tolist():
        inside = bins == place
        accuracy = float(correct[inside].mean())
        rows.append(
            {
                "low": place / CALIBRATION_BINS,
                "high": (place + 1) / CALIBRATION_BINS,
                "n": int(inside.sum()),
                "confidence": float(value[inside].mean()),
                "accuracy": accuracy,
                "ci": wilson(accuracy, len(np.unique(clusters[inside]))),
            }
        )
    return rows


def error_by_chance(outcomes: Outcomes, seed: int = 0) -> dict[str, float]:
    """The mean `ece` and `ece_equal_mass` if these very probabilities were perfectly calibrated: with few images they
    are well above 0 by chance alone (consistency resampling: Bröcker and Smith, 2007).

    Whether the most probable class is right is drawn 200 times with the probability that the model gave it; images are
    drawn independently.
    """
    rng = np.random.default_rng(seed)
    base = outcomes.certainty
    bins = width_bins(base.value)
    errors = np.zeros((_CHANCE, 2))
    for place in range(_CHANCE):
        drawn = Certainty(base.order, base.value, rng.random(len(base.value)) < base.value, base.starts)
        gaps = np.bincount(bins, weights=drawn.correct - base.value)
        errors[place] = np.abs(gaps).sum() / len(bins), drawn.equal_mass_error(CALIBRATION_BINS)
    return {"ece": float(errors[:, 0].mean()), "ece_equal_mass": float(errors[:, 1].mean())}
