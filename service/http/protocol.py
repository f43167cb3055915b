"""HTTP/1.1 as uvicorn speaks it, with two limits it lacks: the time and the size of the head of a request.

Without them a client could hold a connection and memory for ever, with a head that it sends byte by byte or
that never ends.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


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
            self._refuse(_TOO_LARGE)

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._timer = self.loop.call_later(self.timeout_s, self._timed_out)

    def _timed_out(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(_TOO_SLOW)
        else:
            # The client would take an error sent now for the response to its previous request.
            self._timer = self.loop.call_later(self.timeout_s, self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, response: bytes) -> None:
        self._stop_timer()
        transport: Any = self.transport
        if not transport.is_closing():
            transport.write(response)
            transport.close()
