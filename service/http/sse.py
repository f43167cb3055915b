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
from ditserve.service.http.streams import Stream

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
    """Sends encoded events until they end, the client goes, or the stream has to end; then closes both.

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
        stream: Stream,
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_error = events, on_error
        self._keepalive_s = keepalive_s
        self._stream = stream
        # True while nothing was sent since the last look, and while something is being sent.
        self._silent, self._sending = True, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send_events(send))
        gone = asyncio.create_task(disconnected(receive))
        stopped = asyncio.create_task(self._stream.ended.wait())
        tasks = (sending, gone, stopped)
        try:
            done: set[asyncio.Task[Any]] = set()
            while not done:
                self._silent = True
                done, _ = await asyncio.wait(
                    tasks, timeout=self._keepalive_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done and self._silent and not self._sending:
                    await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
            if gone in done:
                return
            if sending in done:
                sending.result()
            await send({"type": "http.response.body", "body": b""})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._events.aclose()
            self._stream.close()

    async def _send_events(self, send: Send) -> None:
        async for events in self._with_error():
            self._silent, self._sending = False, True
            await send({"type": "http.response.body", "body": events, "more_body": True})
            self._sending = False

    async def _with_error(self) -> AsyncGenerator[bytes]:
        try:
            async for events in self._events:
                yield events
        except Exception as error:
            if not isinstance(error, ServiceError):
                _log.exception("event stream crashed")
            yield self._on_error(as_service_error(error))
