"""From a number to grades, against brute force and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score  # type: ignore[import-untyped]

from eyetune.metrics.heads import midpoints
from eyetune.train.thresholds import ordered_probit, tune


def qwk(numbers: NDArray[np.float64], grades: NDArray[np.int64], thresholds: NDArray[np.float64]) -> float:
    """Of the grades that the thresholds call: 1 - squared misses / those of every pair of a truth and a call."""
    calls = (numbers[:, None] > thresholds).sum(axis=1)
    return 1 - float(((grades - calls) ** 2).mean() / ((grades[:, None] - calls) ** 2).mean())


def test_the_kappa_here_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    numbers, grades = rng.normal(1.5, 1, 50), rng.integers(0, 4, 50)
    calls = (numbers[:, None] > midpoints(4)).sum(axis=1)
    expected = cohen_kappa_score(grades, calls, weights="quadratic")
    assert qwk(numbers, grades, midpoints(4)) == pytest.approx(expected)


def best(numbers: NDArray[np.float64], grades: NDArray[np.int64], classes: int) -> float:
    """The best kappa that any thresholds reach: every way to put them between the numbers is tried."""
    values = np.unique(numbers)
    places = [values[0] - 1, *((values[1:] + values[:-1]) / 2), values[-1] + 1]
    tried = itertools.combinations_with_replacement(places, classes - 1)
    return max(qwk(numbers, grades, np.array(cuts)) for cuts in tried)


small = st.integers(3, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-6, 18), min_size=n, max_size=n), st.lists(st.integers(0, 2), min_size=n, max_size=n)
    )
)


@given(small)
@settings(max_examples=60, deadline=None)
def test_thresholds_rise_and_no_single_move_would_be_better(data: tuple[list[int], list[int]]) -> None:
    numbers, grades = np.array(data[0]) / 4.0, np.array(data[1])
    found = tune(numbers, grades, 3)
    assert found.shape == (2,)
    assert np.isfinite(found).all()
    assert found[0] <= found[1]
    if len(set(grades.tolist())) == 1:
        return
    reached = qwk(numbers, grades, found)
    values = np.unique(numbers)
    places = np.array([values[0] - 1, *((values[1:] + values[:-1]) / 2), values[-1] + 1])
    for k, place in itertools.product(range(2), places):
        moved = found.copy()
        moved[k] = place
        if moved[0] <= moved[1]:
            assert qwk(numbers, grades, moved) <= reached + 1e-9
    assert reached >= qwk(numbers, grades, midpoints(3)) - 1e-9, "never worse than half-way between the grades"


@pytest.mark.parametrize("seed", range(10))
def test_thresholds_are_the_best_there_are_where_the_number_means_something(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = 3 if seed % 2 else 4
    grades = rng.integers(0, classes, 11)
    numbers = np.round(0.6 * grades + 0.7 + rng.normal(0, 0.35, 11), 2)
    assert qwk(numbers, grades, tune(numbers, grades, classes)) == pytest.approx(best(numbers, grades, classes))


def test_they_mend_a_number_that_is_shifted_and_squeezed() -> None:
    """What a regression does to rare high grades: half-way thresholds call none of them."""
    rng = np.random.default_rng(0)
    grades = rng.choice(5, 400, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    numbers = 0.4 * grades + 0.6 + rng.normal(0, 0.12, 400)
    found = tune(numbers, grades, 5)
    assert qwk(numbers, grades, found) > qwk(numbers, grades, midpoints(5)) + 0.2
    np.testing.assert_allclose(found, 0.4 * midpoints(5) + 0.6, atol=0.08)


def test_one_grade_alone_leaves_the_thresholds_half_way() -> None:
    np.testing.assert_array_equal(tune(np.array([0.1, 0.2, 0.3]), np.array([1, 1, 1]), 4), midpoints(4))


def probit_reference(numbers: NDArray[np.float64], grades: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Cuts and spread by scipy's simplex, from the definition of what is minimised."""

    def cuts_of(free: NDArray[np.float64]) -> NDArray[np.float64]:
        return free[0] + np.concatenate([[0.0], np.exp(free[1:-1]).cumsum()])

    start = np.array([0.5, *[0.0] * (classes - 2), np.log(0.5)])

    def cost(free: NDArray[np.float64]) -> float:
        edges = np.concatenate([[-np.inf], cuts_of(free), [np.inf]])
        spread = np.exp(free[-1])
        shares = [
            scipy.stats.norm.cdf((edges[g + 1] - x) / spread) - scipy.stats.norm.cdf((edges[g] - x) / spread)
            for x, g in zip(numbers, grades, strict=True)
        ]
        return float(-np.log(np.maximum(shares, 1e-12)).sum() + ((free - start) ** 2).sum() / 2)

    found = scipy.optimize.minimize(
        cost, start, method="Nelder-Mead", options={"maxiter": 20000, "maxfev": 20000, "xatol": 1e-8, "fatol": 1e-10}
    )
    return np.append(cuts_of(found.x), np.exp(found.x[-1]))


@pytest.mark.parametrize("classes", [2, 3])
def test_the_probit_is_the_most_likely_one(classes: int) -> None:
    rng = np.random.default_rng(classes)
    grades = rng.integers(0, classes, 25)
    numbers = 0.7 * grades + 0.3 + rng.normal(0, 0.4, 25)
    cuts, spread = ordered_probit(numbers, grades, classes)
    np.testing.assert_allclose([*cuts, spread], probit_reference(numbers, grades, classes), atol=2e-4)


@given(small)
@settings(max_examples=30, deadline=None)
def test_the_probit_of_hardly_anything_is_a_rising_finite_one(data: tuple[list[int], list[int]]) -> None:
    cuts, spread = ordered_probit(np.array(data[0]) / 4.0, np.array(data[1]), 3)
    assert np.isfinite(cuts).all()
    assert cuts[0] < cuts[1]
    assert 0 < spread < 100
