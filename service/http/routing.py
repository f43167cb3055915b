"""The routing table, asked before a request is routed: its pattern, its methods, the bodies it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

UNMATCHED = "unmatched"
JSON, FORM = "application/json", "multipart/form-data"


def pattern(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the pattern of the path of a request, `UNMATCHED` if there is no such path."""
    # A request that got as far as its route need not be matched again.
    route = scope.get("route") or next(_of_path(routes, scope), None)
    return getattr(route, "path", UNMATCHED)


def media_types(routes: Sequence[BaseRoute], scope: Scope) -> tuple[str, ...]:
    """Return the media types of the body that the route of a request takes; empty if no route takes it."""
    route = next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)
    if route is None:
        return ()
    described = getattr(route, "openapi_extra", None) or {}
    return tuple(described.get("requestBody", {}).get("content", (JSON,)))


def methods(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the methods of a path as the header `Allow` lists them. HEAD is where GET is."""
    allowed = {method for route in _of_path(routes, scope) for method in getattr(route, "methods", ())}
    return ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))


def _of_path(routes: Sequence[BaseRoute], scope: Scope) -> Iterator[BaseRoute]:
    return (route for route in routes if route.matches(scope)[0] is not Match.NONE)
