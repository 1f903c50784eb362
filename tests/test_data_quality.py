"""Quality flags on drawn eyes and on the same spoilt in known ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from data_kit import save

from eyetune.data.phantom import sample
from eyetune.data.quality import SHARPNESS, quality, read_quality
from eyetune.errors import DataError

Photo = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def eyes() -> list[Photo]:
    return [sample(5, patient, "R", camera, 512).image for patient in range(1, 4) for camera in ("clinic", "handheld")]


def scaled(photo: Photo, by: float, add: float = 0) -> Photo:
    """The lit part brighter or darker; the surround stays black."""
    lit = photo.max(axis=2, keepdims=True) > 12
    return np.where(lit, np.clip(photo * by + add, 0, 255), photo).astype(np.uint8)


def framed(photo: Photo) -> Photo:
    """In the corner of a picture three times as wide and high."""
    height, width = photo.shape[:2]
    frame = np.zeros((3 * height, 3 * width, 3), np.uint8)
    frame[height // 2 : height // 2 + height, :width] = photo
    return frame


def middle(photo: Photo) -> Photo:
    """A crop from inside the field, enlarged to be no small picture."""
    height, width = photo.shape[:2]
    return cv2.resize(photo[height // 3 : -height // 3, width // 3 : -width // 3], (512, 512))


SPOILT: dict[str, tuple[Callable[[Photo], Photo], set[str]]] = {
    "untouched": (lambda photo: photo, set()),
    "out of focus": (lambda photo: cv2.GaussianBlur(photo, (0, 0), 4), {"blurred"}),
    "underexposed": (lambda photo: scaled(photo, 0.25), {"dark"}),
    "overexposed": (lambda photo: scaled(photo, 3.2), {"bright"}),
    "hazy": (lambda photo: scaled(photo, 0.1, 81), {"low_contrast"}),
    "far away": (framed, {"small_field"}),
    "a crop": (middle, {"no_field"}),
    "black": (np.zeros_like, {"dark", "low_contrast", "no_field"}),
    "thumbnail": (lambda photo: cv2.resize(photo, (96, 96), interpolation=cv2.INTER_AREA), {"small_field"}),
}


@pytest.mark.parametrize("how", SPOILT)
def test_each_fault_gets_its_word(eyes: list[Photo], how: str) -> None:
    spoil, words = SPOILT[how]
    for eye in eyes:
        found = quality(spoil(eye))
        # A thumbnail and a haze take detail away as well: either answer is right there.
        assert set(found.flags) - ({"blurred"} if how in ("thumbnail", "hazy") else set()) == words, (how, found)


def test_sharpness_falls_with_blur_and_not_with_light_or_size(eyes: list[Photo]) -> None:
    for eye in eyes:
        sharp = quality(eye).sharpness
        blurred = [quality(cv2.GaussianBlur(eye, (0, 0), sigma)).sharpness for sigma in (1, 2, 4)]
        order = [sharp, *blurred]
        assert order == sorted(order, reverse=True)
        assert order[0] > SHARPNESS > order[-1]
        assert quality(scaled(eye, 0.6)).sharpness == pytest.approx(sharp, rel=0.15)
        large = cv2.resize(eye, (1500, 1500), interpolation=cv2.INTER_CUBIC)
        assert quality(large).sharpness == pytest.approx(sharp, rel=0.15)


def test_strange_shapes_are_measured(tmp_path: Path) -> None:
    for shape in ((1, 1), (1, 900), (900, 1), (15, 16), (40, 3000)):
        assert "no_field" in quality(np.full((*shape, 3), 120, np.uint8)).flags
    path = save(tmp_path / "eye.png", np.full((300, 300, 3), 90, np.uint8))
    assert read_quality(path).luminance == pytest.approx(90 / 255, abs=0.01)
    with pytest.raises(DataError, match="no such file"):
        read_quality(tmp_path / "gone.png")
