"""A few pairs of tiny eyes and texts, and a configuration that trains on them in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairs_kit import images, text

from eyetune.clip.config import ClipConfig
from eyetune.config import override
from eyetune.data.pairs.write import write_split

GRADES = ("No retinopathy.", "Mild retinopathy.", "Severe retinopathy.")


def write_pairs(folder: Path, train: int = 12, val: int = 5, test: int = 5, single: bool = False) -> Path:
    """Patients with two eyes each and a text of three sentences; the first two patients of a split share theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        names = [f"p{start + n:03d}" for n in range(count)]
        start += count
        rows = images(*names)
        texts = [
            text(n + 1, f"{GRADES[n % 3]} {n} exudates in the left eye. {2 * n} spots in the right eye.", name)
            for n, name in enumerate(names)
        ]
        texts[1] = text(2, texts[0].text, names[1])
        known = {name: {"group": name, "single": "left" if single else None, "label": None} for name in names}
        write_split(folder, split, rows, texts, {"patients": known, "labels": {}})
    return folder


def clip_config(pairs: Path, out: Path, **more: Any) -> ClipConfig:
    """`nano` for 32 pixels and a text encoder of one layer, without anything random; `more` by dotted path, with `__`
    for the dots."""
    base = {
        "data": {"folder": str(pairs), "cache": False},
        "model": {"pixels": 32, "width": 16},
        "text": {"length": 24, "width": 32, "layers": 1, "vocabulary": 100, "dropout": 0.0},
        "train": {"epochs": 2, "batch_size": 6, "warmup_epochs": 0, "tensorboard": False, "lr": 1e-3},
        "augment": "none",
        "precision": "fp32",
        "device": "cpu",
        "workers": 0,
        "out": str(out),
    }
    return ClipConfig.parse(override(base, {name.replace("__", "."): value for name, value in more.items()}))
