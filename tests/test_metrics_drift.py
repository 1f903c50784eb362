"""How far features moved, against sums written out, and what must be so."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from eyetune.metrics.drift import cosine_distance, debiased_cka, linear_cka

Floats = NDArray[np.float64]


def features(images: int, width: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(images, width)) + 3


def slow_cka(first: Floats, second: Floats) -> float:
    """Feature by feature: the squared covariances of every feature of one with every one of the other."""

    def squares(one: Floats, other: Floats) -> float:
        total = 0.0
        for a, b in itertools.product(range(one.shape[1]), range(other.shape[1])):
            x, y = one[:, a] - one[:, a].mean(), other[:, b] - other[:, b].mean()
            total += float((x * y).sum()) ** 2
        return total

    return squares(first, second) / (squares(first, first) * squares(second, second)) ** 0.5


def slow_debiased(first: Floats, second: Floats) -> float:
    """Song et al. (2012), as a mean over all ordered quadruples of different images."""
    n = len(first)

    def dependence(one: Floats, other: Floats) -> float:
        k, m = one @ one.T, other @ other.T
        quads = list(itertools.permutations(range(n), 4))
        return sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quads) / len(quads)

    return dependence(first, second) / (dependence(first, first) * dependence(second, second)) ** 0.5


def test_cka_is_its_definition() -> None:
    first, second = features(12, 5, 1), features(12, 3, 2)
    assert linear_cka(first, second) == pytest.approx(slow_cka(first, second), abs=1e-12)
    wide = features(6, 40, 3)
    assert linear_cka(features(6, 5, 1), wide) == pytest.approx(slow_cka(features(6, 5, 1), wide), abs=1e-12)


def test_debiased_cka_is_its_definition() -> None:
    first = features(8, 5, 1)
    second = first @ features(5, 3, 2) + features(8, 3, 4)
    assert debiased_cka(first, second) == pytest.approx(slow_debiased(first, second), abs=1e-9)


def test_rotation_and_scale_do_not_count_for_cka() -> None:
    first = features(30, 6, 5)
    turned = 2.5 * first @ np.linalg.qr(features(6, 6, 6))[0] + 7
    for cka in (linear_cka, debiased_cka):
        assert cka(first, turned) == pytest.approx(1, abs=1e-12)


def test_few_images_flatter_cka_and_not_the_debiased_one() -> None:
    flattered = np.mean([linear_cka(features(20, 100, s), features(20, 100, 99 + s)) for s in range(20)])
    honest = np.mean([debiased_cka(features(20, 100, s), features(20, 100, 99 + s)) for s in range(20)])
    assert flattered > 0.7
    assert abs(honest) < 0.1


def test_the_same_features_did_not_move() -> None:
    first = features(9, 7, 7)
    assert linear_cka(first, first) == 1
    assert debiased_cka(first, first) == 1
    assert cosine_distance(first, first) == 0


def test_cosine_distance_by_hand() -> None:
    first = np.array([[1.0, 0], [1, 1], [0, 0]])
    second = np.array([[0.0, 2], [-1, -1], [1, 0]])
    assert cosine_distance(first, second) == pytest.approx((1 + 2 + 1) / 3)


def test_what_has_no_value_has_none() -> None:
    constant = np.ones((5, 3))
    assert linear_cka(constant, features(5, 2, 1)) is None
    assert debiased_cka(constant, features(5, 2, 1)) is None
    assert debiased_cka(features(3, 2, 1), features(3, 2, 2)) is None
