"""What is slow? The images a second that the loader gives against those the training step takes, by worker count."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.transforms import v2  # type: ignore[import-untyped]

from eyetune.checks import plots
from eyetune.checks.rates import DECODE, READ, Rate
from eyetune.checks.subject import Subject, in_turns
from eyetune.checks.trial import Trial
from eyetune.data.cache import Cache
from eyetune.data.config import AugmentConfig
from eyetune.data.fundus import FundusSettings, load_square, prepare
from eyetune.data.loader import make_loader
from eyetune.data.loader import shared_memory as room
from eyetune.data.photo import read_image
from eyetune.data.readable import choose_workers, find_faults
from eyetune.data.transforms import Fused, Normalise, level_steps, listed_steps
from eyetune.errors import DataError, UserError
from eyetune.findings import Finding, Report, Status, carry_out
from eyetune.progress import duration, meter
from eyetune.runtime import Runtime

if TYPE_CHECKING:
    from rich.table import Table

    from eyetune.backbones import Preprocess

SAMPLE = 256
"""Training images that are read; a rate needs no more."""

TIMED, PASSES = 24, 4
"""Images on which single operations are timed, and how often."""

SECONDS = 3.0
"""How long each setting is watched, after its first batch."""

WAITING = 0.05
"""Share of the time that the network may wait for images."""

SPARE = 1.3
"""What a recommended number of processes gives, in steps' needs, where any does: rates vary."""

WORTH = 1.1
"""A change of prefetch or pinning is worth a flag when it gives this many times as much."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds an image, of one operation in one thread."""

    what: str
    milliseconds: float


class Reading:
    """A sample of the training images and how a run would read it."""

    def __init__(self, subject: Subject, preprocess: Preprocess, runtime: Runtime, seconds: float) -> None:
        self.config = subject.config
        self.runtime = runtime
        self.preprocess = preprocess
        self.settings = FundusSettings.of(self.config.data, preprocess)
        self.seconds = seconds
        self.train = subject.manifest.select("train")
        order = in_turns(self.train)[:SAMPLE]
        self.sample = self.train.with_records(self.train[index] for index in order)
        self.batch_size = min(self.config.train.batch_size, len(self.train))
        self.cache = Cache.of(self.config.data)
        begin = time.perf_counter()
        # With a cache this is what a run does before its first epoch.
        faults = find_faults(self.sample, workers=self.config.workers, cache=self.cache, settings=self.settings)
        self.filling = time.perf_counter() - begin
        bad = [f"{record.row}: {fault}" for record, fault in zip(self.sample, faults, strict=True) if fault]
        if bad and (not self.config.data.skip_unreadable or len(bad) == len(self.sample)):
            raise DataError(f"{self.train.source}: images cannot be read (see: eyetune check data):\n  {bad[0]}")
        self.sample = self.sample.with_records(r for r, f in zip(self.sample, faults, strict=True) if f is None)

    def rate(self, workers: int, source: str, *, prefetch: int | None = None, pinned: bool | None = None) -> Rate:
        """Images a second of one setting, on the device."""
        prefetch = prefetch or self.config.prefetch
        pin = self.config.pin_memory if pinned is None else pinned
        shown = torch.cuda.is_available() if pin == "auto" else bool(pin)
        # One long epoch: between epochs there is a gap that says nothing of the rate.
        copies = math.ceil(max(4096, 64 * self.batch_size) / len(self.sample))
        loader = make_loader(
            self.sample.with_records(itertools.chain.from_iterable([self.sample.records] * copies)),
            self.preprocess,
            self.settings,
            batch_size=self.batch_size,
            training=True,
            augment=self.config.augment,
            workers=workers,
            seed=self.config.seed,
            cache=self.cache if source == READ else None,
            prefetch=prefetch,
            pin_memory=pin,
        )
        batches = iter(loader)
        begin = time.perf_counter()
        try:
            self.runtime.to_device(next(batches))
            start = time.perf_counter() - begin
            images, begin = 0, time.perf_counter()
            # Not before each process has brought a batch: the first ones come from what was read at the start.
            least = max(2, workers * prefetch)
            for number, batch in enumerate(batches, 1):
                self.runtime.to_device(batch)
                images += len(batch["index"])
                if time.perf_counter() - begin > self.seconds and number >= least:
                    break
            if self.runtime.device.type == "cuda":
                torch.cuda.synchronize()
            return Rate(workers, source, prefetch, shown, images / (time.perf_counter() - begin), start)
        except (RuntimeError, UserError) as error:  # a process was ended: most often the shared memory was too small
            said = str(error).splitlines()[0]
            return Rate(workers, source, prefetch, shown, None, time.perf_counter() - begin, said)
        finally:
            batches.close()
            loader._iterator = None  # which ends its processes


