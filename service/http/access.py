"""Who may do what: API keys, scopes and quotas, before anything of a request but its head is read. Plain ASGI.

Without a key file the service is open: everybody may do everything.
"""

import math
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditserve.service.api_keys import ApiKey, Keyring
from ditserve.service.errors import Forbidden, QuotaExceeded, ServiceError, Unauthorized
from ditserve.service.http.problems import answer
from ditserve.service.queue.queue_client import Meter
from ditserve.service.queue.quota import WINDOW_S, Allowance

# What anybody may see: probes and figures (for the cluster's network), the pages and what they are made of.
OPEN = frozenset({"/", "/session", "/docs", "/openapi.json", "/livez", "/readyz", "/startupz", "/metrics"})
COOKIE = "dit_key"  # how a browser presents its key where it can set no header: event streams, pictures
DRAWING = frozenset({"/generate", "/v1/images/generations"})
CHALLENGE = {"www-authenticate": 'Bearer realm="dit"'}


class Access:
    """Refuses requests without a good key, and counts those that draw. Puts the key into the request's state as `key`.

    `quota` gives the counter of this process once the application has started.
    """

    def __init__(self, app: ASGIApp, *, keyring: Keyring | None, quota: Callable[[], Meter]) -> None:
        self._app, self._keyring, self._quota = app, keyring, quota

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._keyring is None or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        allowance = None
        try:
            key = _authorised(self._keyring, scope)
            if key.rate is not None and scope["method"] == "POST" and scope["path"] in DRAWING:
                allowance = await self._quota().take(key.id, key.rate)
                if not allowance.allowed:
                    raise QuotaExceeded(
                        f"This key may send {key.rate} requests a minute.", retry_after=allowance.reset_s
                    )
        except ServiceError as error:
            response = answer(error, scope)
            if isinstance(error, Unauthorized):
                response.headers.update(CHALLENGE)
            response.headers["connection"] = "close"  # the body, if any, stays unread
            await response(scope, receive, _telling(allowance, send))
            return
        scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, _telling(allowance, send))


def _authorised(keyring: Keyring, scope: Scope) -> ApiKey:
    headers = Headers(scope=scope)
    kind, _, credentials = headers.get("authorization", "").partition(" ")
    presented = credentials.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
    presented = presented or cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
    if not presented:
        raise Unauthorized("Send an API key: Authorization: Bearer dit_…")
    key = keyring.find(presented)
    if key is None:
        raise Unauthorized("This API key is unknown or was revoked.")
    if scope["path"] in DRAWING and "generate" not in key.scopes:
        raise Forbidden("This API key lacks the scope 'generate'.")
    return key


def _telling(allowance: Allowance | None, send: Send) -> Send:
    """`RateLimit` and `RateLimit-Policy` on the answer (draft-ietf-httpapi-ratelimit-headers-09)."""
    if allowance is None:
        return send

    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["ratelimit-policy"] = f'"requests";q={allowance.quota};w={WINDOW_S}'
            headers["ratelimit"] = f'"requests";r={allowance.remaining};t={math.ceil(allowance.reset_s)}'
        await send(message)

    return telling
