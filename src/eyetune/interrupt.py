"""Ctrl-C, and SIGTERM, the warning of a cluster before it kills: at once, or at the next point where nothing is lost.

Inside :func:`heeded` both signals raise :class:`Interrupted`. Inside :func:`deferred` the first one is only noted, for
the work to look at (:func:`pending`) where it can stop; a second one raises as ever. A second one means: some time
later, for a terminal, a launcher and a cluster may each send the same wish at the same moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: Signals this close to the first, in seconds, say the same as the first.
ONE_WISH = 2.0


class Interrupted(KeyboardInterrupt):
    """The user or the cluster wants the process to end.

    Args:
        text: what is kept, and how to go on.
        signum: the signal that said so.
        again: whether it was said for a second time: end at once, wherever that is.
    """

    def __init__(self, text: str = "", signum: int = signal.SIGINT, again: bool = False) -> None:
        super().__init__(text)
        self.signum = signum
        self.again = again


class _Wish:
    """What has been asked for so far; one a process, as signal handlers are."""

    heeding = False
    deferring = False
    signum: int | None = None
    first: float | None = None
    """When the first signal came, by the monotonic clock."""


def pending() -> int | None:
    """The signal that was noted and not yet obeyed; None when there is none."""
    return _Wish.signum


def obey(text: str) -> Interrupted:
    """The exception to raise for what is pending, with `text`; after it nothing is pending any more."""
    signum, _Wish.signum = _Wish.signum or signal.SIGINT, None
    return Interrupted(text, signum)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Let both signals raise :class:`Interrupted` inside. Does nothing when nested, or outside the main thread."""
    if _Wish.heeding or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _handle) for signum in SIGNALS}
    _Wish.heeding, _Wish.signum, _Wish.first = True, None, None
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _Wish.heeding, _Wish.signum = False, None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only note a first signal inside. Whoever opens it looks at :func:`pending` inside or right behind it."""
    outer, _Wish.deferring = _Wish.deferring, True
    try:
        yield
    finally:
        _Wish.deferring = outer


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside :func:`deferred`: what was noted, and a signal from now on, raises at once."""
    outer, _Wish.deferring = _Wish.deferring, False
    try:
        if pending():
            raise obey("")
        yield
    finally:
        _Wish.deferring = outer


def _handle(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    again = _Wish.first is not None
    if _Wish.first is None:
        _Wish.first = now
        _Wish.signum = signum
        if _Wish.deferring:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\neyetune: stopping as soon as what was done is saved; once more stops at once.\n")
            return
    elif now - _Wish.first < ONE_WISH:
        return
    _Wish.signum = None
    raise Interrupted("", signum, again)
