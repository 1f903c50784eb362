"""What a metric is, and the register of those there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eyetune.metrics.intervals import LEVEL, Clusters, Scorable, bias_allowing, bias_corrected, intervals
from eyetune.metrics.outcomes import Floats
from eyetune.registry import Registry

Scope = Literal["any", "ordered", "graded", "labels", "values"]

TASK_OF: Mapping[str, str] = {"labels": "multilabel", "values": "regression"}
"""The task of a scope; every other one is of classes."""


class Undefined(Exception):
    """A metric has no value for these outcomes; the text is the reason, put for a reader of the scores."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: as in metrics.json.
        function: outcomes (N >= 1) -> value; raises :class:`Undefined` when there is none. Outcomes are those of the
            metric's task: :class:`~eyetune.metrics.outcomes.Outcomes`, :class:`~eyetune.metrics.labels.LabelOutcomes`
            or :class:`~eyetune.metrics.values.ValueOutcomes`.
        higher_is_better: the direction.
        low, high: the range, ends included.
        uses: "predicted" when what is called is enough, "probabilities" when they all matter.
        scope: "any" classes; "ordered" classes only; "graded" = the five grades of diabetic retinopathy only; "labels"
            = several yes-or-no labels; "values" = numbers.
        macro: it is an unweighted mean over classes (labels), taken over those that have examples.
        labels: of classes, and of labels as well: the same mean over labels in place of classes.
        descriptive: says how results are, not how good: it cannot choose an epoch, and is not held against another's.
        biased: few images push it to one side, which its interval has to allow for.
    """

    name: str
    function: Callable[[Any], float]
    higher_is_better: bool
    low: float
    high: float
    uses: Literal["predicted", "probabilities"]
    scope: Scope
    macro: bool
    labels: bool = False
    descriptive: bool = False
    biased: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it scores: "classification", "multilabel", "regression"."""
        own = TASK_OF.get(self.scope, "classification")
        return (own, "multilabel") if self.labels else (own,)

    def __call__(self, outcomes: Any) -> float:
        """The value, finite. Raises :class:`Undefined` with the reason when there is none."""
        if not len(outcomes):
            raise Undefined("no image has a known class")
        value = float(self.function(outcomes))
        if not math.isfinite(value):
            raise Undefined("the value is not finite")
        return value

    def or_none(self, outcomes: Any) -> float | None:
        """The value; None when there is none."""
        try:
            return self(outcomes)
        except Undefined:
            return None

    def interval(self, values: Floats, estimate: float) -> list[float] | None:
        """[low, high] of the value `estimate`, from float64[R] values of its resamples (NaN where there is none)."""
        if self.biased:
            return bias_allowing(values, estimate, self.low, self.high)
        return bias_corrected(values, estimate)

    def gap_interval(self, values: Floats, gap: float) -> list[float] | None:
        """[low, high] of the difference `gap` of two values, from float64[R] differences in the same resamples (NaN
        where there is none). Two samples of other sizes are pushed to one side by different amounts."""
        if self.biased:
            reach = self.high - self.low
            return bias_allowing(values, gap, -reach, reach)
        return bias_corrected(values, gap)

    def entry(self, outcomes: Any, names: Sequence[str] = (), what: str = "classes") -> dict[str, Any]:
        """The value as metrics.json has it, without its interval: a reason where there is none, a note where the mean
        leaves out some of `names`, of the classes or labels (`what`)."""
        result: dict[str, Any] = {"value": None, "ci": [None, None]}
        try:
            result["value"] = self(outcomes)
        except Undefined as reason:
            return result | {"reason": str(reason)}
        if self.macro:
            absent = [name for name, support in zip(names, outcomes.support, strict=True) if not support]
            if absent:
                result["note"] = f"the mean leaves out {what} without examples: {', '.join(absent)}"
        return result


METRICS: Registry[Metric] = Registry("metric", "eyetune.metrics")


def metric(
    name: str,
    *,
    higher_is_better: bool = True,
    low: float = 0.0,
    high: float = 1.0,
    uses: Literal["predicted", "probabilities"] = "predicted",
    scope: Scope = "any",
    macro: bool = False,
    labels: bool = False,
    descriptive: bool = False,
    biased: bool = False,
) -> Callable[[Callable[[Any], float]], Metric]:
    """Register the decorated function as the metric `name`: the arguments are those of :class:`Metric`."""

    def decorate(function: Callable[[Any], float]) -> Metric:
        made = Metric(name, function, higher_is_better, low, high, uses, scope, macro, labels, descriptive, biased)
        return METRICS.add(name, made)

    return decorate


def of_task(task: str) -> dict[str, Metric]:
    """The metrics of a task ("classification", "multilabel", "regression"), by name."""
    return {name: entry for name, entry in METRICS if task in entry.tasks}


def macro(values: Floats, reason: str = "no class has examples") -> float:
    """The mean of the values that are not NaN. Raises Undefined with `reason` when all are."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        raise Undefined(reason)
    return float(defined.mean())


def add_intervals(
    metrics: Mapping[str, dict[str, Any]],
    outcomes: Scorable,
    clusters: Clusters,
    *,
    resamples: int,
    seed: int,
    method: str,
    also: Mapping[str, tuple[Metric, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Put an interval to every metric that has a value; returns what the intervals are.

    Args:
        metrics: name -> entry, of registered metrics.
        outcomes, clusters, resamples, seed: as for :func:`eyetune.metrics.intervals.intervals`.
        method: in words.
        also: further values by any name: how they are computed, and their entries.
    """
    named = {name: (METRICS.get(name), entry) for name, entry in metrics.items()} | dict(also or {})
    defined = {name: pair for name, pair in named.items() if pair[1]["value"] is not None}
    found = intervals(
        outcomes,
        clusters,
        {name: one.or_none for name, (one, _) in defined.items()},
        ends={name: one.interval for name, (one, _) in defined.items()},
        resamples=resamples,
        seed=seed,
    )
    for name, (_, entry) in defined.items():
        ends = found[name]
        if ends is None:
            entry["ci_reason"] = "too many resamples leave it without a value"
        else:
            entry["ci"] = ends
    biased = [name for name in metrics if METRICS.get(name).biased]
    return {
        "level": LEVEL,
        "method": method,
        "allowing_for_bias": biased,
        "unit": clusters.unit,
        "resamples": resamples,
        "seed": seed,
    }
