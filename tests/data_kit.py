"""Small photographs and tables that the tests of the data room share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from eyetune.backbones.backbone import Preprocess
from eyetune.data.record import Record
from eyetune.data.records import Manifest

# On a busy machine a second thread only waits for the first.
torch.set_num_threads(1)
cv2.setNumThreads(1)

PREPROCESS = Preprocess(pixels=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), fit="pad")


def fundus(
    height: int = 240,
    width: int = 320,
    *,
    centre: tuple[int, int] | None = None,
    radius: int = 100,
    surround: tuple[int, int, int] = (0, 0, 0),
    brightness: float = 1.0,
    seed: int = 0,
) -> npt.NDArray[np.uint8]:
    """uint8[height, width, 3] RGB: an orange disc, a yellow spot and some vessels on `surround`, with camera noise."""
    rng = np.random.default_rng(seed)
    x, y = centre or (width // 2, height // 2)
    eye = np.zeros((height, width, 3), np.float32)
    eye[:] = (190, 90, 40)
    for angle in rng.uniform(0, 2 * np.pi, 8):
        end = (int(x + radius * np.cos(angle)), int(y + radius * np.sin(angle)))
        cv2.line(eye, (x + radius // 3, y), end, (130, 40, 20), 2)
    cv2.circle(eye, (x + radius // 3, y), radius // 7, (240, 220, 120), -1)
    ys, xs = np.mgrid[:height, :width]
    away = np.hypot(xs - x, ys - y) / radius
    eye *= (1 - 0.4 * away**2)[..., None].clip(0.3, 1)
    photo = np.where((away <= 1)[..., None], eye * brightness, np.array(surround, np.float32))
    return (photo + rng.normal(0, 1, photo.shape)).clip(0, 255).astype(np.uint8)


def save(path: Path, photo: npt.NDArray[np.uint8]) -> Path:
    """Write an RGB photograph in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))
    return path


def touch(folder: Path, names: Sequence[str]) -> Path:
    """Files that are there, for tests that read no pixels."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"-")
    return folder


def records(labels: Sequence[int | None], patients: Sequence[str | None] | None = None) -> list[Record]:
    """Records of files that are not there."""
    return [
        Record(
            image=Path(f"{i}.jpg"),
            label=label,
            name=f"{i}.jpg",
            row=f"t.csv row {i + 2}",
            patient=None if patients is None else patients[i],
        )
        for i, label in enumerate(labels)
    ]


def manifest(found: Sequence[Record], classes: int = 2) -> Manifest:
    """A manifest with classes "0", "1", …"""
    return Manifest(tuple(found), tuple(str(index) for index in range(classes)), "t.csv")


def photographs(folder: Path, count: int = 6, size: int = 64) -> Manifest:
    """A manifest of real small files, labels 0 1 0 1 …"""
    made = []
    for i in range(count):
        path = save(folder / f"{i}.png", fundus(size, size, radius=size // 2 - 4, seed=i))
        made.append(Record(image=path, label=i % 2, name=path.name, row=f"t.csv row {i + 2}"))
    return manifest(made)
