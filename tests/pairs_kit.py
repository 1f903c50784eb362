"""Small sets of image-text pairs that the tests of preparing and of image-text models share."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb
from data_kit import fundus
from PIL import Image

from eyetune.data.pairs import layout
from eyetune.data.pairs.texts import Images, Text


def jpeg(seed: int = 0, size: int = 32) -> bytes:
    """A small fundus photograph as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(fundus(size, size, radius=size // 2 - 2, seed=seed)).save(stream, "jpeg")
    return stream.getvalue()


def encoded(seed: int = 0) -> str:
    """The same as base64."""
    return layout.encode_base64(jpeg(seed))


def images(*patients: str) -> list[Images]:
    """Two eyes of each patient, no two alike."""
    return [Images(name, encoded(2 * n), encoded(2 * n + 1)) for n, name in enumerate(patients)]


def text(number: int, words: str, *patients: str, label: str | None = None) -> Text:
    """A text about patients."""
    return Text(number, words, patients, label)


def published(folder: Path, entries: Mapping[str, Any], count_key: str, count: int | None = None) -> Path:
    """A database written as RET-CLIP's own converter writes one."""
    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder), map_size=2**26)
    with environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value if isinstance(value, bytes) else pickle.dumps(value))
        transaction.put(count_key.encode(), str(len(entries) if count is None else count).encode())
    environment.close()
    return folder


def contents(folder: Path) -> dict[bytes, Any]:
    """Every entry of a database, as the library `lmdb` and Python's pickle read it (RET-CLIP's loader does)."""
    with lmdb.open(str(folder), readonly=True, create=False, lock=False) as environment, environment.begin() as reading:
        return {
            bytes(key): bytes(value) if key in (layout.IMAGES_KEY, layout.SAMPLES_KEY) else pickle.loads(value)
            for key, value in reading.cursor()
        }
