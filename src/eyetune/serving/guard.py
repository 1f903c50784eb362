"""Who may ask: only pages of this server, only under a name it goes by; and what no answer goes without.

A page of a stranger that is open in the same browser can send requests to 127.0.0.1, too. It is known by its Origin, by
`Sec-Fetch-Site`, or, where it has pointed a name of its own here (DNS rebinding), by its Host.
"""

from __future__ import annotations

import ipaddress
import sys
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "::1")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
"""On every answer: scripts and styles of this server alone, nothing guessed, framed, kept or passed on."""


class Guard:
    """Refuses what does not come from a page of this server.

    Args:
        app: asked for the rest.
        names: host names the server goes by, beside :data:`LOCAL`.
        addresses: whether any IP address will do as a host name: where others may reach the server. (A stranger's page
            can point a name here, not an address.)
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] = (), addresses: bool = False) -> None:
        self.app = app
        self.names = frozenset(name.lower() for name in (*LOCAL, *names))
        self.addresses = addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
        if refusal is not None:
            await PlainTextResponse(refusal, 403)(scope, receive, answer)
            return
        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            # Without its text: it might name a patient.
            where = "".join(traceback.format_tb(error.__traceback__))
            print(f"eyetune: {type(error).__name__} while answering\n{where}", file=sys.stderr, flush=True)
            if not begun:
                await PlainTextResponse("A fault of EyeTune: its window says more.", 500)(scope, receive, answer)

    def refusal(self, method: str, path: str, headers: Headers) -> str | None:
        """Why a request is not answered; None when it is."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return (
                "This server is not known by that name. Open it under the address that it printed, "
                "or start it with --name."
            )
        origin = headers.get("origin")
        if origin is not None and not _same(origin, hosts[0]):
            return "A page of another site asked: refused."
        site = headers.get("sec-fetch-site", "none")
        followed = path == "/" and method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("same-origin", "none") and not followed:
            return "A page of another site asked: refused."
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name is None or "@" in host or "/" in host:
            return False
        return name in self.names or (self.addresses and _is_address(name))


def _same(origin: str, host: str) -> bool:
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
