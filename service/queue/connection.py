"""The Redis connection: how clients are opened, how scripts run, and which errors a failing server raises.

The only place that knows redis-py's defaults, and overrides them. The client does not retry, because a write
that is retried may have happened already; `Scripts` repeats those that may be repeated. The client has no
timeouts either: its `asyncio.wait_for` costs a task per command, and before Python 3.12 it can swallow a
cancellation; `reaching` sets the limits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    MasterDownError,
    MaxConnectionsError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ditserve.service.errors import QueueUnavailable

RETRY_AFTER_S = 2.0
CONNECT_S = 5.0
SENTINEL_S = 1.0  # for one Sentinel to answer, before the next is asked
_TRANSIENT = (RedisConnectionError, RedisTimeoutError, OSError)

# The first word of a server's error → the rest of a sentence that begins with "Redis".
_REFUSALS = {
    "MISCONF": "cannot persist writes",
    "NOREPLICAS": "has too few replicas",
    "UNKILLABLE": "is busy",
    "BUSY": "is busy",
}
# The class of an error → the same.
_MEANINGS: tuple[tuple[type[RedisError], str], ...] = (
    (MaxConnectionsError, "has no connection free"),
    (AuthenticationError, "refuses the credentials"),
    (AuthorizationError, "refuses the credentials"),
    (NoPermissionError, "does not let this user do what the service does"),
    (OutOfMemoryError, "is out of memory"),
    (ReadOnlyError, "is read-only"),
    (ClusterDownError, "cluster is down"),
    (MasterDownError, "primary is down"),
    (MasterNotFoundError, "has no primary of that name that a Sentinel can be asked for"),
    (RedisTimeoutError, "did not answer in time"),
    (RedisConnectionError, "cannot be reached"),
)


def open_client(url: str, *, connections: int) -> Redis:
    """Open a client of at most `connections` connections, without timeouts of its own: `reaching` sets them.

    Args:
        url: redis://, rediss:// (TLS) or unix://, with redis-py's options as its query; or one that names
        Sentinels, see
            `_sentinel_pool`.

    Raises:
        ValueError: any other URL, or an option that is wrong.
    """
    options: dict[str, Any] = {
        "max_connections": connections,
        "timeout": None,
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_S,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "dit",
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
    }
    sentinel = urlsplit(url).scheme.endswith("+sentinel")
    pool: ConnectionPool = (
        _sentinel_pool(url, options) if sentinel else BlockingConnectionPool.from_url(url, **options)
    )
    _check(pool)
    return Redis.from_pool(pool)


def _check(pool: ConnectionPool) -> None:
    """Raise `ValueError` for options with which no connection could be made."""
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        path = pool.connection_kwargs.get(name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"REDIS_URL: {name} names {path}, which is not a file")
    try:
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, RedisError) as error:
        raise ValueError(f"REDIS_URL has an option that is wrong: {error}") from None


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary that the Sentinels name; when all are taken, a command waits for one."""

    def __init__(self, primary: str, manager: Sentinel, **options: Any) -> None:
        super().__init__(primary, manager, **options)  # type: ignore[no-untyped-call]

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        # Without those in use, redis-py only moves to a new primary; the Sentinels are still needed.
        if inuse_connections:
            await self.sentinel_manager.aclose()


def _sentinel_pool(url: str, options: dict[str, Any]) -> _SentinelPool:
    """Return connections to the primary that the Sentinels of the URL name.

    The URL is redis+sentinel://[user:password@]host[:port],host[:port]/primary[/db][?options], or
    rediss+sentinel:// for TLS to all of them. The options `sentinel_username` and `sentinel_password` are for
    the Sentinels, the others for the primary.
    """
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    primary, _, database = parts.path.strip("/").partition("/")
    if parts.scheme not in ("redis+sentinel", "rediss+sentinel") or not hosts or not primary:
        raise ValueError("REDIS_URL by way of Sentinels reads redis+sentinel://host:26379,host:26379/primary")
    sentinels = [urlsplit(f"//{host}") for host in hosts.split(",")]
    # redis-py parses the credentials, the database and the options; the host is what the Sentinels will say.
    primary_url = f"redis://{credentials}{at}primary/{database}?{parts.query}"
    primary_options: dict[str, Any] = {**parse_url(primary_url)}
    del primary_options["host"]
    sentinel_options = {
        name.removeprefix("sentinel_"): primary_options.pop(name)
        for name in tuple(primary_options)
        if name.startswith("sentinel_")
    }
    tls = {name: value for name, value in primary_options.items() if name.startswith("ssl_")}
    secure = parts.scheme == "rediss+sentinel"
    manager = Sentinel(
        [(sentinel.hostname, sentinel.port or 26379) for sentinel in sentinels],
        sentinel_kwargs={
            "socket_timeout": SENTINEL_S,
            "socket_connect_timeout": SENTINEL_S,
            "retry": options["retry"],
            **sentinel_options,
            **({"ssl": True, **tls} if secure else {}),
        },
    )
    return _SentinelPool(primary, manager, ssl=secure, **{**primary_options, **options})


@asynccontextmanager
async def reaching(timeout_s: float | None) -> AsyncIterator[None]:
    """Bound the time of the block, and turn the errors of a failing server into `QueueUnavailable`.

    An error that is this code's own fault, such as a wrong command, is raised as it is.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except RedisError as error:
        meaning = "presents no certificate that is trusted here" if _untrusted(error) else _meaning(error)
        if meaning is None:
            raise
        raise QueueUnavailable(f"Redis {meaning}.", retry_after=RETRY_AFTER_S) from error
    except TimeoutError as error:
        raise QueueUnavailable("Redis did not answer in time.", retry_after=RETRY_AFTER_S) from error
    except OSError as error:
        raise QueueUnavailable("Redis cannot be reached.", retry_after=RETRY_AFTER_S) from error


def _untrusted(error: BaseException | None) -> bool:
    """Return whether TLS is at the root of an error."""
    return error is not None and (
        isinstance(error, SSLError) or _untrusted(error.__cause__ or error.__context__)
    )


def _meaning(error: RedisError) -> str | None:
    for kind, meaning in _MEANINGS:
        if isinstance(error, kind):
            return meaning
    if isinstance(error, ResponseError):
        return _REFUSALS.get(str(error).partition(" ")[0])
    return None


class Scripts:
    """The Lua scripts of `lua/`, each after the shared prelude.

    They run by hash, and are sent again to a server that has lost them (a restart, a new primary).
    """

    def __init__(self, client: Redis, keys: Sequence[str], *, timeout_s: float, attempts: int = 3) -> None:
        folder = files("ditserve.service.queue") / "lua"
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
        """Run one script. Raise `QueueUnavailable`.

        `repeatable`: a second run after a lost answer does no harm, so the script is tried again.
        """
        attempts = self._attempts if repeatable else 1
        async with reaching(None):
            for attempt in range(1, attempts + 1):
                try:
                    async with asyncio.timeout(self._timeout_s):
                        return await self._evaluate(name, args)
                except _TRANSIENT:
                    if attempt == attempts:
                        raise
                    await asyncio.sleep(0.05 * 2**attempt)

    async def _evaluate(self, name: str, args: Sequence[bytes | str | float]) -> Any:
        try:
            return await self._client.evalsha(self._hashes[name], len(self._keys), *self._keys, *args)
        except NoScriptError:
            return await self._client.eval(self._sources[name], len(self._keys), *self._keys, *args)
