"""How far training moved the features of a run's backbone from the published ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.backbones import Preprocess, load_backbone
from eyetune.data.loader import make_loader
from eyetune.data.readable import Workers
from eyetune.metrics.drift import cosine_distance, debiased_cka, linear_cka
from eyetune.runtime import seed_everything
from eyetune.train.features import backbone_features

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Backbone
    from eyetune.data.records import Manifest
    from eyetune.train.run import Run

MOST_IMAGES = 2000
"""Images looked at, evenly over the split: what is compared grows with their square."""


def feature_drift(run: Run, manifest: Manifest, split: str, *, workers: Workers, batch_size: int) -> dict[str, Any]:
    """Compare the features of the images of `manifest` before and after training.

    Args:
        run: the trained run, at its best epoch.
        manifest: the images, most often the validation split.
        split: what to call them.

    Returns {"split", "images", "cka", "cka_debiased", "cosine_distance"}, the values as in eyetune.metrics.drift. A
    frozen backbone moved by exactly nothing. With several processes all have to call this.
    """
    step = -(-len(manifest) // MOST_IMAGES)
    chosen = manifest.with_records(list(manifest)[::step])
    card, model = run.card, run.model

    def features(backbone: Backbone, fingerprint: str, what: str) -> Any:
        loader = make_loader(
            chosen,
            backbone.preprocess,
            run.settings,
            batch_size=batch_size,
            training=False,
            workers=workers,
            cache=run.cache,
            shard=(run.runtime.rank, run.runtime.processes),
        )
        found = backbone_features(backbone, loader, run.runtime, fingerprint=fingerprint, description=what)
        return found[0].numpy().astype(np.float64)

    frozen = run.strategy.frozen_backbone
    after = features(
        model.backbone, model.base_fingerprint() if frozen else model.backbone.fingerprint(), "Features after training"
    )
    before = after
    if not frozen:
        seed_everything(card.seed)  # where the weights are "random"
        published = load_backbone(card.backbone, card.weights, pixels=card.pixels, pool=card.pool)
        published.preprocess = Preprocess.from_dict(card.preprocess)
        run.runtime.place(published)
        before = features(published, card.fingerprint, "Features before training")
    return {
        "split": split,
        "images": len(chosen),
        "cka": linear_cka(before, after),
        "cka_debiased": debiased_cka(before, after),
        "cosine_distance": cosine_distance(before, after),
    }
