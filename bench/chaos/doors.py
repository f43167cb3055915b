"""The APIs as clients meet them: connections, and what the document of each says that it may answer."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

EXCHANGE_TIMEOUT_S = 20.0  # after it a client asks again


@dataclass(frozen=True, slots=True)
class Door:
    """One API: its client, and its operations as a pattern of paths, with their methods and responses."""

    http: httpx.AsyncClient
    operations: Sequence[tuple[re.Pattern[str], Mapping[str, Any]]] = ()

    def documents(self, method: str, path: str, response: httpx.Response) -> bool:
        """Return True if the API's document lists a response of this status and type for the operation."""
        for pattern, methods in self.operations:
            if pattern.fullmatch(path) and method.lower() in methods:
                documented = methods[method.lower()]["responses"].get(str(response.status_code))
                kind = response.headers.get("content-type", "").partition(";")[0]
                return documented is not None and kind in documented.get("content", {kind: {}})
        return False


@asynccontextmanager
async def opened(urls: Sequence[str]) -> AsyncIterator[list[Door]]:
    """Connect to APIs and read their documents.

    No connection is kept: an API may be another process at the next request.
    """
    async with AsyncExitStack() as stack:
        doors = []
        for url in urls:
            limits = httpx.Limits(max_keepalive_connections=0)
            http = await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, timeout=EXCHANGE_TIMEOUT_S, trust_env=False, limits=limits)
            )
            paths = (await http.get("/openapi.json")).raise_for_status().json()["paths"]
            doors.append(Door(http, [(pattern(path), methods) for path, methods in paths.items()]))
        yield doors


def pattern(path: str) -> re.Pattern[str]:
    """Return the pattern of a path of the document, such as `/jobs/{job_id}`."""
    parts = re.split(r"\{\w+\}", path)
    return re.compile("[^/]+".join(map(re.escape, parts)))
