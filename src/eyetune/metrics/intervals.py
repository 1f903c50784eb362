"""How far a score may be off: intervals from resampling patients.

The patient is the unit that was sampled, and fellow eyes resemble each other, so patients are drawn with all their
images (the cluster bootstrap; Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8).
Patients are drawn within strata of their highest class: every resample has as many patients of each, so a metric that
needs a class does not lose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eyetune.metrics.outcomes import Floats, ratio

RESAMPLES = 2000
"""How many resamples an interval rests on when nobody says."""

_FEW_BYTES = 1024
"""Of the counts of a resample that is remembered: 128 images. Of many more no two resamples are alike."""

LEVEL = 0.95
"""Share of repetitions of the study whose interval would hold the true value."""

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Standard errors to either side of a normally distributed estimate: 1.96."""

FEWEST_DEFINED = 0.95
"""Share of the resamples that must give a metric a value for it to have an interval."""


class Scorable(Protocol):
    """N images with their truth and what a model said of each: outcomes of any task."""

    def drawn(self, counts: NDArray[np.int64]) -> Any:
        """The same images, image i `counts[i]` times, int64[N]."""


@dataclass(frozen=True)
class Clusters:
    """What is drawn as one.

    Args:
        of_image: int64[N], 0..C-1: the cluster of each image.
        strata: the clusters of each stratum, int64[·] each; together 0..C-1.
        unit: what a cluster is, "patient" or "image".
    """

    of_image: NDArray[np.int64]
    strata: tuple[NDArray[np.int64], ...]
    unit: str

    @classmethod
    def of(cls, patients: Sequence[str | None], targets: NDArray[np.int64]) -> Clusters:
        """A cluster a patient, an image whose patient is not known being one of its own.

        Args:
            patients: N identifiers; None where not known.
            targets: int64[N], the known classes, 0..K-1; N >= 1.
        """
        keys = [("", row) if patient is None else (patient, -1) for row, patient in enumerate(patients)]
        number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        of_image = np.array([number[key] for key in keys], dtype=np.int64)
        highest = np.full(len(number), -1, dtype=np.int64)
        np.maximum.at(highest, of_image, targets)
        strata = tuple(np.flatnonzero(highest == level) for level in np.unique(highest))
        return cls(of_image, strata, "image" if all(patient is None for patient in patients) else "patient")

    def draws(self, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
        """`resamples` times int64[N]: how often each image was drawn. The same for the same seed."""
        rng = np.random.default_rng(seed)
        drawn = np.zeros(sum(map(len, self.strata)), dtype=np.int64)
        for _ in range(resamples):
            for members in self.strata:
                size = len(members)
                drawn[members] = np.bincount(rng.integers(0, size, size), minlength=size)
            yield drawn[self.of_image]


def intervals(
    outcomes: Scorable,
    clusters: Clusters,
    functions: Mapping[str, Callable[[Any], float | None]],
    *,
    ends: Mapping[str, Callable[[Floats, float], list[float] | None]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """A 95% interval for each function of the outcomes.

    Args:
        outcomes: N >= 1 images.
        clusters: of the same images.
        functions: name -> outcomes to a finite value, None when it is not defined for them.
        ends: name -> (values of the resamples, value) -> its interval; :func:`bias_corrected` where nothing is said.
        resamples: how many.
        seed: of the resampling.

    Returns name -> [low, high]; None where the images themselves or more than 5% of the resamples gave no value.
    """
    values = np.full((len(functions), resamples), np.nan)
    for place, first, counts in _with_first(clusters.draws(resamples, seed)):
        if first != place:
            values[:, place] = values[:, first]
            continue
        drawn = outcomes.drawn(counts)
        for row, function in enumerate(functions.values()):
            value = function(drawn)
            if value is not None:
                values[row, place] = value
    found: dict[str, list[float] | None] = {}
    for (name, function), mine in zip(functions.items(), values, strict=True):
        estimate = function(outcomes)
        make = (ends or {}).get(name, bias_corrected)
        found[name] = None if estimate is None else make(mine, estimate)
    return found


def _with_first(draws: Iterable[NDArray[np.int64]]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Each resample's place, the place of the first one that drew the same, and how often it drew each image.

    A handful of patients can be drawn in a handful of ways: nothing has to be computed twice.
    """
    seen: dict[bytes, int] = {}
    for place, counts in enumerate(draws):
        yield place, seen.setdefault(counts.tobytes(), place) if counts.nbytes <= _FEW_BYTES else place, counts


Statistic = Callable[[NDArray[np.int64]], Floats]
"""How often each of N images counts, int64[N] -> M values float64[M], NaN where one is not defined."""


def resampled(
    clusters: Clusters, statistics: Mapping[str, Statistic], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Each statistic's values on the images themselves, each with its 95% interval, all from the same resamples.

    For what is quick once the images are sorted or scored: unlike :func:`intervals`, nothing is copied per resample.

    Returns name -> M times {"value": x or None, "ci": [low, high] or [None, None]}.
    """
    once = np.ones(len(clusters.of_image), dtype=np.int64)
    estimates = {name: statistic(once) for name, statistic in statistics.items()}
    values = {name: np.empty((resamples, len(found))) for name, found in estimates.items()}
    for place, first, counts in _with_first(clusters.draws(resamples, seed)):
        for name, statistic in statistics.items():
            values[name][place] = values[name][first] if first != place else statistic(counts)
    return {
        name: [interval_entry(values[name][:, place], value) for place, value in enumerate(found.tolist())]
        for name, found in estimates.items()
    }


def shares(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Statistic:
    """The statistic of M shares: of the images in `whole` bool[N, M] those in `part` bool[N, M]; NaN of none."""
    # Many images are alike in every column: they are counted together.
    kinds, kind = np.unique(np.concatenate([part & whole, whole], axis=1), axis=0, return_inverse=True)
    kind, kinds = kind.reshape(-1), kinds.astype(np.float64)

    def statistic(counts: NDArray[np.int64]) -> Floats:
        inside, outside = np.split(np.bincount(kind, weights=counts, minlength=len(kinds)) @ kinds, 2)
        return ratio(inside, outside)

    return statistic


def share_entries(
    clusters: Clusters,
    part: NDArray[np.bool_],
    whole: NDArray[np.bool_],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """M shares, of the images in `whole` bool[N, M] those in `part` bool[N, M], each with its 95% interval.

    Wilson's interval with as many observations as would scatter as much as the resamples do (the design effect: Kish,
    "Survey Sampling", 1965; Korn and Graubard, 1998), and with one a cluster where they do not scatter at all: by
    percentiles, 30 of 30 would be "1.000 to 1.000". None for a share of nothing, and where more than 5% of the
    resamples leave it without a value.

    Returns M times {"value": x or None, "ci": [low, high] or [None, None]}.
    """
    statistic = shares(part, whole)
    values = statistic(np.ones(len(clusters.of_image), dtype=np.int64))
    drawn = np.empty((resamples, len(values)))
    for place, first, counts in _with_first(clusters.draws(resamples, seed)):
        drawn[place] = drawn[first] if first != place else statistic(counts)
    return [
        share_entry(drawn[:, column], value, int(whole[:, column].sum()), _units(clusters, whole[:, column]))
        for column, value in enumerate(values.tolist())
    ]


def _units(clusters: Clusters, rows: NDArray[np.bool_]) -> int:
    return len(np.unique(clusters.of_image[rows]))


def share_entry(drawn: Floats, value: float, images: int, units: int) -> dict[str, Any]:
    """A share and its 95% interval, as :func:`share_entries` has them.

    Args:
        drawn: float64[R]: the share in each resample, NaN where there was none.
        value: the share itself; NaN of nothing.
        images: how many it is a share of.
        units: how many clusters these make.
    """
    defined = drawn[~np.isnan(drawn)]
    if math.isnan(value) or not len(defined) or len(defined) < FEWEST_DEFINED * len(drawn):
        return {"value": None if math.isnan(value) else value, "ci": [None, None]}
    scatter = float(defined.var())
    observed: float = units
    if scatter > 0 and 0 < value < 1:
        observed = min(max(value * (1 - value) / scatter, 1.0), images)
    return {"value": value, "ci": wilson(value, observed)}


def wilson(share: float, n: float) -> list[float]:
    """[low, high]: the 95% interval of a share seen in `n` >= 1 observations (Wilson, 1927)."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def interval_entry(values: Floats, estimate: float) -> dict[str, Any]:
    """A value and its 95% interval as metrics.json has them; `values` float64[R] are those of the resamples."""
    defined = math.isfinite(estimate)
    ci = bias_corrected(values, estimate) if defined and len(values) else None
    return {"value": float(estimate) if defined else None, "ci": [None, None] if ci is None else ci}


def bias_corrected(values: Floats, estimate: float) -> list[float] | None:
    """[low, high] of an estimate, from float64[R] values of its resamples, NaN where there was none.

    Percentiles, moved by how far the median of the resamples lies from the estimate (Efron, "Nonparametric standard
    errors and confidence intervals", 1981): resamples repeat images, which by itself raises an average precision or a
    calibration error. None when more than 5% of the values are missing.
    """
    defined = values[~np.isnan(values)]
    count = len(defined)
    if not count or count < FEWEST_DEFINED * len(values):
        return None
    below = np.count_nonzero(defined < estimate) + np.count_nonzero(defined == estimate) / 2
    normal = NormalDist()
    shift = 2 * normal.inv_cdf((below + 0.5) / (count + 1))
    ends = [normal.cdf(shift + normal.inv_cdf(tail)) for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    low, high = np.percentile(defined, [100 * end for end in ends])
    return [float(low), float(high)]


def bias_allowing(
    values: Floats, estimate: float, low: float = -math.inf, high: float = math.inf
) -> list[float] | None:
    """[low, high] of an estimate that small samples push to one side; arguments as for :func:`bias_corrected`.

    Average precision and the expected calibration error come out too high on few images, and too high again on
    resamples of them. The bias that the resamples show is an estimate itself, mostly too small a one: shifting the
    interval by it leaves the true value out too often, on both sides. So the end on the side of the bias is moved by
    twice of it, as :func:`bias_corrected` moves percentiles, and the other end stays: estimate - 2 bias - 1.96 SE to
    estimate + 1.96 SE for a bias upwards, within the range `low`..`high` of the metric. By simulation this holds the
    true value in 94% to 97% of the studies where percentiles do in 23% to 93% (docs/benchmarks.md).
    """
    defined = values[~np.isnan(values)]
    if not len(defined) or len(defined) < FEWEST_DEFINED * len(values):
        return None
    bias = 2 * (float(defined.mean()) - estimate)
    reach = Z * float(defined.std(ddof=1) if len(defined) > 1 else 0.0)
    return [max(low, estimate - max(bias, 0.0) - reach), min(high, estimate - min(bias, 0.0) + reach)]


def difference(
    first: float, first_interval: Sequence[float], second: float, second_interval: Sequence[float]
) -> list[float]:
    """[low, high] of `first - second`, from the intervals of two values of separate patients.

    The square-and-add method (Newcombe, Statistics in Medicine 17, 1998; Zou and Donner, the same 27, 2008).
    """
    gap = first - second
    low = math.hypot(first - first_interval[0], second_interval[1] - second)
    high = math.hypot(first_interval[1] - first, second - second_interval[0])
    return [gap - low, gap + high]