def check_loader(
    subject: Subject,
    folder: Path,
    *,
    seconds: int | None,
    say: Callable[[Finding], None],
    start: Callable[[str], None],
) -> tuple[Report, list[Table]]:
    """Time the step, every worker count, and every operation on an image; compare and recommend.

    Args:
        subject: the configuration and its photographs.
        folder: for the picture.
        seconds: to watch each setting for; None for the usual 3.
        say: takes each finding as it is made.
        start: takes the line that says what is checked.

    Raises DataError when an image cannot be read, UserError when not even a batch fits into memory.
    """
    config = subject.config
    runtime = Runtime(config.device, config.precision, config.seed)
    trial = Trial(subject, runtime, config.train.grad_checkpointing)
    preprocess = trial.model.backbone.preprocess
    reading = Reading(subject, preprocess, runtime, float(seconds or SECONDS))
    line = subject.describe(trial.model, runtime, f"{len(reading.sample)} of {len(reading.train)} training images")
    start(line)
    point = trial.run(reading.batch_size)
    if point is None:
        raise UserError("the device has not enough memory for a batch. See: eyetune check memory.")
    need = reading.batch_size / point.seconds
    del trial
    own = choose_workers(config.workers, len(reading.train))
    rates = sweep(reading, own)
    costs = operation_costs(reading)
    findings = []
    for name, check in (
        ("loader", lambda: feeds(rates, own, need, cached=reading.cache is not None, costs=costs)),
        ("shared memory", lambda: shared_memory(reading, own)),
        ("preparation", lambda: preparation(reading, rates)),
    ):
        findings.append(carry_out(name, check))
        say(findings[-1])
    picture = folder / "loader.png"
    title = f"{config.model.backbone} at {preprocess.pixels} pixels, batch {reading.batch_size}: what the loader gives"
    plots.loader_rates([rate for rate in rates if rate.prefetch == config.prefetch], need, own, picture, title=title)
    details = {
        "need_images_per_second": need,
        "workers": own,
        "rates": [asdict(rate) for rate in rates],
        "milliseconds": {cost.what: cost.milliseconds for cost in costs},
    }
    return Report("loader", line, findings, [picture], details), [rate_table(rates, need, own), cost_table(costs)]


def sweep(reading: Reading, own: int) -> list[Rate]:
    """Every worker count that makes sense here, from the cache and decoding; then prefetch and pinning at the best."""
    counts = worker_counts(own)
    sources = [DECODE] if reading.cache is None else [READ, DECODE]
    rates: list[Rate] = []
    total = len(counts) * len(sources) + 2
    with meter(total, "Timing the loader", "settings") as update:
        for workers, source in itertools.product(counts, sources):
            rates.append(reading.rate(workers, source))
            update(len(rates))
        best = max((r for r in rates if r.source == sources[0]), key=lambda rate: rate.images or 0.0)
        if best.workers:
            rates.append(reading.rate(best.workers, sources[0], prefetch=2 * reading.config.prefetch))
        if reading.runtime.device.type == "cuda":
            rates.append(reading.rate(best.workers, sources[0], pinned=not best.pinned))
        update(total)
    return rates


