"""Memory as a function of the batch size: what was measured, and the line through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One batch size.

    Attributes:
        batch: images.
        checkpointing: whether activations were recomputed.
        peak: most memory during the steps, in bytes.
        seconds: for a step.
        loading: most memory before the first step, in bytes; 0 where the two cannot be told apart.
    """

    batch: int
    checkpointing: bool
    peak: int
    seconds: float
    loading: int = 0

    @property
    def needs(self) -> int:
        """Bytes that have to fit: of loading or of the steps, whichever are more."""
        return max(self.peak, self.loading)


@dataclass(frozen=True)
class Scale:
    """Memory as a function of the batch, where all of it is known.

    Attributes:
        checkpointing: whether activations are recomputed.
        points: what was measured, by rising batch.
        largest: the largest batch that fits; 0 when not even one image does.
        certain: whether `largest` was tried, or follows from the slope.
        hurried: whether larger batches were left to the slope for the time they would have taken.
    """

    checkpointing: bool
    points: tuple[Point, ...]
    largest: int
    certain: bool
    hurried: bool = False

    def at(self, batch: float) -> Point | None:
        """What was measured at a batch size; None when it was not."""
        return next((point for point in self.points if point.batch == batch), None)

    def peak(self, batch: float) -> float:
        """Bytes at a batch size, measured or on the line through what was measured."""
        if (point := self.at(batch)) is not None:
            return float(point.needs)
        start, slope = line(self.points)
        return max(start + slope * batch, *(float(point.loading) for point in self.points))


def line(points: Sequence[Point]) -> tuple[float, float]:
    """Bytes at batch 0 and bytes an image: the line through the steps of the two largest batches.

    Through one alone, all of it counts as the image's: too much, and so on the safe side.
    """
    if len(points) == 1:
        return 0.0, points[0].peak / points[0].batch
    one, two = points[-2:]
    slope = max(0.0, (two.peak - one.peak) / (two.batch - one.batch))
    return two.peak - slope * two.batch, slope
