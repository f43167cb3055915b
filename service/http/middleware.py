"""The layers that every request passes through, as plain ASGI: a disconnect stays visible to the routes.

Outermost first: `RequestContext` (id, security headers, metrics, trace), Starlette's CORS where it is on,
`Crashes` (an answer to what nobody foresaw), `access.Access` (keys and quotas), `Body` (size, time and type
of the body, before any route), `Head` (HEAD as GET).
"""

import asyncio
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditserve.service.errors import (
    Draining,
    MalformedRequest,
    PayloadTooLarge,
    RequestTimeout,
    ServiceError,
    TooManyConnections,
    TooManyUploads,
    UnsupportedMediaType,
)
from ditserve.service.http.origin import is_foreign
from ditserve.service.http.problems import error_response, media_type, require_type
from ditserve.service.http.routing import FORM, UNMATCHED, media_types, pattern
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.tracing import RequestSpan, Tracing

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
# A body gets a second more for so many of its bytes: pictures come from telephones.
BYTES_PER_S = 64 * 1024
# The bytes of all bodies that a process holds, from when they come until they are answered; at least of one.
HELD_BYTES = 128 * 2**20
_LENGTH = re.compile(r"[0-9]{1,19}")
# Paths that are asked every few seconds: logged at debug level, and not traced.
_QUIET = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
_NO_TRACING = Tracing()
# The status of a request that got no response because its client went away first.
_CLIENT_GONE = 499
_log = structlog.get_logger("service.http")
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class RequestContext:
    """Gives each request an id (the client's if it is well-formed), adds headers, counts, logs and traces.

    Puts into the request's state its `request_id`, and its `trace`, the W3C Trace Context that a job takes
    along. A request counts under the one of `routes` that it was for, also when it is refused earlier.
    """

    def __init__(self, app: ASGIApp, *, tracing: Tracing, routes: Sequence[BaseRoute]) -> None:
        self._app, self._tracing, self._routes = app, tracing, routes
        for route in (UNMATCHED, *(getattr(route, "path", UNMATCHED) for route in routes)):
            for ended in (*_OUTCOMES.values(), *_OTHERS):
                metrics.REQUESTS.labels(route, ended)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        span = self._begin(scope)
        request_id: str = scope["state"]["request_id"]
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        started = time.perf_counter()
        metrics.REQUESTS_IN_PROGRESS.inc()
        try:
            if scope["state"].get("crowded") and scope["path"] not in _QUIET:
                await _refuse_crowded(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        finally:
            metrics.REQUESTS_IN_PROGRESS.dec()
            self._end(scope, span, status or _CLIENT_GONE, time.perf_counter() - started)

    def _begin(self, scope: Scope) -> RequestSpan:
        """Fill the request's state and return the span of the request."""
        headers = Headers(scope=scope)
        own_id, parent = headers.get("x-request-id", ""), headers.get("traceparent", "")
        request_id = own_id if _REQUEST_ID.fullmatch(own_id) else secrets.token_hex(16)
        carrier = {"traceparent": parent} if _TRACEPARENT.fullmatch(parent) else {}
        tracing = _NO_TRACING if scope["path"] in _QUIET else self._tracing
        span = tracing.request(carrier)
        scope.setdefault("state", {}).update(request_id=request_id, trace=span.carrier)
        return span

    def _end(self, scope: Scope, span: RequestSpan, status: int, seconds: float) -> None:
        """Count, log and trace a request that has ended."""
        route, request_id = pattern(self._routes, scope), scope["state"]["request_id"]
        metrics.REQUESTS.labels(route, outcome(status)).inc()
        metrics.REQUEST_SECONDS.labels(route).observe(seconds)
        fields: dict[str, Any] = {"method": scope["method"], "route": route, "status": status}
        fields |= {
            "request_id": request_id,
            "ms": round(seconds * 1000, 1),
            **scope["state"].get("notes", {}),
        }
        log = _log.debug if route in _QUIET else _log.info
        log("request", **fields)
        attributes = {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "dit.request_id": request_id,
        }
        span.end(f"{scope['method']} {route}", attributes)


async def _refuse_crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a request of a connection beyond the limit, which `protocol` marks; probes are answered."""
    error = TooManyConnections("This process serves as many connections as it may.", retry_after=1)
    response = error_response(error, scope)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


# The outcomes of statuses; of others by their hundreds.
_OUTCOMES = {202: "accepted", 429: "quota", 499: "cancelled", 503: "overloaded", 504: "deadline"}
_OTHERS = ("ok", "invalid", "failed")


def outcome(status: int) -> str:
    """Return the outcome that a status stands for, one of few, so that it can label a metric."""
    return _OUTCOMES.get(status) or _OTHERS[0 if status < 400 else 1 if status < 500 else 2]


class Crashes:
    """Answers an exception that nobody foresaw, inside of CORS so that a page may read the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if scope["type"] != "http":
                raise
            _log.exception("request crashed", request_id=scope["state"]["request_id"], path=scope["path"])
            # Once a response has begun, only a cut connection can tell the client that it is incomplete.
            if begun:
                raise
            await error_response(error, scope)(scope, receive, send)


class Head:
    """Answers HEAD as GET without the body (RFC 9110 §9.3.2).

    The route sees a client that leaves once it has the head, so an event stream ends there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        await self._app({**scope, "method": "GET"}, _left, send_head)


async def _left() -> Message:
    return {"type": "http.disconnect"}


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """The bytes of a body, and of one that may hold pictures; and the time of a body, in seconds.

    Pages of the `cors_origins` may send forms.
    """

    max_bytes: int
    max_upload_bytes: int
    timeout_s: float
    cors_origins: Sequence[str] = ()


@dataclass(slots=True)
class _Received:
    """The part of a body that has come, and its bytes, which count until the request is answered."""

    chunks: list[bytes]
    bytes: int = 0


class Body:
    """Reads the whole body before the route runs, within a size and a time, and refuses other types of it.

    Each body is bounded, and so is the memory of all together: a buffer is simpler and safer than trusting
    each reader to count. After the body, `receive` is the server's own: it still reports the disconnect. A
    request that no route takes is not read: it is refused for that, whatever its body.

    A browser asks before it sends JSON to another origin, and sends a form unasked. So the forms of foreign
    pages are refused.
    """

    def __init__(self, app: ASGIApp, *, routes: Sequence[BaseRoute], limits: BodyLimits) -> None:
        self._app, self._routes, self._limits = app, routes, limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_body = scope["type"] == "http" and scope["method"] in _METHODS_WITH_BODY
        types = media_types(self._routes, scope) if has_body else ()
        if not types:
            await self._app(scope, receive, send)
            return
        received = _Received([])
        try:
            complete = await self._receive(received, scope, receive, types)
        except ServiceError as error:
            await self._refuse(error, scope, receive, send)
        else:
            if complete:
                await self._app(scope, _replaying(received.chunks, receive), send)
        finally:
            self._held -= received.bytes

    async def _receive(
        self, received: _Received, scope: Scope, receive: Receive, types: Sequence[str]
    ) -> bool:
        """Receive a body and look at its type; return False if the client went away while sending it.

        Raises:
            ServiceError: the body is not to be read to its end, or of a type that is not taken.
        """
        if scope["app"].state.draining.is_set():
            raise Draining("This process is shutting down; try again.", retry_after=1)
        headers, limits = Headers(scope=scope), self._limits
        limit = limits.max_upload_bytes if FORM in types else limits.max_bytes
        length = headers.get("content-length", "0")
        if not _LENGTH.fullmatch(length):
            raise MalformedRequest("Content-Length is not a number.")
        if int(length) > limit:
            raise PayloadTooLarge(f"The body may be {limit} bytes, not {int(length)}.")
        try:
            async with asyncio.timeout(limits.timeout_s) as timer:
                complete = await self._read(received, receive, limit, timer)
        except TimeoutError:
            raise RequestTimeout(f"Send the body within {limits.timeout_s:g} s.") from None
        if received.bytes:
            require_type(headers, types)
            if media_type(headers) == FORM and is_foreign(scope, limits.cors_origins):
                raise UnsupportedMediaType("A page of another origin sends application/json.")
        return complete

    async def _read(self, received: _Received, receive: Receive, limit: int, timer: asyncio.Timeout) -> bool:
        began = asyncio.get_running_loop().time()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            received.bytes += len(chunk)
            self._held += len(chunk)
            if received.bytes > limit:
                raise PayloadTooLarge(f"The body may be {limit} bytes.")
            if received.bytes > self._limits.max_bytes and self._held > max(HELD_BYTES, limit):
                raise TooManyUploads("This process holds as many pictures as it may.", retry_after=1)
            received.chunks.append(chunk)
            if not message.get("more_body", False):
                return True
            timer.reschedule(began + self._limits.timeout_s + received.bytes / BYTES_PER_S)

    async def _refuse(self, error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(error, scope)
        if isinstance(error, PayloadTooLarge | RequestTimeout | Draining | TooManyUploads):
            response.headers["connection"] = "close"
        await response(scope, receive, send)


def _replaying(chunks: list[bytes], receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, and then what the server's own gives.

    The body is given away: nothing of it is kept here.
    """
    pending = [b"".join(chunks)]
    chunks.clear()

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay


async def disconnected(receive: Receive) -> None:
    """Return once the client has gone. To be awaited after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
