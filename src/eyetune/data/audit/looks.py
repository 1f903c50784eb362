"""One look at every file: can it be decoded, how large is it, what is on it, and a small view to compare it by.

Looks are kept in the image cache by the content of the file, so that a second audit decodes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import __version__ as pillow_version

from eyetune.data.cache import Cache, content_key, file_digest
from eyetune.data.fundus import VERSION, Field, find_field
from eyetune.data.photo import Photo, read_header, read_image
from eyetune.data.store import Item, Kind
from eyetune.errors import DataError
from eyetune.progress import track

View = npt.NDArray[np.uint8]
"""uint8[SIDE, SIDE]: the green channel of the field of view, padded to a square. Green shows vessels best."""

SIDE = 128
"""Pixels of a view."""

_DECODE = 256
"""Pixels that the shorter side is decoded to at least; a JPEG of twice that and more is decoded at reduced scale."""

_LOOKS = 1
"""Counts up with every change of what is measured here."""

_HEAD = struct.Struct("<II8sf f fff")


@dataclass(frozen=True)
class Look:
    """What is measured of one photograph.

    Attributes:
        width, height: pixels of the file, upright.
        mode: as in the file: RGB, L (8-bit gray), I;16, P (palette), CMYK, RGBA, …; DICOM.
        lit: share of the picture that the field of view takes, 0..1.
        spread: gray levels, 0..255, between the darkest and the brightest hundredth of the field of view.
        colour: mean red, green, blue of the field of view, 0..255.
        view: what the photograph is compared by.
    """

    width: int
    height: int
    mode: str
    lit: float
    spread: float
    colour: tuple[float, float, float]
    view: View

    def to_bytes(self) -> bytes:
        """For the cache."""
        mode = self.mode.encode()[:8]
        return _HEAD.pack(self.width, self.height, mode, self.lit, self.spread, *self.colour) + self.view.tobytes()

    @classmethod
    def from_bytes(cls, content: npt.NDArray[np.uint8]) -> Look:
        """Back from :meth:`to_bytes`, uint8[length]. Raises ValueError for another length."""
        if len(content) != _HEAD.size + SIDE * SIDE:
            raise ValueError("not a look")
        width, height, mode, lit, spread, *colour = _HEAD.unpack(content[: _HEAD.size].tobytes())
        view = content[_HEAD.size :].reshape(SIDE, SIDE)
        red, green, blue = colour
        return cls(width, height, mode.rstrip(b"\0").decode(), lit, spread, (red, green, blue), view)


class Seen(NamedTuple):
    """What became of one file: its content's digest and its look, or what is wrong with it."""

    digest: bytes
    look: Look | None
    fault: str


def look_at(path: Path, bits: int | None = None) -> Look:
    """Decode a photograph and measure it.

    Args:
        path: the file.
        bits: how many bits a deep gray image uses.

    Raises DataError as :func:`eyetune.data.photo.read_image` does.
    """
    image = read_image(path, short_side=_DECODE, bits=bits)
    header = read_header(path)
    field = find_field(image)
    inside = image[field.top : field.bottom, field.left : field.right]
    step = max(1, min(inside.shape[:2]) // 64)
    few = inside[::step, ::step].reshape(-1, 3)
    brightest = few.max(axis=1)
    lit = few[brightest > 0.12 * np.percentile(brightest, 95)] if len(few) else few
    lit = lit if len(lit) else few
    gray = lit.mean(axis=1)
    red, green, blue = (float(value) for value in lit.mean(axis=0))
    return Look(
        header.width if header else image.shape[1],
        header.height if header else image.shape[0],
        header.mode if header else "DICOM",
        field.lit,
        float(np.percentile(gray, 99) - np.percentile(gray, 1)),
        (red, green, blue),
        view_of(image, field),
    )


def view_of(image: Photo, field: Field) -> View:
    """The green channel of the field of view, uint8[H, W, 3] -> uint8[SIDE, SIDE], its shape kept, black around it."""
    green = np.ascontiguousarray(image[field.top : field.bottom, field.left : field.right, 1])
    scale = SIDE / max(green.shape)
    width, height = (max(1, round(side * scale)) for side in green.shape[::-1])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    view = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    view[top : top + height, left : left + width] = cv2.resize(green, (width, height), interpolation=method)
    return view


class Looker:
    """Looks at files, from the cache where it has them.

    Args:
        cache: the image cache, or None.
        bits: how many bits deep gray images use.
    """

    def __init__(self, cache: Cache | None, bits: int | None = None) -> None:
        self.cache = cache
        self.bits = bits

    def all(self, paths: Sequence[Path], threads: int) -> list[Seen]:
        """Look at every file, several at a time (decoders work outside Python's lock)."""
        with ThreadPoolExecutor(max(1, threads)) as pool:
            found = list(track(pool.map(self, paths), len(paths), "Looking at images"))
        if self.cache is not None:
            self.cache.store.close()
            self.cache.store.refresh()
        return found

    def __call__(self, path: Path) -> Seen:
        """Look at one file; never raises for what is wrong with it."""
        try:
            digest = self.cache.digest(path) if self.cache else file_digest(path)
        except (OSError, ValueError):
            try:
                look_at(path, self.bits)
            except DataError as error:
                return Seen(b"", None, str(error))
            return Seen(b"", None, f"{path}: cannot be read.")
        key = self._key(digest)
        kept = self.cache.store.get(key) if self.cache else None
        if kept is not None:
            try:
                return Seen(digest, Look.from_bytes(kept), "")
            except ValueError:
                pass  # of another length: looked at anew
        try:
            look = look_at(path, self.bits)
        except DataError as error:
            return Seen(digest, None, str(error))
        if self.cache is not None:
            self.cache.keep(path, Item(key, Kind.LOOK, look.to_bytes()))
        return Seen(digest, look, "")

    def _key(self, digest: bytes) -> bytes:
        code = _LOOKS, VERSION, cv2.__version__, pillow_version
        return content_key("look", *code, SIDE, self.bits, digest.hex())
