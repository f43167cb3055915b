"""One subscription that outlives its connection.

Pub/sub is a hint, never the truth: messages are lost while the connection is away, so `connected` is called
after every (re)connection, once the server has confirmed the subscription, and its owner then reads the state
it cares about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

PING_EVERY_S = 5.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.05, 2.0


class Subscriber:
    """Calls `handlers[channel](message)` from a task of its own; handlers and `connected` return at once and
    never raise.
    """

    def __init__(
        self, client: Redis, handlers: Mapping[str, Callable[[str], None]], *, connected: Callable[[], None]
    ) -> None:
        self._client = client
        self._handlers = {channel.encode(): handler for channel, handler in handlers.items()}
        self._connected = connected
        self._live = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def live(self) -> bool:
        return self._live.is_set()

    async def wait_live(self) -> None:
        """Until the subscription stands."""
        await self._live.wait()

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
                    for _ in self._handlers:
                        await self._next(pubsub)  # the server's confirmations come first
                    self._live.set()
                    self._connected()
                    delay = FIRST_DELAY_S
                    await self._deliver(pubsub)
            except (RedisError, OSError):
                self._live.clear()
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)

    async def _deliver(self, pubsub: PubSub) -> None:
        while True:
            message = await self._next(pubsub)
            if message["type"] == "message":
                self._handlers[message["channel"]](message["data"].decode())

    async def _next(self, pubsub: PubSub) -> dict[str, Any]:
        """The next message of any kind; a connection silent even after a ping is given up."""
        for _ in range(2):
            message: dict[str, Any] | None = await pubsub.get_message(timeout=PING_EVERY_S)
            if message is not None:
                return message
            await pubsub.ping()
        raise RedisConnectionError("the subscription went silent")
