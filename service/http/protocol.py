"""HTTP/1.1 as uvicorn speaks it, with two limits it lacks: the time and the size of the head of a request.

Without them a client could hold a connection and memory for ever, with a head that it sends byte by byte or
that never ends. A request that is refused here, before the application sees it, gets a problem with a request
id, and is counted and logged like any other.
"""

from __future__ import annotations

import asyncio
import secrets
from http import HTTPStatus
from typing import Any, ClassVar

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ditserve.service.errors import HeadTooLarge, MalformedRequest, RequestTimeout, ServiceError
from ditserve.service.http.middleware import outcome
from ditserve.service.http.problems import error_response
from ditserve.service.http.routing import UNMATCHED
from ditserve.service.telemetry import metrics

MAX_HEAD_BYTES = 32 * 1024
_log = structlog.get_logger("service.http")


def bounded(head_timeout_s: float) -> type[BoundedProtocol]:
    """Return a protocol class for `uvicorn.Config(http=…)`.

    It gives a client `head_timeout_s` seconds to send the head of each request.
    """

    class Protocol(BoundedProtocol):
        timeout_s = head_timeout_s

    return Protocol


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A timer runs from when a head is expected until it is complete."""

    timeout_s: ClassVar[float]
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # The timer already runs for the first request of a connection, not for those that follow.
        if self._timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"The head of a request may be {MAX_HEAD_BYTES} bytes."))

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._timer = self.loop.call_later(self.timeout_s, self._timed_out)

    def _timed_out(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(RequestTimeout(f"Send the head of a request within {self.timeout_s:g} s."))
        else:
            # The client would take an error sent now for the response to its previous request.
            self._timer = self.loop.call_later(self.timeout_s, self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest("This is not a request of HTTP/1.1."))

    def _refuse(self, error: ServiceError) -> None:
        """Answer with `error` and close the connection."""
        self._stop_timer()
        transport: Any = self.transport
        if transport.is_closing():
            return
        # A client would take an error sent now for the rest of the response to its previous request.
        if self.cycle is None or self.cycle.response_complete:
            transport.write(_written(error))
        transport.close()


def _written(error: ServiceError) -> bytes:
    """Return the whole response to a request that could not be read; count and log it."""
    request_id = secrets.token_hex(16)
    response = error_response(error, {"path": "/", "state": {"request_id": request_id}})
    response.headers.update({"x-request-id": request_id, "connection": "close"})
    status = HTTPStatus(response.status_code)
    metrics.REQUESTS.labels(UNMATCHED, outcome(status)).inc()
    _log.info("request", route=UNMATCHED, status=int(status), request_id=request_id, detail=error.detail)
    head = [f"HTTP/1.1 {status} {status.phrase}".encode()]
    head += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*head, b"", bytes(response.body)])
