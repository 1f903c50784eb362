"""What can be asked of the server: the page, the model, photographs in, results out, the table."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from eyetune.errors import UserError
from eyetune.serving.card import about, card
from eyetune.serving.desk import Desk, Full, Gone, NoMore, Page, Photograph
from eyetune.serving.held import Held

if TYPE_CHECKING:
    from eyetune.serving.limits import Limits
    from eyetune.serving.reader import Reader

TOKEN, NAME, PLACE = "X-EyeTune-Page", "X-EyeTune-Name", "X-EyeTune-Place"
"""Headers of the page's own requests. No other site's page can send them: the browser would ask first."""

TYPES = ("application/octet-stream", "application/dicom", "image/")
"""What a photograph may be sent as; what it is, its content says."""

_LONGEST_NAME = 1024
_GRACE, _SLOWEST = 60.0, 64 * 1024
"""A body has so many seconds, and one more for each so many bytes of the largest one."""

_SWEEP = 30.0

_FILES = {
    "/": ("page.html", "text/html"),
    **{f"/{name}": (name, "text/javascript") for name in ("serve.js", "cards.js", "files.js")},
    "/serve.css": ("serve.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class Refused(Exception):
    """An answer that is a refusal: its status and its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def make_app(reader: Reader, limits: Limits, done: Callable[[Sequence[Photograph]], None] | None = None) -> Starlette:
    """The application over a reader.

    Args:
        reader: reads the photographs.
        limits: how much there may be.
        done: called, in the reader's thread, with what has been read.
    """
    desk = Desk(reader, limits, done)
    asked = _Answers(reader, limits, desk)

    @contextlib.asynccontextmanager
    async def open_desk(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(desk.work()), asyncio.create_task(_sweep(desk))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            desk.end()

    app = Starlette(
        routes=[
            *(Route(path, _file) for path in (*_FILES, "/style.css")),
            Route("/api/model", asked.model),
            Route("/api/page", asked.open, methods=["POST"]),
            Route("/api/page", asked.close, methods=["DELETE"]),
            Route("/api/photographs", asked.listing),
            Route("/api/photographs", asked.take, methods=["POST"]),
            Route("/api/photographs", asked.clear, methods=["DELETE"]),
            Route("/api/photographs/{key}", asked.forget, methods=["DELETE"]),
            Route("/api/photographs/{key}/preview", asked.preview),
            Route("/api/photographs/{key}/heat", asked.heat),
            Route("/api/table.csv", asked.table),
        ],
        exception_handlers={Refused: _refused, NoMore: _no_more, Full: _full, Gone: _gone, UserError: _mistake},
        lifespan=open_desk,
    )
    app.state.desk = desk
    return app


class _Answers:
    """The answers; each is a method of what is asked."""

    def __init__(self, reader: Reader, limits: Limits, desk: Desk) -> None:
        self.reader = reader
        self.limits = limits
        self.desk = desk
        self._about = about(reader, limits)

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._about)

    async def open(self, request: Request) -> Response:
        _check_no_body(request)
        return JSONResponse({"page": self.desk.open().token}, 201)

    async def close(self, request: Request) -> Response:
        self.desk.close(self._page(request))
        return Response(status_code=204)

    async def listing(self, request: Request) -> Response:
        """What changed since a version, and how far it all is."""
        page = self._page(request)
        since = _number(request.query_params.get("since", "0"))
        point = self._point(request)
        states = [one.state for one in page.photographs.values()]
        return JSONResponse(
            {
                "version": page.version,
                "photographs": [card(self.reader, one, point) for one in page.since(since)],
                "total": len(states),
                "waiting": states.count("waiting"),
                "reading": states.count("reading"),
                "ahead": self.desk.ahead(page),
            }
        )

    async def take(self, request: Request) -> Response:
        """A photograph in, as the whole body."""
        page = self._page(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith(TYPES):
            raise Refused(415, f"A photograph is sent as {TYPES[0]} or {TYPES[2]}…, and nothing around it.")
        name, place = _name(request), _number(request.headers.get(PLACE, "0"))
        declared = _number(request.headers.get("content-length", str(self.limits.upload)))
        if declared > self.limits.upload:
            raise Refused(413, self._too_large())
        self.desk.check_room_for_results()
        await self.desk.room.enter(declared, self.limits.patience)
        data = Held(declared)
        try:
            await self._receive(request, data, declared)
            page = self._page(request)  # it may have been closed meanwhile
            self.desk.check_room_for_results()
        except BaseException:
            data.close()
            self.desk.room.leave(declared)
            raise
        self.desk.room.leave(declared - len(data), places=0)
        photograph = self.desk.add(page, name, place, data)
        return JSONResponse({"key": photograph.key}, 201)

    async def _receive(self, request: Request, into: Held, most: int) -> None:
        """Take the body in as it comes. Raises Refused for one too large or too slow, whatever its head says."""
        latest = time.monotonic() + _GRACE + self.limits.upload / _SLOWEST
        stream = request.stream()
        while True:
            try:
                part = await asyncio.wait_for(anext(stream), self.limits.idle)
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise Refused(408, "Nothing came for too long: send it again.") from None
            except ClientDisconnect:
                raise Refused(400, "The sender has gone.") from None
            if len(into) + len(part) > most:
                raise Refused(413, self._too_large())
            if time.monotonic() > latest:
                raise Refused(408, "It came too slowly: send it again.")
            into.add(part)

    def _too_large(self) -> str:
        return f"A photograph may have {self.limits.upload / (1 << 20):g} MiB here; this one has more."

    async def clear(self, request: Request) -> Response:
        """Forget all photographs of the page, or with `?waiting` those that wait."""
        page = self._page(request)
        some = list(page.photographs.values())
        if "waiting" in request.query_params:
            some = [one for one in some if one.state == "waiting"]
        self.desk.forget(page, some)
        return JSONResponse({"forgotten": [one.key for one in some]})

    async def forget(self, request: Request) -> Response:
        page = self._page(request)
        self.desk.forget(page, [self._photograph(request, page)])
        return Response(status_code=204)

    async def preview(self, request: Request) -> Response:
        reading = self._photograph(request, self._page(request)).reading
        if reading is None:
            raise Gone("there is no picture of it yet.")
        return Response(reading.preview, media_type="image/jpeg")

    async def heat(self, request: Request) -> Response:
        photograph = self._photograph(request, self._page(request))
        reading = photograph.reading
        if reading is None:
            raise Gone("there is no heat map of it yet.")
        if photograph.heat is None:
            photograph.heat = await self.desk.ask(lambda: self.reader.heat(reading))
        return Response(photograph.heat, media_type="image/jpeg")

    async def table(self, request: Request) -> Response:
        """All that has been read, as `eyetune predict` writes it."""
        page, point = self._page(request), self._point(request)
        rows = [
            self.reader.line(point, self.reader.row(point, one.name, one.reading, one.error))
            for one in page.in_order()
            if one.state in ("done", "failed")
        ]
        return Response(
            self.reader.header(point) + b"".join(rows),
            media_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": 'attachment; filename="eyetune-research-use.csv"'},
        )

    def _page(self, request: Request) -> Page:
        return self.desk.page(request.headers.get(TOKEN, ""))

    def _photograph(self, request: Request, page: Page) -> Photograph:
        return self.desk.photograph(page, request.path_params["key"])

    def _point(self, request: Request) -> str:
        point = request.query_params.get("point", self.reader.point)
        self.reader.predictor(point)
        return point


def _name(request: Request) -> str:
    """The photograph's name, as its header says it: percent-encoded UTF-8."""
    name = unquote(request.headers.get(NAME, ""), errors="replace")
    if not name or len(name) > _LONGEST_NAME:
        raise Refused(400, f"A photograph has a name of 1 to {_LONGEST_NAME} characters, in the header {NAME}.")
    return name


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Refused(400, "A whole number was expected.")
    return int(text)


def _check_no_body(request: Request) -> None:
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        raise Refused(400, "Nothing is sent with this.")


@cache
def _content(path: str) -> tuple[bytes, str]:
    if path == "/style.css":  # the one of every page that EyeTune writes
        return files("eyetune.pages").joinpath("templates/style.css").read_bytes(), "text/css"
    name, kind = _FILES[path]
    return files("eyetune.serving").joinpath(name).read_bytes(), kind


async def _file(request: Request) -> Response:
    content, kind = _content(request.url.path)
    return Response(content, media_type=kind)


def _said(status: int, text: str, **headers: str) -> Response:
    # The connection stays: who still sends what was refused would never see why. What comes is thrown away, for as long
    # as the head of a request may take (server.py).
    return PlainTextResponse(text[:1].upper() + text[1:], status, headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _said(error.status, str(error), **({"Connection": "close"} if error.status == 408 else {}))


async def _full(request: Request, error: Exception) -> Response:
    return _said(503, str(error), **{"Retry-After": "5"})


async def _no_more(request: Request, error: Exception) -> Response:
    return _said(507, str(error))


async def _gone(request: Request, error: Exception) -> Response:
    return _said(404, str(error))


async def _mistake(request: Request, error: Exception) -> Response:
    return _said(400, str(error))


async def _sweep(desk: Desk) -> None:
    while True:
        await asyncio.sleep(min(_SWEEP, desk.limits.forget))
        desk.sweep()
