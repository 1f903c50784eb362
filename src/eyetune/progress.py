"""How far a long job is: a bar with rate and remaining time on a terminal, a plain line now and then in a pipe.

All of it goes to stderr, so that what a command prints can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from eyetune.processes import rank

Item = TypeVar("Item")

_counter: ContextVar[Callable[[int], None] | None] = ContextVar("_counter", default=None)

PIPE_SECONDS = (5.0, 30.0)
"""In a pipe, a line at every tenth of the work, but not within the first of these; and one at least every second."""


@contextmanager
def meter(total: int | None, description: str, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of things done so far.

    Args:
        total: How many there will be; None when nobody knows.
        description: What is being done, such as "Drawing".
        unit: What is counted.
    """
    counter = _counter.get()
    if rank() > 0 or counter is not None:  # all processes share one terminal
        yield counter or (lambda done: None)
        return
    with (_bar if sys.stderr.isatty() else _lines)(total, description, unit) as update:
        yield update


@contextmanager
def counted_by(update: Callable[[int], None]) -> Iterator[None]:
    """Inside, the meters of this thread show nothing and report to `update`: they are parts of a longer job."""
    token = _counter.set(update)
    try:
        yield
    finally:
        _counter.reset(token)


def track(
    iterable: Iterable[Item], total: int | None = None, description: str = "Working", unit: str = "images"
) -> Iterator[Item]:
    """Pass `iterable` on, item by item, and show how far it is. `total` defaults to its length, if it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with meter(total, description, unit) as update:
        for done, item in enumerate(iterable, 1):
            yield item
            update(done)


@contextmanager
def _bar(total: int | None, description: str, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(description, total=total, rate="")

        def update(done: int) -> None:
            rate = done / max(time.monotonic() - start, 1e-9)
            progress.update(task, completed=done, rate=f"{rate:.1f} {unit}/s")

        yield update


@contextmanager
def _lines(total: int | None, description: str, unit: str) -> Iterator[Callable[[int], None]]:
    start = said = time.monotonic()
    tenths = 0

    def update(done: int) -> None:
        nonlocal said, tenths
        now = time.monotonic()
        reached = 10 * done // total if total else 0
        due = now - said >= PIPE_SECONDS[0 if reached != tenths else 1]
        if not due and done != total:
            return
        said, tenths = now, reached
        rate = done / max(now - start, 1e-9)
        if total:
            left = duration((total - done) / rate)
            print(
                f"{description}: {done}/{total} {unit} ({100 * done // total}%), {rate:.1f} {unit}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(f"{description}: {done} {unit}, {rate:.1f} {unit}/s", file=sys.stderr, flush=True)

    yield update


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
