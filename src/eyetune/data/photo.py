"""From a file of any kind to pixels: what is opened at all, how large, how many pictures, and which gray is white.

A file from outside is refused by its head where it can be, before memory is spent on it: only the formats of
:data:`FORMATS` and DICOM are opened, by content and not by name, and nothing beyond :data:`MAX_PIXELS`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from eyetune.errors import DataError, MissingExtra

Photo = npt.NDArray[np.uint8]
"""uint8[H, W, 3], RGB."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
"""What is opened at all beside DICOM, whatever the file is called."""

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded. The largest fundus cameras stay below 70 million."""

DICOM_SUFFIXES = (".dcm", ".dicom")

_MOST_PASSES = 20 * MAX_PIXELS
"""Pixels times passes of a progressive JPEG, which may go over its pixels thousands of times. Ten passes are usual."""

_LEAST_BYTES = 1 / 1000
"""Bytes a pixel below which a JPEG cannot hold its picture: an even one takes six times as many."""

_LARGEST_TILE = 4096 * 4096
"""Pixels of a TIFF tile, which is decoded whole however small the picture is."""

_HEAD = 512
"""Bytes of a file that tell what it is, when it is no image."""

_TILE_SIZE = (322, 323)
_ORIENTATION = 274
_LARGEST_VALUE = 281

# Pillow's own remarks (a tag that claims too much, a large image) are nothing a user can act on, and name no file.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_image(path: Path, *, short_side: int | None = None, bits: int | None = None) -> Photo:
    """Decode a photograph: upright by its EXIF orientation, transparency over black, 16 bits brought to 8.

    Args:
        path: JPEG, PNG, TIFF, BMP, WebP or DICOM by content, whatever the suffix.
        short_side: a JPEG may come back smaller by 2, 4 or 8, its shorter side at least this many pixels; much faster.
        bits: how many bits a deep gray image uses; see :func:`to_8_bits`.

    Returns:
        uint8[H, W, 3], RGB.

    Raises DataError, naming the file: missing, empty, not an image, truncated, damaged, several pictures in one file,
    over MAX_PIXELS; DICOM without the extra `dicom`.
    """
    with _said_of(path), _open_file(path) as stream:
        if _is_dicom(path.name, stream):
            from eyetune.data.dicom import read_dicom

            return read_dicom(path, MAX_PIXELS)
        return _decode(stream, os.fstat(stream.fileno()).st_size, short_side, bits)


def decode_image(
    data: bytes,
    where: str,
    *,
    short_side: int | None = None,
    bits: int | None = None,
    name: str | None = None,
    most_pixels: int = MAX_PIXELS,
) -> Photo:
    """As :func:`read_image`, of the bytes of a file; `where` stands in messages. With `name`, what the file was called,
    they may be DICOM. Raises DataError as there, and for more than `most_pixels`."""
    with _said_of(where, data[:_HEAD]):
        stream = io.BytesIO(data)
        if name is not None and _is_dicom(name, stream):
            from eyetune.data.dicom import decode_dicom

            return decode_dicom(data, where, most_pixels)
        return _decode(stream, len(data), short_side, bits, most_pixels)


@contextlib.contextmanager
def _said_of(source: Path | str, head: bytes | None = None) -> Iterator[None]:
    """Turn whatever decoding raises into a DataError that names the file, or where the bytes were, which begin with
    `head`."""
    try:
        yield
    except UnidentifiedImageError:
        raise DataError(f"{source}: {_not_an_image(_head(Path(source)) if head is None else head)}.") from None
    except Image.DecompressionBombError as bomb:
        # (Pillow's own, from before its head is read whole, says so in words.)
        most = bomb.args[0] if bomb.args and isinstance(bomb.args[0], int) else MAX_PIXELS
        raise DataError(f"{source}: more than {most / 1e6:g} million pixels; save it smaller.") from None
    except _Refused as refused:
        raise DataError(f"{source}: {refused}.") from None
    except MissingExtra as missing:  # of one file among many that may be read
        raise DataError(str(missing)) from None
    except DataError:
        raise
    # Pillow's decoders raise many types on damaged bytes (OSError, SyntaxError, ValueError, struct.error, …).
    except Exception as error:
        raise DataError(f"{source}: damaged or cut short ({error}).") from error


@dataclass(frozen=True)
class Header:
    """What a file says of its picture without being decoded.

    Attributes:
        width, height: pixels, upright by the EXIF orientation.
        mode: Pillow's word: RGB, L (8-bit gray), I;16, P (palette), CMYK, RGBA, …
    """

    width: int
    height: int
    mode: str


def read_header(path: Path) -> Header | None:
    """Size and mode of a photograph; None for DICOM and what cannot be opened, which :func:`read_image` explains."""
    try:
        with _open_file(path) as stream, Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return Header(height, width, image.mode) if turned else Header(width, height, image.mode)
    except Exception:  # Pillow's decoders raise many types; whoever decodes the file hears what is wrong
        return None


class _Refused(Exception):
    """Why a file is not taken, without its name."""


def is_dicom_name(name: str) -> bool:
    """Whether a file name ends as DICOM files do, where they have an ending at all."""
    return name.lower().endswith(DICOM_SUFFIXES)


def has_dicom_mark(path: Path) -> bool:
    """Whether a file is DICOM by its content; False for what cannot be opened."""
    try:
        with _open_file(path) as stream:
            return stream.read(132)[128:] == b"DICM"
    except (DataError, OSError):
        return False


def _is_dicom(name: str, stream: BinaryIO) -> bool:
    """Whether a file is DICOM: its mark at byte 128; or, without the mark, its name. Leaves the stream at 0."""
    head = stream.read(132)
    stream.seek(0)
    # A file may be called .dcm and be empty, a web page or a JPEG: only what could be DICOM without its preamble.
    return head[128:] == b"DICM" or (is_dicom_name(name) and head[:2] in (b"\x08\0", b"\x02\0", b"\0\x08"))


def _open_file(path: Path) -> BinaryIO:
    """Open a plain file for reading; a pipe or a device would be waited for, or read, without end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "a folder" if path.is_dir() else "a pipe or a device"
            raise DataError(f"{path}: {what}, not an image.")
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        said = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{str(path)!r}: cannot be opened ({said}).") from None


