"""The quota of an API key: requests in a sliding window that all API processes share.

The arithmetic and its scripts are those of the library `limits`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from ditserve.service.queue.connection import open_client, reaching
from ditserve.service.queue.keys import Keys

WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Allowance:
    """The rest of a key's quota: `remaining` requests of `quota`; the window ends in `reset_s` seconds."""

    allowed: bool
    quota: int
    remaining: int
    reset_s: float


class Quota:
    """The counter of requests by API key."""

    def __init__(self, url: str, *, namespace: str, timeout_s: float = 3.0) -> None:
        """Raise `ValueError` for a malformed URL."""
        self._client = open_client(url, connections=32)
        self._timeout_s = timeout_s
        storage = RedisStorage(
            "async+redis://",  # the pool knows the address
            implementation="redispy",
            key_prefix=f"{Keys(namespace).prefix}quota",
            connection_pool=self._client.connection_pool,  # type: ignore[arg-type]
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def take(self, name: str, per_minute: int) -> Allowance:
        """Count one request of `name` if it is within `per_minute`. Raise `QueueUnavailable`."""
        item = RateLimitItemPerMinute(per_minute)
        async with reaching(self._timeout_s):
            allowed = await self._limiter.hit(item, name)
            window = await self._limiter.get_window_stats(item, name)
        reset_s = max(0.0, window.reset_time - time.time())
        return Allowance(allowed, per_minute, max(0, window.remaining), reset_s)

    async def give_back(self, name: str, per_minute: int) -> None:
        """Uncount one request that `take` counted. Raise `QueueUnavailable`."""
        async with reaching(self._timeout_s):
            await self._limiter.hit(RateLimitItemPerMinute(per_minute), name, cost=-1)

    async def aclose(self) -> None:
        await self._client.aclose()
