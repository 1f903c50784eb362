"""What is checked: a configuration, its photographs, and how to build its model anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from eyetune.adapt.strategy import Step, Strategy, describe_parameters
from eyetune.data.fundus import FundusSettings
from eyetune.data.loader import make_loader
from eyetune.data.photo import read_image
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.errors import DataError, listing
from eyetune.train.task import Batch

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.config import Config
    from eyetune.runtime import Runtime

Build = Callable[[], "tuple[Classifier, Strategy]"]

#: More phases than any strategy has; a plateau is reached long before so many epochs.
_MOST_EPOCHS = 1000


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        config: the configuration.
        manifest: its photographs, all with a split.
        build: a fresh model with its strategy applied, on the CPU; the same at every call.
    """

    config: Config
    manifest: Manifest
    build: Build

    def fresh(self, runtime: Runtime) -> tuple[Classifier, Strategy]:
        """A model as a run would start with, on the device, in training mode."""
        model, strategy = self.build()
        runtime.place(model)
        if self.config.train.grad_checkpointing:
            model.backbone.set_grad_checkpointing(True)
        strategy.set_mode(model, True)
        return model, strategy

    def describe(self, model: nn.Module, runtime: Runtime, data: str) -> str:
        """The line above the findings."""
        config = self.config
        return (
            f"{config.model.backbone}, {config.adapt.kind} ({describe_parameters(model)}); {data}; "
            f"{runtime.device.type} in {runtime.precision}"
        )


def few_images(manifest: Manifest, count: int, skip_unreadable: bool) -> Manifest:
    """Up to `count` training images, the classes in turn, each in the order of the table; only ones that can be read.

    Raises DataError, naming file and row, for one that cannot be read, unless those are skipped.
    """
    train = manifest.select("train")
    order = in_turns(train)
    chosen = [train[index] for index in order[:count]]
    waiting = iter(order[count:])
    while True:
        faults = [_fault(record) for record in chosen]
        bad = [f"{record.row}: {fault}" for record, fault in zip(chosen, faults, strict=True) if fault]
        if not bad:
            return train.with_records(chosen)
        if not skip_unreadable:
            raise DataError(
                f"{manifest.source}: images cannot be read:\n{listing(bad)}\nTo go on without them: --skip-unreadable"
            )
        chosen = [record for record, fault in zip(chosen, faults, strict=True) if not fault]
        chosen += [train[index] for index, _ in zip(waiting, bad, strict=False)]
        if not chosen:
            raise DataError(f"{manifest.source}: no image can be read:\n{listing(bad)}")


def in_turns(manifest: Manifest) -> list[int]:
    """Every index of a manifest: the classes in turn, each in the order of the table."""
    groups, unknown = manifest.strata()[0], manifest.strata()[1] - 1
    by_class: dict[tuple[int, ...], list[int]] = {}
    for index, group in enumerate(groups):
        by_class.setdefault((-1,) if group == (unknown,) else group, []).append(index)
    turns = [by_class[group] for group in sorted(by_class)]
    longest = max(len(members) for members in turns)
    return [members[place] for place in range(longest) for members in turns if place < len(members)]


def _fault(record: Record) -> str | None:
    try:
        read_image(record.image)
    except DataError as error:
        return str(error)
    return None


def one_batch(images: Manifest, model: Classifier, config: Config) -> Batch:
    """All of `images`, prepared as for evaluation, as one batch on the CPU."""
    preprocess = model.backbone.preprocess
    loader = make_loader(
        images,
        preprocess,
        FundusSettings.of(config.data, preprocess),
        batch_size=len(images),
        training=False,
        workers=0,
    )
    batch: Batch = next(iter(loader))
    return batch


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Some images of a batch."""
    return {name: values[start:stop] for name, values in batch.items()}


class FixedBatches:
    """A loader of the same batches every epoch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Nothing changes."""


def phases(model: Classifier, strategy: Strategy) -> Iterator[int]:
    """Lead a strategy from phase to phase, as a validation score that never improves would; yields 1, 2, …"""
    number = 1
    yield number
    for epoch in range(_MOST_EPOCHS):
        if strategy.last_phase():
            return
        step = strategy.after_epoch(model, epoch, 0.0).step
        if step is Step.STOP:
            return
        if step is Step.NEXT_PHASE:
            number += 1
            strategy.set_mode(model, True)
            yield number


def to_last_phase(model: Classifier, strategy: Strategy) -> None:
    """Lead a strategy to the phase in which everything that will train does."""
    for _ in phases(model, strategy):
        pass


def plain_objective(config: Config) -> Config:
    """The same configuration with the plain loss of its task: no mixing, smoothing or weights."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "balance": "none"}
    return config.model_copy(update={"train": config.train.model_copy(update=plain)})


def repeated(batch: Batch, size: int) -> Batch:
    """A batch of `size` images that repeats those of `batch`."""
    index = torch.arange(size) % len(batch["index"])
    return {name: values[index.to(values.device)] for name, values in batch.items()}
