"""One epoch of optimizer steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eyetune.errors import UserError, listing
from eyetune.progress import meter
from eyetune.train.optim import Schedule, rates
from eyetune.train.task import Batches, Task, enough_memory

if TYPE_CHECKING:
    from eyetune.runtime import Runtime

#: On a GPU, reading a number waits for all work queued before it: the loss is looked at this often.
CHECK_EVERY = 20

#: What helps when a training step takes too much memory.
SMALLER_STEPS = (
    "Try half of train.batch_size, with train.accumulate twice as large for the same training; or turn on "
    "train.grad_checkpointing."
)


@dataclass(frozen=True)
class EpochResult:
    """What an epoch of training was.

    Args:
        loss: mean over all images of all processes.
        images: how many, in all processes.
        seconds: how long it took.
        rates: the learning rate of every group at the last step.
    """

    loss: float
    images: int
    seconds: float
    rates: dict[str, float]


def train_epoch(
    network: nn.Module,
    task: Task,
    loader: Batches,
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    runtime: Runtime,
    batch_size: int,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    description: str = "",
) -> EpochResult:
    """Run through `loader` once.

    The gradient of each step is the mean over all images of its `accumulate` batches in all processes, exactly,
    also where the last batches of the epoch are fewer or shorter.

    Args:
        network: as :meth:`Runtime.prepare` returned it, in the mode it is to train in.
        batch_size: images in a full batch of one process.
        accumulate: batches a step.
        clip_norm: largest gradient norm; 0 leaves the gradient alone.
        description: shown with the progress; empty shows none.

    Raises UserError, naming the images, when the loss or the gradient is NaN or infinite; and when the device has not
    enough memory for a batch.
    """
    start = time.perf_counter()
    total = len(loader)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nominal = batch_size * accumulate
    watch = _Watch(task, runtime)
    loss_sum = torch.zeros((), device=runtime.device)
    images = in_step = 0
    used = rates(optimizer)
    optimizer.zero_grad(set_to_none=True)
    with enough_memory(SMALLER_STEPS), _meter(total, description if runtime.is_main else "") as update:
        for number, batch in enumerate(loader):
            ends_step = (number + 1) % accumulate == 0 or number + 1 == total
            size = len(batch["index"])
            on_device = runtime.to_device(batch)
            with runtime.accumulating(network, ends_step), _steady_norms(network, size):
                with runtime.autocast():
                    loss = task.loss(network, on_device)
                runtime.backward(loss * (size / nominal))
            loss_sum += loss.detach().float() * size
            images += size
            in_step += size
            norm = None
            if ends_step:
                used = rates(optimizer)
                norm = _step(optimizer, parameters, runtime, nominal=nominal, actual=in_step, clip_norm=clip_norm)
                schedule.advance()
                in_step = 0
            watch.note(number, batch["index"], loss.detach(), norm)
            update(number + 1)
    watch.check()
    whole_loss, whole_images = runtime.sum(torch.stack([loss_sum, torch.tensor(float(images), device=runtime.device)]))
    return EpochResult(
        loss=float(whole_loss / whole_images),
        images=int(whole_images),
        seconds=time.perf_counter() - start,
        rates=used,
    )


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    runtime: Runtime,
    *,
    nominal: int,
    actual: int,
    clip_norm: float,
) -> Tensor | None:
    """One optimizer step; returns the gradient's norm where it was asked for and is not the loss scaler's business."""
    scaler = runtime.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if runtime.processes > 1:
        # The gradient is the mean over processes of (own sum / nominal); wanted is the sum over all / their number.
        # A process's part of the last batch may be shorter than another's.
        count = runtime.sum(torch.tensor(float(actual), device=runtime.device))
        factor = nominal * runtime.processes / count
        for gradient in gradients:
            gradient.mul_(factor)
    elif actual != nominal:
        for gradient in gradients:
            gradient.mul_(nominal / actual)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm) if clip_norm > 0 else None
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
        norm = None  # infinite ones are how the scaler finds its scale
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@dataclass
class _Watch:
    """Notices a loss or gradient that is not finite, without waiting for the device at every step."""

    task: Task
    runtime: Runtime
    pending: list[tuple[int, Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def note(self, number: int, index: Tensor, loss: Tensor, norm: Tensor | None) -> None:
        """Remember batch `number`; look at what is remembered now and then."""
        self.pending.append((number, index, loss, norm))
        if self.runtime.device.type == "cpu" or len(self.pending) >= CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Raise UserError for the first remembered batch whose loss, or step whose gradient, is not finite."""
        if not self.pending:
            return
        losses = torch.stack([loss.float() for _, _, loss, _ in self.pending]).cpu()
        norms = [math.nan if norm is None else norm for *_, norm in self.pending]
        for place, (number, index, _, norm) in enumerate(self.pending):
            loss = float(losses[place])
            if math.isfinite(loss) and (norm is None or math.isfinite(float(norms[place]))):
                continue
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {float(norms[place])}"
            names = listing(self.task.names([int(i) for i in index]), limit=20)
            raise UserError(
                f"training diverged at batch {number + 1}: {what}. Lower train.lr, use --precision fp32, or look at "
                f"the images of this batch:\n{names}"
            )
        self.pending.clear()


@contextlib.contextmanager
def _steady_norms(network: nn.Module, size: int) -> Iterator[None]:
    """For a batch of one image: batch norms use their running statistics, for one image has none of its own."""
    norms = []
    if size == 1:
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


@contextlib.contextmanager
def _meter(total: int, description: str) -> Iterator[Callable[[int], None]]:
    if not description:
        yield lambda done: None
        return
    with meter(total, description, "batches") as update:
        yield update
