"""EyeTune's loader against ImageFolder with timm's training transform: the same photographs and workers, in one call.

python benchmarks/loader.py [--photographs 64] [--size 2592x1944] [--workers 2] [--pixels 224] [--epochs 10]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import torch
from common import machine, markdown

BATCH = 16


def drain(loader: Any, epoch: int | None = None) -> float:
    """Seconds to take every batch."""
    if epoch is not None:
        loader.set_epoch(epoch)
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def by_hand(folder: Path, pixels: int, workers: int) -> list[float]:
    """Seconds of two epochs of ImageFolder and create_transform(is_training=True)."""
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder), create_transform(pixels, is_training=True)),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return [drain(loader) for _ in range(2)]


def eyetune(folder: Path, cache: Path, pixels: int, workers: int, epochs: int) -> list[float]:
    """Seconds of an epoch with an empty cache (preparing included), and of `epochs` more."""
    from eyetune.backbones.spec import IMAGENET_MEAN, IMAGENET_STD, Preprocess
    from eyetune.data.cache import Cache
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.loader import make_loader
    from eyetune.data.readable import check_readable
    from eyetune.data.records import Manifest

    preprocess = Preprocess(pixels, IMAGENET_MEAN, IMAGENET_STD)
    settings = FundusSettings(pixels)
    manifest = Manifest.from_folder(folder)
    kept = Cache(cache, 50)
    start = time.perf_counter()
    check_readable(manifest, False, workers=max(1, workers), cache=kept, settings=settings)
    loader = make_loader(
        manifest,
        preprocess,
        settings,
        batch_size=BATCH,
        training=True,
        augment="medium",
        workers=workers,
        cache=kept,
    )
    drain(loader, 0)
    first = time.perf_counter() - start
    return [first, *(drain(loader, epoch) for epoch in range(1, epochs + 1))]


def photographs(out: Path, count: int, size: tuple[int, int]) -> Path:
    """Drawn photographs, in class folders."""
    from eyetune.data.phantom import write_cohort
    from eyetune.data.records import Manifest

    write_cohort(out / "drawn", patients=count // 2, size=size, workers=2)
    for record in Manifest.from_table(out / "drawn" / "labels.csv", label_column="dr_grade"):
        place = out / "classes" / str(record.label) / record.name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(record.image, place)
    return out / "classes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=64)
    parser.add_argument("--size", default="2592x1944")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    width, height = (int(side) for side in options.size.split("x"))
    count = options.photographs
    with tempfile.TemporaryDirectory() as scratch:
        folder = photographs(Path(scratch), count, (width, height))
        hand = by_hand(folder, options.pixels, options.workers)
        own = eyetune(folder, Path(scratch) / "cache", options.pixels, options.workers, options.epochs)
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        alone = {
            pixels: eyetune(folder, Path(scratch) / f"cache-{pixels}", pixels, 0, options.epochs)
            for pixels in (224, 392)
        }
    print(machine())
    rows = []
    for name, theirs, ours in (("first", hand[0], own[0]), ("later", hand[1], sum(own[1:]) / options.epochs)):
        rows.append([f"{name} epoch", count / theirs, count / ours, f"{theirs / ours:.1f}x"])
    head = f"{count} photographs of {options.size}, {options.pixels} px, {options.workers} workers"
    print(markdown([head, "ImageFolder, create_transform: images/s", "EyeTune: images/s", "ratio"], rows))
    print()
    rows = [[f"{pixels} px", count * options.epochs / sum(found[1:])] for pixels, found in alone.items()]
    print(markdown(["one core, warm cache, augment: medium", "images/s"], rows))


if __name__ == "__main__":
    main()
