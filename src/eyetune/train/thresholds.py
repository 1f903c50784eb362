"""From a number to grades: thresholds for the best quadratic-weighted kappa, and how likely each grade is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from eyetune.metrics.heads import midpoints

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MOST_ROUNDS = 100
"""Rounds over all thresholds; each improves kappa or is the last, and a handful is the rule."""

TINY = 1e-12

FAR = 1e6
"""In grades: beyond every number, and unlike infinity with a derivative."""


def tune(numbers: Floats, grades: NDArray[np.int64], classes: int) -> Floats:
    """The thresholds with the best quadratic-weighted kappa on these images: float64[K - 1], not falling.

    One threshold after another is put where kappa is best, the others staying, until none moves: from half-way between
    the grades, and from where as many images fall into each grade as belong there; the better of the two is taken.
    Every place is looked at (the sums of one moving threshold are running sums): no threshold moved alone would do
    better, and there is nothing to set. Better ones that differ in several at once are possible.

    Args:
        numbers: float64[N], N >= 1, finite.
        grades: int64[N], 0..K-1.
        classes: K.
    """
    if (grades == grades[0]).all():  # kappa has no value, or is the same everywhere
        return midpoints(classes)
    order = np.argsort(numbers, kind="stable")
    sorted_numbers, sorted_grades = numbers[order], grades[order]
    counts = np.bincount(grades, minlength=classes)
    halves = np.searchsorted(sorted_numbers, midpoints(classes), side="right")
    found = [_ascend(sorted_numbers, sorted_grades, start, classes) for start in (halves, np.cumsum(counts)[:-1])]
    _, places = max(found, key=lambda one: one[0])  # the first of equals
    return np.maximum.accumulate(_cuts(sorted_numbers, places, midpoints(classes)))


def _ascend(
    numbers: Floats, grades: NDArray[np.int64], start: NDArray[np.int64], classes: int
) -> tuple[float, NDArray[np.int64]]:
    """(kappa, places): how many of the sorted images lie below each threshold, moved one at a time from `start`."""
    count = len(numbers)
    ranks = np.arange(classes, dtype=np.float64)
    allowed = np.concatenate([[True], numbers[1:] != numbers[:-1], [True]])  # equal numbers stay together
    # Cost of calling each image each grade; and the cost that chance alone would give for calling that grade.
    cost = (grades[:, None] - ranks) ** 2
    expected = ((ranks[:, None] - ranks) ** 2 * np.bincount(grades, minlength=classes)[:, None]).sum(axis=0) / count
    below = np.concatenate([np.zeros((1, classes)), cost.cumsum(axis=0)])
    places = np.array([_nearest(allowed, place) for place in start], dtype=np.int64)

    def kappa(observed: Floats, by_chance: Floats) -> Floats:
        return 1 - np.divide(observed, by_chance, out=np.full_like(observed, np.inf), where=by_chance > 0)

    best = -np.inf
    for _ in range(MOST_ROUNDS):
        moved = False
        for k in range(classes - 1):
            edges = np.concatenate([[0], places, [count]])
            low, high = edges[k], edges[k + 2]
            inside = np.arange(low, high + 1)
            inside = inside[allowed[low : high + 1]]
            others = [j for j in range(classes) if j not in (k, k + 1)]
            observed = sum(below[edges[j + 1], j] - below[edges[j], j] for j in others)
            by_chance = sum((edges[j + 1] - edges[j]) * expected[j] for j in others)
            observed = observed + (below[inside, k] - below[low, k]) + (below[high, k + 1] - below[inside, k + 1])
            by_chance = by_chance + (inside - low) * expected[k] + (high - inside) * expected[k + 1]
            values = kappa(observed, by_chance)
            at = int(np.argmax(values))
            if values[at] > best + TINY:
                best, moved = float(values[at]), moved or places[k] != inside[at]
                places[k] = inside[at]
        if not moved:
            break
    return best, places


def _nearest(allowed: NDArray[np.bool_], place: int) -> int:
    """The place nearest to `place` that does not part equal numbers."""
    places = np.flatnonzero(allowed)
    return int(places[np.argmin(np.abs(places - place))])


def _cuts(numbers: Floats, places: NDArray[np.int64], halves: Floats) -> Floats:
    """Thresholds in the middle of the gaps that `places` name; beyond the numbers, at least half a grade away."""
    cuts = np.empty(len(places))
    for k, place in enumerate(places):
        if place == 0:
            cuts[k] = min(halves[k], numbers[0] - 0.5)
        elif place == len(numbers):
            cuts[k] = max(halves[k], numbers[-1] + 0.5)
        else:
            cuts[k] = (numbers[place - 1] + numbers[place]) / 2
    return cuts


def ordered_probit(numbers: Floats, grades: NDArray[np.int64], classes: int) -> tuple[Floats, float]:
    """Cuts between the grades, float64[K - 1] rising, and a spread, that make the grades most likely.

    An image's grade has the share of a normal distribution about its number that lies between the cuts of the grade
    (McCullagh, JRSS B 42, 1980). A weak pull of the cuts to one grade apart, and of the spread to half a grade, as
    strong as one image, keeps them apart where images are few or a grade has none.

    Args:
        numbers: float64[N], N >= 1, in grades.
        grades: int64[N], 0..K-1.
        classes: K.
    """
    import torch

    number, grade = torch.from_numpy(numbers), torch.from_numpy(grades)
    # The lowest cut, the logarithms of the gaps above it, and that of the spread.
    free = torch.tensor([0.5, *[0.0] * (classes - 2), math.log(0.5)], dtype=torch.float64, requires_grad=True)
    start = free.detach().clone()
    optimizer = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def cuts_and_spread() -> tuple[torch.Tensor, torch.Tensor]:
        gaps = free[1:-1].clamp(-5, 5).exp()
        return torch.cat([free[:1], free[:1] + gaps.cumsum(0)]), free[-1].clamp(-5, 3).exp()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        cuts, sigma = cuts_and_spread()
        ends = cuts.new_tensor([FAR])
        edges = torch.cat([-ends, cuts, ends])
        low, high = (edges[grade + side] - number for side in (0, 1))
        shares = torch.special.ndtr(high / sigma) - torch.special.ndtr(low / sigma)
        total = -shares.clamp_min(TINY).log().sum() + ((free - start) ** 2).sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        cuts, sigma = cuts_and_spread()
    return cuts.numpy(), float(sigma)
