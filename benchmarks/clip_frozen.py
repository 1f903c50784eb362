"""An epoch of image-text training with both towers frozen, over features computed before: 13,000 pairs.

    python benchmarks/clip_frozen.py

The heads of RET-CLIP (features of 512 and 768, embeddings of 512) through the steps of the real loop. Processor time,
so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import torch
from common import machine
from torch import nn

from eyetune.clip.config import ClipTrainConfig
from eyetune.clip.model import RetClip
from eyetune.clip.task import ContrastTask
from eyetune.runtime import Runtime
from eyetune.train.optim import Schedule
from eyetune.train.steps import train_epoch


class Nothing(nn.Module):
    """A tower whose features are there already."""

    preprocess = None
    config = SimpleNamespace(hidden_size=768)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class Features(list[dict[str, torch.Tensor]]):
    """The batches of an epoch."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """They are the same in all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=13_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    chosen = parser.parse_args()
    print(machine())
    torch.manual_seed(0)
    model: Any = RetClip(Nothing(512), Nothing(768))  # type: ignore[arg-type]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "name": "heads", "base_lr": 1e-4}], fused=True)
    whole = {
        "left": torch.randn(chosen.pairs, 512),
        "right": torch.randn(chosen.pairs, 512),
        "ids": torch.randn(chosen.pairs, 768),
        **{name: torch.arange(chosen.pairs) for name in ("patient", "wording", "index")},
        "single": torch.zeros(chosen.pairs, dtype=torch.int64),
    }
    parts = zip(*(value.split(chosen.batch) for value in whole.values()), strict=True)
    batches = Features(dict(zip(whole, part, strict=True)) for part in parts)
    for precision in ("fp32", "auto"):
        runtime = Runtime("cpu", precision)
        for epoch in range(chosen.epochs):
            processor, wall = time.process_time(), time.perf_counter()
            train_epoch(
                model,
                ContrastTask(ClipTrainConfig(), None, None),
                batches,
                optimizer=optimizer,
                schedule=Schedule(optimizer, "constant", 10**6, 0),
                runtime=runtime,
                batch_size=chosen.batch,
            )
            print(
                f"{runtime.precision}, epoch {epoch + 1}, {parameters:,} parameters: "
                f"{time.process_time() - processor:.1f} s of processor time, {time.perf_counter() - wall:.1f} s elapsed"
            )


if __name__ == "__main__":
    main()
