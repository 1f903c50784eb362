"""Is an export the model it was made of? Both look at the same photographs; what differs too much is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eyetune.errors import RunError
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.predicting.sheet import Checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.metrics.heads import Head
    from eyetune.metrics.strangeness import Strangeness
    from eyetune.metrics.table import Table

TOLERANCES = {"float32": 1e-4, "int8": 0.1}
"""Largest difference of a calibrated probability (of a number: in standard deviations of the training images)."""

LEAST_EQUAL = {"float32": 0.99, "int8": 0.9}
"""Least share of images that are called the same, and of those that are or are not flagged as out of distribution; of
few images, all but one. In float32 a call changes where two classes are equally likely to within the tolerance."""

_AT_THRESHOLD = 1e-4
"""Relative: a score so near to the threshold of what is out of distribution lies on neither side of it."""


def compare(
    ours: Table, theirs: Table, *, split: str, numbers: str, head: Head, rule: Strangeness | None = None
) -> Checked:
    """What an export said of photographs, held against what its run said: two tables, calibrated alike.

    Args:
        ours: of the run.
        theirs: of the export.
        split: which photographs they are.
        numbers: what the export computes in, a key of :data:`TOLERANCES`.
        head: how the head's numbers are read.
        rule: the run's own for what is out of distribution.
    """
    equal = float(_equal(ours, theirs).mean())
    if rule is not None and ours.ood is not None and theirs.ood is not None:
        same = rule.flagged(ours.ood) == rule.flagged(theirs.ood)
        # The threshold may be the score of one of these very images, which then falls on either side of itself.
        equal = min(equal, float((same | np.isclose(ours.ood, rule.threshold, rtol=_AT_THRESHOLD)).mean()))
    return Checked(
        images=len(ours),
        split=split,
        probabilities=float(np.abs(_said(ours, head) - _said(theirs, head)).max()),
        equal_calls=equal,
        tolerance=TOLERANCES[numbers],
        least_equal=LEAST_EQUAL[numbers],
    )


def refuse(found: Checked, what: str) -> None:
    """Raise RunError, with the numbers, when an export differs from its run by more than it may."""
    unlike = round((1 - found.equal_calls) * found.images)
    if found.probabilities <= found.tolerance and unlike <= max(1, (1 - found.least_equal) * found.images):
        return
    raise RunError(
        f"{what} is not what its run is, so nothing was written. On {found.images} images of {found.split} a "
        f"probability differs by up to {found.probabilities:.2g} (allowed: {found.tolerance:g}), and "
        f"{found.equal_calls:.1%} are called and flagged alike (needed: {found.least_equal:.0%}, or all but one)."
    )


def line(found: Checked) -> str:
    """The figures, for people."""
    return (
        f"checked against the run on {found.images} images of {found.split}: largest difference of a probability "
        f"{found.probabilities:.1e} (allowed: {found.tolerance:g}), {found.equal_calls:.1%} called alike"
    )


def _equal(ours: Table, theirs: Table) -> NDArray[np.bool_]:
    """bool[N]: called the same; a number always is."""
    if isinstance(ours, LabelPredictions) and isinstance(theirs, LabelPredictions):
        return np.asarray((ours.predicted == theirs.predicted).all(axis=1))
    if isinstance(ours, Predictions) and isinstance(theirs, Predictions):
        return np.asarray(ours.predicted == theirs.predicted)
    return np.ones(len(ours), dtype=bool)


def _said(table: Table, head: Head) -> NDArray[np.float64]:
    if isinstance(table, ValuePredictions):
        return table.predicted / head.std
    assert isinstance(table, (Predictions, LabelPredictions))
    return table.probabilities
