"""What is learnt: batches to a loss, and a network over a loader to outputs and scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from eyetune.adapt.task import TaskConfig
from eyetune.data.loader import ReaderDied
from eyetune.data.transforms import batch_mixing
from eyetune.errors import ConfigError, UserError, did_you_mean
from eyetune.interrupt import obey, pending
from eyetune.metrics.metric import METRICS, of_task
from eyetune.metrics.scores import is_graded_dr, is_ordered, score
from eyetune.progress import meter
from eyetune.train.answers import Answer, Classes, Objective, Rows, answer_to

if TYPE_CHECKING:
    from eyetune.config import TrainConfig
    from eyetune.data.records import Manifest
    from eyetune.metrics.table import Table
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
    task: dict[str, Any] | None = None
    """What the model card is to say of the task from now on, with what was fitted on these images."""


class Task(Protocol):
    """What the loop trains. Another task (image-text contrast) is another class of these four methods."""

    metric: str
    """Name of the metric, a key of `Validation.metrics`, that chooses the best epoch."""
    higher_is_better: bool
    needs_validation: str
    """Why the task cannot do without validation images; empty when it can."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Batch on the device -> float[] mean loss over its samples, under autocast."""

    def validate(self, network: nn.Module, loader: Iterable[Batch], runtime: Runtime) -> Validation:
        """The network in eval mode over all of `loader`, the same in every process."""

    def names(self, indices: Sequence[int]) -> list[str]:
        """What to call these training samples in a message."""


@runtime_checkable
class InParts(Protocol):
    """A task whose batch is more than the sum of its samples: it takes its own way through forward and backward."""

    def learn(self, network: nn.Module, batch: Batch, runtime: Runtime, *, weight: float, last: bool) -> Tensor:
        """Add the gradient of `weight` times the batch's mean loss to that of the parameters.

        Args:
            network: as :meth:`Runtime.prepare` returned it.
            batch: on the device.
            runtime: knows the precision and the other processes.
            weight: of this batch in the step.
            last: whether the step ends with it, and gradients are exchanged (see :meth:`Runtime.accumulating`).

        Returns float[], the mean loss over the batch, without a gradient.
        """


@dataclass(frozen=True)
class Outputs:
    """What a network said of every sample of a loader, once each, by rising index.

    Args:
        index: int64[N], place in the manifest.
        target: as the loader gives it: int64[N], -1 where not known; or float32[N, L] or [N], NaN where not known.
        raw: float32[N, outputs], what the head gave, on the CPU.
        judged: float32[N, …], what `judge` said of the features of each, on the CPU; None where nothing was asked.
    """

    index: Tensor
    target: Tensor
    raw: Tensor
    judged: Tensor | None = None

    def table(self, manifest: Manifest, answer: Answer) -> Table:
        """The table of predictions, names, patients and truth from the manifest the loader was made of."""
        records = [manifest[int(index)] for index in self.index]
        rows = Rows([r.name for r in records], [r.patient for r in records], [r.eye for r in records])
        return answer.table(self.raw, manifest.targets()[self.index.numpy()], rows)


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
    """What the head gives, float[B, outputs], for a batch of images, or of features computed before."""
    raw: Tensor = network(batch["features"] if "features" in batch else batch["image"])
    return raw


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
    parts: dict[str, list[Tensor]] = {"index": [], "target": [], "raw": []}
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
                raw = forward(network, on_device)
            if judge is not None:
                parts["judged"].append(judge(heard[0].float()))
            # Kept on the device until the end: a copy back would wait for every batch.
            parts["raw"].append(raw.float())
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
        raw=torch.from_numpy(whole["raw"][first]),
        judged=torch.from_numpy(whole["judged"][first]) if judge else None,
    )


