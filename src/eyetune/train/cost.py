"""What a run cost: seconds, memory, parameters. Kept in `cost.json`, through interruptions."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from eyetune import memory
from eyetune.adapt.strategy import count_parameters
from eyetune.errors import UserError
from eyetune.runtime import device_name

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.runtime import Runtime
    from eyetune.train.loop import FitResult
    from eyetune.train.rundir import RunDir


class Cost:
    """Counts while it is entered, and adds that to what earlier parts of the run counted.

    `cost.json` then holds:

    - `seconds`: of all parts, from the first epoch (or features) to the last score; `training_seconds`: of these, the
      epochs with their validation, features computed once included. What a killed process spent is not known.
    - `peak_memory`: most bytes in any part, see memory.peak; null where the system does not let earlier work be left
      out. Processes that read images are not counted.
    - `device`, `memory_of`: the device's name; "cuda", "mps" or "cpu".
    - `parts`: how many processes, one after the other, worked on it.
    - `finished`: whether all of it was done; only then `parameters`, `trainable_parameters` (at the end: gradual
      unfreezing ends with more than it began with), `epochs`, `best_epoch` (from 1) and `images_trained`.
    """

    def __init__(self, folder: RunDir, runtime: Runtime) -> None:
        self.folder = folder
        self.device = runtime.device.type
        self.name = device_name(runtime.device)
        self.outcome: dict[str, Any] = {"finished": False}

    def __enter__(self) -> Cost:
        self.before = self.folder.read_cost()
        self.clean = memory.start_anew(self.device)
        self.start = time.monotonic()
        self.training_from: float | None = None
        self.training = 0.0
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        self._stop_training()
        if error is None:
            self.outcome["finished"] = True
            self._write()
        elif self.folder.config_file.is_file():  # else nothing was begun, and the folder stays free for another try
            with contextlib.suppress(UserError):  # a full disk has been spoken of already
                self._write()

    def training_begins(self) -> None:
        """What follows is training, up to :meth:`training_ends` or an error."""
        self.training_from = time.monotonic()

    def training_ends(self, fitted: FitResult, model: Classifier, images: int) -> None:
        """Training is over; `images` are those of one epoch."""
        self._stop_training()
        trainable, total = count_parameters(model)
        self.outcome |= {
            "trainable_parameters": trainable,
            "parameters": total,
            "epochs": fitted.epochs,
            "best_epoch": fitted.best_epoch + 1,
            "images_trained": images * fitted.epochs,
        }

    def _stop_training(self) -> None:
        if self.training_from is not None:
            self.training += time.monotonic() - self.training_from
            self.training_from = None

    def _write(self) -> None:
        before, peak = self.before, memory.peak(self.device)
        known = self.clean and (not before or before.get("peak_memory") is not None)
        self.folder.write_cost(
            {
                "seconds": round(before.get("seconds", 0.0) + time.monotonic() - self.start, 3),
                "training_seconds": round(before.get("training_seconds", 0.0) + self.training, 3),
                "peak_memory": max(peak, before.get("peak_memory", 0)) if known else None,
                "memory_of": self.device,
                "device": self.name,
                "parts": before.get("parts", 0) + 1,
                **self.outcome,
            }
        )
