"""What the numbers of a head say: from what the network gave to a table of predictions, in NumPy alone.

`eyetune.train.answers` learns with the same heads and says where each comes from; whoever only reads them (an exported
model) needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, model_validator

from eyetune.metrics.part import Part
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.table import Table

Floats = NDArray[np.float64]

TINY = 1e-12
"""The least probability a class is given by a head whose probabilities may vanish: its logarithm must be a number."""


class Head(Part):
    """What a head was asked, and with what its numbers are read: the `task` of a model card."""

    kind: Literal["classification", "ordinal", "multilabel", "regression"] = "classification"
    head: Literal["softmax", "corn", "coral", "regression"] = "softmax"
    mean: FiniteFloat = 0.0
    std: FiniteFloat = 1.0
    thresholds: tuple[FiniteFloat, ...] | None = None
    cuts: tuple[FiniteFloat, ...] | None = None
    sigma: float = Field(default=0.5, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Head:
        if self.head != "softmax" and self.kind != "ordinal":
            raise ValueError(f"head {self.head} is for ordered classes, not for {self.kind}")
        return self

    def outputs(self, names: Sequence[str]) -> int:
        """How many numbers the head gives for these classes, labels, or the one number."""
        if self.head in ("corn", "coral"):
            return len(names) - 1
        return 1 if "regression" in (self.kind, self.head) else len(names)

    def tell(
        self,
        raw: NDArray[Any],
        names: Sequence[str],
        *,
        images: Sequence[str],
        patients: Sequence[str | None] | None = None,
        eyes: Sequence[str | None] | None = None,
        targets: NDArray[Any] | None = None,
    ) -> Table:
        """The table of N images: raw float[N, outputs], as the head gave it.

        Args:
            raw: of every image.
            names: the classes in their order, the labels, or the one name of the number.
            images, patients, eyes: of the images; None where nothing is known.
            targets: as :meth:`eyetune.data.records.Manifest.targets` has them; None where nothing is known.
        """
        none: list[str | None] = [None] * len(images)
        rows = (images, none if patients is None else patients, none if eyes is None else eyes)
        given = np.asarray(raw, dtype=np.float64)
        if self.kind == "regression":
            unknown = np.full(len(images), np.nan)
            number = (self.mean + self.std * given)[:, 0]
            return ValuePredictions(*rows, unknown if targets is None else targets, number, names[0])
        if self.kind == "multilabel":
            known = np.full((len(images), len(names)), -1) if targets is None else np.nan_to_num(targets, nan=-1)
            return LabelPredictions(*rows, known, given, names)
        truth = np.full(len(images), -1) if targets is None else targets
        logits = self.logits(given, len(names))
        ordered = True if self.kind == "ordinal" else None
        return Predictions(*rows, truth, logits, names, self.calls(given, len(names)), ordered)

    def logits(self, raw: Floats, count: int) -> Floats:
        """raw float64[N, outputs] -> float64[N, K], what a softmax turns into the probabilities of `count` classes: as
        the head gave it, or the logarithms of the probabilities."""
        if self.head == "softmax":
            return raw
        if self.head == "corn":  # the log-likelihoods, exactly: yes to every question below a class, no to its own
            zeros = np.zeros((len(raw), 1))
            yes = np.concatenate([zeros, np.logaddexp(0, -raw).cumsum(axis=1)], axis=1)
            return -(yes + np.concatenate([np.logaddexp(0, raw), zeros], axis=1))
        above = self.above(raw, count)
        ones, zeros = np.ones((len(raw), 1)), np.zeros((len(raw), 1))
        shares = np.concatenate([ones, above], axis=1) - np.concatenate([above, zeros], axis=1)
        logs: Floats = np.log(np.maximum(shares, TINY))
        return logs

    def above(self, raw: Floats, count: int) -> Floats:
        """raw float64[N, outputs] -> float64[N, K - 1], falling: P(y > k), of a head that knows an order."""
        if self.head == "corn":
            return np.exp(-np.logaddexp(0, -raw).cumsum(axis=1))
        if self.head == "coral":
            # A question's probability, or that of one before it where that is lower.
            falling: Floats = np.minimum.accumulate(np.exp(-np.logaddexp(0, -raw)), axis=1)
            return falling
        cuts = midpoints(count) if self.cuts is None else np.array(self.cuts)
        return _normal((self.mean + self.std * raw - cuts) / self.sigma)

    def calls(self, raw: Floats, count: int) -> NDArray[np.int64] | None:
        """int64[N]: the class called, by a head that knows an order; None: the most probable one.

        As many grades up as it is more likely above than not; of a grade learnt as a number, as thresholds it is above.
        """
        if self.head == "softmax":
            return None
        if self.head == "regression":
            thresholds = midpoints(count) if self.thresholds is None else np.array(self.thresholds)
            return np.asarray((self.mean + self.std * raw > thresholds).sum(axis=1), dtype=np.int64)
        return np.asarray((self.above(raw, count) > 0.5).sum(axis=1), dtype=np.int64)


def midpoints(classes: int) -> Floats:
    """float64[K - 1]: half-way between the grades 0..K-1."""
    return np.arange(classes - 1, dtype=np.float64) + 0.5


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _normal(values: Floats) -> Floats:
    """The share of a standard normal distribution below each value."""
    shares: Floats = 0.5 * _erfc(-values / math.sqrt(2)) if values.size else values
    return shares
