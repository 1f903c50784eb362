"""From a file to the square every network sees: read, find the field of view, crop, fit, contrast.

Training, evaluation and prediction all go through :func:`load_square`; its settings travel in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from eyetune.data.config import Contrast, Fit
from eyetune.data.photo import Photo, decode_image, read_image

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Preprocess
    from eyetune.data.config import PhotoConfig

VERSION = 2
"""Counts up with every change to this file, photo.py or dicom.py that changes a pixel: squares prepared by an older
version are not used."""

_LOOK = 256
"""Longer side, in pixels, of the copy on which the field of view is looked for."""

_MARGIN = 1.5
"""A scaled decode keeps the shorter side at least this many times the wanted pixels."""


GRAY = 128
"""What Ben Graham's contrast leaves of an even surface, the surround included."""


@dataclass(frozen=True)
class FundusSettings:
    """How a photograph becomes a square; kept in every checkpoint.

    Attributes:
        pixels: side of the square.
        fit: "pad" keeps the shape and fills with black; "squash" stretches to the square.
        crop: crop to the field of view first.
        contrast: "none", "clahe" or "ben-graham".
        bits: how many bits deep gray images use; None where the file or its format says.
    """

    pixels: int
    fit: Fit = "pad"
    crop: bool = True
    contrast: Contrast = "none"
    bits: int | None = None

    @property
    def surround(self) -> int:
        """0..255: what is around the field of view in a prepared square."""
        return GRAY if self.contrast == "ben-graham" else 0

    @classmethod
    def of(cls, config: PhotoConfig, preprocess: Preprocess) -> FundusSettings:
        """What the data section asks for, and the backbone where it does not say."""
        return cls(preprocess.pixels, config.fit or preprocess.fit, config.crop, config.contrast, config.bits)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> FundusSettings:
        """Back from :meth:`to_dict`."""
        return cls(**content)


@dataclass(frozen=True)
class Field:
    """The box around the field of view: left <= x < right, top <= y < bottom, in pixels of the image.

    `lit` is the share of the whole picture, 0..1, that the field of view itself takes.
    """

    left: int
    top: int
    right: int
    bottom: int
    lit: float = 1.0

    @property
    def width(self) -> int:
        """In pixels."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bottom - self.top


def find_field(image: Photo) -> Field:
    """The box around the field of view; the whole image when there is no surround to cut away.

    The surround is what the corners show: black, or, when all four are flat and alike, any gray. The field is the
    largest connected area that differs from it, so a date printed in a corner does not count. Works from brightness
    differences relative to the image, so dark photographs are cropped too.
    """
    height, width = image.shape[:2]
    whole = Field(0, 0, width, height)
    small = _small_copy(image)
    small_size = small.shape[1], small.shape[0]
    if min(small_size) < 16:
        return whole
    surround = _surround(small)
    if surround is None:
        return whole
    difference = _largest_channel(cv2.absdiff(small, np.full_like(small, surround)))
    bright = float(np.percentile(difference[::2, ::2], 95))
    if bright < 8:
        return whole
    _, mask = cv2.threshold(difference, float(np.clip(0.12 * bright, 4, 18)), 1, cv2.THRESH_BINARY)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count < 2:
        return whole
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    x, y, w, h, area = (int(value) for value in stats[largest])
    if area < 0.05 * mask.size:
        return Field(0, 0, width, height, area / mask.size)
    across, down = width / small_size[0], height / small_size[1]
    return Field(
        max(0, int(x * across)),
        max(0, int(y * down)),
        min(width, int(np.ceil((x + w) * across))),
        min(height, int(np.ceil((y + h) * down))),
        area / mask.size,
    )


def find_surround(image: Photo) -> npt.NDArray[np.uint8] | None:
    """The colour around the field, uint8[3], or None when the corners are part of the photograph uint8[H, W, 3]."""
    return _surround(_small_copy(image))


def _small_copy(image: Photo) -> Photo:
    """No side longer than _LOOK."""
    height, width = image.shape[:2]
    scale = min(1.0, _LOOK / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small: Photo = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return small


def _largest_channel(image: Photo) -> Photo:
    """uint8[H, W, 3] to uint8[H, W]; ten times as fast as numpy's max over a short last axis."""
    red, green, blue = cv2.split(image)
    result: Photo = cv2.max(cv2.max(red, green), blue)
    return result


