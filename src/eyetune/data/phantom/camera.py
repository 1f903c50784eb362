"""Cameras: the field stop, optics, light, sensor and file that stand between a retina and its photograph.

Each camera is a domain: the same eye looks different through another one, in ways real photographs differ (field of
view and its shape, colour cast, focus, evenness of light, noise, resolution, JPEG quality).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from eyetune.data.phantom.retina import DrawnEye, grain

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera. Lengths are shares of the field's diameter in the photograph unless said otherwise."""

    name: str
    fill: float
    """Field diameter over the frame (its shorter side, or its width where the field is cut)."""
    view: float
    """Radius of retina seen, 0.5 is the whole drawn field."""
    cut: float
    """Height of the field that is left when top and bottom are cut off; 1 a full circle."""
    notch: bool
    """A small tab on the rim, as many cameras show."""
    gain: tuple[float, float, float]
    """Colour cast: factors on red, green, blue."""
    haze: tuple[float, float, float]
    """Stray light added to red, green, blue, 0..255."""
    contrast: float
    """Contrast around the mean level; 1 leaves it."""
    gamma: float
    blur: float
    """Standard deviation of the point spread."""
    vignette: float
    """Loss of light at the rim, 0..1."""
    uneven: float
    """Side-to-side difference of light, 0..1."""
    noise: float
    """Standard deviation of the sensor's noise, 0..255."""
    resolution: int
    """Pixels the sensor gives the field's diameter; a larger photograph is interpolated from them."""
    quality: int
    """JPEG quality, 1..100."""
    jitter: float
    """How far aim and distance vary between photographs, 0..1."""


CAMERAS: dict[str, Camera] = {
    camera.name: camera
    for camera in (
        Camera(
            "clinic", 0.965, 0.495, 1.0, True, (1.04, 0.98, 0.92), (3, 2, 2),
            1.06, 1.0, 0.0011, 0.26, 0.05, 2.0, 2600, 92, 0.5,
        ),
        Camera(
            "handheld", 0.985, 0.485, 0.80, False, (1.06, 0.93, 0.60), (10, 5, 0),
            0.94, 1.06, 0.0034, 0.38, 0.24, 6.0, 900, 58, 1.0,
        ),
        Camera(
            "legacy", 0.87, 0.455, 1.0, False, (0.80, 1.08, 0.98), (30, 30, 26),
            0.66, 0.96, 0.0024, 0.20, 0.12, 4.0, 640, 76, 0.7,
        ),
    )
}  # fmt: skip
"""The cameras by name: a clinic's table-top one, a hand-held one, and an old one digitised from film."""


def field_diameter(camera: Camera, height: int, width: int) -> float:
    """Diameter of the field in pixels in a photograph of this size."""
    return camera.fill * min(width, height / camera.cut)


def retina_pixels(camera: Camera, height: int, width: int) -> int:
    """Side at which to draw the retina so that a photograph of this size shows it about one to one."""
    wanted = min(field_diameter(camera, height, width), float(camera.resolution))
    return max(96, round(wanted / (2 * camera.view)))


@dataclass(frozen=True, slots=True)
class Shot:
    """The geometry of one photograph: `matrix` float[2, 3] takes drawn pixels to photograph pixels."""

    matrix: NDArray[np.float64]
    height: int
    width: int
    diameter: float


def aim(camera: Camera, rng: np.random.Generator, pixels: int, height: int, width: int) -> Shot:
    """Point the camera: a little off centre, off scale and tilted, never so far that a lesion leaves the view."""
    diameter = field_diameter(camera, height, width)
    zoom = diameter / (2 * camera.view * pixels) * (1 + 0.015 * camera.jitter * float(rng.uniform(-1, 1)))
    turn = np.radians(4.0 * camera.jitter * float(rng.uniform(-1, 1)))
    shift = 0.014 * camera.jitter * rng.uniform(-1, 1, 2) * pixels
    cos, sin = np.cos(turn) * zoom, np.sin(turn) * zoom
    centre = np.array([(pixels - 1) / 2, (pixels - 1) / 2]) + shift
    linear = np.array([[cos, -sin], [sin, cos]])
    offset = np.array([(width - 1) / 2, (height - 1) / 2]) - linear @ centre
    return Shot(np.hstack([linear, offset[:, None]]), height, width, diameter)


@lru_cache(maxsize=4)
def _stop(camera: Camera, height: int, width: int, mirrored: bool) -> tuple[Floats, Floats, Floats, Floats]:
    """Field stop 0..1 and vignette factor, float32[height, width]; x [1, width] and y [height, 1], -1..1 across it."""
    diameter = field_diameter(camera, height, width)
    scale = 2 / diameter
    x = (np.arange(width, dtype=np.float32) - (width - 1) / 2)[None] * scale
    y = (np.arange(height, dtype=np.float32) - (height - 1) / 2)[:, None] * scale
    radius = np.sqrt(x * x + y * y)
    soft = max(2.0, 0.004 * diameter) * scale
    stop = np.clip((1 - radius) / soft, 0, 1)
    if camera.cut < 1:
        stop = stop * np.clip((camera.cut - np.abs(y)) / soft, 0, 1)
    if camera.notch:
        angle = np.radians(-38)
        side = -1.0 if mirrored else 1.0
        tab = np.hypot(x - side * 1.0 * np.cos(angle), y - 1.0 * np.sin(angle))
        stop = np.maximum(stop, np.clip((0.028 - tab) / soft, 0, 1))
    vignette = 1 - camera.vignette * np.clip(radius, 0, 1.1) ** 3
    return stop.astype(np.float32), vignette.astype(np.float32), x.astype(np.float32), y.astype(np.float32)


