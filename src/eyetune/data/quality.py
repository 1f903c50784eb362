"""Is a photograph fit to be judged? Six plain measures inside the field of view, and a word for each that is out of
bounds.

Sharpness is measured where it does not depend on brightness or camera: fine detail over coarse detail of the green
channel, the field brought to one size. (Ratios of octaves as in Crete et al., "The blur effect", 2007.) The bounds were
set on photographs whose quality is known; docs/predict.md has the numbers. A photograph without a word may still be
unfit: glare, dust, a missing macula and much else goes unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from eyetune.data.fundus import find_field, find_surround
from eyetune.data.photo import Photo, read_image

SIDE = 512
"""Longer side, in pixels, to which the field is brought before it is measured."""

SHORT_SIDE = 640
"""A JPEG is decoded no larger than needed: its shorter side stays at least this many pixels."""

SHARPNESS = 0.38
"""Below: `blurred`."""

DARK, BRIGHT = 0.12, 0.7
"""Median luminance below: `dark`; above: `bright`."""

BURNT = 0.10
"""Share of the field whose green channel is at its end; above: `bright`."""

CONTRAST = 0.03
"""Below: `low_contrast`."""

FIELD_PIXELS, FIELD_SHARE = 160, 0.2
"""A field with a shorter side below so many pixels, or a smaller share of the picture: `small_field`."""

_RIM, _WIDE = 41, SIDE / 30
"""In pixels at :data:`SIDE`: twice what is left out along the rim, and what counts as the surroundings of a place."""

WORDS = ("blurred", "dark", "bright", "low_contrast", "small_field", "no_field")
"""Every flag there is."""


@dataclass(frozen=True)
class Quality:
    """What was measured of one photograph.

    Attributes:
        sharpness: deviation of the detail of 1 to 2 pixels over that of 4 to 8, at :data:`SIDE`; about 0.65 in sharp
            photographs, 0.15 in smeared ones. None without a field: the scale is then not known.
        luminance: median inside the field, 0..1.
        burnt: share of the field with green above 240 of 255, 0..1.
        contrast: deviation of the green channel from its surroundings, as a share of its mean.
        field_pixels: shorter side of the box around the field, as decoded.
        field_share: of the picture that this box takes, 0..1.
        has_field: whether there is a surround, black or plain, around something lit.
    """

    sharpness: float | None
    luminance: float
    burnt: float
    contrast: float
    field_pixels: int
    field_share: float
    has_field: bool

    @property
    def flags(self) -> tuple[str, ...]:
        """What is out of bounds, in the order of :data:`WORDS`; empty when nothing is."""
        small = self.field_pixels < FIELD_PIXELS or self.field_share < FIELD_SHARE
        found = (
            self.sharpness is not None and self.sharpness < SHARPNESS,
            self.luminance < DARK,
            self.luminance > BRIGHT or self.burnt > BURNT,
            self.contrast < CONTRAST,
            small,
            not self.has_field,
        )
        return tuple(word for word, holds in zip(WORDS, found, strict=True) if holds)


def read_quality(path: Path, *, bits: int | None = None) -> Quality:
    """Measure a file. Raises DataError as :func:`eyetune.data.photo.read_image` does."""
    return quality(read_image(path, short_side=SHORT_SIDE, bits=bits))


def quality(photo: Photo) -> Quality:
    """Measure a photograph uint8[H, W, 3], RGB."""
    field = find_field(photo)
    height, width = photo.shape[:2]
    inside = photo[field.top : field.bottom, field.left : field.right]
    scale = SIDE / max(inside.shape[:2])
    size = (max(1, round(inside.shape[1] * scale)), max(1, round(inside.shape[0] * scale)))
    inside = cv2.resize(inside, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    lit = _lit(inside, find_surround(photo))
    has_field = bool(0.3 < lit.mean() < 0.97)
    if not has_field:
        lit = np.ones(lit.shape, bool)
    # Away from the rim, whose edge is no detail of the retina.
    core = cv2.erode(lit.astype(np.uint8), np.ones((_RIM, _RIM), np.uint8), borderValue=0) > 0
    if core.sum() < 1000:
        core = lit
    green = inside[..., 1].astype(np.float32)
    blurs = {sigma: cv2.GaussianBlur(green, (0, 0), sigma) for sigma in (1, 2, 4, 8)}
    fine, coarse = (float((blurs[a] - blurs[2 * a])[core].std()) for a in (1, 4))
    # The average of the lit surroundings only: the surround would leak in.
    weight = lit.astype(np.float32)
    around = cv2.GaussianBlur(green * weight, (0, 0), _WIDE) / np.maximum(cv2.GaussianBlur(weight, (0, 0), _WIDE), 1e-3)
    return Quality(
        sharpness=fine / max(coarse, 0.1) if has_field else None,
        luminance=float(np.median(cv2.cvtColor(inside, cv2.COLOR_RGB2GRAY)[core])) / 255,
        burnt=float((inside[..., 1][core] > 240).mean()),
        contrast=float((green - around)[core].std()) / max(float(around[core].mean()), 1.0),
        field_pixels=min(field.width, field.height),
        field_share=field.width * field.height / (width * height),
        has_field=has_field,
    )


def _lit(inside: Photo, surround: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.bool_]:
    """Where the picture differs from what is around the field; everywhere when nothing is around it."""
    if surround is None:
        return np.ones(inside.shape[:2], bool)
    away = cv2.absdiff(inside, np.full_like(inside, surround)).max(axis=2)
    return np.asarray(away > 12, dtype=bool)
