"""Features of a frozen backbone, computed once: the epochs that follow run over memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from eyetune.data.loader import EpochBatches, Loader
from eyetune.progress import meter
from eyetune.train.task import Batch

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy
    from eyetune.config import TrainConfig
    from eyetune.data.config import AugmentConfig
    from eyetune.runtime import Runtime


def can_compute_once(strategy: Strategy, train: TrainConfig, augment: AugmentConfig) -> bool:
    """Whether an image has the same features in every epoch: frozen backbone, no augmentation, nothing mixed."""
    unchanged = augment == "none" or (not isinstance(augment, str) and len(augment) == 0)
    return strategy.frozen_backbone and unchanged and train.mixup == 0 and train.cutmix == 0


class FeatureHead(nn.Module):
    """The classifier from its features on: float[B, width] -> logits float[B, K]."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.head = model.head

    def forward(self, features: Tensor) -> Tensor:
        """features float[B, width] -> logits float[B, K]."""
        logits: Tensor = self.head(features)
        return logits


class FeatureLoader:
    """The batches of another loader, in the same order, with `features` float32[B, width] in place of images.

    Args:
        features: float32[N, width], by index.
        target: int64[N].
        batches: the other loader's order.
    """

    def __init__(self, features: Tensor, target: Tensor, batches: EpochBatches) -> None:
        self.features = features
        self.target = target
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.batches:
            index = torch.tensor([index for _, index in keys], dtype=torch.int64)
            yield {"features": self.features[index], "target": self.target[index], "index": index}


def compute_once(model: Classifier, loader: Loader, runtime: Runtime, description: str) -> FeatureLoader:
    """Pass every image of `loader` through the backbone, in eval mode, once; return the loader over its features.

    Each image is read once, in the manifest's order, whatever order and repetition `loader` trains in.
    """
    model.eval()
    order = loader.batches
    once = EpochBatches(order.labels, order.batch_size, shuffle=False, shard=(order.rank, order.world))
    reading = Loader(
        loader.dataset,
        batch_sampler=once,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
    )
    indices: list[Tensor] = []
    features: list[Tensor] = []
    with meter(len(order.labels), description) as update:
        done = 0
        for batch in reading:
            with torch.no_grad(), runtime.autocast():
                features.append(model.backbone.features(runtime.to_device(batch["image"])).float())
            indices.append(batch["index"])
            done += len(batch["index"])
            update(done * runtime.processes)
    mine = (torch.cat(indices).numpy(), torch.cat(features).cpu().numpy()) if indices else None
    shares = [share for share in runtime.gather(mine) if share is not None]
    index = np.concatenate([share[0] for share in shares])
    values = np.concatenate([share[1] for share in shares])
    ordered = torch.empty(len(order.labels), values.shape[1])
    ordered[torch.from_numpy(index)] = torch.from_numpy(values)
    target = torch.tensor([-1 if label is None else label for label in order.labels], dtype=torch.int64)
    return FeatureLoader(ordered, target, order)
