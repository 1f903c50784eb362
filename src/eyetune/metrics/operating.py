"""Operating points: thresholds fixed on validation, and what they do elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eyetune.metrics.intervals import Clusters, share_entries
from eyetune.metrics.outcomes import Curve, Floats, Outcomes, Ranking
from eyetune.metrics.part import Part

TARGETS: tuple[tuple[str, int], ...] = (("specificity", 95), ("sensitivity", 95))
"""What a threshold has to reach on validation, in percent: one for few false alarms, one for few misses."""

MOST_CLASSES = 20
"""Beyond so many classes without an order, a threshold for each says little and fills pages."""

_MEASURES = ("sensitivity", "specificity", "ppv", "npv")


class OperatingPoint(Part):
    """A threshold on the summed probability of some classes: at or above it an image is called positive."""

    name: str
    """As in "grade >= 2 at 95% specificity"."""
    positive: str
    classes: tuple[int, ...] = Field(min_length=1)
    """Indices of the classes whose calibrated probabilities are summed."""
    threshold: float = Field(ge=0, le=1)
    chosen_on: str
    target: dict[str, float]

    def scores(self, probabilities: Floats) -> Floats:
        """Calibrated probabilities float64[N, K] -> float64[N], what the threshold is compared with."""
        found: Floats = probabilities[:, list(self.classes)].sum(axis=1)
        return found

    def called(self, probabilities: Floats) -> NDArray[np.bool_]:
        """Calibrated probabilities float64[N, K] -> bool[N]: called positive."""
        return self.scores(probabilities) >= self.threshold

    def is_positive(self, targets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Targets int64[N] -> bool[N]: truly positive."""
        return np.isin(targets, self.classes)


def questions(classes: Sequence[str], *, graded: bool, ordered: bool) -> dict[str, tuple[int, ...]]:
    """What can be asked of an image with a yes or a no: name -> the classes that mean yes.

    Of two classes, whether it is the second one; of classes with an order, whether it is one of them or a higher one;
    else, for each class, whether it is that one.
    """
    count = len(classes)
    if count == 2:
        return {classes[1]: (1,)}
    if graded:
        return {f"grade >= {k}": tuple(range(k, count)) for k in range(1, count)}
    if ordered:
        return {f"{classes[k]} or higher": tuple(range(k, count)) for k in range(1, count)}
    return {name: (k,) for k, name in enumerate(classes)} if count <= MOST_CLASSES else {}


def choose_points(
    outcomes: Outcomes, asked: dict[str, tuple[int, ...]], chosen_on: str
) -> tuple[list[OperatingPoint], list[str]]:
    """The operating points of every question, from calibrated probabilities of labelled images; and what to say of
    those that are missing or rest on few images."""
    points, warnings = [], []
    for positive, members in asked.items():
        truth = np.isin(outcomes.targets, members)
        curve = Ranking.of(truth, outcomes.probabilities[:, list(members)].sum(axis=1)).curve()
        if not curve.defined:
            what = "no image" if not truth.any() else "every image"
            warnings.append(f"no threshold for {positive}: {what} of {chosen_on} is positive")
            continue
        for target, percent in TARGETS:
            threshold = threshold_for(curve, target, percent)
            if threshold is None:
                warnings.append(f"no threshold for {positive} reaches {percent}% {target} on {chosen_on}")
                continue
            others = int(curve.alarms[-1] if target == "specificity" else curve.hits[-1])
            if others * (100 - percent) < 200:
                side = "negative" if target == "specificity" else "positive"
                warnings.append(
                    f"{positive} at {percent}% {target}: chosen on {others} {side} images of {chosen_on}, "
                    f"{others * (100 - percent) // 100} of which may be called wrong: expect another {target} elsewhere"
                )
            points.append(
                OperatingPoint(
                    name=f"{positive} at {percent}% {target}",
                    positive=positive,
                    classes=members,
                    threshold=threshold,
                    chosen_on=chosen_on,
                    target={target: percent / 100},
                )
            )
    return points, warnings


def threshold_for(curve: Curve, target: str, percent: int) -> float | None:
    """The threshold that reaches `percent` of the target on the curve and is best in the other measure.

    Half-way to the next lower score, so that rounding decides nothing; None where only calling nothing positive does.
    """
    positives, negatives = int(curve.hits[-1]), int(curve.alarms[-1])
    if target == "specificity":  # in whole numbers: nothing is lost to rounding
        allowed = 100 * (negatives - curve.alarms) >= percent * negatives
        place = int(np.argmax(curve.hits * allowed))
    else:
        first = int(np.argmax(100 * curve.hits >= percent * positives))
        place = int(np.searchsorted(curve.alarms, curve.alarms[first], side="right")) - 1
    if not curve.hits[place]:
        return None
    here = min(1.0, float(curve.thresholds[place]))  # a sum of probabilities may be 1.0000000000000002
    if place + 1 == len(curve.thresholds):
        return 0.0
    middle = (here + float(curve.thresholds[place + 1])) / 2
    return middle if middle > curve.thresholds[place + 1] else here


def point_scores(
    points: Sequence[OperatingPoint], outcomes: Outcomes, clusters: Clusters, *, resamples: int, seed: int = 0
) -> list[dict[str, Any]]:
    """What the points do on labelled images with calibrated probabilities, as it stands in metrics.json.

    `ppv` and `npv` hold at this dataset's share of positives (`positives` of `n`) and at no other.
    """
    if not points:
        return []
    parts, wholes = [], []
    for point in points:
        called, truth = point.called(outcomes.probabilities), point.is_positive(outcomes.targets)
        parts += [called & truth, ~called & ~truth, called & truth, ~called & ~truth]
        wholes += [truth, ~truth, called, ~called]
    entries = share_entries(clusters, np.stack(parts, axis=1), np.stack(wholes, axis=1), resamples=resamples, seed=seed)
    rows = []
    for place, point in enumerate(points):
        row = point.model_dump(mode="json", exclude={"classes"})
        row |= {"n": len(outcomes), "positives": int(point.is_positive(outcomes.targets).sum())}
        rows.append(row | dict(zip(_MEASURES, entries[4 * place : 4 * place + 4], strict=True)))
    return rows
