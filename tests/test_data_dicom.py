"""DICOM photographs: the pixels of every colour space that is read, refusals, and headers that stay private."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from data_kit import fundus
from dicom_kit import EXPLICIT, JPEG_2000, JPEG_2000_LOSSLESS, JPEG_BASELINE, RLE, SECRET, dataset, write
from PIL import Image

from eyetune.data.dicom import read_header
from eyetune.data.photo import MAX_PIXELS, read_image
from eyetune.errors import DataError, MissingExtra

PHOTO = fundus(seed=5)
GREEN = PHOTO[..., 1]


def near(got: np.ndarray, wanted: np.ndarray, tolerance: float = 2.0) -> bool:
    return got.shape == wanted.shape and float(np.abs(got.astype(float) - wanted).mean()) <= tolerance


def ybr(photo: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(photo).convert("YCbCr"))


@pytest.mark.parametrize("name", ["eye.dcm", "1.2.840.1", "eye.JPG"])
def test_known_by_content_whatever_the_name(tmp_path: Path, name: str) -> None:
    read = read_image(write(tmp_path / name, PHOTO))
    assert (read == PHOTO).all()
    assert read.flags.writeable


def test_without_the_preamble_the_suffix_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.dcm", PHOTO)
    content = path.read_bytes()
    (tmp_path / "body.dcm").write_bytes(content[content.index(b"\x08\0\x16\0") :])
    assert (read_image(tmp_path / "body.dcm") == PHOTO).all()


@pytest.mark.parametrize(
    ("kind", "pixels"), [("RGB", PHOTO), ("YBR_FULL", ybr(PHOTO))], ids=["RGB", "YBR_FULL"]
)  # fmt: skip
@pytest.mark.parametrize("planar", [0, 1])
def test_colour(tmp_path: Path, kind: str, pixels: np.ndarray, planar: int) -> None:
    stored = np.ascontiguousarray(pixels.transpose(2, 0, 1)) if planar else pixels
    path = write(tmp_path / "a.dcm", pixels, kind=kind, PlanarConfiguration=planar, PixelData=stored.tobytes())
    assert near(read_image(path), PHOTO)


def test_ybr_full_422(tmp_path: Path) -> None:
    full = ybr(PHOTO)
    pairs = full.reshape(240, 160, 2, 3)
    stored = np.concatenate([pairs[:, :, 0, :1], pairs[:, :, 1, :1], pairs[:, :, 0, 1:]], axis=2)
    path = write(tmp_path / "a.dcm", full, kind="YBR_FULL_422", PixelData=stored.tobytes())
    assert near(read_image(path), PHOTO)


@pytest.mark.parametrize(
    ("syntax", "kind"),
    [(JPEG_BASELINE, "YBR_FULL_422"), (JPEG_2000, "YBR_ICT"), (JPEG_2000_LOSSLESS, "RGB"), (RLE, "RGB")],
)
def test_compressed(tmp_path: Path, syntax: str, kind: str) -> None:
    assert near(read_image(write(tmp_path / "a.dcm", PHOTO, syntax=syntax, kind=kind)), PHOTO)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_gray_of_any_depth(tmp_path: Path, bits: int, kind: str) -> None:
    stored = (GREEN / 255 * (2**bits - 1)).round().astype(np.uint8 if bits == 8 else np.uint16)
    path = write(tmp_path / "a.dcm", stored, kind=kind, BitsStored=bits, HighBit=bits - 1)
    wanted = 255 - GREEN if kind == "MONOCHROME1" else GREEN
    assert near(read_image(path)[..., 1], wanted, 0.6)


def test_a_dark_frame_stays_dark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", (GREEN * 2).astype(np.uint16), BitsStored=12, HighBit=11)
    assert near(read_image(path)[..., 0], GREEN * 2 / 4095 * 255, 0.6)


def test_signed_gray_spans_its_range(tmp_path: Path) -> None:
    signed = (GREEN.astype(int) * 257 - 32768).astype(np.int16)
    assert near(read_image(write(tmp_path / "a.dcm", signed))[..., 2], GREEN, 0.6)


def test_rescale_and_window(tmp_path: Path) -> None:
    stored = (GREEN.astype(np.uint16) + 100) * 2  # shown is 0.5 * stored - 100
    path = write(
        tmp_path / "a.dcm", stored, RescaleSlope="0.5", RescaleIntercept="-100", WindowCenter="128", WindowWidth="256"
    )
    assert near(read_image(path)[..., 0], GREEN, 0.6)


def test_deep_colour(tmp_path: Path) -> None:
    assert near(read_image(write(tmp_path / "a.dcm", PHOTO.astype(np.uint16) * 257)), PHOTO, 0.6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"NumberOfFrames": 2, "PixelData": PHOTO.tobytes() * 2}, "2 frames"),
        ({"Rows": 20_000, "Columns": 20_000}, f"{MAX_PIXELS // 1_000_000} million pixels"),
        ({"Rows": 5_000, "Columns": 5_000}, "damaged or cut short"),
        ({"PixelData": PHOTO.tobytes()[:-50]}, "damaged or cut short"),
        ({"kind": "PALETTE COLOR"}, "PALETTE|colours as"),
        ({"BitsAllocated": 32, "BitsStored": 32}, "32 bits"),
        ({"syntax": JPEG_BASELINE, "Rows": 100}, "picture of another size"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, options: dict[str, object], said: str) -> None:
    path = write(tmp_path / "a.dcm", PHOTO, **options)
    with pytest.raises(DataError, match=said) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_other_compressions_are_named(tmp_path: Path) -> None:
    for syntax, said in (("1.2.840.10008.1.2.4.70", "JPEG 2000"), ("1.2.840.10008.1.2.1.99", "deflated")):
        path = write(tmp_path / "a.dcm", PHOTO)
        content = path.read_bytes()
        old = EXPLICIT.encode() + bytes(len(EXPLICIT) % 2)
        new = syntax.encode() + bytes(len(syntax) % 2)
        at = content.index(old)
        content = content[: at - 2] + len(new).to_bytes(2, "little") + new + content[at + len(old) :]
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_image(path)


def test_a_file_without_a_picture(tmp_path: Path) -> None:
    made = dataset(PHOTO)
    del made.PixelData
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match="without a picture"):
        read_image(tmp_path / "a.dcm")


def test_the_header_is_offered(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "a.dcm", GREEN))
    assert (header.patient, header.eye, header.date) == ("MRN-4711", "right", "2026-03-14")
    empty = dict.fromkeys(("PatientID", "ImageLaterality", "AcquisitionDate"), "")
    header = read_header(write(tmp_path / "b.dcm", GREEN, **empty, Laterality="L", StudyDate="20250102"))
    assert (header.patient, header.eye, header.date) == ("", "left", "2025-01-02")
    assert "MRN" not in repr(header)


def test_nothing_of_the_header_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    whole = write(tmp_path / "a.dcm", GREEN).read_bytes()
    rng = np.random.default_rng(0)
    said = []
    with warnings.catch_warnings(record=True) as warned:
        for number in range(300):
            content = bytearray(whole[: rng.integers(400, len(whole))] if number % 2 else whole)
            for place in rng.integers(132, 700, 3):
                content[min(place, len(content) - 1)] = rng.integers(256)
            (tmp_path / "b.dcm").write_bytes(content)
            for read in (read_image, read_header):
                try:
                    read(tmp_path / "b.dcm")
                except DataError as error:
                    said.append(str(error))
    everything = "\n".join([*said, caplog.text, *(str(warning.message) for warning in warned)])
    assert len(said) > 50
    assert not any(secret[:5] in everything for secret in (*SECRET, "Jane"))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.dcm", GREEN)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"eyetune\[dicom\]"):
        read_image(path)
    with pytest.raises(MissingExtra, match=r"eyetune\[dicom\]"):
        read_header(path)
