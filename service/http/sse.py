"""Server-sent events (WHATWG HTML §9.2): a response that notices when the client goes.

Written here rather than taken from sse-starlette, which learns of the process's end through uvicorn's signal
handlers; this stream ends on the application's own event.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ditserve.service.errors import ServiceError
from ditserve.service.http.middleware import disconnected
from ditserve.service.http.problems import as_service_error

_KEEP_ALIVE = b": keep-alive\n\n"
_log = structlog.get_logger("service.http")


def encode(kind: str, data: Mapping[str, Any], *, event_id: str | None = None) -> bytes:
    """Return one event. JSON has no raw newlines, so one `data:` line is enough.

    A value that JSON cannot hold, which a worker of a later release may add, becomes null.
    """
    head = f"id: {event_id}\n" if event_id is not None else ""
    text = json.dumps(data, separators=(",", ":"), skipkeys=True, default=lambda value: None)
    return f"{head}event: {kind}\ndata: {text}\n\n".encode()


class EventStream(Response):
    """Sends encoded events until they end, the client goes, or `stop` is set; then closes their iterator.

    After `keepalive_s` seconds of silence a comment is sent, so that proxies do not cut the connection. An
    error ends the stream, and `on_error` gives the last event, which tells of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        on_error: Callable[[ServiceError], bytes],
        keepalive_s: float,
        stop: asyncio.Event | None = None,
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_error = events, on_error
        self._keepalive_s = keepalive_s
        self._stop = stop or asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        upcoming = asyncio.create_task(self._next())
        gone = asyncio.create_task(disconnected(receive))
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while True:
                waiting = {upcoming, gone, stopped}
                done, _ = await asyncio.wait(
                    waiting, timeout=self._keepalive_s, return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    return
                if upcoming in done:
                    event = upcoming.result()
                    if event is None:
                        break
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    upcoming = asyncio.create_task(self._next())
                elif stopped in done:
                    break
                else:
                    await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            for task in (upcoming, gone, stopped):
                task.cancel()
            await asyncio.wait((upcoming, gone, stopped))
            await self._events.aclose()

    async def _next(self) -> bytes | None:
        try:
            return await anext(self._events, None)
        except Exception as error:
            if not isinstance(error, ServiceError):
                _log.exception("event stream crashed")
            return self._on_error(as_service_error(error))
