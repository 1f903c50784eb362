"""How unlike the training images an image is, by the features the network sees in it (out-of-distribution score).

The Mahalanobis distance from the training features, one normal cloud for all classes (Lee et al., "A Simple Unified
Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", 2018, has one a class with a shared
covariance), its covariance shrunk (Ledoit and Wolf, 2004): features are many and training images few. Measured against
distances to the nearest neighbours: docs/calibration.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCORE = "mahalanobis"

MOST_IMAGES = 1000
"""Training images that the cloud is fitted on, at most: it costs each of them one pass through the network."""

FEWEST_IMAGES = 10
"""With fewer there is no cloud to speak of."""


@dataclass(frozen=True)
class Novelty:
    """The cloud of the training features.

    Args:
        mean: float32[width].
        whitening: float32[width, width], lower triangular, W with W W' = the inverse covariance / width.
        images: how many it was fitted on.
        digest: SHA-256 of the file that holds it; empty before it is written.
    """

    mean: Tensor
    whitening: Tensor
    images: int
    digest: str = ""

    @classmethod
    def fit(cls, features: Tensor) -> Novelty | None:
        """The cloud of `features` float32[N, width], on the CPU; None when N is below 10 or they are all the same."""
        import numpy as np
        from sklearn.covariance import ledoit_wolf

        given = features.double().numpy()
        width = given.shape[1]
        if len(given) < FEWEST_IMAGES or not np.isfinite(given).all() or given.var(axis=0).sum() <= 0:
            return None
        covariance, _ = ledoit_wolf(given)
        # A feature that never changes (a dead unit) would divide by zero where nothing was shrunk.
        covariance += 1e-6 * np.trace(covariance) / width * np.eye(width)
        whitening = np.linalg.cholesky(np.linalg.inv(covariance) / width)
        return cls(torch.from_numpy(given.mean(axis=0)).float(), torch.from_numpy(whitening).float(), len(given))

    def score(self, features: Tensor) -> Tensor:
        """Features float[B, width] -> float32[B], >= 0, on the same device: the distance from the middle of the cloud,
        in standard deviations a feature; about 1 for a training image."""
        mean, whitening = self.mean.to(features.device), self.whitening.to(features.device)
        return ((features.float() - mean) @ whitening).norm(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """What calibration.safetensors holds."""
        return {"mean": self.mean, "whitening": self.whitening}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], width: int, images: int, digest: str) -> Novelty:
        """The cloud of a file. Raises ValueError when these are not its tensors, for features of `width`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"mean": (width,), "whitening": (width, width)}:
            raise ValueError(f"it holds {shapes}, not the mean and whitening of {width} features")
        if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("it holds numbers that are not finite")
        return cls(tensors["mean"].float(), tensors["whitening"].float(), images, digest)


def sample_places(count: int, seed: int, most: int = MOST_IMAGES) -> list[int]:
    """At most `most` of `count` places, in order, the same for the same seed."""
    if count <= most:
        return list(range(count))
    keys = [hashlib.sha256(f"{seed}:{place}".encode()).digest() for place in range(count)]
    return sorted(sorted(range(count), key=lambda place: keys[place])[:most])
