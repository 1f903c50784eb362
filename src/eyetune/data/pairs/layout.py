"""Where the parts of a prepared folder lie, and the names in RET-CLIP's databases."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

SPLITS = ("train", "val", "test")
REPORT = "prepare.json"
"""What was prepared, how, and what was noticed; in the folder itself."""
NOTES = "pairs.json"
"""What RET-CLIP's layout has no place for, beside imgs and pairs: patients, labels, which eye stands for both."""
SAMPLES_KEY = b"num_samples"
IMAGES_KEY = b"num_images"

_STANDARD = str.maketrans("-_", "+/")


def images_file(folder: Path, split: str) -> Path:
    """`{split}_imgs.tsv`: patient, left, right, the images as base64 JPEG."""
    return folder / f"{split}_imgs.tsv"


def texts_file(folder: Path, split: str) -> Path:
    """`{split}_texts.jsonl`: text_id, text, image_ids."""
    return folder / f"{split}_texts.jsonl"


def database_folder(folder: Path, split: str) -> Path:
    """Holds `imgs`, `pairs` and :data:`NOTES`."""
    return folder / "lmdb" / split


def encode_base64(image: bytes) -> str:
    """An image file as RET-CLIP's tables hold it."""
    return base64.b64encode(image).decode("ascii")


def decode_base64(text: str) -> bytes | None:
    """The bytes of an image, in either alphabet; None for what is no base64 at all."""
    try:
        return base64.b64decode(text.translate(_STANDARD).encode("ascii"), validate=True) or None
    except (binascii.Error, ValueError):
        return None