class SupervisedTask:
    """A truth an image: its class, its labels, or its number.

    The loss of a batch is the plain mean over its images, class weights included (they are 1 on average over the
    training images): so accumulated batches weigh as one large batch does.

    Args:
        answer: what is asked of the head.
        train: loss and metric settings.
        weights: as :meth:`Answer.weights` gives them; needed for balance "weighted".
        names: what the training images are called, by index.

    Raises ConfigError when `train.metric` is unknown or has no value for this answer.
    """

    def __init__(
        self, answer: Answer, train: TrainConfig, *, weights: Tensor | None = None, names: Sequence[str] = ()
    ) -> None:
        self.answer = answer
        self.train = train
        self.metric = _chosen_metric(train.metric, answer)
        self.higher_is_better = METRICS.get(self.metric).higher_is_better
        self.image_names = names
        self.needs_validation = ""
        if answer.needs_validation:
            self.needs_validation = f"task.head {answer.head} tunes thresholds between the grades on validation images"
        if train.balance == "weighted" and weights is None:
            raise ValueError("balance 'weighted' needs the weights")
        self.objective = Objective(
            smoothing=train.label_smoothing,
            gamma=train.focal_gamma if train.balance == "focal" else None,
            weights=weights if train.balance == "weighted" else None,
        )

    @classmethod
    def of(cls, manifest: Manifest, train: TrainConfig, asked: TaskConfig | None = None) -> SupervisedTask:
        """The task of learning `manifest`, the training split; `asked` is its kind, settled (`Config.asked`)."""
        asked = asked or TaskConfig(kind="classification")
        answer = answer_to(asked, manifest.classes).learnt_from(manifest)
        weights = answer.weights(manifest) if train.balance == "weighted" else None
        return cls(answer, train, weights=weights, names=[f"{record.name} ({record.row})" for record in manifest])

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """image float[B, 3, H, W] or features float[B, width], target as the loader gives it -> float[] mean loss."""
        target = batch["target"]
        if (self.train.mixup or self.train.cutmix) and "image" in batch:
            image, target = self._mixed(batch["image"], target)
            batch = batch | {"image": image}
        return self.losses(forward(network, batch), target).mean()

    def _mixed(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Blended images, and their targets: of classes as shares float[B, K], else blended too."""
        classes = not target.is_floating_point()
        # Blending the places in the batch, one-hot, gives the share of each image in each.
        places = target if classes else torch.arange(len(target), device=target.device)
        count = len(self.answer.names) if classes else len(target)
        mixing = batch_mixing(self.train.mixup, self.train.cutmix, count)
        assert mixing is not None
        image, shares = mixing(image, places)
        return image, shares if classes else self.answer.blended(shares, target)

    def losses(self, raw: Tensor, target: Tensor) -> Tensor:
        """raw float[B, outputs], target as the loader gives it or blended -> float32[B]."""
        return self.answer.losses(raw, target, self.objective)

    def validate(self, network: nn.Module, loader: Iterable[Batch], runtime: Runtime) -> Validation:
        """Mean loss over the labelled images and every metric; metrics that are not defined are None."""
        outputs = predict(network, loader, runtime)
        known = _known(outputs.target)
        raw, target = outputs.raw[known], outputs.target[known]
        some = bool(known.any())
        loss = float(self.losses(raw, target).mean()) if some else None
        answer = self.answer.fitted(raw, target) if some else self.answer
        none = [None] * len(outputs.index)
        rows = Rows([str(int(index)) for index in outputs.index], none, none)
        table = answer.table(outputs.raw, outputs.target.numpy(), rows)
        scores = score(table, resamples=0)  # intervals are for the end
        metrics = {name: entry["value"] for name, entry in scores["metrics"].items()}
        return Validation(loss, metrics, self._gaps(target), answer.card())

    def _gaps(self, targets: Tensor) -> str:
        """What of the classes or labels no image shows, of the targets of the images of which anything is known."""
        names = self.answer.names
        if not len(targets):
            return "no validation image has a label"
        if targets.ndim == 2:
            shown = {k for k in range(len(names)) if bool((targets[:, k] == 1).any())}
        else:
            shown = {0} if targets.is_floating_point() else set(targets.tolist())
        missing = ", ".join(name for k, name in enumerate(names) if k not in shown)
        return f"no validation image is of {missing}" if missing else ""

    def names(self, indices: Sequence[int]) -> list[str]:
        """Names and rows of training images."""
        return [self.image_names[index] if index < len(self.image_names) else f"image {index}" for index in indices]


def _known(targets: Tensor) -> Tensor:
    """bool[N]: whether anything is known, of targets as the loader gives them."""
    if not targets.is_floating_point():
        return targets >= 0
    return ~targets.isnan().reshape(len(targets), -1).all(dim=1)


def _chosen_metric(name: str | None, answer: Answer) -> str:
    if name is None:
        return answer.metric
    known = [metric for metric, entry in of_task(answer.task).items() if not entry.descriptive]
    if name not in METRICS:
        raise ConfigError(f"train.metric: unknown {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    if METRICS.canonical(name) not in known:
        raise ConfigError(
            f"train.metric: {name} cannot choose the epoch of a {answer.kind} task. These can: {', '.join(known)}."
        )
    scope, classes = METRICS.get(name).scope, answer.names
    if scope == "graded" and not is_graded_dr(classes):
        raise ConfigError(f"train.metric: {name} is for the five grades of diabetic retinopathy, not for {classes}.")
    if scope == "ordered" and not (isinstance(answer, Classes) and answer.ordered) and not is_ordered(classes):
        raise ConfigError(
            f"train.metric: {name} needs classes with an order, and {classes} have none that is known (task.kind "
            "ordinal says that they have one)."
        )
    return METRICS.canonical(name)
