"""Steps of training at a batch size, and the memory they take: in this process, or in one of its own."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from eyetune.checks.scale import Point
from eyetune.checks.subject import FixedBatches, Subject, to_last_phase
from eyetune.data.loader import target_tensor
from eyetune.errors import UserError
from eyetune.memory import peak, start_anew
from eyetune.runtime import Runtime
from eyetune.train.features import FeatureHead, can_compute_once
from eyetune.train.optim import Schedule, build_optimizer
from eyetune.train.steps import train_epoch
from eyetune.train.task import Batch, SupervisedTask


class Trial:
    """A model and its optimizer on the device, to take steps of training with batches of noise."""

    def __init__(self, subject: Subject, runtime: Runtime, checkpointing: bool) -> None:
        self.runtime = runtime
        config = subject.config
        self.model, self.strategy = subject.build()
        runtime.place(self.model)
        to_last_phase(self.model, self.strategy)
        self.once = can_compute_once(self.strategy, config.train, config.augment)
        if checkpointing and not self.once:
            self.model.backbone.set_grad_checkpointing(True)
        self.strategy.set_mode(self.model, True)
        train = subject.manifest.select("train")
        self.task = SupervisedTask.of(train, config.train, config.asked)
        self.targets = target_tensor(train)
        self.network = FeatureHead(self.model) if self.once else self.model
        self.checkpointing = checkpointing
        groups = self.strategy.groups(self.model)
        self.optimizer = build_optimizer(groups, config.learning_rate, config.train.weight_decay)
        #: Bytes at most before the first step, on a processor; whether there was one.
        self.loading, self.began = 0, False

    def run(self, batch: int) -> Point | None:
        """A few steps at a batch size: the peak and the seconds of a step. None when it does not fit.

        On a processor memory that an earlier, smaller batch took may count; one that was as large or larger would.
        """
        device = self.runtime.device.type
        try:
            images = self._batch(batch)
            loading = peak(device) if device == "cpu" else 0
            told_apart = start_anew(device)
            self.loading = max(self.loading, loading if told_apart and not self.began else 0)
            self.began = True
            begin = time.perf_counter()
            self.steps([images])  # which makes the optimizer's states
            count = 2 if time.perf_counter() - begin < 1.0 else 1
            begin = time.perf_counter()
            self.steps([images] * count)
            seconds = (time.perf_counter() - begin) / count
            return Point(batch, self.checkpointing, peak(device), seconds, self.loading)
        except (UserError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            return None
        finally:
            images = None  # type: ignore[assignment]
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()

    def steps(self, batches: Sequence[Batch] | FixedBatches) -> None:
        """A step of the training loop a batch."""
        loader = batches if isinstance(batches, FixedBatches) else FixedBatches(batches)
        if self.once:
            loader = FixedBatches([self._features(batch) for batch in loader])
        train_epoch(
            self.network,
            self.task,
            loader,
            optimizer=self.optimizer,
            schedule=Schedule(self.optimizer, "constant", 1, 0),
            runtime=self.runtime,
            batch_size=len(loader.batches[0]["index"]),
        )
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()

    def _batch(self, count: int) -> Batch:
        pixels = self.model.backbone.preprocess.pixels
        index = torch.arange(count)
        batch = {"image": torch.randn(count, 3, pixels, pixels), "target": self.targets[index % len(self.targets)]}
        return self.runtime.to_device(batch | {"index": index})

    def _features(self, batch: Batch) -> Batch:
        with torch.no_grad(), self.runtime.autocast():
            features = self.model.backbone.features(batch["image"]).float()
        return {"features": features, "target": batch["target"], "index": batch["index"]}


class Elsewhere:
    """Batches of rising size in a process of their own."""

    def __init__(self, subject: Subject, checkpointing: bool) -> None:
        self.asked = subject, checkpointing, torch.get_num_threads()
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run(self, batch: int) -> Point | None:
        """One batch size; None when the system ended the process for its memory."""
        try:
            return self.pool.submit(_in_child, *self.asked, batch).result()
        except BrokenProcessPool:
            return None


_TRIALS: list[Trial] = []
"""In the other process: its trial, once it is built."""


def _in_child(subject: Subject, checkpointing: bool, threads: int, batch: int) -> Point | None:
    torch.set_num_threads(threads)
    config = subject.config
    if not _TRIALS:
        _TRIALS.append(Trial(subject, Runtime(config.device, config.precision, config.seed), checkpointing))
    return _TRIALS[0].run(batch)


def _out_of_memory(error: Exception) -> bool:
    cause = error.__cause__ or error
    return (
        isinstance(cause, torch.OutOfMemoryError) or "out of memory" in str(cause) or "not enough memory" in str(cause)
    )
