"""DICOM photographs (extra `dicom`): the pixels, and patient, eye and date for who asks for them.

Nothing of a header but its numbers of pixels ever enters a message: a damaged element may hold a name.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from eyetune.errors import DataError, MissingExtra, UserError

SYNTAXES = {
    "1.2.840.10008.1.2": "uncompressed",
    "1.2.840.10008.1.2.1": "uncompressed",
    "1.2.840.10008.1.2.2": "uncompressed",
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.4.50": "JPEG",
    "1.2.840.10008.1.2.4.90": "JPEG 2000",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
}
"""Transfer syntaxes that are read: what NumPy and Pillow decode without further packages."""

_DEFLATED = "1.2.840.10008.1.2.1.99"

Bytes = npt.NDArray[np.uint8]

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_HEADER = (
    "PatientID",
    "ImageLaterality",
    "Laterality",
    "AcquisitionDateTime",
    "AcquisitionDate",
    "ContentDate",
    "StudyDate",
)
_EYES = {"R": "right", "L": "left", "OD": "right", "OS": "left"}


@dataclass(frozen=True, repr=False)
class Header:
    """What a DICOM file says of its photograph; empty where it says nothing. Not for logs: it identifies a patient.

    Attributes:
        patient: the patient's number (PatientID), never the name.
        eye: "left" or "right".
        date: of the photograph, YYYY-MM-DD.
    """

    patient: str = ""
    eye: str = ""
    date: str = ""


def read_header(path: Path) -> Header:
    """Patient, eye and date of a DICOM file. Raises DataError when it cannot be read, MissingExtra without pydicom."""
    with _quietly(str(path)):
        dataset = _read(path, str(path), stop_before_pixels=True, specific_tags=list(_HEADER))
        texts = {name: str(dataset.get(name) or "").strip() for name in _HEADER}
    side = texts["ImageLaterality"] or texts["Laterality"]
    days = [texts[name][:8] for name in _HEADER[3:]]
    day = next((day for day in days if len(day) == 8 and day.isdigit()), "")
    return Header(
        patient=texts["PatientID"],
        eye=_EYES.get(side.upper(), ""),
        date=f"{day[:4]}-{day[4:6]}-{day[6:]}" if day else "",
    )


def read_dicom(path: Path, most_pixels: int) -> Bytes:
    """Decode the one picture of a DICOM file, if it has at most `most_pixels`: uint8[H, W, 3], RGB.

    Gray goes through its rescale slope and intercept, then through its first window, or without one from the whole
    range of its stored bits; MONOCHROME1 is turned round. Colour of more than 8 bits is divided by its whole range.

    Raises DataError, naming the file: several frames, a compression or a colour space that is not read, no pixels,
    damaged; Pillow's DecompressionBombError for too many pixels; MissingExtra without pydicom.
    """
    return _decoded(path, str(path), most_pixels)


def decode_dicom(data: bytes, where: str, most_pixels: int) -> Bytes:
    """As :func:`read_dicom`, of the bytes of a file; `where` stands in messages."""
    return _decoded(data, where, most_pixels)


def _decoded(source: Path | bytes, where: str, most_pixels: int) -> Bytes:
    with _quietly(where):
        dataset = _read(source, where)
        _check(where, dataset, most_pixels)
        pixels = np.asarray(dataset.pixel_array)
        stored, signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation", 0) or 0)
        if dataset.PhotometricInterpretation in _GRAY:
            gray = _shown(dataset, pixels, stored, signed=bool(signed))
            return np.repeat(gray[..., None], 3, axis=2)
        if pixels.dtype == np.uint8 and stored == 8:
            return np.array(pixels)
        return _scaled(pixels, 0.0, float(2**stored - 1))


def _check(where: str, dataset: Any, most_pixels: int) -> None:
    """Raise DataError unless the pixels are one picture of a known kind and within bounds; decodes nothing."""
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if syntax not in SYNTAXES:
        kinds = ", ".join(dict.fromkeys(SYNTAXES.values()))
        raise DataError(
            f"{where}: DICOM in a compression that is not read here ({_plain(syntax)}; read are {kinds}). "
            "Convert it, for example with: dcmdjpeg or gdcmconv --raw"
        )
    if "PixelData" not in dataset:
        raise DataError(f"{where}: a DICOM file without a picture.")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames != 1:
        raise DataError(f"{where}: a DICOM file of {frames} frames; save the one that counts by itself.")
    height, width, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
    if height * width > most_pixels:
        raise Image.DecompressionBombError(most_pixels)
    kind, stored = str(dataset.get("PhotometricInterpretation", "")), int(dataset.BitsStored)
    if kind not in (_GRAY if samples == 1 else _COLOUR):
        raise DataError(
            f"{where}: DICOM with colours as {_plain(kind) or 'nothing'}, which are not read; export it as PNG."
        )
    if int(dataset.BitsAllocated) not in (8, 16) or not 8 <= stored <= int(dataset.BitsAllocated):
        raise DataError(f"{where}: DICOM of {stored} bits in {int(dataset.BitsAllocated)}; 8 to 16 are read.")
    if SYNTAXES[syntax].startswith("JPEG"):
        _check_inside(where, dataset, (width, height))
    elif SYNTAXES[syntax] == "RLE" and len(dataset.PixelData) > 2 * _raw_bytes(dataset) + 4096:
        # Two bytes may unpack to 128; honest files are hardly longer than their pixels.
        raise DataError(f"{where}: damaged: more compressed bytes than {width}x{height} pixels can need.")


def _raw_bytes(dataset: Any) -> int:
    samples = int(dataset.get("SamplesPerPixel", 1))
    return int(dataset.Rows) * int(dataset.Columns) * samples * int(dataset.BitsAllocated) // 8


def _check_inside(where: str, dataset: Any, size: tuple[int, int]) -> None:
    """Refuse a JPEG inside that is larger than the DICOM around it says, by its head."""
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image:
        if image.size != size:
            raise DataError(f"{where}: damaged: DICOM of {size[0]}x{size[1]} around a picture of another size.")


def _shown(dataset: Any, pixels: npt.NDArray[Any], stored: int, *, signed: bool) -> Bytes:
    """Stored values to the gray that a viewer shows: uint8[H, W]. After DICOM PS3.3 C.11.1 and C.11.2.1.2."""
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    low, high = sorted((low * slope + intercept, high * slope + intercept))
    centre, width = _number(dataset, "WindowCenter", 0.0), _number(dataset, "WindowWidth", 0.0)
    if width > 1:
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    gray = _scaled(pixels, low, high, slope=slope, intercept=intercept)
    return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


def _scaled(pixels: npt.NDArray[Any], low: float, high: float, *, slope: float = 1.0, intercept: float = 0.0) -> Bytes:
    """`low` and below to 0, `high` and above to 255, row by row: large pictures are not held as floats."""
    result = np.empty(pixels.shape, np.uint8)
    for row in range(len(pixels)):
        values = pixels[row] * slope + intercept
        result[row] = np.rint(np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255)
    return result


def _number(dataset: Any, name: str, default: float) -> float:
    """A number of the header, the first where there are several."""
    value = dataset.get(name)
    if value is None or value == "":
        return default
    value = value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(name)
    return number


def _plain(text: str) -> str:
    """A keyword or number of the header as far as it is one; a damaged element may hold anything."""
    return (
        text
        if len(text) <= 64 and all(c.isdigit() or c in "._" or (c.isascii() and c.isupper()) for c in text)
        else "?"
    )


def _read(source: Path | bytes, where: str, **options: Any) -> Any:
    """The data set. The deflated syntax is refused by the head alone: it unpacks to any size at once."""
    from pydicom import dcmread

    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
        if stream.read(132)[128:] == b"DICM" and _syntax(stream) == _DEFLATED:
            raise DataError(
                f"{where}: a deflated DICOM file, which is not read. Convert it, for example with: dcmconv +te"
            )
        stream.seek(0)
        dataset = dcmread(stream, force=True, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:
        # Written without its head: pydicom found out which of the three plain syntaxes it is.
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

        implicit, little = dataset.original_encoding
        plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = plain
    return dataset


def _syntax(stream: BinaryIO) -> str:
    """The transfer syntax that the head behind the preamble says; as pydicom does, read in the one way of writing or,
    where its first element makes no sense, in the other. Empty where it says none."""
    from pydicom.filereader import read_dataset

    for implicit in (False, True):
        stream.seek(132)
        with contextlib.suppress(Exception):  # whoever decodes the file hears what is wrong
            head = read_dataset(stream, implicit, True, stop_when=lambda tag, vr, length: tag.group != 2)
            _ = head[next(iter(head.elements())).tag]
            return str(head.get("TransferSyntaxUID", ""))
    return ""


@contextlib.contextmanager
def _quietly(where: str) -> Iterator[None]:
    """Whatever pydicom raises becomes a DataError without its text, and whatever it would log is not said: both quote
    the header."""
    _silence(where)
    try:
        yield
    except (UserError, Image.DecompressionBombError):
        raise
    except Exception as error:
        raise DataError(f"{where}: a DICOM file that is damaged or cut short ({type(error).__name__}).") from None


def _silence(where: str) -> None:
    try:
        from pydicom import config
    except ImportError:
        raise MissingExtra(f"{where}: DICOM", "dicom") from None
    logging.getLogger("pydicom").disabled = True
    config.settings.reading_validation_mode = config.IGNORE


# Its warnings quote the header too. (Not around each reading: several threads read at a time.)
warnings.filterwarnings("ignore", module=r"pydicom\.")