def _head(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(_HEAD)


def _not_an_image(head: bytes) -> str:
    if not head:
        return "an empty file (0 bytes)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not an image"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image itself (run: git lfs pull)"
    return f"not an image EyeTune reads ({', '.join(FORMATS)}, DICOM), or damaged at its beginning"


def _decode(
    stream: BinaryIO, size: int, short_side: int | None, bits: int | None, most_pixels: int = MAX_PIXELS
) -> Photo:
    """The picture in a stream of `size` bytes."""
    with Image.open(stream, formats=FORMATS) as image:
        width, height = image.size
        if width * height > most_pixels:
            raise Image.DecompressionBombError(most_pixels)
        # (Some cameras' JPEGs are multi-picture files, which Pillow calls MPO: the first is the photograph.)
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg:
            _check_jpeg(image, stream, size)
        else:
            _check_alone(image)
        if image.format == "TIFF":
            _check_tiles(image)
        if short_side is not None and is_jpeg and min(width, height) >= 2 * short_side:
            scale = short_side / min(width, height)
            image.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, bits)


def _check_jpeg(image: Image.Image, stream: BinaryIO, size: int) -> None:
    """Refuse a JPEG without its pixels, for which the decoder makes up gray ones, and one that would take minutes."""
    pixels = image.size[0] * image.size[1]
    if size < _LEAST_BYTES * pixels:
        raise _Refused(f"damaged or cut short ({size} bytes cannot hold {image.size[0]}x{image.size[1]} pixels)")
    if image.info.get("progressive") and _count(stream, b"\xff\xda") * pixels > _MOST_PASSES:
        raise _Refused("a progressive JPEG of far too many passes; save it anew")


