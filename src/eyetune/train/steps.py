"""One epoch of optimizer steps: left where it can go on, and before a loss that is not finite reaches the weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eyetune.errors import UserError, listing
from eyetune.progress import meter
from eyetune.runtime import whole
from eyetune.train.optim import Schedule, rates
from eyetune.train.task import Batch, Batches, InParts, Task, enough_memory

if TYPE_CHECKING:
    from eyetune.runtime import Runtime

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
        skipped: steps left out because they were not finite.
    """

    loss: float
    images: int
    seconds: float
    rates: dict[str, float]
    skipped: int = 0


@dataclass(frozen=True)
class EpochState:
    """How far an epoch is, in this process: with the generators' states and the gradients, all it takes to go on.

    Args:
        batches: done.
        loss_sum: over their images.
        images: in them.
        in_step: images since the last optimizer step, whose gradients are held.
        skipped: steps left out.
        seconds: spent.
    """

    batches: int = 0
    loss_sum: float = 0.0
    images: int = 0
    in_step: int = 0
    skipped: int = 0
    seconds: float = 0.0


class EpochStopped(Exception):
    """The epoch was left at the end of a batch, because that was asked for; `state` is where."""

    def __init__(self, state: EpochState) -> None:
        super().__init__(f"stopped after {state.batches} batches")
        self.state = state


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
    skip_nonfinite: bool = False,
    description: str = "",
    start: EpochState | None = None,
    stop: Callable[[], bool] = lambda: False,
    finish: Callable[[Batch], Batch] = lambda batch: batch,
) -> EpochResult:
    """Run through `loader` once.

    The gradient of each step is the mean over all images of its `accumulate` batches in all processes, exactly,
    also where the last batches of the epoch are fewer or shorter.

    Args:
        network: as :meth:`Runtime.prepare` returned it, in the mode it is to train in.
        batch_size: images in a full batch of one process.
        accumulate: batches a step.
        clip_norm: largest gradient norm; 0 leaves the gradient alone.
        skip_nonfinite: leave out a step whose loss or gradient is not finite, and count it, instead of raising.
        description: shown with the progress; empty shows none.
        start: go on from there: `loader` gives the batches that are left, and the parameters hold the gradients of a
            step that was begun. None is from the beginning.
        stop: asked after every batch (with several processes, every step): whether to leave the epoch there. One
            process's wish is enough.
        finish: what is left to do to a batch on the device (see :meth:`eyetune.data.loader.Loader.finish`).

    Raises UserError, naming the images, when the loss or the gradient is NaN or infinite (the step is not taken), and
    when the device has not enough memory for a batch; EpochStopped when `stop` said so.
    """
    total = len(loader)
    work = _Steps(
        optimizer,
        task,
        runtime,
        begun=start or EpochState(),
        nominal=batch_size * accumulate,
        clip_norm=clip_norm,
        skip=skip_nonfinite,
    )
    if not work.in_step:
        optimizer.zero_grad(set_to_none=True)
    with enough_memory(SMALLER_STEPS), _meter(total, description if runtime.is_main else "") as update:
        for number, batch in enumerate(loader, work.begun.batches):
            ends_step = (number + 1) % accumulate == 0 or number + 1 == total
            size = len(batch["index"])
            on_device = finish(runtime.to_device(batch))
            kept = _statistics(network) if skip_nonfinite else []
            with _steady_norms(network, size):
                loss = _learn(task, network, on_device, runtime, weight=size / work.nominal, last=ends_step)
            _restore(kept, loss.detach().isfinite())
            work.add(number, batch["index"], loss.detach())
            leave = work.step(schedule, stop()) if ends_step else work.may_leave_step and stop()
            update(number + 1)
            if leave and number + 1 < total:
                raise EpochStopped(work.state(number + 1))
    return work.result()


def _learn(task: Task, network: nn.Module, batch: Batch, runtime: Runtime, *, weight: float, last: bool) -> Tensor:
    """Forward and backward of a batch; returns its mean loss float[]. Arguments as :meth:`InParts.learn`."""
    if isinstance(task, InParts):
        return task.learn(network, batch, runtime, weight=weight, last=last)
    with runtime.accumulating(network, last):
        with runtime.autocast():
            loss = task.loss(network, batch)
        runtime.backward(loss * weight)
    return loss


