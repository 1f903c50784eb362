"""What mirrored views do to the scores of a run: one view, left and right, and upside down too; mean of the outputs
before the softmax and after it.

    python benchmarks/mirrored.py RUN TABLE [--images FOLDER] [--label-column NAME] [--split test]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import machine, markdown

from eyetune.data.loader import make_loader
from eyetune.data.records import Manifest
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import score
from eyetune.train.run import load_run

VIEWS: dict[str, tuple[tuple[int, ...], ...]] = {
    "as it is": ((),),
    "and mirrored": ((), (3,)),
    "and upside down": ((), (3,), (2,), (2, 3)),
}
METRICS = ("qwk", "accuracy", "auroc_macro", "nll", "ece")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--label-column")
    parser.add_argument("--split")
    given = parser.parse_args()
    run = load_run(given.run, cache=False)
    column = None if given.split else "none"
    manifest = Manifest.from_table(
        given.table, images=given.images, label_column=given.label_column, patient_column="none", split_column=column
    )
    if given.split:
        manifest = manifest.select(given.split)
    loader = make_loader(
        manifest, run.model.backbone.preprocess, run.settings, batch_size=32, training=False, workers=0
    )
    flips = VIEWS["and upside down"]
    parts: dict[tuple[int, ...], list[torch.Tensor]] = {flip: [] for flip in flips}
    with torch.no_grad():
        for batch in loader:
            for flip in flips:
                image = batch["image"].flip(flip) if flip else batch["image"]
                parts[flip].append(run.model(image.to(run.runtime.device)).float().cpu())
    logits = {flip: torch.cat(found).double().numpy() for flip, found in parts.items()}
    targets = np.array([record.label for record in manifest])
    names = [record.name for record in manifest]
    rows = []
    for name, chosen in VIEWS.items():
        views = np.stack([logits[flip] for flip in chosen])
        shares = np.exp(views - views.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        for what, mean in (("before", views.mean(axis=0)), ("after", np.log(shares.mean(axis=0)))):
            if len(chosen) > 1 or what == "before":
                none = [None] * len(names)
                found = score(Predictions(names, none, none, targets, mean, run.classes), resamples=0)["metrics"]
                rows.append([name, "-" if len(chosen) == 1 else what, *(f"{found[m]['value']:.3f}" for m in METRICS)])
    print(f"{len(names)} images; {machine()}")
    print(markdown(["views", "mean before or after the softmax", *METRICS], rows))


if __name__ == "__main__":
    main()
