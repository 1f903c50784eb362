"""`scripts.utils`: the guides' helpers for their own training loops, on top of the house's parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split

from eyetune.adapt import strategy
from eyetune.errors import DataError, UserError
from eyetune.guides import TICK
from eyetune.guides.network import check_count
from eyetune.guides.settings import GuideConfig
from eyetune.runtime import seed_everything

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.data.loader import Loader
    from eyetune.metrics.outcomes import Outcomes

GRADES = ("No DR", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR")
"""The guides' names of the classes 0 to 4."""

_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "precision_macro": "precision_macro",
    "precision_weighted": "precision_weighted",
    "recall_macro": "recall_macro",
    "recall_weighted": "recall_weighted",
    "f1_macro": "f1_macro",
    "f1_weighted": "f1_weighted",
    "cohen_kappa": "kappa",
    "quadratic_kappa": "qwk",
}
"""What the guides' programs call a metric -> its name here."""


def set_seed(seed: int, deterministic: bool = True, verbose: bool = True) -> None:
    """Seed Python, NumPy and PyTorch; `deterministic` has cuDNN choose the same algorithm every time.

    The draws are those of `eyetune finetune --seed`, not those of `torch.manual_seed(seed)`.
    """
    check_count("seed", seed, least=0)
    seed_everything(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
    if verbose:
        print(f"{TICK} Random seed set to {seed} (deterministic mode: {'ON' if deterministic else 'OFF'})")


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int | tuple[int, int]:
    """(all, trainable) parameters of a model; with `trainable_only` the second number alone."""
    trainable, total = strategy.count_parameters(model)
    return trainable if trainable_only else (total, trainable)


def calculate_metrics(y_true: Any, y_pred: Any, num_classes: int = 5) -> dict[str, Any]:
    """The guides' metrics of predicted classes, as :mod:`eyetune.metrics.scores` defines them.

    Args:
        y_true, y_pred: int[N], 0..num_classes-1.
        num_classes: K.

    Returns accuracy, balanced_accuracy, precision, recall and F1 (macro and weighted), cohen_kappa, quadratic_kappa
    (None where a metric has no value), confusion_matrix [[int]] (rows = truth), and per_class_metrics by number:
    precision, recall, f1-score (None for a class without examples), support. No intervals: `eyetune evaluate` has them.
    Raises DataError when the two do not belong together.
    """
    from eyetune.metrics.scores import METRICS

    outcomes = _outcomes(y_true, y_pred, num_classes)
    columns = {"precision": outcomes.precision, "recall": outcomes.recall, "f1-score": outcomes.f1}
    return {
        **{theirs: METRICS.get(ours).or_none(outcomes) for theirs, ours in _METRICS.items()},
        "confusion_matrix": outcomes.confusion.tolist(),
        "per_class_metrics": {
            str(number): {
                **{name: float(of[number]) if np.isfinite(of[number]) else None for name, of in columns.items()},
                "support": int(outcomes.support[number]),
            }
            for number in range(num_classes)
        },
    }


def plot_confusion_matrix(
    y_true: Any,
    y_pred: Any,
    classes: Sequence[str] | None = None,
    save_path: str | Path = "confusion_matrix.png",
    title: str = "Confusion Matrix",
) -> None:
    """Draw the confusion matrix to a PNG file: counts, and their share of the true class.

    Args:
        y_true, y_pred: int[N].
        classes: K names; None: those of the five grades.
        save_path: the file.
        title: a line above.

    Raises DataError when the two do not belong together.
    """
    from eyetune.metrics import plots

    names = GRADES if classes is None else tuple(map(str, classes))
    plots.confusion_matrix(_outcomes(y_true, y_pred, len(names)).confusion, names, Path(save_path), title=title)
    print(f"{TICK} Confusion matrix saved: {save_path}")


class Pairs:
    """The batches of a loader as the guides' loops take them: (images float[B, 3, H, W], labels int64[B]).

    Every pass is a new epoch: another order and augmentation where the loader trains.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.dataset = loader.dataset
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.loader.set_epoch(self.epoch)
        self.epoch += 1
        for batch in self.loader:
            yield batch["image"], batch["target"]


def create_data_loaders(
    dataset: GuideConfig | Dataset[Any],
    batch_size: int | None = None,
    split_ratio: float = 0.8,
    num_workers: int | None = None,
    *,
    pin_memory: bool | None = None,
    seed: int | None = None,
) -> tuple[Any, Any]:
    """Loaders of (images, labels) for training and validation.

    Args:
        dataset: a configuration: its table is split by patient and its photographs prepared as its network wants them,
            exactly as `eyetune finetune` does. Or a PyTorch dataset: it does not name patients, so it is split by
            image, which is said.
        batch_size: images a batch; None: as the configuration says, else 32.
        split_ratio: share of a PyTorch dataset that trains; a configuration has `data.val_split`.
        num_workers: processes that read; None: as the configuration says, else none.
        pin_memory: whether batches wait where a GPU copies from directly; None: where there is a CUDA device.
        seed: of split and order; None: as the configuration says, else 42.

    Raises DataError and ConfigError as `eyetune finetune` does, UserError for a dataset too small to split.
    """
    if isinstance(dataset, GuideConfig):
        return _of_config(dataset, batch_size, num_workers, pin_memory, seed)
    if not 0 < split_ratio < 1:
        raise UserError(f"create_data_loaders: split_ratio must be between 0 and 1, got {split_ratio!r}.")
    count = len(dataset)  # type: ignore[arg-type]
    train = round(count * split_ratio)
    if not 0 < train < count:
        raise UserError(f"create_data_loaders: {count} images cannot be split into {split_ratio:g} and the rest.")
    generator = torch.Generator().manual_seed(42 if seed is None else seed)
    parts = random_split(dataset, [train, count - train], generator)
    options: dict[str, Any] = {"batch_size": batch_size or 32, "num_workers": num_workers or 0}
    options["pin_memory"] = torch.cuda.is_available() if pin_memory is None else pin_memory
    print(
        f"{TICK} Created data loaders: train={train}, val={count - train}. Split by image: two photographs of one "
        "patient may fall on both sides. A configuration in place of the dataset splits by patient."
    )
    return DataLoader(parts[0], shuffle=True, generator=generator, **options), DataLoader(parts[1], **options)


def _of_config(
    guide: GuideConfig, batch_size: int | None, num_workers: int | None, pin_memory: bool | None, seed: int | None
) -> tuple[Pairs, Pairs]:
    from eyetune.backbones import find_spec
    from eyetune.config import Config
    from eyetune.data.cache import Cache
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.loader import make_loader
    from eyetune.verbs.finetune import prepare_data

    content = guide.translation().content
    if batch_size is not None:
        content.setdefault("train", {})["batch_size"] = batch_size
    given = {"workers": num_workers, "pin_memory": pin_memory, "seed": seed}
    content |= {name: value for name, value in given.items() if value is not None}
    config = Config.parse(content, check_files=False)
    cache = Cache.of(config.data)
    manifest = prepare_data(config, cache)
    if "val" not in manifest.splits:
        raise UserError("create_data_loaders: data.val_split is 0 and the table has no val split: nothing validates.")
    preprocess = find_spec(config.model.backbone).preprocess_at(config.model.pixels)
    settings = FundusSettings.of(config.data, preprocess)
    made = [
        make_loader(
            manifest.select(name),
            preprocess,
            settings,
            batch_size=config.train.batch_size,
            training=name == "train",
            augment=config.augment,
            workers=config.workers,
            pin_memory=config.pin_memory,
            seed=config.seed,
            cache=cache,
        )
        for name in ("train", "val")
    ]
    for note in manifest.notes:
        print(note)
    return Pairs(made[0]), Pairs(made[1])


def _outcomes(y_true: Any, y_pred: Any, num_classes: int) -> Outcomes:
    """Truth and called classes, the calls as probabilities of 1."""
    from eyetune.metrics.outcomes import Outcomes

    check_count("num_classes", num_classes, least=2)
    targets, calls = (_classes(values, name, num_classes) for values, name in ((y_true, "y_true"), (y_pred, "y_pred")))
    if len(targets) != len(calls) or not len(targets):
        raise DataError(f"y_true has {len(targets)} classes and y_pred {len(calls)}: one of each for every image.")
    return Outcomes(targets, np.eye(num_classes)[calls])


def _classes(values: Any, name: str, num_classes: int) -> NDArray[np.int64]:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or not np.isin(array, np.arange(num_classes)).all():
        raise DataError(f"{name}: must be a list of classes from 0 to {num_classes - 1}, one an image.")
    return array.astype(np.int64)
