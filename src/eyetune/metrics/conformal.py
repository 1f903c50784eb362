"""Split conformal prediction: sets of classes that hold the true one as often as promised.

A class is in the set when its probability is high enough: score 1 - probability, at or below a quantile of the true
classes' scores on validation (Sadinle, Lei and Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error
Levels", 2019). Marginal: one quantile for all. By class: one for each class (Mondrian; Vovk, "Conditional Validity of
Inductive Conformal Predictors", 2012).

Images of one patient are not exchangeable with those of others one by one; patients are. So a patient counts once,
shared by its images, and one patient more, of whom nothing is known, counts as infinitely strange (Lee, Barber and
Willett, "Distribution-free inference with hierarchical data", 2023). With one image a patient that is the usual
ceil((n + 1) * level) / n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eyetune.metrics.intervals import Clusters, share_entries
from eyetune.metrics.outcomes import Floats, Outcomes
from eyetune.metrics.part import Part

LEVEL = 0.9
"""Share of images whose set shall hold the true class."""

Quantile = float | None
"""None: too few images for the level, every class is in the set."""


class Conformal(Part):
    """The quantiles of validation, of the score 1 - calibrated probability of the true class."""

    score: str = "1 - probability"
    level: float = Field(default=LEVEL, gt=0, lt=1)
    marginal: Quantile
    by_class: tuple[Quantile, ...]

    def sets(self, probabilities: Floats, *, by_class: bool = False) -> NDArray[np.bool_]:
        """Calibrated probabilities float64[N, K] -> bool[N, K]: which classes are in the set of each image."""
        quantiles = self.by_class if by_class else [self.marginal] * probabilities.shape[1]
        limits = np.array([np.inf if one is None else one for one in quantiles])
        inside: NDArray[np.bool_] = 1 - probabilities <= limits
        return inside


def fit_conformal(outcomes: Outcomes, clusters: Clusters, chosen_on: str) -> tuple[Conformal, list[str]]:
    """The quantiles of labelled images with calibrated probabilities; and which classes have too few for the level."""
    scores = 1 - outcomes.probabilities[np.arange(len(outcomes)), outcomes.targets]
    by_class = []
    for k in range(outcomes.num_classes):
        mine = outcomes.targets == k
        by_class.append(quantile(scores[mine], clusters.of_image[mine], LEVEL))
    marginal = quantile(scores, clusters.of_image, LEVEL)
    few = sum(one is None for one in by_class)
    warnings = []
    if few:
        needed = f"{LEVEL:.0%} need {round(LEVEL / (1 - LEVEL))} {clusters.unit}s of a class"
        which = "1 class is" if few == 1 else f"{few} classes are"
        warnings.append(f"conformal sets by class: {which} in every set, for {chosen_on} has too few ({needed})")
    return Conformal(marginal=marginal, by_class=tuple(by_class)), warnings


def quantile(scores: Floats, clusters: NDArray[np.int64], level: float) -> Quantile:
    """The smallest of `scores` float64[N] that is at least as large as `level` of them, each of the `clusters` int64[N]
    counting once, and one more as infinity; None when that is the infinite one."""
    if not len(scores):
        return None
    _, of, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    upto = np.cumsum(1 / sizes[of][order])
    needed = level * (len(sizes) + 1)
    # Rounding must not make 9 of 9 less than 0.9 times 10.
    place = int(np.searchsorted(upto, needed - 1e-9))
    return None if place == len(scores) else float(scores[order][place])


def conformal_scores(
    fitted: Conformal,
    outcomes: Outcomes,
    clusters: Clusters,
    classes: Sequence[str],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Coverage and size of the sets on labelled images with calibrated probabilities, as in metrics.json.

    For `marginal` and `by_class` each: `coverage`, `mean_size`, `single` and `empty` (share of images whose set has one
    class, or none), and the coverage of the images of each class under `by_class`.
    """
    result: dict[str, Any] = {"level": fitted.level}
    rows = np.arange(len(outcomes))
    of_class = outcomes.targets[:, None] == np.arange(outcomes.num_classes)
    whole = np.concatenate([np.ones((len(outcomes), 1), dtype=bool), of_class], axis=1)
    for name, mondrian in (("marginal", False), ("by_class", True)):
        sets = fitted.sets(outcomes.probabilities, by_class=mondrian)
        covered = sets[rows, outcomes.targets]
        found = share_entries(clusters, whole & covered[:, None], whole, resamples=resamples, seed=seed)
        sizes = sets.sum(axis=1)
        result[name] = {
            "coverage": found[0],
            "mean_size": float(sizes.mean()),
            "single": float((sizes == 1).mean()),
            "empty": float((sizes == 0).mean()),
            "by_class": dict(zip(classes, found[1:], strict=True)),
        }
    return result
