"""What is learnt: batches to a loss, and a network over a loader to outputs and scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyetune.data.loader import ReaderDied
from eyetune.data.transforms import batch_mixing
from eyetune.errors import ConfigError, UserError
from eyetune.interrupt import obey, pending
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import METRICS, is_graded_dr, is_ordered, primary_metric, score
from eyetune.progress import meter

if TYPE_CHECKING:
    from eyetune.config import TrainConfig
    from eyetune.data.records import Manifest
    from eyetune.runtime import Runtime

Batch = dict[str, Any]
"""At least `index` int64[B], and what the task reads: `image` or `features`, `target`."""


#: What helps when a forward pass alone takes too much memory: nothing but fewer images at once.
SMALLER_FORWARD = (
    "Try half as many images: --batch-size in predict, evaluate and embed; train.batch_size in finetune, with "
    "train.accumulate twice as large for the same training."
)


class Batches(Sized, Protocol):
    """A loader: batches of one epoch, in an order that is a function of the epoch."""

    def __iter__(self) -> Any: ...
    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Which epoch the next iteration is, and from which batch on."""


@dataclass(frozen=True)
class Validation:
    """What validation says of an epoch."""

    loss: float | None
    metrics: dict[str, float | None]
    gaps: str = ""
    """What the validation images lack that a metric may need; empty when nothing is known to be missing."""


class Task(Protocol):
    """What the loop trains. Another task (image-text contrast) is another class of these four methods."""

    metric: str
    """Name of the metric, a key of `Validation.metrics`, that chooses the best epoch."""
    higher_is_better: bool

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Batch on the device -> float[] mean loss over its samples, under autocast."""

    def validate(self, network: nn.Module, loader: Iterable[Batch], runtime: Runtime) -> Validation:
        """The network in eval mode over all of `loader`, the same in every process."""

    def names(self, indices: Sequence[int]) -> list[str]:
        """What to call these training samples in a message."""


@dataclass(frozen=True)
class Outputs:
    """What a network said of every sample of a loader, once each, by rising index.

    Args:
        index: int64[N], place in the manifest.
        target: int64[N], -1 where not known.
        logits: float32[N, K], on the CPU.
        judged: float32[N, …], what `judge` said of the features of each, on the CPU; None where nothing was asked.
    """

    index: Tensor
    target: Tensor
    logits: Tensor
    judged: Tensor | None = None

    def predictions(self, manifest: Manifest) -> Predictions:
        """The table of predictions, names and patients from the manifest the loader was made of."""
        records = [manifest[int(index)] for index in self.index]
        return Predictions(
            images=[record.name for record in records],
            patients=[record.patient for record in records],
            eyes=[record.eye for record in records],
            targets=self.target.numpy(),
            logits=self.logits.numpy(),
            classes=manifest.classes,
        )


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn the device's running out of memory into a UserError that gives `advice`; so too the death of a process that
    reads images, mostly for want of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # After its third sentence torch explains its allocator.
        said = ". ".join(str(error).split(". ")[:3]).rstrip(".")
        raise UserError(f"the device has not enough memory for a batch. {advice}\n  ({said})") from error
    except RuntimeError as error:
        # As torch's DataLoader says it, within seconds, wherever the main process is just then.
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ReaderDied(error) from error


def forward(network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits float[B, K] of a batch of images, or of features computed before."""
    logits: Tensor = network(batch["features"] if "features" in batch else batch["image"])
    return logits


