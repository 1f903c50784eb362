"""Small DICOM files, made here: no patient was ever photographed for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, OphthalmicPhotography8BitImageStorage

EXPLICIT = str(ExplicitVRLittleEndian)
JPEG_BASELINE, JPEG_2000, JPEG_2000_LOSSLESS = (
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.90",
)
RLE = "1.2.840.10008.1.2.5"
SECRET = ("Doe^Jane", "MRN-4711", "20260314")
"""Name, number and day of the photograph, as they stand in every file made here."""


def dataset(pixels: np.ndarray[Any, Any], *, syntax: str = EXPLICIT, kind: str | None = None, **tags: Any) -> Dataset:
    """A data set of `pixels` [H, W] or [H, W, 3]; for JPEG syntaxes they are compressed."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.file_meta.MediaStorageSOPClassUID = OphthalmicPhotography8BitImageStorage
    made.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    made.SOPClassUID, made.SOPInstanceUID = OphthalmicPhotography8BitImageStorage, "1.2.3"
    made.PatientName, made.PatientID, made.AcquisitionDate = SECRET
    made.ImageLaterality = "R"
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    made.PhotometricInterpretation = kind or ("RGB" if pixels.ndim == 3 else "MONOCHROME2")
    if pixels.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
    if syntax == RLE:
        made.file_meta.TransferSyntaxUID = EXPLICIT
        made.PixelData = pixels.tobytes()
        made.compress(RLE)
    elif syntax == EXPLICIT:
        made.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    else:
        stream = io.BytesIO()
        if syntax == JPEG_BASELINE:
            Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        else:
            Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
        made.PixelData = encapsulate([stream.getvalue()])
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def write(path: Path, pixels: np.ndarray[Any, Any], **options: Any) -> Path:
    """A DICOM file; the options are those of :func:`dataset`."""
    dataset(pixels, **options).save_as(path, enforce_file_format=True)
    return path
