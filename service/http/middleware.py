"""What every request passes through, as plain ASGI: no wrapping of `receive` that would hide a disconnect.

Outermost first: `RequestContext` (id, security headers, metrics), `access.Access` (keys and quotas), `Body` (size, time and type of the body, before any route).
"""

import asyncio
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditserve.service.errors import Draining, MalformedRequest, PayloadTooLarge, RequestTimeout, ServiceError
from ditserve.service.http.problems import answer, require_json
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.tracing import NoSpan, Tracing

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CARRIES_BODY = frozenset({"POST", "PUT", "PATCH"})
_UNMEASURED = "unmatched"
_QUIET = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
_GONE = 499  # nothing was answered: the client went away first
_log = structlog.get_logger("service.http")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class RequestContext:
    """Gives the request its id (the client's if it is well-formed), echoes it, adds security headers, counts, and traces.

    Puts into the request's state its `request_id`, and as `trace` what a job takes along (W3C Trace Context). Requests are counted
    by the one of `routes` that they were for, also when they are refused before anybody looks for it.
    """

    def __init__(self, app: ASGIApp, *, tracing: Tracing, routes: Sequence[BaseRoute]) -> None:
        self._app, self._tracing, self._routes = app, tracing, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        offered, parent = headers.get("x-request-id", ""), headers.get("traceparent", "")
        request_id = offered if _REQUEST_ID.fullmatch(offered) else secrets.token_hex(16)
        carrier = {"traceparent": parent} if _TRACEPARENT.fullmatch(parent) else {}
        span = NoSpan(carrier) if scope["path"] in _QUIET else self._tracing.request(carrier)
        scope.setdefault("state", {}).update(request_id=request_id, trace=span.carrier)
        status: int | None = None

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        started = time.perf_counter()
        metrics.REQUESTS_IN_PROGRESS.inc()
        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            _log.exception("request crashed", request_id=request_id, path=scope["path"])
            if status is not None:  # the answer has begun: cutting the connection is the only truth left
                raise
            await answer(error, scope)(scope, receive, send_named)
        finally:
            metrics.REQUESTS_IN_PROGRESS.dec()
            seconds = time.perf_counter() - started
            fields = _record(scope, self._route(scope), request_id, status or _GONE, seconds)
            span.end(
                f"{scope['method']} {fields['route']}",
                {
                    "http.request.method": scope["method"],
                    "http.route": fields["route"],
                    "http.response.status_code": fields["status"],
                    "dit.request_id": request_id,
                },
            )

    def _route(self, scope: Scope) -> str:
        """The pattern of the request's path."""
        if "route" in scope:
            return str(scope["route"].path)
        known = (route for route in self._routes if route.matches(scope)[0] != Match.NONE)
        return getattr(next(known, None), "path", _UNMEASURED)


def _record(scope: Scope, route: str, request_id: str, status: int, seconds: float) -> dict[str, Any]:
    """Into metrics and the log; gives the fields of the log line."""
    metrics.REQUESTS.labels(route, outcome(status)).inc()
    metrics.REQUEST_SECONDS.labels(route).observe(seconds)
    fields = {"method": scope["method"], "route": route, "status": status, "request_id": request_id}
    log = _log.debug if route in _QUIET else _log.info
    log("request", **fields, ms=round(seconds * 1000, 1), **scope["state"].get("notes", {}))
    return fields


def outcome(status: int) -> str:
    """The outcome a status stands for: few values, so that they can label a metric."""
    named = {202: "accepted", 429: "quota", 499: "cancelled", 503: "overloaded", 504: "deadline"}
    return named.get(status) or ("ok" if status < 400 else "invalid" if status < 500 else "failed")


class Body:
    """Reads the whole body before the route runs, within a size and a time, and refuses what is not JSON.

    Bodies here are small documents, so a bounded buffer is simpler and safer than trusting each reader to count. After the
    body, `receive` is the server's own: it still reports the disconnect.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _CARRIES_BODY:
            await self._app(scope, receive, send)
            return
        try:
            self._refuse_while_draining(scope)
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(Headers(scope=scope), receive)
            if body:
                require_json(Headers(scope=scope))
        except TimeoutError:
            await self._refuse(
                RequestTimeout(f"Send the body within {self._timeout_s:g} s."), scope, receive, send
            )
        except ServiceError as error:
            await self._refuse(error, scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    def _refuse_while_draining(self, scope: Scope) -> None:
        draining = scope["app"].state.draining
        if draining.is_set():
            raise Draining("This process is shutting down; try again.", retry_after=1)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None when the client went away while sending it."""
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise MalformedRequest("Content-Length is not a number.")
        if int(length) > self._max_bytes:
            raise PayloadTooLarge(f"The body may be {self._max_bytes} bytes, not {int(length)}.")
        chunks: list[bytes] = []
        total = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            total += len(chunk)
            if total > self._max_bytes:
                raise PayloadTooLarge(f"The body may be {self._max_bytes} bytes.")
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _refuse(self, error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
        response = answer(error, scope)
        if isinstance(error, PayloadTooLarge | RequestTimeout | Draining):
            response.headers["connection"] = "close"
        await response(scope, receive, send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    pending: Iterable[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        for message in pending:
            return message
        return await receive()

    return replay


async def disconnected(receive: Receive) -> None:
    """Returns once the client has gone. To be awaited after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
