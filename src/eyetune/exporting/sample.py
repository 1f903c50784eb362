"""What a run says of the photographs an export is checked on, to hold a network of timm's or PEFT's against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from eyetune.data.transforms import eval_transform
from eyetune.exporting.check import compare
from eyetune.exporting.photographs import to_check_on
from eyetune.exporting.timm_layout import logits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from eyetune.metrics.table import Table
    from eyetune.predicting.sheet import Checked
    from eyetune.train.run import Run


@dataclass(frozen=True)
class Sample:
    """Normalised photographs float32[3, P, P], the split they are of, and the run's table of them, calibrated."""

    run: Run
    split: str
    images: list[Tensor]
    table: Table

    @classmethod
    def of(cls, run: Run) -> Sample:
        """The photographs of a run, and what it says of them."""
        found = to_check_on(run)
        normalise = eval_transform(run.model.backbone.preprocess)
        images = [normalise(torch.from_numpy(np.array(square)).permute(2, 0, 1)) for square in found.squares]
        table = run.table_of([str(number) for number in range(len(images))], found.squares, batch_size=8)
        return cls(run, found.split, images, _calibrated(run, table))

    def compare(self, network: nn.Module) -> Checked:
        """A network that gives the head's numbers, float32[N, 3, P, P] -> float32[N, outputs], held against the run."""
        head = self.run.answer.reading
        raw = logits(network, self.images).numpy()
        theirs = _calibrated(self.run, head.tell(raw, self.run.classes, images=self.table.images))
        return compare(self.table, theirs, split=self.split, numbers="float32", head=head)


def _calibrated(run: Run, table: Table) -> Table:
    return table if run.calibration is None else run.calibration.apply(table)
