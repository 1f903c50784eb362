"""Out-of-distribution scores of a dataset held against those of validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eyetune.metrics.conformal import quantile
from eyetune.metrics.intervals import RESAMPLES, Clusters, interval_entry
from eyetune.metrics.outcomes import Floats, Ranking
from eyetune.metrics.part import Part
from eyetune.metrics.table import Table

LEVEL = 0.95
"""Share of validation at or below the threshold."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Strangeness(Part):
    """The score, and above which value an image is unlike 95% of validation."""

    score: str
    threshold: float = Field(ge=0)
    chosen_on: str
    fitted_on: int = Field(ge=1)
    """Training images whose features the score compares with."""
    tensors: str
    """SHA-256 of calibration.safetensors, which holds what computes the score."""

    def flagged(self, scores: Floats) -> NDArray[np.bool_]:
        """Scores float64[N] -> bool[N]: above the threshold."""
        above: NDArray[np.bool_] = scores > self.threshold
        return above


def choose_threshold(table: Table) -> float | None:
    """The score that 95% of the patients of `table` do not exceed, one unknown patient counted as infinitely strange
    (as in conformal prediction: an image like these exceeds it in at most 5%); the highest there is where they are
    fewer than 19; None without scores."""
    if table.ood is None or not len(table):
        return None
    found = quantile(table.ood, _clusters(table).of_image, LEVEL)
    return float(table.ood.max()) if found is None else found


def strangeness_scores(
    rule: Strangeness, table: Table, val: Table | None, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """How strange the images of a table are, as it stands in metrics.json under `ood`; nothing where none has a score.

    Args:
        rule: of the run.
        table: labelled or not.
        val: the run's validation split; None, or without scores, leaves out the comparison with it.
        resamples: how many the interval rests on.
        seed: of the resampling.

    Returns `score`, `threshold`, `share_above`, `quantiles` (5, 25, 50, 75, 95%), and `auroc_against_val`: how well the
    score tells these images from validation's, 0.5 is not at all.
    """
    if table.ood is None or not len(table):
        return {}
    result: dict[str, Any] = {
        "score": rule.score,
        "threshold": rule.threshold,
        "chosen_on": rule.chosen_on,
        "n": len(table),
        "share_above": float(rule.flagged(table.ood).mean()),
        "quantiles": [{"share": share, "score": float(np.quantile(table.ood, share))} for share in QUANTILES],
    }
    if val is None or val.ood is None or not len(val):
        return result
    ranking = Ranking.of(
        np.concatenate([np.ones(len(table), dtype=bool), np.zeros(len(val), dtype=bool)]),
        np.concatenate([table.ood, val.ood]),
    )
    pairs = zip(_clusters(table).draws(resamples, seed), _clusters(val).draws(resamples, seed + 1), strict=True)
    values = np.array([ranking.curve(np.concatenate(pair)).auroc for pair in pairs])
    return result | {"auroc_against_val": interval_entry(values, ranking.curve().auroc)}


def _clusters(table: Table) -> Clusters:
    """By patient, in one stratum: a score needs no truth."""
    patients: Sequence[str | None] = table.patients
    return Clusters.of(patients, np.zeros(len(table), dtype=np.int64))
