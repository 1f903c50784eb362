"""A calibration for a new site from a small labelled sample of it, and what it brings there.

A site differs in two ways that a calibration can mend: the network is surer, or less sure, than it should be of these
photographs (a temperature), and its classes have other shares (a shift of each class's log-odds). Both together are
bias-corrected temperature scaling (Alexandari, Kundaje and Shrikumar, "Maximum Likelihood with Bias-Corrected
Calibration is Hard-To-Beat at Label Shift Adaptation", 2020); clinical prediction models are recalibrated in the same
way, by slope and intercept (Steyerberg et al., Statistics in Medicine 23, 2004). Shifts cost more images than they are
worth where the shares are alike, so whether they are used is decided on the sample, by cross-validation.

What it brings is measured on patients that it was not fitted on, by cross-validation again, around all of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eyetune.metrics.intervals import RESAMPLES, Clusters
from eyetune.metrics.metric import METRICS, Metric
from eyetune.metrics.outcomes import Floats, Outcomes
from eyetune.metrics.part import Ends, Part
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.temperature import fit_shift, fit_temperature

FOLDS = 5

FEWEST = 30
"""Patients (images, where none is named) below which no calibration is fitted: docs/calibration.md, measured."""

FEWEST_FOR_SHIFTS = 50
"""Patients below which the classes keep their odds."""

_REACH = math.sqrt(1 + FOLDS / (FOLDS - 1))
"""Nadeau and Bengio's correction: the variance over J folds of n2 of the n1 + n2 patients each is not 1/J of that
between folds but 1/J + n2/n1."""

JUDGED = ("ece", "ece_equal_mass", "brier", "nll")
"""By what a calibration is judged: metrics that it changes on purpose."""


class Figure(Part):
    """A value with its 95% interval."""

    value: float | None
    ci: Ends = (None, None)


class Brought(Part):
    """What a site's calibration does to patients of the site that it was not fitted on."""

    folds: int = Field(ge=2)
    unit: str
    """What the folds and the intervals keep together: "patient", or "image" where none is named."""
    against: str
    """What `before` is: "the run's own calibration", or "no calibration"."""
    before: dict[str, Figure]
    after: dict[str, Figure]
    difference: dict[str, Figure]
    """After less before, on the same patients: below 0 is better."""

    @property
    def helps(self) -> bool:
        """Whether the loss (`nll`) falls beyond doubt: its whole interval lies below 0."""
        high = self.difference["nll"].ci[1]
        return high is not None and high < 0


@dataclass(frozen=True, eq=False)
class Scaling:
    """What is done to logits: divided by a temperature, and shifted by class where `bias` float64[K] is there."""

    temperature: float
    bias: Floats | None = None
    warnings: tuple[str, ...] = ()

    def __call__(self, logits: Floats) -> Floats:
        """Logits float64[N, K] -> the same."""
        scaled: Floats = logits / self.temperature
        return scaled if self.bias is None else scaled + self.bias


def patients_of(table: Predictions) -> Clusters:
    """Who the images of a sample are of, in one stratum: how many of each class a site sends is as uncertain as all
    else that is learnt from the sample, so neither folds nor resamples may hold it fixed."""
    return Clusters.of(table.patients, np.zeros(len(table), dtype=np.int64))


def folds(clusters: Clusters, seed: int = 0) -> NDArray[np.int64]:
    """int64[N], 0..4: the fold of each image. Those of a patient stay together; the folds have as many patients each,
    but for one. They are drawn without a look at the classes: folds of equal shares would flatter shifts of the odds,
    which are fitted to the very shares that they are then judged by (docs/calibration.md, measured)."""
    (everyone,) = clusters.strata
    of = np.empty(len(everyone), dtype=np.int64)
    of[np.random.default_rng(seed).permutation(everyone)] = np.arange(len(everyone)) % FOLDS
    return of[clusters.of_image]


def fit_scaling(table: Predictions, seed: int = 0, *, shifts: bool | None = None) -> Scaling:
    """A temperature, or a temperature and shifts where cross-validation by patient prefers them.

    Args:
        table: raw predictions of labelled images.
        seed: of the folds.
        shifts: whether there may be any; None: where there are patients enough for them.
    """
    logits, targets = table.logits, table.targets
    clusters = patients_of(table)
    temperature, warnings = fit_temperature(logits, targets)
    plain = Scaling(temperature, warnings=tuple(warnings))
    if not (_enough(clusters) if shifts is None else shifts):
        return plain
    losses = np.zeros(2)
    fold = folds(clusters, seed)
    for one in range(FOLDS):
        here, there = fold != one, fold == one
        ways = (
            Scaling(fit_temperature(logits[here], targets[here])[0]),
            Scaling(*fit_shift(logits[here], targets[here])),
        )
        losses += [_loss(way(logits[there]), targets[there]) for way in ways]
    return Scaling(*fit_shift(logits, targets)) if losses[1] < losses[0] else plain


