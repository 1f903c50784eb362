"""A trained run without training: small photographs, a small network with weights of chance, everything a run has."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from eyetune.config import Config
from eyetune.data.records import open_manifest
from eyetune.data.splits import write_splits
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.table import Table
from eyetune.train import results
from eyetune.train.answers import answer_to, read_answer
from eyetune.train.run import Run, load_run
from eyetune.train.rundir import RunDir
from eyetune.verbs.finetune import build_model, model_card

torch.set_num_threads(1)

COUNT = 36

TASKS: dict[str, dict[str, Any]] = {
    "classes": {"column": "grade", "task": {}},
    "corn": {"column": "grade", "task": {"head": "corn"}},
    "coral": {"column": "grade", "task": {"head": "coral"}},
    "ranked": {
        "column": "grade",
        "task": {"head": "regression"},
        "fitted": {"mean": 2.0, "std": 1.4, "thresholds": [0.7, 1.6, 2.4, 3.1], "cuts": [0.5, 1.5, 2.6, 3.4]},
    },
    "labels": {"column": ["wet", "dry"], "task": {}},
    "number": {"column": "age", "task": {"kind": "regression"}, "fitted": {"mean": 50.0, "std": 12.0}},
}
"""What can be learnt, with what training and validation would have fitted."""


def photographs(folder: Path) -> Path:
    """The table of a few small photographs that differ in brightness, with a column for every task, and splits."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(COUNT):
        level = 40 + 4 * number
        pixels = np.clip(rng.normal(level, 30, size=(40, 48, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), pixels)
        split = ("train", "val", "train", "test")[number % 4]
        wet, dry = int(number % 5 == 0), int(number % 2 == 0)
        lines.append([f"{number}.png", number % 5, wet, dry, 40 + number, split])
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["image", "grade", "wet", "dry", "age", "split"], *lines])
    return folder / "table.csv"


def make_run(
    table: Path,
    path: Path,
    *,
    backbone: str = "test_vit",
    adapt: str | dict[str, Any] = "full",
    task: str = "classes",
    pool: str | None = None,
    pixels: int = 32,
    splits: bool = True,
) -> Run:
    """A run folder as training leaves it, loaded. `splits` False: as one made from a checkpoint of another program."""
    wanted = TASKS[task]
    config = Config.parse(
        {
            "model": {"backbone": backbone, "weights": "random", "pixels": pixels, "pool": pool},
            "data": {
                "table": str(table),
                "images": str(table.parent / "images"),
                "label_column": wanted["column"],
                "split_column": "split",
                "crop": False,
                "cache": False,
            },
            "task": wanted["task"],
            "adapt": {"kind": adapt} if isinstance(adapt, str) else adapt,
            "out": str(path),
        }
    )
    manifest = open_manifest(config.data, kind=config.reads)
    model, strategy = build_model(config, manifest.classes)
    model_base = model.base_fingerprint()
    torch.manual_seed(1)
    with torch.no_grad():  # as if something had been learnt, in every layer
        for name, tensor in model.named_parameters():
            if strategy.saved(model, name):
                tensor.add_(torch.randn_like(tensor) * (0.3 if name.startswith("head.") else 0.02))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var") and strategy.saved(model, name):
                buffer.uniform_(0.5, 1.5)
    answer = read_answer(answer_to(config.asked, manifest.classes).card() | wanted.get("fitted", {}), manifest.classes)
    card = model_card(config, answer, model)
    assert card.fingerprint == model_base
    folder = RunDir.create(path)
    folder.write_config(config)
    folder.write_environment({"versions": {}})
    folder.write_load_report({})
    folder.save_best(strategy.checkpoint(model), card)
    folder.settle(card.epoch)
    if splits:
        write_splits(manifest, folder.splits_file)
        run = load_run(path, device="cpu", precision="fp32")
        parts = {name: manifest.with_records([r for r in manifest if r.split == name]) for name in ("train", "val")}
        run.fit_novelty(parts["train"], workers=0)
        results.calibrate(run, _mostly_right(run.table(parts["val"], workers=0)))
    return load_run(path, device="cpu", precision="fp32")


def _mostly_right(table: Table) -> Table:
    """The same with a truth that makes two thirds of the calls right: else calibration would find nothing to keep."""
    if isinstance(table, ValuePredictions):
        return replace(table, targets=table.predicted + np.linspace(-5, 5, len(table)))
    assert isinstance(table, (Predictions, LabelPredictions))
    wrong = np.arange(len(table)) % 3 == 0
    return replace(table, targets=np.where(wrong if table.targets.ndim == 1 else wrong[:, None], 0, table.predicted))
