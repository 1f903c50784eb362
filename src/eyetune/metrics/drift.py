"""How far features moved: the same images before and after training.

What a backbone knew and no longer does ("forgetting") cannot be seen in the score of the new task. What can be seen is
whether its features of the same photographs are still the published ones.
"""

from __future__ import annotations

import math

import numpy as np

from eyetune.metrics.outcomes import Floats


def linear_cka(first: Floats, second: Floats) -> float | None:
    """Linear centred kernel alignment of two sets of features of the same images (Kornblith et al., "Similarity of
    Neural Network Representations Revisited", ICML 2019, equation 5): 1 for features that are the same up to rotation
    and one scale, 0 for unrelated ones of endlessly many images. Of few images it is far above 0 whatever the features
    are: see :func:`debiased_cka`.

    float64[N, P], float64[N, Q] -> 0..1; None where all images have the same features.
    """
    kernels = [(one - one.mean(axis=0)) @ (one - one.mean(axis=0)).T for one in (first, second)]
    return _alignment(*((a * b).sum() for a, b in _pairs(kernels)))


def debiased_cka(first: Floats, second: Floats) -> float | None:
    """Linear centred kernel alignment from the unbiased estimate of dependence (Song et al., "Feature Selection via
    Dependence Maximization", JMLR 2012; so used by Nguyen, Raghu and Kornblith, ICLR 2021): near 0 for unrelated
    features of however few images, slightly negative at times.

    float64[N, P], float64[N, Q] -> at most 1; None below 4 images, and where all images have the same features.
    """
    count = len(first)
    if count < 4:
        return None
    # The estimate does not depend on the origin; near it, fewer digits are lost.
    kernels = [(one - one.mean(axis=0)) @ (one - one.mean(axis=0)).T for one in (first, second)]
    for kernel in kernels:
        np.fill_diagonal(kernel, 0.0)
    return _alignment(*(_unbiased(a, b, count) for a, b in _pairs(kernels)))


def cosine_distance(first: Floats, second: Floats) -> float:
    """Mean over the images of 1 - cosine of the angle between the two features: 0 where no direction changed, 1 where
    they are at right angles.

    float64[N, P] both -> 0..2; a feature of zeros counts as at a right angle to any other.
    """
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = (first * second).sum(axis=1)
    cosines = np.divide(products, lengths, out=np.zeros(len(first)), where=lengths > 0)
    cosines[(first == second).all(axis=1)] = 1.0  # exactly, whatever the rounding
    return float(1 - np.clip(cosines, -1, 1).mean())


def _pairs(kernels: list[Floats]) -> tuple[tuple[Floats, Floats], ...]:
    first, second = kernels
    return (first, second), (first, first), (second, second)


def _unbiased(first: Floats, second: Floats, count: int) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion, from kernels without diagonal."""
    together = float((first * second).sum())
    apart = float(first.sum() * second.sum()) / ((count - 1) * (count - 2))
    along = float(first.sum(axis=0) @ second.sum(axis=0)) * 2 / (count - 2)
    return (together + apart - along) / (count * (count - 3))


def _alignment(across: float, first: float, second: float) -> float | None:
    scale = math.sqrt(max(first, 0.0) * max(second, 0.0))
    return min(1.0, float(across / scale)) if scale > 0 else None
