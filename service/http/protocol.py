"""HTTP/1.1 as uvicorn speaks it, with the limits it lacks: each message and each phase of a connection ends.

| phase | limit |
|---|---|
| waiting for a request | `head_s`, later uvicorn's keep-alive time; empty lines do not count as a request |
| the head of a request | `head_s`, and `MAX_HEAD_BYTES` |
| its body | `head_s`, `BODY_GRACE_S`, a second for each `BYTES_PER_S`; `body_bytes`, and a head's around it |
| what a client still sends after the last response | ends at `LINGER_S` of silence, or `LONGEST_LINGER_S` |
| requests sent ahead | `MAX_PIPELINED` |
| a response that its client does not read | `STALL_S` for every `STALL_BYTES` |
| connections at once | `connections`: the one that has waited longest for a request makes room |

Without them a client could hold a connection and memory for ever. A request that is refused here, before the
application sees it, gets a problem with a request id, and is counted and logged like any other.

A request that asks for another protocol (`Upgrade`) is served in this one, as RFC 9110 §7.8 allows.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any, ClassVar, cast

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ditserve.service.errors import (
    HeadTooLarge,
    MalformedRequest,
    PayloadTooLarge,
    RequestTimeout,
    ServiceError,
    TooManyConnections,
)
from ditserve.service.http.middleware import BYTES_PER_S, outcome
from ditserve.service.http.problems import error_response
from ditserve.service.http.routing import UNMATCHED
from ditserve.service.telemetry import metrics

MAX_HEAD_BYTES = 32 * 1024
MAX_PIPELINED = 16
BODY_GRACE_S = 1.0
# For a client to read its last response: a socket that is closed on what it still sends would lose that.
LINGER_S, LONGEST_LINGER_S = 2.0, 20.0
STALL_S, STALL_BYTES = 20.0, 16 * 1024
RESERVE = 32  # connections beyond the limit, for probes
_SLICE = 8 * 1024  # the parser is given so much at once, so that a limit is passed by no more than this
_log = structlog.get_logger("service.http")


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The time a client has for the head of a request, and for its body; bytes of a body; connections."""

    head_s: float
    body_bytes: int
    connections: int


def bounded(connection_limits: ConnectionLimits) -> type[BoundedProtocol]:
    """Return a protocol class for `uvicorn.Config(http=…)`."""

    class Protocol(BoundedProtocol):
        limits = connection_limits

    return Protocol


