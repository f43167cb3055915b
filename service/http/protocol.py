"""HTTP/1.1 as uvicorn speaks it, with the two limits it lacks: how long and how large the head of a request may be.

A client that sends its head byte by byte, or without end, would otherwise hold a connection and memory for as long as it likes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bounded(head_timeout_s: float) -> type[HttpToolsProtocol]:
    """A protocol class for `uvicorn.Config(http=…)` that gives a client `head_timeout_s` to send the head of each request."""

    class BoundedProtocol(HttpToolsProtocol):
        _late: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_here()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._late is None:  # a further request on this connection
                self._expect_head()

        def on_headers_complete(self) -> None:
            self._head_is_here()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            if self._late is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._late is not None and self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(_TOO_LARGE)

        def _expect_head(self) -> None:
            self._head_bytes = 0
            self._late = self.loop.call_later(head_timeout_s, self._too_slow)

        def _too_slow(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(_TOO_SLOW)
            else:  # what is said now would be taken for the answer to the request before
                self._late = self.loop.call_later(head_timeout_s, self._too_slow)

        def _head_is_here(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _refuse(self, answer: bytes) -> None:
            self._head_is_here()
            transport: Any = self.transport
            if not transport.is_closing():
                transport.write(answer)
                transport.close()

    return BoundedProtocol
