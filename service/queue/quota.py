"""How many requests a key may send: a sliding window shared by every API process (the arithmetic and its scripts are `limits`')."""

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
    """What a key has left: `remaining` requests, the window anew in `reset_s` seconds."""

    allowed: bool
    quota: int
    remaining: int
    reset_s: float


class Quota:
    """Raises `ValueError` for a malformed URL."""

    def __init__(self, url: str, *, namespace: str, timeout_s: float = 3.0) -> None:
        self._client = open_client(url, connections=32)
        self._timeout_s = timeout_s
        storage = RedisStorage(
            "async+redis://",  # where it is, is the pool's affair
            implementation="redispy",
            key_prefix=f"{Keys(namespace).prefix}quota",
            connection_pool=self._client.connection_pool,  # type: ignore[arg-type]
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def take(self, name: str, per_minute: int) -> Allowance:
        """Count one request of `name` if it is within `per_minute`. Raises `QueueUnavailable`."""
        item = RateLimitItemPerMinute(per_minute)
        async with reaching(self._timeout_s):
            allowed = await self._limiter.hit(item, name)
            window = await self._limiter.get_window_stats(item, name)
        reset_s = max(0.0, window.reset_time - time.time())
        return Allowance(allowed, per_minute, max(0, window.remaining), reset_s)

    async def aclose(self) -> None:
        await self._client.aclose()
