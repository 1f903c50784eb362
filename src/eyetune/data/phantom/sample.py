"""One photograph on the fly, with its facts: what pretraining and the cohort writer both draw from."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eyetune.data.phantom.camera import CAMERAS, Camera, photograph, photograph_with_masks, retina_pixels
from eyetune.data.phantom.caption import describe
from eyetune.data.phantom.plan import EyePlan, plan_patient
from eyetune.data.phantom.retina import draw_eye
from eyetune.errors import UserError, did_you_mean

Image = NDArray[np.uint8]
SMALLEST, LARGEST = 64, 4096
"""Side of a photograph, in pixels."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One photograph.

    `image` uint8[h, w, 3] RGB; `facts` as :meth:`EyePlan.facts` plus `camera` and `caption`; `masks` uint8[h, w] each,
    0..255, moved with the photograph: vessels, arteries, veins, disc, cup and every kind of lesion present.
    """

    image: Image
    facts: dict[str, Any]
    masks: dict[str, Image] = field(default_factory=dict)


def find_camera(name: str) -> Camera:
    """The camera of that name, or a UserError that lists the names."""
    if name not in CAMERAS:
        raise UserError(f"There is no camera {name!r}.{did_you_mean(name, CAMERAS)} Known: {', '.join(CAMERAS)}.")
    return CAMERAS[name]


def check_size(height: int, width: int) -> None:
    """Refuse sizes that cannot be drawn."""
    if not (SMALLEST <= height <= LARGEST and SMALLEST <= width <= LARGEST):
        raise UserError(f"A photograph must be {SMALLEST} to {LARGEST} pixels each way; got {width}x{height}.")


def photo_rng(plan: EyePlan, camera: Camera) -> np.random.Generator:
    """The chance in this camera's photograph of this eye."""
    key = [plan.seed, plan.patient, 10 + (plan.eye == "L"), zlib.crc32(camera.name.encode())]
    return np.random.default_rng(np.random.SeedSequence(key))


def take_photo(plan: EyePlan, camera: Camera, height: int, width: int) -> Image:
    """This camera's one photograph of this eye, uint8[height, width, 3] RGB."""
    drawn = draw_eye(plan, retina_pixels(camera, height, width))
    return photograph(drawn, camera, photo_rng(plan, camera), height, width)


def sample(
    seed: int,
    patient: int,
    eye: str,
    camera: str,
    pixels: int | tuple[int, int],
    *,
    masks: bool = False,
    grades: Sequence[float] | None = None,
    vcdr: float | None = None,
) -> Sample:
    """The photograph that :func:`write_cohort` would write (before JPEG), without a file.

    Args:
        seed: The cohort's seed.
        patient: The patient's number.
        eye: `R` or `L`.
        camera: A name in :data:`CAMERAS`.
        pixels: Side of a square photograph, or (width, height).
        masks: Also return masks, in the photograph's frame.
        grades: As for :func:`plan_patient`.
        vcdr: As for :func:`plan_patient`.
    """
    if eye not in ("R", "L"):
        raise UserError(f"An eye is 'R' or 'L'; got {eye!r}.")
    width, height = (pixels, pixels) if isinstance(pixels, int) else pixels
    check_size(height, width)
    taken_by = find_camera(camera)
    plan = plan_patient(seed, patient, grades=grades, vcdr=vcdr)[0 if eye == "R" else 1]
    facts = {**plan.facts(), "camera": camera, "caption": describe(plan)}
    if not masks:
        return Sample(take_photo(plan, taken_by, height, width), facts)
    drawn = draw_eye(plan, retina_pixels(taken_by, height, width), masks=True)
    image, moved = photograph_with_masks(drawn, taken_by, photo_rng(plan, taken_by), height, width)
    return Sample(image, facts, moved)