@contextlib.contextmanager
def _heard(network: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """While inside, the features float[B, width] that come to the network's head are put into the list."""
    heard: list[Tensor] = []
    if not wanted:
        yield heard
        return
    head = network.head
    assert isinstance(head, nn.Module)
    handle = head.register_forward_pre_hook(lambda module, given: heard.append(given[0]))
    try:
        yield heard
    finally:
        handle.remove()


def predict(
    network: nn.Module,
    loader: Iterable[Batch],
    runtime: Runtime,
    *,
    total: int | None = None,
    description: str = "",
    judge: Callable[[Tensor], Tensor] | None = None,
) -> Outputs:
    """Run `network`, in eval mode and without gradients, over `loader`.

    `judge` is given the features float32[B, width] of every batch, those the network's head turns into logits, in the
    same pass, and answers with a row an image.

    With several processes each brings its part and all get the whole: every sample exactly once, whatever the loader
    repeats. Shows progress when there is a `description`, with `total` samples as the whole. Raises UserError when the
    device has not enough memory for a batch; Interrupted, in all processes, when one of them has a signal pending.
    """
    network.eval()
    parts: dict[str, list[Tensor]] = {"index": [], "target": [], "logits": []}
    if judge is not None:
        parts["judged"] = []
    show = bool(description) and runtime.is_main
    split = hasattr(network, "unshard")

    def leaving() -> bool:
        """Whether to stop here: each by itself, but for a split network, whose processes can only go on together."""
        return runtime.any(pending() is not None) if split else pending() is not None

    def run(update: Any) -> None:
        done = 0
        missing = runtime.lockstep(network, len(loader)) if isinstance(loader, Sized) else 0
        image: Tensor | None = None
        for batch in loader:
            on_device = runtime.to_device(batch)
            with _heard(network, judge is not None) as heard, torch.no_grad(), runtime.autocast():
                logits = forward(network, on_device)
            if judge is not None:
                parts["judged"].append(judge(heard[0].float()))
            # Kept on the device until the end: a copy back would wait for every batch.
            parts["logits"].append(logits.float())
            parts["index"].append(batch["index"])
            parts["target"].append(batch["target"])
            image = on_device.get("image")
            done += len(batch["index"])
            update(done * runtime.processes)
            if leaving():
                return
        if missing and image is None:
            raise UserError("train.fsdp: there are fewer images to predict than processes. Start fewer processes.")
        for _ in range(missing):
            with torch.no_grad(), runtime.autocast():
                network(image[:1] if image is not None else None)
            if leaving():
                return

    with enough_memory(SMALLER_FORWARD):
        if show:
            with meter(total, description) as update:
                run(update)
        else:
            run(lambda done: None)
    mine = {name: torch.cat(tensors).cpu().numpy() if tensors else None for name, tensors in parts.items()}
    answers = runtime.gather((mine, pending() is not None))
    if any(wish for _, wish in answers):
        raise obey("")
    shares = [share for share, _ in answers if share["index"] is not None]
    if not shares:
        raise ValueError("the loader is empty")
    whole = {name: np.concatenate([share[name] for share in shares]) for name in parts}
    index, first = np.unique(whole["index"], return_index=True)
    return Outputs(
        index=torch.from_numpy(index),
        target=torch.from_numpy(whole["target"][first]),
        logits=torch.from_numpy(whole["logits"][first]),
        judged=torch.from_numpy(whole["judged"][first]) if judge else None,
    )


class ClassificationTask:
    """One class an image.

    The loss of a batch is the plain mean over its images, class weights included (they are 1 on average over the
    training images): so accumulated batches weigh as one large batch does.

    Args:
        classes: K class names, in the order of the logits.
        train: loss and metric settings.
        class_weights: K weights, 1 on average over the training images; needed for balance "weighted".
        names: what the training images are called, by index.

    Raises ConfigError when `train.metric` is unknown or has no value for these classes.
    """

    def __init__(
        self,
        classes: Sequence[str],
        train: TrainConfig,
        *,
        class_weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.classes = tuple(classes)
        self.train = train
        self.metric = _chosen_metric(train.metric, self.classes)
        self.higher_is_better = METRICS.get(self.metric).higher_is_better
        self.image_names = names
        self.mixing = batch_mixing(train.mixup, train.cutmix, len(self.classes))
        self.weights: Tensor | None = None
        if train.balance == "weighted":
            if class_weights is None or len(class_weights) != len(self.classes):
                raise ValueError("balance 'weighted' needs one weight a class")
            self.weights = torch.tensor(class_weights, dtype=torch.float32)

    @classmethod
    def of(cls, manifest: Manifest, train: TrainConfig) -> ClassificationTask:
        """The task of learning `manifest`, the training split."""
        return cls(
            manifest.classes,
            train,
            class_weights=manifest.class_weights(),
            names=[f"{record.name} ({record.row})" for record in manifest],
        )

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """image float[B, 3, H, W] or features float[B, width], target int64[B] -> float[] mean loss, float32."""
        target = batch["target"]
        if self.mixing is not None and "image" in batch:
            image, target = self.mixing(batch["image"], target)
            batch = batch | {"image": image}
        return self.losses(forward(network, batch), target).mean()

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits float[B, K], target int64[B] or soft float[B, K] -> float32[B].

        Cross-entropy with label smoothing and class weights; or focal loss (Lin et al., 2017), for soft targets
        sum over classes of target * (1 - p)^gamma * -log p.
        """
        logits = logits.float()
        smoothing = self.train.label_smoothing
        if self.train.balance == "focal":
            classes = logits.shape[-1]
            soft = target if target.is_floating_point() else F.one_hot(target, classes).to(logits.dtype)
            soft = soft * (1.0 - smoothing) + smoothing / classes
            log_p = logits.log_softmax(dim=-1)
            return -(soft * (1.0 - log_p.exp()).clamp_min(0.0).pow(self.train.focal_gamma) * log_p).sum(dim=-1)
        weights = None if self.weights is None else self.weights.to(logits.device)
        return F.cross_entropy(logits, target, weight=weights, label_smoothing=smoothing, reduction="none")

    def validate(self, network: nn.Module, loader: Iterable[Batch], runtime: Runtime) -> Validation:
        """Mean loss over the labelled images and every metric; metrics that are not defined are None."""
        outputs = predict(network, loader, runtime)
        known = outputs.target >= 0
        loss = float(self.losses(outputs.logits[known], outputs.target[known]).mean()) if bool(known.any()) else None
        none = [None] * len(outputs.index)
        names = [str(int(index)) for index in outputs.index]
        table = Predictions(names, none, none, outputs.target.numpy(), outputs.logits.numpy(), self.classes)
        scores = score(table, resamples=0)  # intervals are for the end
        metrics = {name: entry["value"] for name, entry in scores["metrics"].items()}
        return Validation(loss, metrics, self._gaps(outputs.target[known]))

    def _gaps(self, targets: Tensor) -> str:
        """Which classes have no image among the labels int64[N], all known."""
        missing = set(range(len(self.classes))) - set(targets.tolist())
        if len(missing) == len(self.classes):
            return "no validation image has a label"
        names = ", ".join(self.classes[index] for index in sorted(missing))
        return f"no validation image is of {names}" if missing else ""

    def names(self, indices: Sequence[int]) -> list[str]:
        """Names and rows of training images."""
        return [self.image_names[index] if index < len(self.image_names) else f"image {index}" for index in indices]


def _chosen_metric(name: str | None, classes: tuple[str, ...]) -> str:
    if name is None:
        return primary_metric(classes)
    if name not in METRICS:
        from eyetune.errors import did_you_mean

        known = METRICS.names()
        raise ConfigError(f"train.metric: unknown {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    scope = METRICS.get(name).scope
    if scope == "graded" and not is_graded_dr(classes):
        raise ConfigError(f"train.metric: {name} is for the five grades of diabetic retinopathy, not for {classes}.")
    if scope == "ordered" and not is_ordered(classes):
        raise ConfigError(f"train.metric: {name} needs classes with an order, and {classes} have none that is known.")
    return METRICS.canonical(name)
