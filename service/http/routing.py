"""The routing table, asked before a request is routed: its pattern, and the methods of its path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

UNMATCHED = "unmatched"


def pattern(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the pattern of the path of a request, `UNMATCHED` if there is no such path."""
    return next((getattr(route, "path", UNMATCHED) for route in _of_path(routes, scope)), UNMATCHED)


def is_routed(routes: Sequence[BaseRoute], scope: Scope) -> bool:
    """Return True if a route takes this path and method."""
    return any(route.matches(scope)[0] is Match.FULL for route in routes)


def methods(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the methods of a path as the header `Allow` lists them. HEAD is where GET is."""
    allowed = {method for route in _of_path(routes, scope) for method in getattr(route, "methods", ())}
    return ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))


def _of_path(routes: Sequence[BaseRoute], scope: Scope) -> Iterator[BaseRoute]:
    return (route for route in routes if route.matches(scope)[0] is not Match.NONE)
