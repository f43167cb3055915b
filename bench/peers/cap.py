"""The cap on requests inside a server; the rest are told at once that it is full."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Cap:
    """ASGI middleware that admits at most `cap` POST requests at a time; others, such as GET, always pass."""

    def __init__(self, app: ASGIApp, cap: int) -> None:
        self._app, self._cap, self._inside = app, cap, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self._inside >= self._cap:
            await PlainTextResponse("full", 503)(scope, receive, send)
        else:
            self._inside += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._inside -= 1
