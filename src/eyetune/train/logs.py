"""Where the numbers of an epoch go besides the run folder: TensorBoard, and Weights & Biases as an extra."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from eyetune.errors import MissingExtra

if TYPE_CHECKING:
    from eyetune.config import LoopConfig
    from eyetune.train.rundir import RunDir


class Log(Protocol):
    """Takes the numbers of an epoch."""

    def epoch(self, epoch: int, row: Mapping[str, Any]) -> None:
        """A row of the history."""

    def close(self) -> None:
        """Write what is still held back."""


class TensorBoard:
    """Event files in the run folder's `tensorboard`."""

    def __init__(self, run: RunDir, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run logged of epochs that are run again is hidden.
        self.writer = SummaryWriter(str(run.tensorboard), purge_step=first_epoch or None)

    def epoch(self, epoch: int, row: Mapping[str, Any]) -> None:
        """Scalars `loss/…`, `val/…`, `time/…` and `lr/<group>` at step `epoch`."""
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


_WANDB = ("logging to Weights & Biases", "wandb")


class WeightsAndBiases:
    """A run of the project `eyetune` on wandb (WANDB_MODE=offline keeps it on this machine).

    Raises MissingExtra when the package is not installed.
    """

    def __init__(self, run: RunDir, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra(*_WANDB) from error
        # The same folder resumed is the same run there.
        identity = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project="eyetune",
            name=run.path.name,
            id=identity,
            dir=str(run.path),
            resume="allow",
            config=dict(settings),
            # Only numbers and the configuration leave: the terminal's text may name photographs, the rest names this
            # machine and its user.
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True),
        )

    def epoch(self, epoch: int, row: Mapping[str, Any]) -> None:
        """The same names as in TensorBoard."""
        self.run.log(scalars(row), step=epoch)

    def close(self) -> None:
        """Finish the run there."""
        self.run.finish()


def check_available(train: LoopConfig) -> None:
    """Raise MissingExtra, before any work is done, when a log in `train` needs a package that is not here."""
    if train.wandb and importlib.util.find_spec("wandb") is None:
        raise MissingExtra(*_WANDB)


def open_logs(run: RunDir, train: LoopConfig, first_epoch: int, settings: Mapping[str, Any]) -> list[Log]:
    """The logs that `train` asks for; none in processes that do not write."""
    if not run.main:
        return []
    logs: list[Log] = []
    if train.wandb:
        logs.append(WeightsAndBiases(run, settings))
    if train.tensorboard:
        logs.append(TensorBoard(run, first_epoch))
    return logs


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of the history under the names of a dashboard; values that are not defined are left out."""
    places = {
        "train_loss": "loss/train",
        "val_loss": "loss/val",
        "seconds": "time/seconds",
        "images_per_second": "time/images_per_second",
        "phase": "time/phase",
    }
    return {
        name if name.startswith("lr/") else places.get(name, f"val/{name.removeprefix('val_')}"): float(value)
        for name, value in row.items()
        if name != "epoch" and value is not None
    }
