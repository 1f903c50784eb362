"""Chance and order: the same for the same seed, epoch and index, whatever the processes do that read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


def seeded(seed: int, transform: Any, square: torch.Tensor) -> Any:
    """The transform under a seed of its own. Only torch's CPU generator is touched, and put back: without workers this
    is the training process, whose dropout and GPU generators must not notice."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        return transform(square)
    finally:
        torch.set_rng_state(state)


def mix(*numbers: int) -> int:
    """One well-spread 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), a function of (seed, epoch) alone.

    Args:
        labels: the label of every record.
        batch_size: records a batch and process.
        shuffle: a new order every epoch; else the order of the manifest.
        balanced: draw as many of each class, with repetition; an epoch keeps its length.
        seed: of the order.
        shard: (this process, number of processes): each takes its part of every common batch, nothing is padded.
    """

    def __init__(
        self,
        labels: Sequence[int | None],
        batch_size: int,
        *,
        shuffle: bool,
        balanced: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.balanced = balanced
        self.seed = seed
        self.rank, self.world = shard
        self.epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Which epoch the next iteration is, and from which of its batches on."""
        self.epoch, self.first = epoch, first

    def order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The indices of this epoch, in order, of all processes together."""
        count = len(self.labels)
        if not self.shuffle:
            return np.arange(count)
        rng = np.random.default_rng(mix(self.seed, self.epoch))
        if not self.balanced:
            return rng.permutation(count)
        labels = np.array([-1 if label is None else label for label in self.labels])
        present = np.unique(labels)
        # Whole passes over a class before any repetition: a rare class is repeated evenly, a common one never twice.
        share = -(-count // len(present))
        drawn = []
        for label in present:
            members = np.flatnonzero(labels == label)
            passes = -(-share // len(members))
            drawn.append(np.concatenate([rng.permutation(members) for _ in range(passes)])[:share])
        return rng.permutation(np.concatenate(drawn))[:count]

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size * self.world)
        return full + self._has_part(rest)

    def _has_part(self, rest: int) -> bool:
        """Whether this process takes part in a last common batch of `rest` records."""
        # In training every process must have something in it, or the others wait for gradients forever.
        return rest >= self.world if self.shuffle else rest > self.rank

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        common = self.batch_size * self.world
        order = self.order()
        for start in range(self.first * common, len(order), common):
            batch = order[start : start + common]
            if self._has_part(len(batch)):
                yield [(epoch, int(index)) for index in np.array_split(batch, self.world)[self.rank]]
