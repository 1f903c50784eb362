"""What fits? Peak memory by batch size, the largest batch, and whether memory grows from step to step.

On a GPU every batch size is tried, and running out of memory is an answer. On a processor running out of memory takes
the machine into swap or the process down, so small batches are measured, in a process of their own, and the rest
follows from the slope: memory is a part that is always there (program, weights, gradients, optimizer) and one that
grows with the images. What would take longer than a minute there is predicted or left out, and said.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eyetune.checks import plots
from eyetune.checks.scale import Point, Scale, line
from eyetune.checks.subject import FixedBatches, Subject
from eyetune.checks.trial import Elsewhere, Trial
from eyetune.errors import UserError
from eyetune.findings import Finding, Report, Status, carry_out
from eyetune.progress import duration, meter
from eyetune.runtime import Runtime
from eyetune.train.features import can_compute_once

if TYPE_CHECKING:
    from rich.table import Table

    from eyetune.adapt.classifier import Classifier

MARGIN = 0.9
"""Share of the free memory that a run may take: the rest is for what fragments, and for the processes that read."""

MOST_IMAGES = 4096
"""No larger batch is tried."""

PATIENCE = 60.0
"""Seconds for the batches of one setting on a processor, and for looking for growth. Batches that would take longer are
predicted, once two are measured; growth is looked for in fewer steps."""

GROWTH_STEPS = 100
GROWTH_SAMPLES = 5
GROWTH_BATCH = 2
"""Images a step when looking for growth: a leak does not depend on the batch, the time does. (Of one image alone batch
statistics cannot always be taken.)"""

LEAK_GPU, LEAK_CPU = 2**20, 2**25
"""Bytes: less growth over the last three fifths of the steps is the allocator's, not a leak."""

GIB = 2**30


def check_memory(
    subject: Subject, folder: Path, *, steps: int | None, say: Callable[[Finding], None], start: Callable[[str], None]
) -> tuple[Report, Table]:
    """Measure, find the largest batch, look for growth, and draw it.

    Args:
        subject: the configuration and its photographs.
        folder: for the picture.
        steps: to look for growth in; None for 100, or as many as there is patience for.
        say: takes each finding as it is made.
        start: takes the line that says what is checked.
    """
    config = subject.config
    runtime = Runtime(config.device, config.precision, config.seed)
    model, strategy = subject.build()
    room = free_memory(runtime.device.type)
    title = subject.describe(model, runtime, f"{model.backbone.preprocess.pixels} pixels; {room / GIB:.1f} GiB free")
    start(title)
    parts = _parts(model)
    once = can_compute_once(strategy, config.train, config.augment)
    del model, strategy
    scales: list[Scale] = []
    most = min(MOST_IMAGES, len(subject.manifest.select("train")))

    def sizes() -> Finding:
        asked = config.train.grad_checkpointing
        planned = None if runtime.device.type == "cuda" else len(_sizes(subject, most)) * (1 if once else 2)
        with meter(planned, "Measuring memory", "batch sizes") as update:
            tried = itertools.count(1)
            for checkpointing in [asked] if once else [asked, not asked]:
                scale = measure(subject, runtime, room, most, checkpointing, tried=lambda: update(next(tried)))
                scales.extend([scale] if scale.points or checkpointing == asked else [])
        return _verdict(subject, scales, room, most)

    findings = []
    for name, check in (
        ("batch size", sizes),
        ("growth", lambda: growth(subject, runtime, steps)),
    ):
        findings.append(carry_out(name, check))
        say(findings[-1])
    pictures = []
    if any(scale.points for scale in scales):
        pictures.append(folder / "memory.png")
        plots.memory(
            scales,
            room,
            config.train.batch_size,
            pictures[0],
            title=f"{config.model.backbone}, {config.adapt.kind}: memory by batch size",
        )
    details = {
        "free_bytes": room,
        "bytes": parts,
        "features_computed_once": once,
        "batches": [asdict(point) for scale in scales for point in scale.points],
        "largest": [{"grad_checkpointing": s.checkpointing, "batch": s.largest, "tried": s.certain} for s in scales],
    }
    return Report("memory", title, findings, pictures, details), table(scales, room, config.train.batch_size)


# -- by batch size -----------------------------------------------------------------------------------------------------


def measure(
    subject: Subject,
    runtime: Runtime,
    room: int,
    most: int,
    checkpointing: bool,
    *,
    tried: Callable[[], None] = lambda: None,
) -> Scale:
    """Peak memory from batch 1 up to what fits, `room` bytes or `most` images; no points where the network cannot
    recompute its activations. Calls `tried` after every batch size.

    Raises MemoryError when not even one image fits.
    """
    try:
        if runtime.device.type == "cuda":
            return _by_trying(subject, runtime, most, checkpointing, tried)
        return _by_slope(subject, room, most, checkpointing, tried)
    except UserError:
        if checkpointing != subject.config.train.grad_checkpointing:  # this network cannot, and was not asked to
            return Scale(checkpointing, (), 0, False)
        raise