def photograph(drawn: DrawnEye | Image, camera: Camera, rng: np.random.Generator, height: int, width: int) -> Image:
    """Take a photograph: uint8[height, width, 3] RGB, the camera's field on black.

    Args:
        drawn: A drawn retina, best at :func:`retina_pixels` (or its image, uint8[n, n, 3]).
        camera: One of :data:`CAMERAS`, or your own.
        rng: Decides aim, light and noise; the same state gives the same photograph.
        height: Pixels, 64 or more.
        width: Pixels, 64 or more.
    """
    image = drawn.image if isinstance(drawn, DrawnEye) else drawn
    shot = aim(camera, rng, image.shape[0], height, width)
    return _expose(image, shot, camera, rng)


def photograph_with_masks(
    drawn: DrawnEye, camera: Camera, rng: np.random.Generator, height: int, width: int
) -> tuple[Image, dict[str, Image]]:
    """As :func:`photograph`, with every mask of `drawn` moved along: uint8[height, width], 0..255."""
    shot = aim(camera, rng, drawn.image.shape[0], height, width)
    stop = _stop(camera, height, width, False)[0] > 0.5
    named: Mapping[str, Image | None] = {
        "vessels": drawn.vessels,
        "arteries": drawn.arteries,
        "veins": drawn.veins,
        "disc": drawn.disc,
        "cup": drawn.cup,
        **drawn.lesions,
    }
    masks = {
        name: np.asarray(cv2.warpAffine(mask, shot.matrix, (width, height), flags=cv2.INTER_LINEAR) * stop, np.uint8)
        for name, mask in named.items()
        if mask is not None
    }
    return _expose(drawn.image, shot, camera, rng), masks


def _expose(image: Image, shot: Shot, camera: Camera, rng: np.random.Generator) -> Image:
    """Optics, colour, light and noise."""
    size = (shot.width, shot.height)
    flags = cv2.INTER_CUBIC if shot.matrix[0, 0] > 1.3 else cv2.INTER_LINEAR
    photo = cv2.warpAffine(image, shot.matrix, size, flags=flags, borderMode=cv2.BORDER_REFLECT)
    sigma = camera.blur * shot.diameter * float(rng.uniform(0.75, 1.35))
    if sigma > 0.25:
        photo = cv2.GaussianBlur(photo, (0, 0), sigma)
    stop, vignette, x, y = _stop(camera, shot.height, shot.width, bool(rng.random() < 0.5))
    turn = rng.uniform(0, 2 * np.pi)
    slope = camera.uneven * float(rng.uniform(0.3, 1.0))
    bright = float(rng.uniform(0.94, 1.06))
    light = vignette * (bright + slope * (np.float32(np.cos(turn)) * x + np.float32(np.sin(turn)) * y))
    curves = _colour_curves(camera, np.array(camera.gain) * (1 + rng.uniform(-0.02, 0.02, 3)))
    exposed = cv2.multiply(cv2.LUT(photo, curves), cv2.merge([light, light, light]))
    exposed = cv2.add(exposed, _sensor_noise(camera, shot, rng))
    stops = cv2.merge([stop, stop, stop])
    return np.asarray(np.clip(cv2.multiply(exposed, stops), 0, 255), np.uint8)


def _colour_curves(camera: Camera, cast: NDArray[np.float64]) -> Floats:
    """Gamma, contrast and colour cast as one table for each channel, float32[1, 256, 3]."""
    level = 255 * (np.arange(256) / 255) ** camera.gamma
    middle = np.array([150, 78, 45])
    return ((level[:, None] * camera.contrast + middle * (1 - camera.contrast)) * cast).astype(np.float32)[None]


@lru_cache(maxsize=1)
def _noise_tile() -> Floats:
    """Sensor noise, float32[1024, 1024, 3], unit variance: mostly luminance, some colour."""
    planes = [np.roll(grain(1024), shift, (0, 1)) for shift in (0, 307, 701)]
    return np.stack([planes[0] + 0.45 * planes[1], planes[0], planes[0] + 0.6 * planes[2]], -1)


def _sensor_noise(camera: Camera, shot: Shot, rng: np.random.Generator) -> Floats:
    """Noise and stray light, float32[height, width, 3]; the grain is as coarse as the sensor."""
    tile = _noise_tile()
    coarse = max(1.0, shot.diameter / camera.resolution)
    h, w = int(np.ceil(shot.height / coarse)), int(np.ceil(shot.width / coarse))
    row, column = (int(rng.integers(0, max(1, 1024 - need))) for need in (h, w))
    if max(h, w) > 1024:
        tile = np.tile(tile, (-(-h // 1024), -(-w // 1024), 1))
    noise = tile[row : row + h, column : column + w] * np.float32(camera.noise) + np.array(camera.haze, np.float32)
    if coarse > 1:
        noise = cv2.resize(noise, (shot.width, shot.height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(noise, np.float32)
