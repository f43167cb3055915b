"""Text encodings that workers share through Redis, read by a thread that must not wait long for them.

They are only a cache: entries have a TTL and a bound on their size in all, and while Redis is slow or away
there are none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from ditserve.service.errors import QueueUnavailable
from ditserve.service.queue.connection import ask, open_client
from ditserve.service.queue.keys import Keys
from ditserve.service.telemetry.counters import CacheCounters

PATIENCE_S = 0.1  # for which the calling thread waits
PAUSE_S = 5.0  # after a failure, in which Redis is not asked

T = TypeVar("T")


class Embeddings(CacheCounters):
    """A cache of about `max_bytes` of values at most, each for `ttl_s` seconds after it was last written.

    Construct it in the event loop that is to speak to Redis; call `get_many` and `put_many` from other
    threads.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        max_bytes: int,
        clock: Callable[[], float],
        ttl_s: float = 86400.0,
    ) -> None:
        """`clock` is that of the queue. Raise `ValueError` for a malformed URL."""
        super().__init__()
        self._client = open_client(url, connections=4)
        self._prefix = f"{Keys(namespace).prefix}embedding:"
        # A sorted set: key → when it was written. It expires with the last entry.
        self._index = f"{Keys(namespace).prefix}embeddings"
        self._max_bytes, self._ttl_ms, self._clock = max_bytes, round(ttl_s * 1000), clock
        self._loop = asyncio.get_running_loop()
        self._paused_until = 0.0

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the value of each key, None where it is not known."""
        if not keys:
            return []
        values = self._wait_for(lambda: self._get(keys))
        if values is None:
            self.bypasses += len(keys)
            return [None] * len(keys)
        hits = sum(value is not None for value in values)
        self.hits += hits
        self.misses += len(keys) - hits
        return values

    def put_many(self, entries: Mapping[str, bytes]) -> None:
        self._wait_for(lambda: self._put(entries))

    async def aclose(self) -> None:
        await self._client.aclose()

    def _wait_for(self, command: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """Run a command in the event loop and return its answer, or None if there is none in time."""
        if time.monotonic() >= self._paused_until:
            answer = asyncio.run_coroutine_threadsafe(command(), self._loop)
            try:
                return answer.result(PATIENCE_S)
            except (FutureTimeoutError, QueueUnavailable):
                answer.cancel()
                self._paused_until = time.monotonic() + PAUSE_S
        return None

    async def _get(self, keys: Sequence[str]) -> list[bytes | None]:
        values: Any = await ask(
            self._client,
            lambda: self._client.mget([self._prefix + key for key in keys]),
            timeout_s=PATIENCE_S,
        )
        return list(values)

    async def _put(self, entries: Mapping[str, bytes]) -> None:
        # A second removal of the oldest would remove others, so the call is not repeated.
        await ask(self._client, lambda: self._write(entries), timeout_s=PATIENCE_S, repeatable=False)

    async def _write(self, entries: Mapping[str, bytes]) -> None:
        now = self._clock()
        pipeline = self._client.pipeline(transaction=True)
        for key, value in entries.items():
            pipeline.set(self._prefix + key, value, px=self._ttl_ms)
        pipeline.zadd(self._index, dict.fromkeys(entries, now))
        pipeline.zremrangebyscore(self._index, "-inf", now - self._ttl_ms / 1000)
        pipeline.pexpire(self._index, self._ttl_ms)
        pipeline.zcard(self._index)
        *_, count = await pipeline.execute()
        # All values are of one encoder's size.
        size = max(map(len, entries.values()))
        self.bytes = count * size
        excess = count - max(1, self._max_bytes // size)
        if excess > 0:
            oldest: Any = await self._client.zpopmin(self._index, excess)
            await self._client.delete(*(self._prefix + key.decode() for key, _ in oldest))
            self.evictions += len(oldest)
