"""What every request passes before anything reads it: count, password, size and time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from modeldemo import refusals
from modeldemo.auth import Users
from modeldemo.images import MAX_BYTES
from modeldemo.limits import Limits
from modeldemo.metrics import Metrics

# The paths that are not the page's, with the methods that each answers.
ROUTES = {
    "/healthz": "GET, HEAD",
    "/metrics": "GET, HEAD",
    "/v1/models": "GET, HEAD",
    "/v1/chat/completions": "POST",
}
OPEN = frozenset({"/healthz"})  # says nothing that a password protects, and load balancers ask it

# A picture at its limit in base64, and room for the conversation.
MAX_BODY = MAX_BYTES * 4 // 3 + 4 * 1024 * 1024

_TOO_LONG = f"the request is over the limit of {MAX_BODY // 2**20} MiB; send a smaller picture"
_TOO_SLOW = "the request's body did not arrive in time; send it again"
_NO_PASSWORD = "this server asks for a user and a password, or the password as an API key"
_CHALLENGE = 'Basic realm="modeldemo", charset="UTF-8"'


class Gate:
    """Counts requests, asks for passwords, and cuts bodies off that are too long or too slow."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, limits: Limits, users: Users | None = None
    ) -> None:
        self.app = app
        self.requests = metrics.requests
        self.limits = limits
        self.users = users

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = _route(scope["path"])
        body = _Body(receive, self.limits)
        status = 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status in (401, 408, 413):  # do not read on what is not wanted
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal:
                await refusals.response(refusal)(scope, receive, noted)
            else:
                await self.app(scope, body.receive, noted)
        except ClientDisconnect:  # before its body was whole
            status = 499
        except Exception:
            status = 500
            raise
        finally:
            self.requests.labels(route, str(status)).inc()

    def _refusal(self, scope: Scope) -> HTTPException | None:
        headers = dict(scope["headers"])
        if self.users and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"").decode("latin-1")
            if not self.users.allows(given):
                return HTTPException(401, _NO_PASSWORD, {"WWW-Authenticate": _CHALLENGE})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            return HTTPException(413, _TOO_LONG)
        return None


def _route(path: str) -> str:
    """The label that counts a path: one for every path would let any caller fill the memory."""
    if path in ROUTES:
        return path
    return "/v1/models" if path.startswith("/v1/models/") else "page"


class _Body:
    """A request's body as it arrives, within its limits of size and time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._idle = limits.idle_seconds
        self._until = time.monotonic() + limits.body_seconds
        self._length = 0
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:  # what comes now is only that the client left, whenever that is
            return await self._receive()
        patience = min(self._idle, self._until - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(patience, 0))
        except asyncio.TimeoutError:
            raise HTTPException(408, _TOO_SLOW) from None
        self._length += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._length > MAX_BODY:
            raise HTTPException(413, _TOO_LONG)
        return message


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which hangs up on who does not finish a request's header in time."""

    def __init__(self, *args: Any, patience: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._patience = patience
        self._alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._alarm:
            self._alarm.cancel()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if self._between_requests:
            self._alarm = self._alarm or self.loop.call_later(self._patience, self._hang_up)
        elif self._alarm:
            self._alarm.cancel()
            self._alarm = None

    def _hang_up(self) -> None:
        self._alarm = None
        if self._between_requests:
            self.transport.abort()
