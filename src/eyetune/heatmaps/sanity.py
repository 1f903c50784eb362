"""Does a heat map depend on what the network learnt? (Adebayo et al., NeurIPS 2018: the parameter randomisation test.)

A map that looks the same for a network of random weights shows the picture, not the network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from eyetune.errors import UserError
from eyetune.heatmaps.explain import normalised, read_square
from eyetune.heatmaps.maps import Method, choose_method, grid_maps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.adapt.classifier import Classifier
    from eyetune.train.run import Run

THRESHOLD = 0.5
"""A mean rank correlation below this passes: less than a quarter of the map's order is there without learning."""


@dataclass(frozen=True)
class Sanity:
    """How alike the maps of a network and of the same network with shuffled weights are.

    Attributes:
        method: of the maps.
        correlation: Spearman's rank correlation over the cells inside the field of view, mean over the photographs;
            1: the map has nothing to do with what was learnt; around 0: everything.
        correlations: of each photograph.
        threshold: what `correlation` must stay below.
    """

    method: Method
    correlation: float
    correlations: tuple[float, ...]
    threshold: float = THRESHOLD

    @property
    def passed(self) -> bool:
        """Whether the maps depend on what was learnt."""
        return self.correlation < self.threshold


def sanity_check(run: Run, paths: Sequence[str | Path], *, method: str = "auto", seed: int = 0) -> Sanity:
    """Compare the heat maps of photographs with those of the same network with shuffled weights, class for class.

    Args:
        run: the trained run.
        paths: the photographs; ten or more make a steady number.
        method: as for :func:`eyetune.heatmaps.explain`.
        seed: of the shuffling.

    Raises DataError for a photograph that cannot be read, and UserError when there is none.
    """
    if not paths:
        raise UserError("the sanity check of heat maps needs at least one photograph.")
    chosen = choose_method(run.model, method)
    shuffled = shuffle_weights(run.model, seed)
    found = []
    for path in paths:
        square = read_square(run, Path(path))
        images = normalised(run, [square])
        with torch.no_grad():
            targets = run.model.scores(images).argmax(dim=1)
        learnt, random = (grid_maps(model, images, targets, chosen)[0].cpu().numpy() for model in (run.model, shuffled))
        inside = _inside(square, learnt.shape, run.settings.surround)
        found.append(rank_correlation(learnt[inside], random[inside]))
    return Sanity(chosen, float(np.mean(found)), tuple(found))


def shuffle_weights(model: Classifier, seed: int = 0) -> Classifier:
    """A copy whose every parameter has its own numbers in another order: the same sizes, nothing of what was learnt."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Spearman's correlation of two maps, -1..1; 0 where one of them is the same everywhere."""
    import pandas as pd

    ranks = [pd.Series(values).rank().to_numpy() for values in (first, second)]  # equals share their mean rank
    deviations = [values - values.mean() for values in ranks]
    sizes = [float(np.sqrt((values**2).sum())) for values in deviations]
    return float(deviations[0] @ deviations[1] / (sizes[0] * sizes[1])) if min(sizes) > 0 else 0.0


def _inside(square: NDArray[np.uint8], shape: tuple[int, ...], surround: int) -> NDArray[np.bool_]:
    """Which cells are mostly field of view: any two maps agree about where the black begins."""
    seen = (np.abs(square.astype(np.int16) - surround).max(axis=2) > 8).astype(np.float32)
    cells = cv2.resize(seen, shape[::-1], interpolation=cv2.INTER_AREA) > 0.5
    return cells if cells.sum() > 2 else np.ones(shape, bool)
