"""What wakes a worker: a job became available, or one that runs was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from redis.asyncio import Redis

from ditserve.service.queue.keys import Keys
from ditserve.service.queue.subscriber import Subscriber


class Bell:
    """Rings for work; starts to listen at the first use, inside the event loop."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._rung = asyncio.Event()
        self._subscriber: Subscriber | None = None
        self._cancelled: Callable[[str], None] = lambda job_id: None

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, timeout_s: float) -> None:
        """Until it has rung since the last call, or the timeout."""
        self._subscribe()
        try:
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        except TimeoutError:
            return
        finally:
            self._rung.clear()

    def listen(self, cancelled: Callable[[str], None]) -> None:
        self._cancelled = cancelled
        self._subscribe()

    async def aclose(self) -> None:
        if self._subscriber is not None:
            await self._subscriber.aclose()

    def _subscribe(self) -> None:
        if self._subscriber is None:
            handlers = {
                self._keys.work_channel: lambda _: self.ring(),
                self._keys.cancelled_channel: lambda job_id: self._cancelled(job_id),
            }
            self._subscriber = Subscriber(self._client, handlers, connected=self.ring)
