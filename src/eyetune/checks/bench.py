"""Where a model is tried: a few images as one batch on the device, fresh models, and steps of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from eyetune.checks.subject import FixedBatches, Subject, one_batch, plain_objective, to_last_phase
from eyetune.runtime import Runtime
from eyetune.train.optim import Schedule, build_optimizer
from eyetune.train.steps import train_epoch
from eyetune.train.task import Batch, Batches, SupervisedTask

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy
    from eyetune.config import Config
    from eyetune.data.records import Manifest


@dataclass
class Bench:
    """A few images as one batch on the device, and fresh models to try on them."""

    subject: Subject
    runtime: Runtime
    images: Manifest
    steps: int | None = None

    def __post_init__(self) -> None:
        model, _ = self.subject.build()
        self.batch: Batch = self.runtime.to_device(one_batch(self.images, model, self.config))
        self.task = self._task(self.config)

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.subject.config

    @cached_property
    def plain_task(self) -> SupervisedTask:
        """The plain loss: no smoothing, weights or mixing."""
        return self._task(plain_objective(self.config))

    @cached_property
    def trained(self) -> tuple[Classifier, Strategy]:
        """A model after a few large steps, so that what training changes shows; in eval mode."""
        model, strategy = self.fresh()
        to_last_phase(model, strategy)
        self.train(model, strategy, [self.batch] * 5, lr=10 * self.config.learning_rate)
        strategy.set_mode(model, False)
        return model, strategy

    def fresh(self) -> tuple[Classifier, Strategy]:
        """A model as a run would start with."""
        return self.subject.fresh(self.runtime)

    def train(
        self,
        model: Classifier,
        strategy: Strategy,
        batches: Sequence[Batch],
        *,
        lr: float,
        task: SupervisedTask | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        network: nn.Module | None = None,
        loader: Batches | None = None,
        batch_size: int = 0,
        accumulate: int = 1,
    ) -> float:
        """Steps of the training loop at a constant rate, in the mode the model is in; returns the mean loss."""
        optimizer = optimizer or build_optimizer(strategy.groups(model), lr, self.config.train.weight_decay)
        return train_epoch(
            model if network is None else network,
            task or self.task,
            FixedBatches(batches) if loader is None else loader,
            optimizer=optimizer,
            schedule=Schedule(optimizer, "constant", 1, 0),
            runtime=self.runtime,
            batch_size=batch_size or len(self.batch["index"]),
            accumulate=accumulate,
        ).loss

    def _task(self, config: Config) -> SupervisedTask:
        task = SupervisedTask.of(self.subject.manifest.select("train"), config.train, config.asked)
        task.image_names = [f"{record.name} ({record.row})" for record in self.images]
        return task