def worker_counts(own: int) -> list[int]:
    """0, 1, 2, 4, … up to the processors, and what the configuration asks for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    powers = [2**power for power in range(10) if 2**power < cores]
    return sorted({0, *powers, cores, own})


def operation_costs(reading: Reading) -> list[Cost]:
    """What one image costs, operation by operation, in one thread."""
    paths = [record.image for record in reading.sample][:TIMED]
    settings, preprocess = reading.settings, reading.preprocess
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        photos = [read_image(path, short_side=settings.pixels) for path in paths]
        squares = [load_square(path, settings) for path in paths]
        costs = [
            _cost("from the file", paths, lambda path: load_square(path, settings)),
            _cost("- read and decode", paths, lambda path: read_image(path, short_side=settings.pixels)),
            _cost("- crop, fit, contrast", photos, lambda photo: prepare(photo, settings)),
        ]
        cache = reading.cache
        if cache is not None:
            costs.append(_cost("from the cache", paths, lambda path: cache.square(path, settings)))
        tensors = [torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1) for square in squares]
        for name, transform in augmentation_steps(reading.config.augment, settings):
            costs.append(_cost(f"augment: {name}", tensors, transform))
        costs.append(_cost("normalise", tensors, Normalise(preprocess)))
    finally:
        torch.set_num_threads(threads)
    return costs


def augmentation_steps(augment: AugmentConfig, settings: FundusSettings) -> list[tuple[str, Callable[[Any], Any]]]:
    """(name, transform) of every step of the augmentation, one at a time."""
    steps = level_steps(augment, settings.surround) if isinstance(augment, str) else listed_steps(augment)
    return [(_name(step), Fused([step]) if isinstance(augment, str) else step) for step in steps]


def _name(step: Any) -> str:
    inner = getattr(step, "transforms", None)
    if isinstance(step, v2.RandomApply) and inner:
        return f"{type(inner[0]).__name__} (for {step.p:.0%} of the images)"
    return type(step).__name__


def _cost(what: str, inputs: Sequence[Any], operation: Callable[[Any], Any]) -> Cost:
    """The mean over the inputs, in the quickest of a few passes: the first ones warm up, others are disturbed."""
    means = []
    for _ in range(PASSES):
        begin = time.perf_counter()
        for one in inputs:
            operation(one)
        means.append((time.perf_counter() - begin) / len(inputs))
    return Cost(what, 1000 * min(means))


# -- the verdicts ------------------------------------------------------------------------------------------------------


def waiting(workers: int, images: float, need: float) -> float:
    """Share of the time that the network waits: without workers for every image, with them for those that are late.

    Args:
        workers: reading processes.
        images: a second, that they give.
        need: images a second, that the step takes.
    """
    if workers == 0:
        return need / (need + images)
    return max(0.0, 1.0 - images / need)


def feeds(rates: Sequence[Rate], own: int, need: float, *, cached: bool, costs: Sequence[Cost]) -> Finding:
    """Whether the loader, as configured, gives what the step takes; the fewest processes that do."""
    source = READ if cached else DECODE
    swept = {rate.workers: rate for rate in reversed(rates) if rate.source == source}
    mine = swept[own]
    possible = {workers: rate.images for workers, rate in swept.items() if rate.images is not None}
    values: dict[str, Any] = {"need": need, "workers": own, "images_per_second": mine.images, "by_workers": possible}
    if not possible:
        return Finding(
            Status.FAIL, f"no setting could run: {mine.problem}", "Look at the message; try --workers 0.", values
        )
    chosen = recommend(possible, need)
    waits = {workers: waiting(workers, images, need) for workers, images in possible.items()}
    values |= {"recommended": chosen, "waiting": waits}
    extra = extra_flags(rates, source, chosen)
    flags = " ".join([f"--workers {chosen}", *extra])
    promise = f"{flags} ({possible[chosen]:.0f} images/s: it waits {waits[chosen]:.0%} of the time)"
    if mine.images is None:
        return Finding(Status.FAIL, f"{_workers(own)} cannot run: {mine.problem}", f"Set {promise}.", values)
    why = (
        f"{_workers(own)} {'give' if own != 1 else 'gives'} {mine.images:.0f} images/s {source}, the step takes "
        f"{need:.0f}: the network waits {waits[own]:.0%} of the time"
    )
    if waits[own] <= WAITING:
        fewer = f"Fewer processes do: --workers {chosen}." if chosen < own else ""
        return Finding(Status.PASS, why, fewer, values)
    why += f" (at most {WAITING:.0%})"
    advice = f"Set {promise}." if chosen != own or extra else ""
    if waits[chosen] <= WAITING:
        return Finding(Status.FAIL, why, advice, values)
    if not cached:
        advice += " Let photographs be kept prepared: data.cache true."
    slow = max((c for c in costs if c.what.startswith("augment")), key=lambda c: c.milliseconds, default=None)
    if slow is not None:
        name = slow.what.removeprefix("augment: ")
        advice += f" The dearest transform is {name}, {slow.milliseconds:.1f} ms an image: try a lighter augment."
    return Finding(Status.FAIL, why, f"{advice} More processors help.".strip(), values)


def _workers(count: int) -> str:
    return {0: "the main process", 1: "1 worker"}.get(count, f"{count} workers")


def recommend(possible: dict[int, float], need: float) -> int:
    """The fewest processes for which the network does not wait, with some to spare; else the fewest of the best."""
    enough = [
        workers
        for workers, images in possible.items()
        if waiting(workers, images, need) <= WAITING and (workers == 0 or images >= SPARE * need)
    ]
    if enough:
        return min(enough)
    least = min(waiting(workers, images, need) for workers, images in possible.items())
    return min(w for w, images in possible.items() if waiting(w, images, need) <= least + WAITING)


def extra_flags(rates: Sequence[Rate], source: str, workers: int) -> list[str]:
    """Flags for prefetch and pinning, where another setting than the usual gives more at this worker count."""
    tried = [rate for rate in rates if rate.workers == workers and rate.source == source and rate.images is not None]
    if not tried:
        return []
    usual = tried[0]
    flags = []
    for rate in tried[1:]:
        if (rate.images or 0.0) < WORTH * (usual.images or 0.0):
            continue
        if rate.prefetch != usual.prefetch:
            flags.append(f"--prefetch {rate.prefetch}")
        if rate.pinned != usual.pinned:
            flags.append(f"--pin_memory {str(rate.pinned).lower()}")
    return flags


def shared_memory(reading: Reading, own: int) -> Finding:
    """Whether the batches on their way between the processes fit where they are handed over; or why there are none."""
    pixels = reading.preprocess.pixels
    batch = reading.batch_size * 3 * pixels * pixels * 4
    if own == 0:
        reason = "the main process reads by itself (--workers 0)"
        if reading.config.workers == "auto":
            reason = "few images: starting processes would cost more than it saves"
            if sys.platform == "darwin":
                reason = "on macOS every process starts from scratch and hands batches over slowly, so auto takes none"
        return Finding(Status.PASS, reason, values={"workers": 0})
    wanted, free = room(batch, own, reading.config.prefetch)
    values: dict[str, Any] = {"workers": own, "batch_bytes": batch, "wanted_bytes": wanted, "free_bytes": free}
    if free is None:
        return Finding(Status.PASS, "this system gives shared memory no limit of its own", values=values)
    why = (
        f"{_workers(own)} may need {wanted / 2**20:.0f} MiB for batches on their way; there are {free / 2**20:.0f} MiB"
    )
    if wanted <= free:
        return Finding(Status.PASS, why, values=values)
    return Finding(
        Status.WARN,
        f"{why}: they go through pipes instead, a little slower",
        f"Start the container with --shm-size={max(1, math.ceil(wanted / 2**30))}g.",
        values,
    )


def preparation(reading: Reading, rates: Sequence[Rate]) -> Finding:
    """What decoding costs: once with the cache, in every epoch without."""
    decoding = max((rate.images or 0.0 for rate in rates if rate.source == DECODE), default=0.0)
    if not decoding:
        return Finding(Status.SKIP, "nothing could be decoded")
    seconds = len(reading.train) / decoding
    values = {"images_per_second": decoding, "seconds": seconds}
    took = f"decoding {len(reading.train)} training images takes {duration(seconds)} at {decoding:.0f} images/s"
    if reading.cache is not None:
        return Finding(Status.PASS, f"{took}, once: they are kept prepared", values=values)
    return Finding(
        Status.WARN,
        f"{took}, in every epoch",
        "Let them be kept prepared: data.cache true (without --no-cache).",
        values,
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def rate_table(rates: Sequence[Rate], need: float, own: int) -> Table:
    """A row a setting."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("workers", "prefetch", "pinned", "source", "images/s", "network waits", "first batch after"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for rate in rates:
        given = "-" if rate.images is None else f"{rate.images:.0f}"
        share = rate.problem[:40] if rate.images is None else f"{waiting(rate.workers, rate.images, need):.0%}"
        prefetch = str(rate.prefetch) if rate.workers else "-"
        pinned = "yes" if rate.pinned else "no"
        mark = " *" if rate.workers == own else ""
        table.add_row(f"{rate.workers}{mark}", prefetch, pinned, rate.source, given, share, f"{rate.start:.1f} s")
    return table


def cost_table(costs: Sequence[Cost]) -> Table:
    """A row an operation."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("one image, one thread")
    table.add_column("ms", justify="right")
    for cost in costs:
        table.add_row(cost.what, f"{cost.milliseconds:.2f}")
    return table
