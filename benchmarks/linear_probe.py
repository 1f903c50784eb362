"""A 10-epoch linear probe against one pass over the same images, RETFound-Green, drawn photographs.

python benchmarks/linear_probe.py [--patients 40] [--size 1024] [--backbone retfound-green]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from common import machine, markdown


def one_pass_by_hand(folder: Path, name: str, pixels: int) -> float:
    """Seconds for torchvision's ImageFolder, timm's create_transform and a float32 forward pass over every image."""
    import timm
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    model = timm.create_model(name, num_classes=0, img_size=pixels).eval()
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder), create_transform(pixels)), batch_size=32, num_workers=2
    )
    start = time.perf_counter()
    with torch.no_grad():
        for images, _ in loader:
            model(images)
    return time.perf_counter() - start


def one_pass(table: Path, backbone: str) -> float:
    """Seconds for EyeTune to read every image once and pass it through the backbone once."""
    from eyetune.backbones import load_backbone
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.loader import make_loader
    from eyetune.data.records import Manifest
    from eyetune.runtime import Runtime

    runtime = Runtime()
    network = runtime.place(load_backbone(backbone, "random"))
    manifest = Manifest.from_table(table, label_column="dr_grade")
    settings = FundusSettings(network.preprocess.pixels, network.preprocess.fit)
    loader = make_loader(manifest, network.preprocess, settings, batch_size=32, training=False)
    start = time.perf_counter()
    with torch.no_grad(), runtime.autocast():
        for batch in loader:
            network.features(batch["image"])
    return time.perf_counter() - start


def probe(table: Path, backbone: str, out: Path) -> float:
    """Seconds for ten epochs of `adapt.kind: linear`: checking, training, scoring val and test, plots."""
    from eyetune.config import Config
    from eyetune.verbs.finetune import finetune

    config = Config.parse(
        {
            "model": {"backbone": backbone, "weights": "random"},
            "data": {"table": str(table), "label_column": "dr_grade"},
            "adapt": {"kind": "linear", "patience": 10},
            "train": {"epochs": 10, "patience": 0},
            "augment": "none",
            "out": str(out),
        }
    )
    start = time.perf_counter()
    finetune(config)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--backbone", default="retfound-green")
    parser.add_argument("--by-hand", default="vit_small_patch14_reg4_dinov2")
    parser.add_argument("--pixels", type=int, default=392)
    options = parser.parse_args()
    from eyetune.data.phantom import write_cohort

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EYETUNE_CACHE"] = f"{scratch}/cache"  # empty: a second probe would compute nothing
        folder = Path(scratch) / "eyes"
        write_cohort(folder, patients=options.patients, size=options.size, workers=2)
        hand = one_pass_by_hand(folder, options.by_hand, options.pixels)
        own = one_pass(folder / "labels.csv", options.backbone)
        whole = probe(folder / "labels.csv", options.backbone, Path(scratch) / "run")
    print(machine())
    rows = [
        ["one pass by hand (ImageFolder, create_transform, float32)", hand, f"{hand / own:.2f}"],
        ["one pass with EyeTune", own, "1.00"],
        ["10-epoch linear probe, everything included", whole, f"{whole / own:.2f}"],
    ]
    print(
        markdown([f"{2 * options.patients} eyes of {options.size} px, {options.backbone}", "seconds", "passes"], rows)
    )


if __name__ == "__main__":
    main()