def unseen(table: Predictions, seed: int = 0) -> Floats:
    """Logits float64[N, K] of labelled images, each scaled by what was fitted on the other folds' patients."""
    clusters = patients_of(table)
    fold = folds(clusters, seed + 1)  # others than those that `fit_scaling` decides by
    scaled = np.empty_like(table.logits)
    for one in range(FOLDS):
        # As with the whole sample, though four fifths of it may be too few.
        scaling = fit_scaling(table.take(fold != one), seed, shifts=_enough(clusters))
        scaled[fold == one] = scaling(table.logits[fold == one])
    return scaled


def judge(
    before: Predictions, after: Predictions, against: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> Brought:
    """What becomes of the probabilities of the same labelled images, before and after, and the difference.

    Resampling patients with both sides together knows nothing of how the fit itself would have turned out on others;
    by simulation such intervals of the difference hold it in two thirds to nine tenths of the samples. So `after` and
    `difference` reach 1.5 times as far, as Nadeau and Bengio ("Inference for the Generalization Error", 2003) correct
    the variance over folds that share what they were fitted on (docs/calibration.md, measured).
    """
    clusters = patients_of(before)
    sides = Outcomes.of_table(before), Outcomes.of_table(after)
    metrics = {name: METRICS.get(name) for name in JUDGED}
    values = np.empty((resamples, 2, len(metrics)))
    for place, counts in enumerate(clusters.draws(resamples, seed)):
        for side, outcomes in enumerate(sides):
            drawn = outcomes.drawn(counts)
            values[place, side] = [metric(drawn) for metric in metrics.values()]
    found: tuple[dict[str, Figure], ...] = ({}, {}, {})
    for column, (name, metric) in enumerate(metrics.items()):
        first, second = (metric(outcomes) for outcomes in sides)
        drawn_first, drawn_second = values[:, 0, column], values[:, 1, column]
        found[0][name] = _figure(first, metric.interval(drawn_first, first))
        found[1][name] = _figure(second, _wider(metric.interval(drawn_second, second), second, metric))
        gap, mean = drawn_second - drawn_first, second - first
        ends = metric.gap_interval(gap, mean)
        found[2][name] = _figure(mean, _wider(ends, mean))
    return Brought(
        folds=FOLDS,
        unit=clusters.unit,
        against=against,
        before=found[0],
        after=found[1],
        difference=found[2],
    )


def too_few(table: Predictions) -> str:
    """Why no calibration can be fitted on a table, in words; empty when one can."""
    known = table.labelled()
    classes = sorted(set(known.targets.tolist()))
    if len(classes) < 2:
        said = f"all of {table.classes[classes[0]]}" if classes else "none with a label"
        return f"its {len(known)} labelled images are {said}" if classes else "no image of it has a label"
    clusters = patients_of(known)
    count = len(clusters.strata[0])
    if count < FEWEST:
        return (
            f"its labelled images are of {count} {clusters.unit}s: with fewer than {FEWEST} a calibration is as likely "
            "to harm as to help"
        )
    return ""


def remarks(scaling: Scaling, table: Predictions, brought: Brought) -> list[str]:
    """What a reader of a site's calibration must not overlook."""
    counts = np.bincount(table.targets, minlength=len(table.classes))
    missing = [name for name, count in zip(table.classes, counts, strict=True) if not count]
    found = list(scaling.warnings)
    if missing:
        found.append(f"no image of {', '.join(missing)} in the sample: nothing is known of the odds there")
    if not brought.helps:
        value, (low, high) = brought.difference["nll"].value, brought.difference["nll"].ci
        ends = "" if low is None or high is None else f" ({low:+.3f} to {high:+.3f})"
        found.append(
            f"it is not shown to be better than {brought.against}: by cross-validation the loss changes by "
            f"{value:+.3f}{ends}"
        )
    return found


def _enough(clusters: Clusters) -> bool:
    """For shifts of the classes' odds."""
    return len(clusters.strata[0]) >= FEWEST_FOR_SHIFTS


def _loss(logits: Floats, targets: NDArray[np.int64]) -> float:
    """The summed negative log-likelihood."""
    below = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(below).sum(axis=1)) - below[np.arange(len(targets)), targets]).sum())


def _wider(ends: list[float] | None, value: float, metric: Metric | None = None) -> list[float] | None:
    """The interval of a `value` from cross-validation, within the metric's range."""
    low, high = (-math.inf, math.inf) if metric is None else (metric.low, metric.high)
    return None if ends is None else [min(max(value + _REACH * (end - value), low), high) for end in ends]


def _figure(value: float, ends: list[float] | None) -> Figure:
    return Figure(value=value, ci=(None, None) if ends is None else (ends[0], ends[1]))
