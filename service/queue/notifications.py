"""Notifications by Redis pub/sub: a subscription that outlives its connection, and a worker's.

Pub/sub is a hint, never the truth. Messages are lost while the connection is away, so `connected` is called
after every (re)connection, once the server has confirmed the subscription; its owner then reads the state it
depends on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ditserve.service.jobs import ANY_FLOW
from ditserve.service.queue.keys import Keys

PING_EVERY_S = 5.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.05, 2.0  # between attempts to connect

log = structlog.get_logger()


class Subscriber:
    """A task that calls `handlers[channel](message)`.

    Handlers and `connected` return at once and never raise.
    """

    def __init__(
        self, client: Redis, handlers: Mapping[str, Callable[[str], None]], *, connected: Callable[[], None]
    ) -> None:
        self._client = client
        self._handlers = {channel.encode(): handler for channel, handler in handlers.items()}
        self._connected = connected
        self._live = False
        self._task = asyncio.create_task(self._run())

    @property
    def live(self) -> bool:
        """Return whether messages are delivered at this moment."""
        return self._live

    async def aclose(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        delay = FIRST_DELAY_S
        while True:
            try:
                async with self._client.pubsub() as pubsub:
                    await pubsub.subscribe(*self._handlers)
                    # The server's confirmations come before all messages.
                    for _ in self._handlers:
                        await self._next_message(pubsub)
                    self._live = True
                    self._connected()
                    delay = FIRST_DELAY_S
                    await self._deliver(pubsub)
            except (RedisError, OSError):
                self._live = False
            except Exception:
                # Without its notifications a process goes on, but slowly.
                self._live = False
                log.exception("the subscription failed")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)

    async def _deliver(self, pubsub: PubSub) -> None:
        while True:
            message = await self._next_message(pubsub)
            if message["type"] == "message":
                self._handlers[message["channel"]](message["data"].decode(errors="replace"))

    async def _next_message(self, pubsub: PubSub) -> dict[str, Any]:
        """Return the next message of any kind. Give up a connection that stays silent even after a ping."""
        for _ in range(2):
            message: dict[str, Any] | None = await pubsub.get_message(timeout=PING_EVERY_S)
            if message is not None:
                return message
            await pubsub.ping()
        raise RedisConnectionError("the subscription went silent")


class WorkNotifications:
    """Wakes a worker when a job became available, and tells it of cancelled jobs.

    It subscribes at the first use, inside the event loop.
    """

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._notified = asyncio.Event()
        self._flows: set[str] = set()
        self._subscriber: Subscriber | None = None
        self._cancelled: Callable[[str], None] = lambda job_id: None

    def notify(self, *flows: str) -> None:
        """End the current `wait`, or the next one, which then also returns `flows`."""
        self._flows.update(flows)
        self._notified.set()

    async def wait(self, timeout_s: float) -> frozenset[str]:
        """Return once there was a notification since the last call, or after the timeout.

        The answer holds the flows in which a job became available since then. `ANY_FLOW` is among them if the
        flow does not matter, and after the timeout.
        """
        self._subscribe()
        try:
            async with asyncio.timeout(timeout_s):
                await self._notified.wait()
        except TimeoutError:
            self._flows.add(ANY_FLOW)
        self._notified.clear()
        flows = frozenset(self._flows)
        self._flows.clear()
        return flows

    def watch(self, cancelled: Callable[[str], None]) -> None:
        """From now on call `cancelled(job_id)` for every running job that is cancelled, on any worker."""
        self._cancelled = cancelled
        self._subscribe()

    async def aclose(self) -> None:
        if self._subscriber is not None:
            await self._subscriber.aclose()

    def _subscribe(self) -> None:
        if self._subscriber is None:
            handlers = {
                self._keys.work_channel: self.notify,
                self._keys.cancelled_channel: lambda job_id: self._cancelled(job_id),
            }
            self._subscriber = Subscriber(self._client, handlers, connected=lambda: self.notify(ANY_FLOW))
