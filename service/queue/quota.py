"""The quota of an API key: requests in a sliding window that all API processes share.

The arithmetic and its scripts are those of the library `limits`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import OutOfMemoryError

from ditserve.service.queue.connection import ask, open_client
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
        # A repeated call counts the request once more at worst.
        allowed = await ask(self._client, lambda: self._hit(item, name), timeout_s=self._timeout_s)
        window = await ask(
            self._client, lambda: self._limiter.get_window_stats(item, name), timeout_s=self._timeout_s
        )
        reset_s = max(0.0, window.reset_time - time.time())
        return Allowance(allowed, per_minute, max(0, window.remaining), reset_s)

    async def _hit(self, item: RateLimitItem, name: str) -> bool:
        try:
            return await self._limiter.hit(item, name)
        except OutOfMemoryError:
            # Nothing can be counted, and nothing new can be queued either; replays still work.
            return True

    async def give_back(self, name: str, per_minute: int) -> None:
        """Uncount one request that `take` counted. Raise `QueueUnavailable`.

        It is not repeated after a lost answer, because the request would be uncounted twice.
        """
        item = RateLimitItemPerMinute(per_minute)
        await ask(
            self._client,
            lambda: self._limiter.hit(item, name, cost=-1),
            timeout_s=self._timeout_s,
            repeatable=False,
        )

    async def aclose(self) -> None:
        await self._client.aclose()
