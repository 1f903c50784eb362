"""What may come from outside, as functions of bytes: they give a value or raise UserError, and nothing else happens.

The property tests and the fuzzer (`fuzz.py`) share these, and the small valid files that both start from.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data_kit import fundus
from dicom_kit import JPEG_2000, JPEG_BASELINE, RLE, dataset
from hostile_kit import HOSTILE, tiff, tiff_tags
from PIL import Image
from safetensors.torch import save as to_safetensors

import eyetune.data.tables  # noqa: F401 - else imported when first used, past the eyes of the fuzzer
from eyetune.backbones.opening import open_checkpoint
from eyetune.config import Config
from eyetune.data.dicom import read_header
from eyetune.data.fundus import FundusSettings, load_square
from eyetune.data.photo import read_image
from eyetune.data.records import Manifest
from eyetune.errors import UserError

PHOTO = fundus(24, 32, radius=11)


@dataclass(frozen=True)
class Target:
    """One door that files come in through.

    Args:
        suffix: what the file is called.
        seeds: small valid files, from which mutations start.
        enter: given the path of a file, what the program does with it.
    """

    suffix: str
    seeds: Callable[[], list[bytes]]
    enter: Callable[[Path], object]

    def run(self, content: bytes, folder: Path) -> str | None:
        """Enter with `content` in `folder`: the message of its refusal, or None. Any other exception is a defect."""
        path = folder / f"x{self.suffix}"
        path.write_bytes(content)
        try:
            self.enter(path)
        except UserError as error:
            return str(error)
        return None


def _saved(mode: str = "RGB", photo: np.ndarray | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PHOTO if photo is None else photo).convert(mode).save(stream, **options)
    return stream.getvalue()


def _images() -> list[bytes]:
    stream = io.BytesIO()
    Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257).save(stream, "TIFF")
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        _saved(format="JPEG", exif=exif),
        _saved(format="JPEG", progressive=True),
        _saved("CMYK", format="JPEG"),
        _saved(format="PNG"),
        _saved("P", format="PNG"),
        _saved("LA", format="PNG"),
        _saved(format="TIFF", compression="tiff_lzw"),
        _saved(format="TIFF", compression="tiff_adobe_deflate"),
        _saved(format="TIFF", compression="jpeg"),
        _saved(format="BMP"),
        _saved("P", format="BMP"),
        _saved(format="WEBP"),
        _saved(format="WEBP", lossless=True),
        stream.getvalue(),
        tiff(tiff_tags(16, bytes_here=256).values(), bytes(256), big=True),
        *(make() for name, make in HOSTILE.items() if name.endswith(("huge", "pixels", "side", "largest"))),
    ]


def _dicoms() -> list[bytes]:
    made = [
        dataset(PHOTO),
        dataset(PHOTO[..., 1].astype(np.uint16) * 16, BitsStored=12, WindowCenter="2000", WindowWidth="4000"),
        dataset(PHOTO[..., 1], kind="MONOCHROME1", RescaleSlope="2", RescaleIntercept="-3"),
        dataset(PHOTO, kind="YBR_FULL", PlanarConfiguration=1),
        dataset(PHOTO, syntax=JPEG_BASELINE, kind="YBR_FULL_422"),
        dataset(PHOTO, syntax=JPEG_2000, kind="YBR_ICT"),
        dataset(PHOTO, syntax=RLE),
    ]
    contents = []
    for one in made:
        stream = io.BytesIO()
        one.save_as(stream, enforce_file_format=True)
        contents.append(stream.getvalue())
    return contents


def _checkpoints() -> list[bytes]:
    content = {"model": {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3)}, "epoch": 3, "best": np.float64(0.5)}
    made = []
    for new in (True, False):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=new)
        made.append(stream.getvalue())
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return [
        *made,
        to_safetensors(content["model"]),  # type: ignore[arg-type]
        pickle.dumps({"a": 1}, protocol=2),
        struct.pack("<Q", len(header)) + header,
    ]


def _read_image(path: Path) -> None:
    with contextlib.suppress(UserError):
        read_image(path, short_side=1, bits=12)
    assert load_square(path, FundusSettings(16)).shape == (16, 16, 3)


def _read_dicom(path: Path) -> None:
    with contextlib.suppress(UserError):
        read_header(path)
    assert read_image(path).dtype == np.uint8


def _read_table(path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (path.parent / name).touch()
    for required in (True, False):
        with contextlib.suppress(UserError):
            Manifest.from_table(path, labels_required=required)
    Manifest.from_table(path, images=path.parent, label_column="none", labels_required=False)


def _read_config(path: Path) -> None:
    config = Config.from_yaml(path, check_files=False)
    again = path.with_name("again.yaml")
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert Config.from_yaml(again, check_files=False) == config


def _read_checkpoint(path: Path) -> None:
    open_checkpoint(path).containers()


_TABLE = b"image,label,patient,eye,split\na.png,0,p1,left,train\nb.png,1,p2,OD,val\nc.png,2.0,,,test\n"
_CONFIG = b"""model: {backbone: nano, pool: cls, dropout: 0.3}
data: {table: &t labels.csv, images: *t, classes: ["0", "no", 2], val: 0.1}
adapt: {kind: lora, r: 8, targets: [qkv]}
train: {epochs: 20, lr: 5e-4, metric: qwk}
augment: [RandomHorizontalFlip, {RandomRotation: {degrees: 20}}]
out: runs/a
"""

_LINES = b'{"image": "a.png", "label": 1, "eye": null}\n{"image": "b", "label": 0, "patient": "\\u00e9"}\n'

TARGETS: dict[str, Target] = {
    "table": Target(".csv", lambda: [_TABLE, _TABLE.replace(b",", b"\t"), b"\xef\xbb\xbf" + _TABLE], _read_table),
    "jsonl": Target(".jsonl", lambda: [_LINES], _read_table),
    "image": Target(".jpg", _images, _read_image),
    "dicom": Target(".dcm", _dicoms, _read_dicom),
    "config": Target(".yaml", lambda: [_CONFIG, b"data: t.csv\nadapt: linear\n", b"a: &a [*a, *a]\n"], _read_config),
    "checkpoint": Target(".pth", _checkpoints, _read_checkpoint),
}


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """A folder in memory where there is one: a fuzzer writes a file thousands of times a second."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)