def _count(stream: BinaryIO, mark: bytes) -> int:
    """How often `mark` stands in a file; coded pixels never look like a marker."""
    if isinstance(stream, io.BytesIO):
        return stream.getvalue().count(mark)
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        number, at = 0, content.find(mark)
        while at >= 0:
            number, at = number + 1, content.find(mark, at + len(mark))
    return number


def _check_alone(image: Image.Image) -> None:
    """Refuse several pictures in one file: one row is one photograph. A TIFF's smaller second page is its preview."""
    if image.format == "TIFF":
        size = image.size
        try:
            image.seek(1)
        except EOFError:
            return
        second = image.size
        image.seek(0)
        several = second[0] * second[1] >= size[0] * size[1]
    else:
        several = getattr(image, "n_frames", 1) > 1
    if several:
        raise _Refused("several pictures in one file; save the one that counts by itself")


def _check_tiles(image: Image.Image) -> None:
    """Refuse a TIFF by its tiles: one is decoded whole, and of its two sides either may be left out."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, side) for tag, side in zip(_TILE_SIZE, image.size, strict=True))
    if not (isinstance(width, int) and isinstance(height, int)):
        raise _Refused("damaged (tiles without a size)")
    if any(tag in tags for tag in _TILE_SIZE) and max(width, 1) * max(height, 1) > _LARGEST_TILE:
        raise _Refused(f"damaged (tiles of {width}x{height} pixels)")


def _to_rgb(image: Image.Image, bits: int | None) -> Photo:
    if image.mode.startswith("I") or image.mode == "F":
        if bits is None and image.format == "TIFF":
            bits = _declared_bits(image)
        return np.repeat(to_8_bits(np.asarray(image), bits)[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(image, mask=image.getchannel("A"))
        image = black
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def _declared_bits(image: Image.Image) -> int | None:
    """The bits a TIFF says it uses (MaxSampleValue), when it says so."""
    largest = getattr(image, "tag_v2", {}).get(_LARGEST_VALUE)
    largest = largest[0] if isinstance(largest, tuple) and largest else largest
    return int(largest).bit_length() if isinstance(largest, int) and 255 < largest < 65_535 else None


def to_8_bits(gray: npt.NDArray[Any], bits: int | None = None) -> Photo:
    """Deep gray to 8 bits, by a scale that is the same for every frame of a camera.

    Whole numbers are divided by the largest of their `bits`; without `bits` they fill 16, as the formats say. A scale
    by the brightness of the single picture would make a dark frame as bright as its neighbours. A picture that is
    darker than a sixteenth of 16 bits, but not black, is refused: it almost certainly uses fewer bits, and would come
    out black. Floats are 0..1, or 0..255 when one is above 1.

    Args:
        gray: whole numbers or floats of any shape.
        bits: 9..16, or None.

    Returns:
        uint8 of the same shape.

    Raises DataError (through :func:`read_image`, with the file) for what fits no such scale.
    """
    top = gray.max(initial=0)
    if gray.dtype.kind == "f":
        if not np.isfinite(gray).all():
            raise _Refused("holds values that are not finite")
        full = 1.0 if top <= 1 else 255.0
        if top > 255:
            raise _Refused(f"floating-point values up to {float(top):g}; save it with 0..1, or as whole numbers")
    else:
        full = float(2 ** (bits or 16) - 1)
        if top > full:
            raise _Refused(f"values up to {int(top)}, more than {bits or 16} bits hold (data.bits)")
        if bits is None and 0 < top < 4096:
            raise _Refused(
                f"16-bit gray whose brightest pixel is {int(top)} of 65535: if the camera uses fewer bits, say so with "
                "data.bits (12 is usual)"
            )
    result = np.empty(gray.shape, np.uint8)
    for row in range(len(gray)):  # row by row: large pictures are not held as floats
        result[row] = np.rint(np.clip(gray[row] / full, 0, 1) * 255)
    return result
