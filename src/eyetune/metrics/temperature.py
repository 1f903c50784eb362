"""One number that makes probabilities mean what they say: the temperature (Guo et al., 2017)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eyetune.metrics.intervals import interval_entry
from eyetune.metrics.outcomes import Floats
from eyetune.metrics.part import Ends, Part

HOTTEST = 20.0
"""The highest temperature; 1 / HOTTEST is the lowest. At either end it says something about the sample, not a value."""

_LARGEST_GAP = 1e6
"""Logits further than this below the largest are taken for this far: their share is 0 at every temperature."""


class Temperature(Part):
    """What logits are divided by."""

    value: float = Field(gt=0, allow_inf_nan=False)
    ci: Ends = (None, None)


def fit_temperature(logits: Floats, targets: NDArray[np.int64]) -> tuple[float, list[str]]:
    """The temperature with the smallest negative log-likelihood (Guo et al., 2017), and what is wrong with it if not
    inside its bounds.

    The loss is convex in 1 / temperature: its slope has one root, found by Brent's method.

    Args:
        logits: float64[N, K], N >= 1.
        targets: int64[N], 0..K-1.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    gaps = _gaps(logits)
    images = np.arange(len(targets))

    def slope(log_inverse: float) -> float:
        scaled = np.exp(gaps * math.exp(log_inverse))
        expected = (scaled * gaps).sum(axis=1) / scaled.sum(axis=1)
        return float((expected - gaps[images, targets]).mean())

    end = math.log(HOTTEST)
    if not gaps.any():
        return 1.0, ["every class has the same logit in every image: no temperature says anything; left at 1"]
    if slope(end) <= 0:
        return 1.0, ["no image speaks against ever surer probabilities: the temperature has no lower bound; left at 1"]
    if slope(-end) >= 0:
        return HOTTEST, [f"the network knows nothing of these images: the temperature is at its end, {HOTTEST:g}"]
    return math.exp(-float(brentq(slope, -end, end, xtol=1e-12))), []


def fit_shift(logits: Floats, targets: NDArray[np.int64], width: float = 1.0) -> tuple[float, Floats]:
    """A temperature and a shift of each class's log-odds, float64[K] with mean 0, for a site whose classes have other
    shares (bias-corrected temperature scaling: Alexandari, Kundaje and Shrikumar, 2020).

    The shifts are held back by a normal prior around 0 of standard deviation `width`: a class with few images, or none,
    keeps its odds. The penalised loss is convex in 1 / temperature and the shifts. Arguments as for
    :func:`fit_temperature`.
    """
    from scipy.optimize import minimize

    gaps, truth = _gaps(logits), np.eye(logits.shape[1])[targets]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        inverse, shift = parameters[0], parameters[1:]
        scaled = inverse * gaps + shift
        scaled -= scaled.max(axis=1, keepdims=True)
        total = np.log(np.exp(scaled).sum(axis=1))
        rest = np.exp(scaled - total[:, None]) - truth
        slope = np.concatenate([[(rest * gaps).sum()], rest.sum(axis=0) + shift / width**2])
        value = float((total - (truth * scaled).sum(axis=1)).sum() + (shift**2).sum() / (2 * width**2))
        return value / len(targets), slope / len(targets)

    start = np.concatenate([[1.0], np.zeros(logits.shape[1])])
    bounds = [(1 / HOTTEST, HOTTEST)] + [(None, None)] * logits.shape[1]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return 1 / float(found[0]), found[1:] - found[1:].mean()


def temperature_interval(
    logits: Floats, targets: NDArray[np.int64], draws: Iterable[NDArray[np.int64]], temperature: float
) -> tuple[float | None, float | None]:
    """The 95% interval of `temperature`, from resamples: how often each image was drawn, int64[N] each.

    Each resample's temperature is where its slope crosses zero on a grid of temperatures; the slopes of the images on
    the grid are computed once. Between grid points, 5% apart, a line is off by less than 0.1%.
    """
    gaps, images, end = _gaps(logits), np.arange(len(targets)), math.log(HOTTEST)
    grid = np.linspace(-end, end, 1 + round(2 * end / 0.05))
    slopes = np.empty((len(targets), len(grid)))
    for place, log_inverse in enumerate(grid):
        scaled = np.exp(gaps * math.exp(log_inverse))
        slopes[:, place] = (scaled * gaps).sum(axis=1) / scaled.sum(axis=1) - gaps[images, targets]
    found = [_crossings(grid, np.array(block, dtype=np.float64) @ slopes) for block in _blocks(draws, 100)]
    low, high = interval_entry(np.exp(-np.concatenate(found)), temperature)["ci"]
    return low, high


def _blocks(draws: Iterable[NDArray[np.int64]], size: int) -> Iterator[tuple[NDArray[np.int64], ...]]:
    waiting = iter(draws)
    while block := tuple(itertools.islice(waiting, size)):
        yield block


def _crossings(grid: Floats, slopes: Floats) -> Floats:
    """Where each row of float64[R, G], rising along the grid float64[G], crosses zero; the grid's end if nowhere."""
    after = np.clip((slopes < 0).sum(axis=1), 1, len(grid) - 1)
    rows = np.arange(len(slopes))
    left, right = slopes[rows, after - 1], slopes[rows, after]
    part = np.where(right > left, -left / np.where(right > left, right - left, 1.0), 0.0)
    crossing: Floats = grid[after - 1] + np.clip(part, 0.0, 1.0) * (grid[after] - grid[after - 1])
    return crossing


def _gaps(logits: Floats) -> Floats:
    """float64[N, K]: how far each logit lies below the largest of its row, <= 0."""
    with np.errstate(over="ignore"):
        return np.maximum(logits - logits.max(axis=1, keepdims=True), -_LARGEST_GAP)
