"""Trains, and kills the process that reads the images, as the system does when memory runs out. Prints what fit() says.

A process of its own: torch's DataLoader raises the death of a reader from a signal handler, wherever the main thread is
just then, again at the end of every other child, and in a test runner that may be inside the runner itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from train_kit import PREPROCESS, SETTINGS, card, photographs, tiny_model

from eyetune.config import TrainConfig
from eyetune.data.loader import make_loader
from eyetune.errors import UserError
from eyetune.runtime import Runtime
from eyetune.train.loop import fit
from eyetune.train.rundir import RunDir
from eyetune.train.task import ClassificationTask


class Killing(ClassificationTask):
    """Kills the reader in the first step."""

    killed = False

    def loss(self, *arguments: Any) -> Tensor:
        if not self.killed:
            self.killed = True
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        return super().loss(*arguments)


def main(folder: Path) -> int:
    """0 when the death of the reader was a UserError, which is printed."""
    images = photographs(folder / "images", 12)
    loader = make_loader(images, PREPROCESS, SETTINGS, batch_size=2, training=True, workers=1, seed=0)
    model, strategy = tiny_model("linear")
    settings = TrainConfig(epochs=4, batch_size=2, tensorboard=False)
    try:
        fit(
            model,
            strategy,
            Killing.of(images, settings),
            loader,
            None,
            run=RunDir.create(folder / "run"),
            runtime=Runtime("cpu", "fp32"),
            train=settings,
            lr=1e-3,
            card=card(),
            say=lambda line: None,
        )
    except UserError as error:
        print(error)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
