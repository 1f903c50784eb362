"""Trains, embeds, and kills a process that reads images, as the system does when memory runs out. Prints what is said.

A process of its own: torch's DataLoader raises the death of a reader from a signal handler, wherever the main thread is
just then, and in a test runner that may be inside the runner itself. The error is kept, as a notebook does: the other
readers have to be gone all the same, and the next child that ends has to end in peace.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from train_kit import PREPROCESS, SETTINGS, card, photographs, tiny_backbone, tiny_model

from eyetune.config import TrainConfig
from eyetune.data.loader import Loader, make_loader
from eyetune.data.records import Manifest
from eyetune.errors import UserError
from eyetune.runtime import Runtime
from eyetune.train.features import backbone_features
from eyetune.train.loop import fit
from eyetune.train.rundir import RunDir
from eyetune.train.task import SupervisedTask


def kill_a_reader(pause: float) -> None:
    """Kill one, and be found elsewhere (computing, or waiting for it) when that is known."""
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    time.sleep(pause)


class Killing(SupervisedTask):
    """Kills a reader in the second step."""

    calls = 0
    pause = 0.0

    def loss(self, *arguments: Any) -> Tensor:
        Killing.calls += 1
        if Killing.calls == 2:
            kill_a_reader(self.pause)
        return super().loss(*arguments)


def readers(images: Manifest, *, training: bool) -> Loader:
    """A loader with two processes."""
    return make_loader(images, PREPROCESS, SETTINGS, batch_size=2, training=training, workers=2, seed=0)


def train(folder: Path, images: Manifest, pause: float) -> None:
    """As `finetune` does."""
    model, strategy = tiny_model("linear")
    settings = TrainConfig(epochs=4, batch_size=2, tensorboard=False)
    Killing.calls, Killing.pause = 0, pause
    fit(
        model,
        strategy,
        Killing.of(images, settings),
        readers(images, training=True),
        None,
        run=RunDir.create(folder),
        runtime=Runtime("cpu", "fp32"),
        train=settings,
        lr=1e-3,
        card=card(),
        say=lambda line: None,
    )


def embed(images: Manifest) -> None:
    """As `embed` does, and `predict` with a frozen backbone."""
    backbone = tiny_backbone()
    features, calls = backbone.features, 0

    def killing(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            kill_a_reader(0)
        return features(batch)

    backbone.features = killing  # type: ignore[method-assign]
    backbone_features(
        backbone, readers(images, training=False), Runtime("cpu", "fp32"), fingerprint="-", description="Features"
    )


def main(folder: Path) -> int:
    """0 when each death was a UserError, which is printed, and left nothing behind."""
    images = photographs(folder / "images", 40)
    kept = []
    for work in (
        lambda: train(folder / "computing", images, pause=1.0),
        lambda: train(folder / "waiting", images, pause=0.0),
        lambda: embed(images),
    ):
        try:
            work()
            return 1
        except UserError as error:
            print(error)
            kept.append(error)
        if left := multiprocessing.active_children():
            print(f"left behind: {left}")
            return 1
        for _ in range(3):
            subprocess.run([sys.executable, "-S", "-c", ""], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
