"""A run and a photograph to a heat map, on the square the network saw and on the photograph itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from eyetune.data.fundus import Field, find_field, load_square
from eyetune.data.transforms import eval_transform
from eyetune.errors import UserError, did_you_mean
from eyetune.heatmaps.maps import Method, choose_method, grid_maps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.data.fundus import FundusSettings
    from eyetune.train.run import Run


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Where a network looked in one photograph.

    Attributes:
        values: float32[P, P], 0..1 on the square the network saw: 0 is the least and 1 the most within this picture.
            Two pictures cannot be compared by them, and how sure the network was is not in them.
        square: uint8[P, P, 3] RGB, what the network saw.
        method: how it was made; see :mod:`eyetune.heatmaps.maps`.
        target: the class it is about; None for `rollout`, which knows of none.
    """

    values: NDArray[np.float32]
    square: NDArray[np.uint8]
    method: Method
    target: str | None


def heat_map(run: Run, path: str | Path, *, target: str | None = None, method: str = "auto") -> NDArray[np.float32]:
    """float32[P, P], 0..1: where the run's network looked in the photograph at `path`; see :func:`explain`."""
    return explain(run, path, target=target, method=method).values


def explain(run: Run, path: str | Path, *, target: str | None = None, method: str = "auto") -> HeatMap:
    """What in a photograph the run's output depended on.

    Args:
        run: the trained run.
        path: the photograph.
        target: the class to look for; None = the one with the highest output.
        method: `relevance`, `rollout`, `gradcam`, or `auto` (relevance for transformers, gradcam for the rest).

    Raises DataError for a photograph that cannot be read, and UserError for an unknown class or a method that does
    not fit the network.
    """
    choose_method(run.model, method)
    return explain_square(run, read_square(run, Path(path)), target=target, method=method)


def explain_square(run: Run, square: NDArray[np.uint8], *, target: str | None = None, method: str = "auto") -> HeatMap:
    """As :func:`explain`, of a photograph that is a square uint8[P, P, 3] already, as the run's settings make it."""
    chosen = choose_method(run.model, method)
    if target is not None and target not in run.classes:
        raise UserError(
            f"no class {target!r} in this run.{did_you_mean(target, run.classes)} Known: {', '.join(run.classes)}."
        )
    images = normalised(run, [square])
    if target is not None:
        wanted = run.classes.index(target)
    else:
        with torch.no_grad():
            wanted = int(run.model.scores(images).argmax(dim=1))
    grid = grid_maps(run.model, images, torch.tensor([wanted], device=images.device), chosen)[0].cpu().numpy()
    shown = None if chosen == "rollout" else run.classes[wanted]
    return HeatMap(smooth(grid, square.shape[0]), square, chosen, shown)


def read_square(run: Run, path: Path) -> NDArray[np.uint8]:
    """The square the run's network sees of a photograph, uint8[P, P, 3] RGB. Raises DataError."""
    if run.cache is not None:
        return run.cache.square(path, run.settings)
    return load_square(path, run.settings)


def normalised(run: Run, squares: list[NDArray[np.uint8]]) -> torch.Tensor:
    """Squares uint8[P, P, 3] as the run's network takes them: float32[B, 3, P, P] on its device."""
    transform = eval_transform(run.model.backbone.preprocess)
    images = torch.stack([transform(torch.from_numpy(np.array(square)).permute(2, 0, 1)) for square in squares])
    return images.to(run.runtime.device)


def smooth(grid: NDArray[np.float32], pixels: int) -> NDArray[np.float32]:
    """A grid float32[rows, columns] on the square: float32[pixels, pixels], 0..1, interpolated between cell centres.

    Lowest to 0, highest to 1; a grid that is the same everywhere says nothing and becomes 0.
    """
    low, high = float(grid.min()), float(grid.max())
    if not high - low > 1e-6 * max(abs(high), 1e-20):
        return np.zeros((pixels, pixels), np.float32)
    scaled = np.asarray((grid - low) / (high - low), np.float32)
    large = cv2.resize(scaled, (pixels, pixels), interpolation=cv2.INTER_LINEAR)
    return np.clip(large, 0, 1).astype(np.float32)


def on_photograph(
    values: NDArray[np.float32], photo: NDArray[np.uint8], settings: FundusSettings
) -> NDArray[np.float32]:
    """A map of the square, back on the photograph it was made of: the inverse of cropping, padding and squashing.

    Args:
        values: float32[P, P], 0..1.
        photo: uint8[H, W, 3] RGB, as :func:`eyetune.data.photo.read_image` reads the file.
        settings: how the photograph became a square.

    Returns float32[H, W], 0..1; 0 where the network saw nothing.
    """
    height, width = photo.shape[:2]
    field = find_field(photo) if settings.crop else Field(0, 0, width, height)
    pixels = values.shape[0]
    if settings.fit == "pad":
        scale = pixels / max(field.height, field.width)
        rows, columns = max(1, round(field.height * scale)), max(1, round(field.width * scale))
        top, left = (pixels - rows) // 2, (pixels - columns) // 2
        values = values[top : top + rows, left : left + columns]
    whole = np.zeros((height, width), np.float32)
    inside = cv2.resize(np.ascontiguousarray(values), (field.width, field.height), interpolation=cv2.INTER_LINEAR)
    whole[field.top : field.bottom, field.left : field.right] = inside
    return whole
