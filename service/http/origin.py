"""The origin of a request: its caller, the host it names, and its path, as they were before any proxy.

A proxy is believed only if its address is among the trusted ones. From everybody else, other programs of this
machine included, `X-Forwarded-For`, `X-Forwarded-Proto`, `X-Forwarded-Host` and `Forwarded` (RFC 7239) say
nothing, because a client can write them as it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ditserve.service.addresses import Address, is_loopback, parsed_address, parsed_network
from ditserve.service.errors import MalformedRequest, MisdirectedRequest, ServiceError
from ditserve.service.http.problems import error_response

ANY_HOST = "*"

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]*)?")
# One header of RFC 7239. It is believed as a whole or not at all: an open quote of a client could otherwise
# swallow the start of what the proxy added.
_PAIR = r'[A-Za-z]+=(?:[^\s",;=]+|"[^"\\]*")'
_FORWARDED = re.compile(rf"\s*{_PAIR}(?:\s*[,;]\s*{_PAIR})*\s*")


class Origin:
    """Replaces a trusted proxy's account of a request for what the socket says, and removes `root_path`.

    Puts into the request's state its `hosts`, all that the request names, and the `root_path`.
    """

    def __init__(self, app: ASGIApp, *, trusted_proxies: str, root_path: str) -> None:
        self._app, self._root_path = app, root_path
        self._trusted = [parsed_network(network) for network in _parts(trusted_proxies)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            hosts = headers.getlist("host")
            peer = parsed_address(scope["client"][0]) if scope["client"] else None
            if peer is not None and self._trusts(peer):
                scope["client"] = (str(self._caller(peer, headers)), 0)
                scope["scheme"] = _scheme(headers) or scope["scheme"]
                hosts += [*_listed(headers, "x-forwarded-host"), *_forwarded(headers, "host")]
            state = scope.setdefault("state", {})
            state["hosts"], state["root_path"] = hosts, self._root_path
            # Some proxies remove the prefix and some do not.
            if scope["path"] == self._root_path or scope["path"].startswith(self._root_path + "/"):
                scope["path"] = scope["path"][len(self._root_path) :] or "/"
        await self._app(scope, receive, send)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)

    def _caller(self, peer: Address, headers: Headers) -> Address:
        """Return the right-most hop that is no trusted proxy; `peer` where two headers name two callers."""
        chains = [_listed(headers, "x-forwarded-for"), _forwarded(headers, "for")]
        callers = {self._before(peer, chain) for chain in chains if chain}
        # A proxy writes one of the headers and passes the other on as the client wrote it.
        return callers.pop() if len(callers) == 1 else peer

    def _before(self, peer: Address, chain: Sequence[str]) -> Address:
        caller = peer
        for hop in reversed(chain):
            address = parsed_address(hop)
            if address is None or not self._trusts(caller):
                break
            caller = address
        return caller


class Hosts:
    """Refuses a request that names a host which is not `allowed`, so that no web page can pose as this one.

    A page of `evil.example` whose name suddenly resolves to this machine is, to a browser, of the same origin
    as the service (DNS rebinding). The names of the loopback interface and the very address that the client
    connected to are always allowed, because no foreign page has those.
    """

    def __init__(self, app: ASGIApp, *, allowed: Iterable[str]) -> None:
        self._app, self._allowed = app, frozenset(_host_name(host) or host for host in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ServiceError as error:
                response = error_response(error, scope)
                response.headers["connection"] = "close"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        named = Headers(scope=scope).getlist("host")
        if len(named) > 1 or (not named and scope["http_version"] == "1.1"):
            raise MalformedRequest("Send one Host header.")
        if ANY_HOST in self._allowed:
            return
        reached = parsed_address(scope["server"][0]) if scope["server"] else None
        for host in scope["state"]["hosts"]:
            name = _host_name(host)
            own = name is not None and reached is not None and parsed_address(name) == reached
            if name is None or not (own or is_loopback(name) or self._allows(name)):
                raise MisdirectedRequest(
                    f"This service does not answer for the host {host[:100]!r}: ask for it by a name "
                    "in --allowed-hosts, or as localhost."
                )

    def _allows(self, name: str) -> bool:
        return name in self._allowed or any(f"*.{parent}" in self._allowed for parent in _parents(name))


def is_foreign(scope: Scope, allowed: Sequence[str]) -> bool:
    """Return True if a page of another host sends this request, unless its origin is among the `allowed`.

    Browsers name the origin of a page with every POST; other clients name none.
    """
    origin = Headers(scope=scope).get("origin")
    if origin is None or origin in allowed or ANY_HOST in allowed:
        return False
    name = _host_name(origin.partition("://")[2])
    return name is None or name not in map(_host_name, scope["state"]["hosts"])


def _host_name(host: str) -> str | None:
    """Return the name in a `Host` header without its port, None if the header is malformed.

    An address is written in the one way that `parsed_address` gives it.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    address = parsed_address(match[1])
    return match[1].lower().removesuffix(".") if address is None else str(address)


def _parents(name: str) -> Iterator[str]:
    """Yield the domains above a name: "a.b.c" is below "b.c" and "c"."""
    _, dot, parent = name.partition(".")
    while dot:
        yield parent
        _, dot, parent = parent.partition(".")


def _scheme(headers: Headers) -> str | None:
    """Return the scheme of the client's own connection as the proxies tell it, None if they do not."""
    schemes = [*_listed(headers, "x-forwarded-proto"), *_forwarded(headers, "proto")]
    return next((scheme.lower() for scheme in schemes if scheme.lower() in ("http", "https")), None)


def _listed(headers: Headers, name: str) -> list[str]:
    return [part for value in headers.getlist(name) for part in _parts(value)]


def _forwarded(headers: Headers, name: str) -> list[str]:
    """Return the values of one parameter of `Forwarded`, that of the client's own connection first."""
    text = ",".join(headers.getlist("forwarded"))
    if not _FORWARDED.fullmatch(text):
        return []
    pairs = (pair.split("=", 1) for pair in re.findall(_PAIR, text))
    return [value.strip('"') for key, value in pairs if key.lower() == name]


def _parts(text: str) -> list[str]:
    """Return the parts of a list with commas that are not empty."""
    return [part.strip() for part in text.split(",") if part.strip()]
