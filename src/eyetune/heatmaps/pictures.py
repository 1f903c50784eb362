"""Heat maps for the eye: the photograph in gray, the map over it in colours that everybody can tell apart."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from eyetune.heatmaps.explain import HeatMap

COLOURS = "plasma"
"""From dark blue through magenta to yellow: brighter is more, in even steps with and without colour blindness (Smith
and van der Walt, SciPy 2015), and no gray in between that would be lost on a gray photograph."""

_FAINT, _FULL = 0.05, 0.75
"""How much of the colour there is over the photograph where the map is 0, and where it is 1."""


def overlay(square: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8[H, W, 3] RGB: the photograph uint8[H, W, 3] in gray under the map float32[H, W], 0..1."""
    gray = cv2.cvtColor(np.ascontiguousarray(square), cv2.COLOR_RGB2GRAY).astype(np.float32)
    share = (_FAINT + (_FULL - _FAINT) * np.sqrt(np.clip(values, 0, 1)))[..., None]
    mixed = (1 - share) * gray[..., None] + share * _table()[_levels(values)]
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def side_by_side(found: HeatMap) -> NDArray[np.uint8]:
    """uint8[P, W, 3] RGB: what the network saw, the map over it, and the scale of the colours (top is 1)."""
    pixels = found.square.shape[0]
    gap, bar = max(2, pixels // 56), max(6, pixels // 20)
    scale = np.repeat(np.linspace(1, 0, pixels, dtype=np.float32)[:, None], bar, axis=1)
    white = np.full((pixels, gap, 3), 255, np.uint8)
    colours = _table()[_levels(scale)].astype(np.uint8)
    return np.concatenate([found.square, white, overlay(found.square, found.values), white, colours], axis=1)


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write uint8[H, W, 3] RGB as PNG, atomically. Raises UserError when the file cannot be written."""
    from eyetune.files import atomic

    encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    with atomic(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def _levels(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.rint(255 * np.clip(values, 0, 1)).astype(np.int64)


@cache
def _table() -> NDArray[np.float32]:
    """float32[256, 3], 0..255: the colours from 0 to 1."""
    from matplotlib import colormaps

    return np.asarray(255 * colormaps[COLOURS](np.arange(256))[:, :3], np.float32)
