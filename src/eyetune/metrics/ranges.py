"""Prediction intervals of a number: split conformal prediction.

The absolute error that nine tenths of the validation patients do not exceed, to either side of what is predicted
(Lei, G'Sell, Rinaldo, Tibshirani and Wasserman, "Distribution-Free Predictive Inference for Regression", 2018; a
patient counts once, shared by the images: Lee, Barber and Willett, 2023). It is as wide for every image: it promises
the share over all images, not within the old or within the young.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from eyetune import __version__
from eyetune.metrics.conformal import LEVEL, Quantile, quantile
from eyetune.metrics.fitted import FEW_IMAGES, Fitted, Said, wrong_task
from eyetune.metrics.intervals import RESAMPLES, share_entries
from eyetune.metrics.part import Part, Sample
from eyetune.metrics.predictions import ValuePredictions
from eyetune.metrics.scores import sample


class Interval(Part):
    """How far to either side of a predicted number the true one lies, for a share `level` of the images."""

    level: float = Field(default=LEVEL, gt=0, lt=1)
    half_width: Quantile
    """In the units of the number; None: too few patients for the level, no interval holds."""


class ValueCalibration(Fitted):
    """calibration.json of a run that learnt a number: an interval, as there are no probabilities to scale."""

    interval: Interval

    def apply(self, predictions: Said) -> Said:
        """The predictions as they are: a number is not changed."""
        if not isinstance(predictions, ValuePredictions):
            raise wrong_task(predictions, "a number")
        return predictions


def fit_range(table: ValuePredictions, dataset: str, model: str | None) -> ValueCalibration:
    """The interval of the labelled rows of a table, one at least."""
    known = table.labelled()
    outcomes, clusters = sample(known)
    half_width = quantile(np.abs(outcomes.errors), clusters.of_image, LEVEL)
    patients = {patient for patient in known.patients if patient is not None}
    warnings = []
    if half_width is None:
        needed = f"{LEVEL:.0%} need {round(LEVEL / (1 - LEVEL))} {clusters.unit}s"
        warnings.append(f"no prediction interval: {dataset} has too few labelled images ({needed})")
    elif len(known) < FEW_IMAGES:
        warnings.append(
            f"{dataset} has {len(known)} labelled images: an interval from fewer than {FEW_IMAGES} may hold a share of "
            "others that is some percentage points off"
        )
    return ValueCalibration(
        classes=table.names,
        model=model,
        fitted_on=Sample(dataset=dataset, n=len(known), patients=len(patients) or None, unit=clusters.unit),
        interval=Interval(half_width=half_width),
        warnings=tuple(warnings),
        versions={"eyetune": __version__, "numpy": np.__version__},
    )


def range_scores(
    interval: Interval, table: ValuePredictions, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What the interval does on the labelled rows of a table, as in metrics.json under `prediction_interval`: `level`,
    `half_width`, and `coverage`, the share of images whose true number lies inside; empty without an interval."""
    if interval.half_width is None:
        return {}
    outcomes, clusters = sample(table.labelled())
    inside = np.abs(outcomes.errors) <= interval.half_width
    (coverage,) = share_entries(
        clusters, inside[:, None], np.ones((len(inside), 1), dtype=bool), resamples=resamples, seed=seed
    )
    return {"level": interval.level, "half_width": interval.half_width, "coverage": coverage}


def ends(interval: Interval, predicted: float) -> Sequence[float | None]:
    """(low, high) of one predicted number; None without an interval."""
    if interval.half_width is None:
        return None, None
    return predicted - interval.half_width, predicted + interval.half_width
