"""API keys, scopes and quotas: checked before anything of a request but its head is read. Plain ASGI.

Without a key file the service is open, and everybody may do everything.
"""

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditserve.service.api_keys import ApiKey, Keyring
from ditserve.service.errors import Forbidden, QueueUnavailable, QuotaExceeded, ServiceError, Unauthorized
from ditserve.service.http.problems import error_response
from ditserve.service.queue.queue_client import Meter
from ditserve.service.queue.quota import WINDOW_S, Allowance

# Paths that need no key: probes and metrics (for the cluster's network), the pages and what they load.
OPEN = frozenset({"/", "/session", "/docs", "/openapi.json", "/livez", "/readyz", "/startupz", "/metrics"})
# A browser cannot set a header on an event stream or a picture, so there it presents its key in this cookie.
COOKIE = "dit_key"
# Paths that need the scope `generate` and count towards a key's rate.
DRAWING = frozenset({"/generate", *(f"/v1/images/{name}" for name in ("generations", "edits", "variations"))})
# Statuses of requests that do not count.
_UNCOUNTED = frozenset({QuotaExceeded.status, QueueUnavailable.status})
GIVE_BACK_S = 0.5
CHALLENGE = {"www-authenticate": 'Bearer realm="dit"'}


class Access:
    """Refuses requests without a valid key and counts those that draw.

    Puts the key into the request's state as `key`.

    `quota` returns this process's counter, which exists once the application has started.
    """

    def __init__(self, app: ASGIApp, *, keyring: Keyring | None, quota: Callable[[], Meter]) -> None:
        self._app, self._keyring, self._quota = app, keyring, quota

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._keyring is None or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        allowance = None
        try:
            key = _authenticate(self._keyring, scope)
            if key.rate is not None and scope["method"] == "POST" and scope["path"] in DRAWING:
                allowance = await self._quota().take(key.id, key.rate)
                if not allowance.allowed:
                    raise QuotaExceeded(
                        f"This key may send {key.rate} requests a minute.", retry_after=allowance.reset_s
                    )
        except ServiceError as error:
            response = error_response(error, scope)
            if isinstance(error, Unauthorized):
                response.headers.update(CHALLENGE)
            # The body, if there is one, stays unread.
            response.headers["connection"] = "close"
            await response(scope, receive, _with_rate_limit(allowance, send))
            return
        scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, self._counted(key, allowance, send))

    def _counted(self, key: ApiKey, allowance: Allowance | None, send: Send) -> Send:
        """Return a `send` that tells the rest of the rate.

        A request does not count that is refused because its key has too many unfinished jobs, or because the
        service cannot take it. While Redis is slow the answer does not wait for the count.
        """
        if allowance is None or key.rate is None:
            return send
        rate = key.rate

        async def send_counted(message: Message) -> None:
            rest = allowance
            if message["type"] == "http.response.start" and message["status"] in _UNCOUNTED:
                with suppress(QueueUnavailable, TimeoutError):
                    async with asyncio.timeout(GIVE_BACK_S):
                        await self._quota().give_back(key.id, rate)
                    rest = replace(allowance, remaining=allowance.remaining + 1)
            await _with_rate_limit(rest, send)(message)

        return send_counted


def _authenticate(keyring: Keyring, scope: Scope) -> ApiKey:
    """Return the key of a request. Raises `Unauthorized`, `Forbidden`."""
    headers = Headers(scope=scope)
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    text = credentials.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    text = text or cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
    if not text:
        raise Unauthorized("Send an API key: Authorization: Bearer dit_…")
    key = keyring.find(text)
    if key is None:
        raise Unauthorized("This API key is unknown or was revoked.")
    if scope["path"] in DRAWING and "generate" not in key.scopes:
        raise Forbidden("This API key lacks the scope 'generate'.")
    return key


def _with_rate_limit(allowance: Allowance | None, send: Send) -> Send:
    """Add `RateLimit` and `RateLimit-Policy` to the response (draft-ietf-httpapi-ratelimit-headers-09)."""
    if allowance is None:
        return send

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["ratelimit-policy"] = f'"requests";q={allowance.quota};w={WINDOW_S}'
            headers["ratelimit"] = f'"requests";r={allowance.remaining};t={math.ceil(allowance.reset_s)}'
        await send(message)

    return send_with_headers
