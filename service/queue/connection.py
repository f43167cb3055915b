"""The Redis connection: how clients are opened, how scripts run, and what a failing server means.

The only place that knows redis-py's defaults, and overrides them. No retry inside the client: a retried write may have happened;
here only scripts that may be repeated are. No timeout inside the client either: its `asyncio.wait_for` costs a task per command and
can swallow a cancellation before Python 3.12; `reaching` sets the limits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    MasterDownError,
    MaxConnectionsError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import QueueUnavailable

RETRY_AFTER_S = 2.0
CONNECT_S = 5.0
_PASSING = (RedisConnectionError, RedisTimeoutError, OSError)
_REFUSALS = {
    "MISCONF": "cannot persist writes",
    "NOREPLICAS": "has too few replicas",
    "UNKILLABLE": "is busy",
    "BUSY": "is busy",
}
_MEANINGS: tuple[tuple[type[RedisError], str], ...] = (
    (MaxConnectionsError, "has no connection free"),
    (AuthenticationError, "refuses the credentials"),
    (AuthorizationError, "refuses the credentials"),
    (OutOfMemoryError, "is out of memory"),
    (ReadOnlyError, "is read-only"),
    (ClusterDownError, "cluster is down"),
    (MasterDownError, "primary is down"),
    (RedisTimeoutError, "did not answer in time"),
    (RedisConnectionError, "cannot be reached"),
)


def open_client(url: str, *, connections: int) -> Redis:
    """A client without timeouts of its own: `reaching` sets them.

    `url`: redis://, rediss:// or unix://. Raises `ValueError` for any other.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=None,
        socket_timeout=None,
        socket_connect_timeout=CONNECT_S,
        retry=Retry(NoBackoff(), 0),
        client_name="dit",
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
    )
    return Redis.from_pool(pool)


@asynccontextmanager
async def reaching(timeout_s: float | None) -> AsyncIterator[None]:
    """Bounds what is awaited inside, and turns what a failing server raises into `QueueUnavailable`; a fault of ours stays what
    it is."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except RedisError as error:
        meaning = _meaning(error)
        if meaning is None:
            raise
        raise QueueUnavailable(f"Redis {meaning}.", retry_after=RETRY_AFTER_S) from error
    except TimeoutError as error:
        raise QueueUnavailable("Redis did not answer in time.", retry_after=RETRY_AFTER_S) from error
    except OSError as error:
        raise QueueUnavailable("Redis cannot be reached.", retry_after=RETRY_AFTER_S) from error


def _meaning(error: RedisError) -> str | None:
    for kind, meaning in _MEANINGS:
        if isinstance(error, kind):
            return meaning
    if isinstance(error, ResponseError):
        return _REFUSALS.get(str(error).partition(" ")[0])
    return None


class Scripts:
    """The Lua scripts of `lua/`, each behind the shared prelude, run by hash and sent again to a server that
    forgot them.
    """

    def __init__(self, client: Redis, keys: Sequence[str], *, timeout_s: float, attempts: int = 3) -> None:
        folder = files("service.queue") / "lua"
        prelude = (folder / "prelude.lua").read_text()
        self._client = client
        self._keys = tuple(key.encode() for key in keys)
        self._timeout_s, self._attempts = timeout_s, attempts
        self._sources = {
            entry.name.removesuffix(".lua"): prelude + entry.read_text()
            for entry in folder.iterdir()
            if entry.name.endswith(".lua") and entry.name != "prelude.lua"
        }
        self._hashes = {
            name: hashlib.sha1(source.encode()).hexdigest() for name, source in self._sources.items()
        }

    async def load(self) -> None:
        """Send every script to the server."""
        async with reaching(self._timeout_s):
            pipeline = self._client.pipeline(transaction=False)
            for source in self._sources.values():
                pipeline.script_load(source)
            await pipeline.execute()

    async def run(self, name: str, *args: bytes | str | float, repeatable: bool = True) -> Any:
        """Run one script. `repeatable`: a second run after a lost answer does no harm, so it is tried again.

        Raises `QueueUnavailable`.
        """
        attempts = self._attempts if repeatable else 1
        async with reaching(None):
            for attempt in range(1, attempts + 1):
                try:
                    async with asyncio.timeout(self._timeout_s):
                        return await self._evaluate(name, args)
                except _PASSING:
                    if attempt == attempts:
                        raise
                    await asyncio.sleep(0.05 * 2**attempt)

    async def _evaluate(self, name: str, args: Sequence[bytes | str | float]) -> Any:
        try:
            return await self._client.evalsha(self._hashes[name], len(self._keys), *self._keys, *args)
        except NoScriptError:
            return await self._client.eval(self._sources[name], len(self._keys), *self._keys, *args)