def _by_trying(
    subject: Subject, runtime: Runtime, most: int, checkpointing: bool, tried: Callable[[], None] = lambda: None
) -> Scale:
    """Double until it does not fit or there are no more images, then halve the gap; all in this process."""
    trial = Trial(subject, runtime, checkpointing)
    points: list[Point] = []
    fits, too_many, batch = 0, most + 1, 1
    while fits + max(1, fits // 16) < too_many:
        point = trial.run(batch)
        tried()
        if point is None:
            too_many = batch
        else:
            points.append(point)
            fits = batch
        batch = min(2 * fits, most) if too_many > most else (fits + too_many) // 2
        if batch <= fits:
            break
    return Scale(checkpointing, tuple(sorted(points, key=lambda point: point.batch)), fits, True)


def _sizes(subject: Subject, most: int) -> list[int]:
    """The batches to measure on a processor: up to that of the configuration, four times as large each."""
    wanted = min(subject.config.train.batch_size, most)
    return [4**power for power in range(MOST_IMAGES.bit_length()) if 4**power < wanted] + [wanted]


def _by_slope(subject: Subject, room: int, most: int, checkpointing: bool, tried: Callable[[], None]) -> Scale:
    """Measure batches while they are sure to fit and there is patience; the largest by the slope."""
    points: list[Point] = []
    hurried = False
    begin = time.monotonic()
    overhead = 0.0
    with Elsewhere(subject, checkpointing) as child:
        for batch in _sizes(subject, most):
            if len(points) > 1:
                start, slope = line(points)
                if start + 1.2 * slope * batch > MARGIN * room:
                    break
                expected = overhead + 2 * points[-1].seconds * batch / points[-1].batch
                if hurried := time.monotonic() - begin + expected > PATIENCE:
                    break
            before = time.monotonic()
            point = child.run(batch)
            tried()
            if point is None:
                break
            points.append(point)
            overhead = max(0.0, time.monotonic() - before - 2 * point.seconds)
    if not points:
        return Scale(checkpointing, (), 0, True)
    start, slope = line(points)
    largest = most if slope <= 0 else max(0, min(most, math.floor((MARGIN * room - start) / slope)))
    if max(point.loading for point in points) > MARGIN * room:
        largest = 0
    return Scale(checkpointing, tuple(points), largest, largest <= points[-1].batch, hurried)


def free_memory(device: str) -> int:
    """Bytes that a run could take now: of the GPU, or of this machine or its container."""
    import psutil  # type: ignore[import-untyped]

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    if device == "mps":
        return int(torch.mps.recommended_max_memory())
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        return max(0, min(free, limit - used))
    except (OSError, ValueError):  # no container, or none with a limit
        return free


# -- the verdicts ------------------------------------------------------------------------------------------------------


def _verdict(subject: Subject, scales: Sequence[Scale], room: int, most: int) -> Finding:
    train = subject.config.train
    mine = scales[0]
    other = scales[1] if len(scales) > 1 else None
    values: dict[str, Any] = {"batch_size": train.batch_size, "largest": mine.largest, "free_bytes": room}
    if not mine.points:
        return Finding(
            Status.FAIL,
            f"not even one image fits into {room / GIB:.1f} GiB",
            "Train fewer parameters (adapt.kind lora or linear), or take a smaller backbone or a larger machine.",
            values,
        )
    peak = mine.peak(train.batch_size)
    values["peak"] = peak
    tried, certain = ("" if known else "about " for known in (mine.at(train.batch_size), mine.certain))
    limit = " (all training images)" if mine.largest == most else ""
    why = (
        f"train.batch_size {train.batch_size} takes {tried}{peak / GIB:.2f} of {room / GIB:.1f} GiB; "
        f"the largest that fits is {certain}{mine.largest}{limit}"
    )
    if other is not None and other.points and other.largest != mine.largest:
        switch = "on" if other.checkpointing else "off"
        why += f", with train.grad_checkpointing {switch} {'' if other.certain else 'about '}{other.largest}"
    if mine.hurried:
        why += f"; batches above {mine.points[-1].batch} take long here: predicted, not measured"
    if train.batch_size <= mine.largest:
        return Finding(Status.PASS, why, values=values)
    if mine.largest >= len(subject.manifest.select("train")):
        return Finding(Status.PASS, why, values=values)
    return Finding(Status.FAIL, why, _smaller(train.batch_size, train.accumulate, mine, other), values)


def _smaller(batch: int, accumulate: int, mine: Scale, other: Scale | None) -> str:
    """Settings that fit and train the same."""
    advice = []
    if mine.largest:
        divisor = next(size for size in range(min(mine.largest, batch), 0, -1) if batch % size == 0)
        advice.append(f"--train.batch_size {divisor} --train.accumulate {accumulate * batch // divisor}")
    if other is not None and other.checkpointing and other.largest >= batch:
        advice.append("--train.grad_checkpointing true")
    if not advice:
        return "Train fewer parameters (adapt.kind lora or linear), or take a smaller backbone."
    return f"For the same training: {', or '.join(advice)}."


def growth(subject: Subject, runtime: Runtime, steps: int | None) -> Finding:
    """Take `steps` steps of training (None: 100, or fewer where they take long); memory may not grow from one fifth of
    them to the next."""
    trial = Trial(subject, runtime, subject.config.train.grad_checkpointing)
    batch = trial._batch(min(GROWTH_BATCH, subject.config.train.batch_size))
    samples: list[tuple[int, int]] = []
    wanted = steps or GROWTH_STEPS
    every = max(1, wanted // GROWTH_SAMPLES)
    trial.steps([batch])  # which makes the optimizer's states
    begin = time.monotonic()
    trial.steps([batch])
    if steps is None:
        every = max(1, min(every, int(PATIENCE / GROWTH_SAMPLES / max(time.monotonic() - begin, 1e-9))))
    begin = time.monotonic()
    with meter(every * GROWTH_SAMPLES, "Looking for growth", "steps") as update:
        for number in range(GROWTH_SAMPLES):
            trial.steps(FixedBatches([batch] * every))
            samples.append(_held(runtime.device.type))
            update((number + 1) * every)
    each = (time.monotonic() - begin) / (every * GROWTH_SAMPLES)
    objects, held = zip(*samples[1:], strict=True)  # the first fifth warms up
    taken = every * (GROWTH_SAMPLES - 1)
    least = LEAK_CPU if runtime.device.type == "cpu" else LEAK_GPU
    more_bytes, more_objects = held[-1] - held[0], objects[-1] - objects[0]
    values = {"steps": every * GROWTH_SAMPLES, "bytes": held, "tensors": objects}
    grows = _rises(held) and more_bytes > max(least, 0.02 * held[0])
    piles_up = _rises(objects) and more_objects >= taken // 4
    why = f"{every * GROWTH_SAMPLES} steps: {more_bytes / 2**20:+.1f} MiB and {more_objects:+d} tensors after warm-up"
    if grows or piles_up:
        return Finding(
            Status.FAIL,
            why,
            "Something keeps what a step makes: a list of losses or outputs with their graph (use .detach() or "
            "float()), or a hook that stores activations.",
            values,
        )
    if every * GROWTH_SAMPLES >= wanted // GROWTH_SAMPLES * GROWTH_SAMPLES:
        return Finding(Status.PASS, why, values=values)
    unseen = max(least, 0.02 * held[0]) / (3 * every)
    why += f"; in so few, less than {unseen / 2**20:.1f} MiB a step goes unseen"
    return Finding(
        Status.PASS, why, f"--steps {wanted} takes about {duration(wanted * each)} here and sees more.", values
    )


def _rises(numbers: Sequence[int]) -> bool:
    return all(later > earlier for earlier, later in pairwise(numbers))


def _held(device: str) -> tuple[int, int]:
    """Tensors that Python knows of, and bytes in use."""
    import psutil

    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    if device == "cuda":
        return tensors, torch.cuda.memory_allocated()
    if device == "mps":
        return tensors, torch.mps.current_allocated_memory()
    return tensors, int(psutil.Process().memory_info().rss)


def _parts(model: Classifier) -> dict[str, int]:
    """Bytes that are there whatever the batch: weights, gradients, AdamW's two moments."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"weights": weights, "gradients": trained, "optimizer": 2 * trained}


def table(scales: Sequence[Scale], room: int, wanted: int) -> Table:
    """A row a batch size: memory and speed, with and without recomputed activations."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.add_column("batch", justify="right")
    for scale in scales:
        named = " (checkpointing)" if scale.checkpointing else ""
        for column in (f"peak{named}", "of free", "s/step", "images/s"):
            shown.add_column(column, justify="right")
    batches = {point.batch for scale in scales for point in scale.points} | {wanted}
    batches |= {scale.largest for scale in scales if scale.largest}
    for batch in sorted(batches):
        cells = [cell for scale in scales for cell in _cells(scale, batch, room)]
        shown.add_row(f"{batch}{' *' if batch == wanted else ''}", *cells)
    return shown


def _cells(scale: Scale, batch: int, room: int) -> Iterator[str]:
    point = scale.at(batch)
    if not scale.points:
        yield from ("-", "-", "-", "-")
        return
    peak = scale.peak(batch)
    sign = "" if point else "~"
    yield f"{sign}{peak / GIB:.2f} GiB"
    yield f"{sign}{peak / room:.0%}"
    if point is None:
        yield from ("", "")
        return
    yield f"{point.seconds:.2f}"
    yield f"{batch / point.seconds:.1f}"
