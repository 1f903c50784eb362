"""Features of a frozen backbone, computed once ever: later epochs, runs and verbs read them from the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import timm
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from eyetune.data.cache import content_key
from eyetune.data.loader import Loader
from eyetune.data.order import EpochBatches
from eyetune.data.store import Item, Kind
from eyetune.progress import meter
from eyetune.train.task import SMALLER_FORWARD, Batch, enough_memory

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy
    from eyetune.backbones.backbone import Backbone
    from eyetune.config import TrainConfig
    from eyetune.data.config import AugmentConfig
    from eyetune.runtime import Runtime

Features = npt.NDArray[np.float32]


def can_compute_once(strategy: Strategy, train: TrainConfig, augment: AugmentConfig) -> bool:
    """Whether an image has the same features in every epoch, or in every epoch of its stored views."""
    fixed = strategy.views > 0 or not _changes(augment)
    return strategy.frozen_backbone and fixed and train.mixup == 0 and train.cutmix == 0


def _changes(augment: AugmentConfig) -> bool:
    return augment != "none" and len(augment) > 0


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
        features: float32[V, N, width], by view and index; epoch e takes view e mod V.
        target: by index, as :class:`eyetune.data.loader.FundusDataset` has them.
        batches: the other loader's order.
    """

    def __init__(self, features: Tensor, target: Tensor, batches: EpochBatches) -> None:
        self.features = features
        self.target = target
        self.batches = batches

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Which epoch the next iteration is, and from which batch on."""
        self.batches.set_epoch(epoch, first)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.batches:
            index = torch.tensor([index for _, index in keys], dtype=torch.int64)
            view = self.features[keys[0][0] % len(self.features)]
            yield {"features": view[index], "target": self.target[index], "index": index}


def compute_once(
    model: Classifier, loader: Loader, runtime: Runtime, description: str, *, views: int = 0
) -> FeatureLoader:
    """The loader over the features of the frozen backbone of `model`, in place of the images of `loader`.

    Where `loader` augments, each image has `views` views, the same in every run; else it has one.
    """
    views = views if _changes(loader.dataset.augment) else 0
    features = backbone_features(
        model.backbone, loader, runtime, fingerprint=model.base_fingerprint(), description=description, views=views
    )
    return FeatureLoader(features, loader.dataset.targets, loader.batches)


def backbone_features(
    backbone: Backbone, loader: Loader, runtime: Runtime, *, fingerprint: str, description: str, views: int = 0
) -> Tensor:
    """Features of every image of `loader`, in the manifest's order: float32[max(1, views), N, width], on the CPU.

    What the loader's cache has is not computed again; what is computed goes there. With several processes each computes
    a part and all have the whole. Puts the backbone into eval mode. Raises UserError as :func:`enough_memory` does.

    Args:
        backbone: on the device.
        loader: gives the images, whatever order and repetition it trains in, and the cache.
        fingerprint: of the backbone's weights as they are now.
        description: for the progress display.
        views: how many augmented views an image has; 0 for the image as the loader gives it in any epoch.
    """
    backbone.eval()
    count = len(loader.batches.labels)
    wanted = [(view, index) for view in range(max(1, views)) for index in range(count)]
    known = _Known(backbone, loader, runtime, fingerprint, views)
    if known.cache is not None:
        known.cache.store.refresh()  # what the other processes of this run have stored since it began
    values = np.zeros((len(wanted), backbone.width), np.float32)
    missing = [place for place, key in enumerate(wanted) if not known.read(key, values[place])]
    # A process may see less in the cache than another, which goes on storing: what any lacks is computed.
    missing = sorted(set().union(*runtime.gather(missing)))
    if missing:
        mine = np.array_split(np.array(missing), runtime.processes)[runtime.rank].tolist()
        with enough_memory(SMALLER_FORWARD), meter(len(missing), description) as update:
            own = known.compute([wanted[place] for place in mine], update)
        for places, features in runtime.gather((mine, own)):
            values[places] = features
    return torch.from_numpy(values).reshape(max(1, views), count, backbone.width)


class _Known:
    """The features of one backbone over one loader: read from the cache under a key of everything that decides their
    values, or computed. Arguments as for :func:`backbone_features`."""

    def __init__(self, backbone: Backbone, loader: Loader, runtime: Runtime, fingerprint: str, views: int) -> None:
        self.backbone = backbone
        self.loader = loader
        self.runtime = runtime
        self.dataset = loader.dataset
        self.cache = loader.dataset.cache
        self.views = views
        self.identity = (
            [backbone.spec.name, backbone.pool, backbone.width, backbone.preprocess.to_dict(), fingerprint],
            [runtime.precision, runtime.device.type, torch.__version__, timm.__version__],
            [loader.dataset.augment, torchvision.__version__] if views else None,
        )

    def key(self, key: tuple[int, int]) -> bytes:
        """Of (view, index). Raises OSError when the file cannot be read."""
        assert self.cache is not None
        view, index = key
        square = self.cache.square_key(self.dataset.records[index].image, self.dataset.settings)
        return content_key("features", square.hex(), *self.identity, view if self.views else None)

    def read(self, key: tuple[int, int], into: Features) -> bool:
        """Copy a stored feature float32[width] into `into`; False when there is none."""
        if self.cache is None:
            return False
        try:
            kept = self.cache.store.get(self.key(key))
        except OSError:
            return False  # the loader says what is wrong with the file
        if kept is None or kept.nbytes != into.nbytes:
            return False
        into[:] = kept.view(np.float32)
        return True

    def compute(self, keys: Sequence[tuple[int, int]], update: Callable[[int], None]) -> Features:
        """Features float32[M, width] of the (view, index) of `keys`, each batch stored as soon as it is done."""
        size = self.loader.batches.batch_size
        dataset = copy.copy(self.dataset)
        dataset.by_content = self.views > 0
        reading = Loader(
            dataset,
            batch_sampler=[keys[start : start + size] for start in range(0, len(keys), size)],
            num_workers=self.loader.num_workers,
            collate_fn=self.loader.collate_fn,
            worker_init_fn=self.loader.worker_init_fn,
            pin_memory=self.loader.pin_memory,
        )
        found = np.zeros((len(keys), self.backbone.width), np.float32)
        done = 0
        for batch in reading:
            with torch.no_grad(), self.runtime.autocast():
                features = self.backbone.features(self.runtime.to_device(batch["image"])).float().cpu().numpy()
            found[done : done + len(features)] = features
            self.write(keys[done : done + len(features)], features)
            done += len(features)
            update(done * self.runtime.processes)
        if self.cache is not None:
            self.cache.store.close()  # others may append now
        return found

    def write(self, keys: Sequence[tuple[int, int]], features: Features) -> None:
        """Store features float32[M, width] of `keys`."""
        if self.cache is not None:
            self.cache.store.put(
                [Item(self.key(key), Kind.FEATURES, one.tobytes()) for key, one in zip(keys, features, strict=True)]
            )