def _surround(small: Photo) -> npt.NDArray[np.uint8] | None:
    """As :func:`find_surround`, of a small copy."""
    side = max(3, round(0.05 * min(small.shape[:2])))
    corners = [small[:side, :side], small[:side, -side:], small[-side:, :side], small[-side:, -side:]]
    middles = np.array([np.median(corner.reshape(-1, 3), axis=0) for corner in corners])
    flat = np.array([np.percentile(np.abs(c - m), 75) <= 6 for c, m in zip(corners, middles, strict=True)])
    black = middles.max(axis=1) <= 24
    if (flat & black).any():
        return np.median(middles[flat & black], axis=0).astype(np.uint8)
    # Paper and screens are colourless; a flat coloured corner is retina, as in crops around the optic disc.
    if flat.all() and np.ptp(middles, axis=0).max() <= 12 and np.ptp(middles, axis=1).max() <= 24:
        return np.median(middles, axis=0).astype(np.uint8)
    return None


def prepare(image: Photo, settings: FundusSettings, field: Field | None = None) -> Photo:
    """Crop, fit and contrast: uint8[H, W, 3] RGB to uint8[pixels, pixels, 3] RGB. `field` when it is known already."""
    if settings.crop:
        field = field or find_field(image)
        image = image[field.top : field.bottom, field.left : field.right]
    square = _squash(image, settings.pixels) if settings.fit == "squash" else _pad(image, settings.pixels)
    if settings.contrast == "clahe":
        return _clahe(square)
    if settings.contrast == "ben-graham":
        return _ben_graham(square)
    return square


def load_square(path: Path, settings: FundusSettings) -> Photo:
    """Read and prepare a file, decoding no more pixels than needed; uint8[pixels, pixels, 3].

    Raises DataError as :func:`eyetune.data.photo.read_image` does.
    """
    return _square(lambda short_side: read_image(path, short_side=short_side, bits=settings.bits), settings)


def decode_square(data: bytes, where: str, settings: FundusSettings, *, name: str | None = None) -> Photo:
    """As :func:`load_square`, of the bytes of a file; `where` and `name` as :func:`decode_image` takes them."""

    def read(short_side: int | None) -> Photo:
        return decode_image(data, where, short_side=short_side, bits=settings.bits, name=name)

    return _square(read, settings)


def _square(read: Callable[[int | None], Photo], settings: FundusSettings) -> Photo:
    """The square of what `read` decodes, its shorter side as asked, or whole for None."""
    image = read(int(np.ceil(_MARGIN * settings.pixels)))
    field = find_field(image) if settings.crop else None
    if field is not None and max(field.width, field.height) < settings.pixels:
        # A small field in a wide frame: what was decoded small would have to be enlarged.
        image, field = read(None), None
    return prepare(image, settings, field)


def _resize(image: Photo, width: int, height: int) -> Photo:
    shrinks = image.shape[1] >= width and image.shape[0] >= height
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method)


def _squash(image: Photo, pixels: int) -> Photo:
    return _resize(image, pixels, pixels)


def _pad(image: Photo, pixels: int) -> Photo:
    height, width = image.shape[:2]
    scale = pixels / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    square = np.zeros((pixels, pixels, 3), np.uint8)
    top, left = (pixels - new_height) // 2, (pixels - new_width) // 2
    square[top : top + new_height, left : left + new_width] = _resize(image, new_width, new_height)
    return square


def _clahe(square: Photo) -> Photo:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of the lightness; the surround stays black."""
    lab = cv2.cvtColor(square, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(lab[..., 0])
    result: Photo = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    result[_largest_channel(square) <= 8] = 0
    return result


def _ben_graham(square: Photo) -> Photo:
    """Four times the difference from the local average, around mid-gray; the surround becomes mid-gray.

    After Graham, "Kaggle Diabetic Retinopathy Detection competition report" (2015): sigma is radius / 30.
    """
    average = cv2.GaussianBlur(square, (0, 0), square.shape[0] / 60)
    result: Photo = cv2.addWeighted(square, 4, average, -4, GRAY)
    result[_largest_channel(square) <= 8] = GRAY
    return result
