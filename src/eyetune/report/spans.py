"""Scores as marks with their intervals on one line: of several datasets, runs or strategies, all on the same scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eyetune.metrics.metric import METRICS
from eyetune.report.content import Score

#: Where guessing lands.
CHANCE = {"auroc_macro": 0.5, "auroc_micro": 0.5, "referable_auroc": 0.5, "kappa": 0.0, "qwk": 0.0}


@dataclass(frozen=True)
class Span:
    """One score: where it and its interval lie, in percent of the line; None where it has no place on one."""

    name: str
    score: Score
    at: float | None = None
    start: float | None = None
    width: float | None = None


@dataclass(frozen=True)
class Spans:
    """Scores of one metric on a line from `low` to `high`, with `chance` marked at that percentage of it.

    `low` and `high` are None for a metric that has no upper end: its scores stand there as numbers alone.
    """

    lines: Sequence[Span]
    low: float | None = None
    high: float | None = None
    chance: float | None = None

    @property
    def known(self) -> bool:
        """Whether any of the scores has a value."""
        return any(line.score.value is not None for line in self.lines)


def spans(metric: str, scores: Iterable[tuple[str, Score]]) -> Spans:
    """(name, score) of one metric on one line: from 0 to 1, or from -1 where a value or an interval lies below 0."""
    given = list(scores)
    high = METRICS.get(metric).high if metric in METRICS else math.inf
    if high == math.inf:
        return Spans([Span(name, score) for name, score in given])
    ends = [value for _, score in given for value in (score.value, *score.ci) if value is not None]
    low = -1.0 if min(ends, default=0.0) < 0 else 0.0

    def place(value: float) -> float:
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    lines = []
    for name, score in given:
        at = None if score.value is None else place(score.value)
        start = width = None
        if at is not None and score.ci[0] is not None and score.ci[1] is not None:
            start = place(score.ci[0])
            width = round(place(score.ci[1]) - start, 2)
        lines.append(Span(name, score, at, start, width))
    chance = CHANCE.get(metric)
    return Spans(lines, low, high, place(chance) if chance is not None and chance > low else None)