class _Reading(Enum):
    """The part of a message that the parser is in the middle of."""

    NOTHING = "nothing"
    HEAD = "head"
    BODY = "body"


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[ConnectionLimits]
    _reading = _Reading.NOTHING
    # Bytes of the head, or of the body, that is being read; and those of the names and values in the head.
    _bytes = _field_bytes = 0
    # Bytes in the chunks of the body, without what is around them.
    _content = 0
    # When the body is to be there at the latest, apart from the time that its bytes add; 0: none is awaited.
    _body_until = 0.0
    # Since when no request has come, in seconds of the event loop's clock.
    waiting_since = 0.0
    # True once the connection is to end: what still comes is thrown away.
    _ending = False
    # When it ends at the latest, once its last response is written; and when something came last.
    _lingers_until: float | None = None
    _received_at = 0.0
    # True if there were too many connections when this one came.
    _crowded = False
    _fault: ServiceError | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        self._expect(self.limits.head_s)
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received_at = self.loop.time()
        if self._reading is _Reading.NOTHING:
            # Empty lines before a request mean nothing (RFC 9112 §2.2), and would stop the idle timer.
            data = data.lstrip(b"\r\n")
        for start in range(0, len(data), _SLICE):
            if self._ending or self.transport.is_closing():
                return
            self._feed(data[start : start + _SLICE])

    def _feed(self, data: bytes) -> None:
        if self._reading is _Reading.NOTHING:
            self._begin_head()
        self._bytes += len(data)
        self._parse(data)
        if self._reading is _Reading.HEAD and self._bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        if self._reading is not _Reading.BODY:
            return
        if self._bytes > self.limits.body_bytes + MAX_HEAD_BYTES:
            self._refuse(PayloadTooLarge(f"The body may be {self.limits.body_bytes} bytes."))
        elif self._bytes - self._content > self._content + MAX_HEAD_BYTES:
            self._refuse(
                PayloadTooLarge(f"Around a body may be {MAX_HEAD_BYTES} bytes, or as many as in it.")
            )

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes all behind the head for another protocol, or for nothing if the head also says
            # `Connection: close`. A new one is given the head without the upgrade.
            (position,) = upgrade.args
            head, self.parser = self._head_without_upgrade(), httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(head + data[position:])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b" ".join([self.parser.get_method(), self.url, b"HTTP/" + version])]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _should_upgrade(self) -> bool:
        # Then the base class does not begin a request that is read once more. A tunnel has no other reading.
        return self.parser.get_method() != b"CONNECT"

    # What the parser calls. An exception here ends in `send_400_response`.

    def on_message_begin(self) -> None:
        if self._reading is not _Reading.HEAD:
            self._begin_head()
        super().on_message_begin()
        self.scope["state"]["crowded"] = self._crowded

    def on_url(self, url: bytes) -> None:
        self._field_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # A trailer must not become a header of a request that was let in without it (RFC 9110 §6.5.1).
        if self._reading is _Reading.HEAD:
            self._field_bytes += len(name) + len(value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._field_bytes > MAX_HEAD_BYTES:
            self._fault = _head_too_large()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._fault = MalformedRequest(f"Send at most {MAX_PIPELINED} requests ahead.")
        if self._fault is not None:
            raise ValueError(self._fault.detail)
        # An address that is none raises here, and is refused as a part of the head.
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = cast(asyncio.Transport, _ResponseTransport(self))
        self._reading, self._bytes, self._content = _Reading.BODY, 0, 0
        self._body_until = self.loop.time() + self.limits.head_s + BODY_GRACE_S
        self._expect(self.limits.head_s + BODY_GRACE_S)
        if not self.flow.write_paused:
            self._stop_watching()

    def on_body(self, body: bytes) -> None:
        self._content += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading = _Reading.NOTHING
        self._expect(None)
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault or MalformedRequest("This is not a request of HTTP/1.1."))

    # What the transport and a response call.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.waiting_since = self.loop.time()
        self._watch_writing()
        if self._reading is _Reading.BODY and self.cycle.response_complete:
            self.end()

    def timeout_keep_alive_handler(self) -> None:
        self.end()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()
        if self.cycle is None or self.cycle.response_complete:
            self._watch_writing()

    # Ends.

    def _begin_head(self) -> None:
        self._reading, self._bytes, self._field_bytes, self._body_until = _Reading.HEAD, 0, 0, 0.0
        self._expect(self.limits.head_s)

    def _expect(self, seconds: float | None) -> None:
        """Give what is being read so many seconds; None stops the timer."""
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = None if seconds is None else self.loop.call_later(seconds, self._timed_out)

    def _timed_out(self) -> None:
        if self._owes_earlier():
            self._expect(self.limits.head_s)
        elif (rest := self._body_until + self._bytes / BYTES_PER_S - self.loop.time()) > 0.0:
            self._expect(rest)
        else:
            self._refuse(RequestTimeout(f"Send a request within {self.limits.head_s:g} s."))

    def waits(self) -> bool:
        """Return True if the connection waits for a request, for the rest of its head, or for its end."""
        if self._lingers_until is not None:
            return True
        return self._reading is not _Reading.BODY and not self._owes_earlier()

    def _owes_earlier(self) -> bool:
        """Return True if a request before the one that is being read has no whole response yet."""
        if self._reading is _Reading.BODY:
            return bool(self.pipeline)
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ServiceError) -> None:
        """Answer with `error` and end the connection, once earlier requests are answered."""
        if self._ending or self.transport.is_closing():
            return
        if self._owes_earlier():
            # The client would take an error sent now for the response to its previous request.
            self._ending, self.cycle.keep_alive = True, False
            self._expect(None)
        elif self._reading is _Reading.BODY and self.cycle.response_started:
            self.transport.abort()
        else:
            self.transport.write(_written(error))
            self.end()

    def end(self) -> None:
        """Send what was written, and close once the client has nothing more to send."""
        if self._lingers_until is not None or self.transport.is_closing():
            return
        self._ending, self._lingers_until = True, self.loop.time() + LONGEST_LINGER_S
        self.pipeline.clear()
        self.flow.resume_reading()
        if self.cycle is not None and not self.cycle.response_complete:
            # The application has not answered yet: its response would be written behind the end.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._watch_writing()
        self._expect(None)
        self._read_timer = self.loop.call_later(LINGER_S, self._linger)

    def _linger(self) -> None:
        """Close the connection, unless its client has sent something lately and may go on."""
        now = self.loop.time()
        if self._received_at + LINGER_S <= now or now >= (self._lingers_until or now):
            self.transport.close()
        else:
            self._read_timer = self.loop.call_later(LINGER_S, self._linger)

    def _watch_writing(self) -> None:
        """Cut the connection unless `STALL_BYTES` of what is written now have gone after `STALL_S`.

        To be called when nothing more will be written for now: it looks at the length of the buffer alone.
        """
        if self._write_timer is None and (unsent := self.transport.get_write_buffer_size()):
            self._write_timer = self.loop.call_later(STALL_S, self._check_writing, unsent)

    def _check_writing(self, unsent_before: int) -> None:
        self._write_timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent > max(0, unsent_before - STALL_BYTES):
            self.transport.abort()
        else:
            self._watch_writing()

    def _stop_watching(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _make_room(self) -> None:
        """End the connection that has waited longest for a request, or serve on this one only probes."""
        others: Any = self.connections - {self}
        waiting = [other for other in others if other.waits()]
        if waiting:
            longest = min(waiting, key=lambda other: other.waiting_since)
            longest.transport.abort()
            self.connections.discard(longest)
        elif len(self.connections) > self.limits.connections + RESERVE:
            self.transport.write(_written(TooManyConnections(retry_after=1)))
            # Closed on a request that is not read, it would be reset before its client reads this.
            self.end()
        else:
            self._crowded = True


class _ResponseTransport:
    """The transport as responses see it: the connection chooses when to close it, so that none is lost."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing
        self.close = protocol.end


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"The head of a request may be {MAX_HEAD_BYTES} bytes.")


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