class _Steps:
    """What an epoch carries from batch to batch: sums, gradients' counts, and the verdict on every step.

    Whether a step is finite is decided on the device before it reaches the weights. Reading the verdict would wait for
    all work queued on a GPU: there the optimizer's own kernel leaves the step out, and the numbers are copied while
    the next step runs and looked at behind it. On a CPU they are looked at at once.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        task: Task,
        runtime: Runtime,
        *,
        begun: EpochState,
        nominal: int,
        clip_norm: float,
        skip: bool,
    ) -> None:
        self.optimizer = optimizer
        self.task = task
        self.runtime = runtime
        self.begun = begun
        self.nominal = nominal
        self.clip_norm = clip_norm
        self.skip = skip
        self.clock = time.perf_counter()
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.rates = rates(optimizer)
        self.in_step = begun.in_step
        self.loss_sum = torch.tensor(begun.loss_sum, device=runtime.device)
        self.images = torch.tensor(begun.images, device=runtime.device)
        self.skipped = torch.tensor(float(begun.skipped), device=runtime.device)
        self.parts: list[tuple[int, Tensor, Tensor]] = []
        self.unseen: list[_Verdict] = []
        self.lag = _lag(runtime)
        #: Inside a step, one process alone may stop: of several each would have gradients of its own to keep, and
        #: gradients that may be infinite are not worth it.
        self.may_leave_step = runtime.processes == 1 and runtime.scaler is None and not skip

    def add(self, number: int, index: Tensor, loss: Tensor) -> None:
        """Note batch `number`: indices int64[B] of its images and its mean loss float[]."""
        loss, finite = loss.float(), loss.isfinite()
        self.loss_sum += torch.where(finite, loss * len(index), 0.0)
        self.images += finite * len(index)
        self.in_step += len(index)
        self.parts.append((number, index, loss))

    def step(self, schedule: Schedule, stop: bool) -> bool:
        """Take the optimizer step of the batches noted since the last one, if it is finite.

        Returns whether to leave the epoch here: the same in every process.
        """
        scaler = self.runtime.scaler
        self.rates = rates(self.optimizer)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        losses = torch.stack([loss for *_, loss in self.parts])
        shared = torch.tensor([float(self.in_step), float(stop)], device=losses.device)
        shared = torch.cat([shared, (~losses.isfinite()).sum().float()[None]])
        if self.runtime.processes > 1:
            # The gradient is the mean over processes of (own sum / nominal); wanted is the sum over all / their number.
            # A process's part of the last batch may be shorter than another's.
            shared = self.runtime.sum(shared)
            factor = self.nominal * self.runtime.processes / shared[0]
            for gradient in gradients:
                gradient.mul_(factor)
        elif self.in_step != self.nominal:
            for gradient in gradients:
                gradient.mul_(self.nominal / self.in_step)
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        bad = ((shared[2] > 0) | ~norm.isfinite()).float()
        self.skipped += bad
        # The infinite gradients of fp16 are how the scaler finds its scale: only its losses are judged.
        judged = torch.zeros_like(norm) if scaler is not None else norm
        self.unseen.append(_Verdict.of(self.parts, torch.cat([losses, judged[None], shared[1:]]), self.lag > 0))
        leave = self.look(self.lag)
        if scaler is not None:
            scaler.step(self.optimizer)
            scaler.update()
        elif self.lag:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(bad):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        schedule.advance()
        self.parts, self.in_step = [], 0
        return leave if self.runtime.processes > 1 else stop

    def look(self, lag: int = 0) -> bool:
        """Look at the verdicts but the last `lag`; returns whether one of them says that a process wants to stop.

        Raises UserError for the first step that was not finite, unless such steps are skipped.
        """
        stop = False
        while len(self.unseen) > lag:
            verdict = self.unseen.pop(0)
            *losses, norm, wish, bad = verdict.read()
            stop = stop or wish > 0
            if not self.skip:
                self._judge(verdict, losses, norm, bad)
        return stop

    def _judge(self, verdict: _Verdict, losses: list[float], norm: float, bad: float) -> None:
        first = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if first is not None:
            what, batches = f"the loss is {losses[first]}", verdict.batches[first : first + 1]
        elif bad:
            raise UserError(
                f"training diverged at batch {verdict.batches[-1][0] + 1}: the loss is not finite in another process, "
                "which names its images."
            )
        elif not math.isfinite(norm):
            what, batches = f"the gradient is {norm}", verdict.batches
        else:
            return
        names = listing(self.task.names([int(i) for _, index in batches for i in index]), limit=20)
        raise UserError(
            f"training diverged at batch {batches[-1][0] + 1}: {what}. The step was not taken. Lower train.lr, use "
            "--precision fp32, leave such steps out with --skip-nonfinite, or look at the images of this batch:\n"
            f"{names}"
        )

    def state(self, batches: int) -> EpochState:
        """Where the epoch is after `batches` batches; every loss so far was looked at. Raises as :meth:`look`."""
        self.look()
        return EpochState(
            batches=batches,
            loss_sum=float(self.loss_sum),
            images=int(self.images),
            in_step=self.in_step,
            skipped=int(self.skipped),
            seconds=self.begun.seconds + time.perf_counter() - self.clock,
        )

    def result(self) -> EpochResult:
        """The whole epoch, of all processes. Raises as :meth:`look`, and UserError when no step of it was finite."""
        self.look()
        loss, images = self.runtime.sum(torch.stack([self.loss_sum, self.images.float()]))
        if not images:
            raise UserError("no step of the epoch had a finite loss. Lower train.lr, or use --precision fp32.")
        return EpochResult(
            loss=float(loss / images),
            images=int(images),
            seconds=self.begun.seconds + time.perf_counter() - self.clock,
            rates=self.rates,
            skipped=int(self.skipped),
        )


@dataclass(frozen=True)
class _Verdict:
    """The numbers that say whether a step was finite, on their way from the device."""

    batches: list[tuple[int, Tensor]]
    """Number and image indices of each batch of the step."""
    numbers: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, parts: list[tuple[int, Tensor, Tensor]], numbers: Tensor, later: bool) -> _Verdict:
        """Send `numbers` to the CPU; with `later`, from a GPU, without waiting for them."""
        arrived = None
        if later and numbers.is_cuda:
            there = torch.empty(numbers.shape, pin_memory=True)
            numbers = there.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return cls([(number, index) for number, index, _ in parts], numbers, arrived)

    def read(self) -> list[float]:
        """The numbers, once they are here."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return [float(number) for number in self.numbers.tolist()]


def _lag(runtime: Runtime) -> int:
    """By how many steps the verdicts are looked at later. Only CUDA gains by it, and can leave a step out by itself."""
    return 1 if runtime.device.type == "cuda" else 0


def _statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a forward pass changes (batch norm's statistics), each with a copy."""
    return [(buffer, buffer.clone()) for buffer in network.buffers() if buffer.is_floating_point()]


def _restore(kept: list[tuple[Tensor, Tensor]], finite: Tensor) -> None:
    """Put the copies back where the batch was not `finite` (bool[])."""
    for buffer, copy in kept:
        buffer.copy_(torch.where(finite, buffer, copy))


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
