"""Small parts that the tests of training share: a two-block vision transformer and an easy problem of two classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch

from eyetune.adapt import parse_adapt
from eyetune.adapt.classifier import Classifier
from eyetune.adapt.strategy import Strategy
from eyetune.backbones.backbone import BACKBONES, Backbone, Preprocess
from eyetune.config import TrainConfig
from eyetune.data.cache import Cache
from eyetune.data.fundus import FundusSettings
from eyetune.data.loader import Loader, make_loader
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.runtime import Runtime, seed_everything
from eyetune.train.loop import FitResult, fit
from eyetune.train.rundir import ModelCard, RunDir
from eyetune.train.task import SupervisedTask

# The networks are tiny: a second thread only waits for the first.
torch.set_num_threads(1)

PIXELS = 32
PREPROCESS = Preprocess(pixels=PIXELS, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="pad")
SETTINGS = FundusSettings(pixels=PIXELS, fit="pad", crop=False, contrast="none")


def tiny_backbone(seed: int = 0) -> Backbone:
    """A vision transformer of two blocks, width 32, for 32 pixels; untrained."""
    seed_everything(seed)
    network = timm.models.VisionTransformer(
        img_size=PIXELS, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, drop_path_rate=0.1
    )
    return Backbone(BACKBONES.get("nano"), network, preprocess=PREPROCESS, pool="cls", width=32)


def tiny_model(
    adapt: dict[str, Any] | str = "full", seed: int = 0, dropout: float = 0.1
) -> tuple[Classifier, Strategy]:
    """A classifier of two classes and its strategy, applied."""
    model = Classifier(tiny_backbone(seed), 2, dropout)
    strategy = parse_adapt(adapt).build()
    return strategy.apply(model), strategy


def photographs(folder: Path, count: int, start: int = 0) -> Manifest:
    """Small images whose brightness is their class, noisily."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(start)
    records = []
    for number in range(start, start + count):
        label = number % 2
        image = np.clip(rng.normal(90 + 60 * label, 40, size=(40, 40, 3)), 0, 255).astype(np.uint8)
        path = folder / f"{number}.png"
        cv2.imwrite(str(path), image)
        records.append(Record(image=path, label=label, name=path.name, row=f"t.csv row {number + 2}"))
    return Manifest(tuple(records), ("no", "yes"), "t.csv")


def loader(
    manifest: Manifest,
    *,
    training: bool,
    batch_size: int = 4,
    augment: str = "none",
    seed: int = 0,
    cache: Cache | None = None,
) -> Loader:
    """The manifest's loader, without worker processes."""
    return make_loader(
        manifest,
        PREPROCESS,
        SETTINGS,
        batch_size=batch_size,
        training=training,
        augment=augment,
        workers=0,
        seed=seed,
        cache=cache,
    )


def card(**changes: Any) -> ModelCard:
    """A card for the tiny model."""
    values: dict[str, Any] = {
        "backbone": "tiny",
        "weights": "random",
        "pool": "cls",
        "pixels": PIXELS,
        "dropout": 0.1,
        "fingerprint": "abc",
        "preprocess": {"pixels": PIXELS},
        "fundus": {"fit": "pad"},
        "classes": ("no", "yes"),
        "adapt": {"kind": "full"},
    }
    return ModelCard(**(values | changes))


def fit_tiny(
    run: RunDir,
    train_manifest: Manifest,
    val_manifest: Manifest | None,
    *,
    adapt: dict[str, Any] | str = "full",
    precision: str = "fp32",
    augment: str = "none",
    resume: bool = False,
    features_once: bool = False,
    cache: Cache | None = None,
    lr: float = 1e-3,
    dropout: float = 0.1,
    **train: Any,
) -> tuple[Classifier, FitResult]:
    """One whole run on the CPU."""
    settings = TrainConfig(**({"epochs": 3, "batch_size": 4, "tensorboard": False} | train))
    model, strategy = tiny_model(adapt, dropout=dropout)
    task = SupervisedTask.of(train_manifest, settings)
    result = fit(
        model,
        strategy,
        task,
        loader(train_manifest, training=True, batch_size=settings.batch_size, augment=augment, cache=cache),
        None if val_manifest is None else loader(val_manifest, training=False, cache=cache),
        run=run,
        runtime=Runtime("cpu", precision, seed=3),
        train=settings,
        lr=lr,
        card=card(),
        resume=resume,
        features_once=features_once,
        say=lambda line: None,
    )
    return model, result
