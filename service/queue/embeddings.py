"""Embeddings that workers share through Redis, asked from a thread that must not wait for it long.

A convenience: entries have a TTL, together they have a bound, and while Redis is slow or away there are none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import TimeoutError as Late
from typing import Any, TypeVar

from ditserve.service.errors import QueueUnavailable
from ditserve.service.queue.connection import open_client, reaching
from ditserve.service.queue.keys import Keys
from ditserve.service.telemetry.counters import CacheCounters

PATIENCE_S = 0.1  # of the asking thread
PAUSE_S = 5.0  # without asking after a failure

T = TypeVar("T")


class Embeddings(CacheCounters):
    """At most about `max_bytes` of values, each for `ttl_s` seconds after it was last written.

    Made in the event loop that is to speak to Redis; `get_many` and `put_many` are for other threads.
    """

    def __init__(self, url: str, *, namespace: str, max_bytes: int, ttl_s: float = 86400.0) -> None:
        """Raises `ValueError` for a malformed URL."""
        super().__init__()
        self._client = open_client(url, connections=4)
        self._prefix = f"{Keys(namespace).prefix}embedding:"
        self._index = f"{Keys(namespace).prefix}embeddings"  # sorted set: key → when written; expires with the last entry
        self._max_bytes, self._ttl_ms = max_bytes, round(ttl_s * 1000)
        self._loop = asyncio.get_running_loop()
        self._paused_until = 0.0

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key, None where it is not known."""
        if not keys:
            return []
        found = self._ask(lambda: self._get(keys))
        if found is None:
            self.bypasses += len(keys)
            return [None] * len(keys)
        known = sum(value is not None for value in found)
        self.hits += known
        self.misses += len(keys) - known
        return found

    def put_many(self, entries: Mapping[str, bytes]) -> None:
        self._ask(lambda: self._put(entries))

    async def aclose(self) -> None:
        await self._client.aclose()

    def _ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """None when there is no answer in time."""
        if time.monotonic() >= self._paused_until:
            asked = asyncio.run_coroutine_threadsafe(question(), self._loop)
            try:
                return asked.result(PATIENCE_S)
            except (Late, QueueUnavailable):
                asked.cancel()
                self._paused_until = time.monotonic() + PAUSE_S
        return None

    async def _get(self, keys: Sequence[str]) -> list[bytes | None]:
        async with reaching(PATIENCE_S):
            found: Any = await self._client.mget([self._prefix + key for key in keys])
        return list(found)

    async def _put(self, entries: Mapping[str, bytes]) -> None:
        now = time.time()
        async with reaching(PATIENCE_S):
            pipeline = self._client.pipeline(transaction=True)
            for key, value in entries.items():
                pipeline.set(self._prefix + key, value, px=self._ttl_ms)
            pipeline.zadd(self._index, dict.fromkeys(entries, now))
            pipeline.zremrangebyscore(self._index, "-inf", now - self._ttl_ms / 1000)
            pipeline.pexpire(self._index, self._ttl_ms)
            pipeline.zcard(self._index)
            *_, count = await pipeline.execute()
            size = max(map(len, entries.values()))  # all are of one encoder's size
            self.bytes = count * size
            excess = count - max(1, self._max_bytes // size)
            if excess > 0:
                oldest: Any = await self._client.zpopmin(self._index, excess)
                await self._client.delete(*(self._prefix + key.decode() for key, _ in oldest))
                self.evictions += len(oldest)
