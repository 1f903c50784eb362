"""Connections: where the server listens, and how long a request's head may take to come."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from typing import TYPE_CHECKING, Any

from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from eyetune.errors import ConfigError
from eyetune.serving.guard import Guard

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from eyetune.serving.limits import Limits

HEAD = 10.0
"""Seconds in which the head of a request has to come."""

_FAREWELL = 3
"""Seconds that requests have to end when the server does."""


class Punctual(H11Protocol):
    """HTTP/1.1 that hangs up on who does not finish the head of a request in :data:`HEAD` seconds (slowloris)."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Wait for a head for so long and no longer, and for nothing while a request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD, self.transport.close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises ConfigError when that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is taken on {host}: another --port, or --port 0 for a free one.") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"port {port} may not be used: ports below 1024 are for the administrator.") from None
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error}).") from None
    return found


def make_server(app: ASGIApp, limits: Limits, *, names: tuple[str, ...] = (), addresses: bool = False) -> Server:
    """A server of `app`, guarded; `run(sockets=[…])` keeps it going until it is interrupted. It logs no request: their
    paths and headers are nobody's business."""
    settings: dict[str, Any] = {"access_log": False, "log_config": None, "log_level": "error", "server_header": False}
    config = Config(
        Guard(app, names, addresses),
        http=Punctual,
        ws="none",
        lifespan="on",
        limit_concurrency=limits.connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_FAREWELL,
        proxy_headers=False,
        **settings,
    )
    return Server(config)
