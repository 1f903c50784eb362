"""Whose photographs are here, in which order they are read, and when they are forgotten. All of it in memory.

Everything here runs in the one thread of the event loop; only the reader works in a thread of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from eyetune.errors import UserError
from eyetune.serving.reader import unexpected

if TYPE_CHECKING:
    from eyetune.serving.held import Held
    from eyetune.serving.limits import Limits
    from eyetune.serving.reader import Reader, Reading

State = Literal["waiting", "reading", "done", "failed"]
Result = TypeVar("Result")

TOGETHER = 4
"""Photographs read at a time: enough for a network, few enough to see it go on."""


class Full(UserError):
    """There is no place now; the text says of what."""


class NoMore(Full):
    """There is no place until somebody makes some."""


class Gone(UserError):
    """What is asked for is not here, or not any more."""


class Room:
    """Places and bytes for photographs on their way in; who finds none waits his turn.

    Args:
        places: how many photographs.
        size: how many bytes.
    """

    def __init__(self, places: int, size: int) -> None:
        self.places = places
        self.size = size
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size: int, patience: float) -> None:
        """Take a place and `size` bytes, in turn. Raises Full after `patience` seconds."""
        if not self._line and self._fits(size):
            self._take(size)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append((size, turn))
        try:
            await asyncio.wait_for(turn, patience)
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # granted at the very moment
                self.leave(size)
            else:
                self._line.remove((size, turn))
                self._admit()
            if isinstance(error, TimeoutError):
                raise Full("too many photographs are waiting: try again in a few minutes.") from None
            raise

    def leave(self, size: int, places: int = 1) -> None:
        """Give back a place and its bytes, or only some of the bytes."""
        self.places += places
        self.size += size
        self._admit()

    def _fits(self, size: int) -> bool:
        return self.places > 0 and self.size >= size

    def _take(self, size: int) -> None:
        self.places -= 1
        self.size -= size

    def _admit(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            size, turn = self._line.popleft()
            if turn.done():
                continue
            self._take(size)
            turn.set_result(None)


@dataclass(eq=False)
class Photograph:
    """One photograph of a page.

    Attributes:
        key: by which it is asked for.
        name: as the user's file is called.
        place: its number among the photographs of the page.
        data: the file, until it has been read.
        version: of the page when it last changed.
        reading: what came of it, once it is done.
        error: why nothing did.
        heat: its heat map as a JPEG, once somebody wanted it.
    """

    key: str
    name: str
    place: int
    data: Held | None
    state: State = "waiting"
    version: int = 0
    reading: Reading | None = None
    error: str | None = None
    heat: bytes | None = None


@dataclass(eq=False)
class Page:
    """An open page: its photographs, seen by nobody who does not know its token."""

    token: str
    seen: float
    version: int = 0
    photographs: dict[str, Photograph] = field(default_factory=dict)

    def changed(self, photograph: Photograph) -> None:
        """Note that there is something new to say of one of its photographs."""
        self.version += 1
        photograph.version = self.version

    def since(self, version: int) -> list[Photograph]:
        """Those that changed after a version."""
        return [one for one in self.photographs.values() if one.version > version]

    def in_order(self) -> list[Photograph]:
        """All, by their places."""
        return sorted(self.photographs.values(), key=lambda one: one.place)


class Desk:
    """Takes photographs in, has them read in the order they came, and keeps what came of it until it is forgotten.

    Args:
        reader: reads them.
        limits: how much there may be.
        done: called, in the reader's thread, with what has been read.
    """

    def __init__(self, reader: Reader, limits: Limits, done: Callable[[Sequence[Photograph]], None] | None) -> None:
        self.reader = reader
        self.limits = limits
        self.room = Room(limits.waiting, limits.memory)
        self.count = 0
        self._done = done
        self._pages: dict[str, Page] = {}
        self._queue: deque[tuple[Page, Photograph]] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "reader")

    def open(self) -> Page:
        """A new page. Raises Full when there are too many."""
        self.sweep()
        if len(self._pages) >= self.limits.pages:
            raise Full(f"{len(self._pages)} pages are open already: close one.")
        page = Page(secrets.token_urlsafe(24), time.monotonic())
        self._pages[page.token] = page
        return page

    def page(self, token: str) -> Page:
        """The page of a token. Raises Gone."""
        self.sweep()
        page = self._pages.get(token)
        if page is None:
            raise Gone("this page has been forgotten: load it anew.")
        page.seen = time.monotonic()
        return page

    def photograph(self, page: Page, key: str) -> Photograph:
        """One photograph of a page. Raises Gone."""
        found = page.photographs.get(key)
        if found is None:
            raise Gone("there is no such photograph here, or not any more.")
        return found

    def close(self, page: Page) -> None:
        """Forget a page and all that is on it."""
        self.forget(page, list(page.photographs.values()))
        self._pages.pop(page.token, None)

    def forget(self, page: Page, photographs: Sequence[Photograph]) -> None:
        """Forget some photographs of a page; those that wait are not read any more."""
        for one in photographs:
            page.photographs.pop(one.key, None)
            if one.state == "waiting":
                self._queue.remove((page, one))
                self._let_go(one)

    def sweep(self) -> None:
        """Forget pages that have not asked for long."""
        late = time.monotonic() - self.limits.forget
        for page in [page for page in self._pages.values() if page.seen < late]:
            self.close(page)

    def check_room_for_results(self) -> None:
        """Raise NoMore when there are as many photographs as may be kept."""
        kept = sum(len(page.photographs) for page in self._pages.values())
        if kept >= self.limits.results:
            raise NoMore(
                f"{kept} photographs are here, as many as are kept at a time: download the table, then clear the page."
            )

    def add(self, page: Page, name: str, place: int, data: Held) -> Photograph:
        """Put a photograph into the queue. Its bytes have their place in :attr:`room` already, which is given back when
        it has been read."""
        photograph = Photograph(secrets.token_urlsafe(9), name, place, data)
        page.photographs[photograph.key] = photograph
        page.changed(photograph)
        self._queue.append((page, photograph))
        self._wake.set()
        return photograph

    def ahead(self, page: Page) -> int:
        """How many photographs of others are read before the next one of this page."""
        for place, (owner, _) in enumerate(self._queue):
            if owner is page:
                return place
        return 0

    async def ask(self, work: Callable[[], Result]) -> Result:
        """Have the reader's thread do something, between two photographs."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def work(self) -> None:
        """Read what comes, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                await self._read([self._queue.popleft() for _ in range(min(TOGETHER, len(self._queue)))])

    async def _read(self, some: Sequence[tuple[Page, Photograph]]) -> None:
        for page, one in some:
            one.state = "reading"
            page.changed(one)
        files = [(one.name, one.data) for _, one in some if one.data is not None]
        try:
            found = await self.ask(lambda: self.reader.read(files))
        except Exception as fault:  # one of ours must not end the queue
            found = [(None, unexpected(fault))] * len(files)
        for (page, one), (reading, error) in zip(some, found, strict=True):
            one.reading, one.error = reading, error
            one.state = "failed" if reading is None else "done"
            self._let_go(one)
            page.changed(one)
            self.count += 1
        if self._done is not None:
            done = self._done
            try:
                await self.ask(lambda: done([one for _, one in some]))
            except UserError as fault:  # the page goes on without
                print(f"eyetune: {fault}", file=sys.stderr, flush=True)

    def _let_go(self, photograph: Photograph) -> None:
        assert photograph.data is not None
        self.room.leave(len(photograph.data))
        photograph.data.close()
        photograph.data = None

    def end(self) -> None:
        """Let go of everything; what is being read is waited for."""
        self._pages.clear()
        self._queue.clear()
        self._thread.shutdown(cancel_futures=True)
