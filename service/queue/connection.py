"""The Redis connection: how clients are opened, how calls are repeated, and what a failing server is called.

The only place that knows redis-py's defaults, and overrides them. The client does not retry, because a write
that is retried may have happened already; `ask` repeats what may be repeated. The client has no timeouts
either: its `asyncio.wait_for` costs a task per command, and before Python 3.12 it can swallow a cancellation;
`ask` sets the limits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from ssl import SSLError
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    MaxConnectionsError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ditserve.service.errors import QueueUnavailable

RETRY_AFTER_S = 2.0
RETRY_S = 0.2  # between two tries of who waits for a Redis that cannot be used
CONNECT_S = 5.0
SENTINEL_S = 1.0  # for one Sentinel to answer, before the next is asked
# The pauses before a call is repeated. The first repetition is for a connection that was lost while it waited
# in the pool, the others for a server that starts or that hands over to another.
PAUSES_S = (0.0, 0.1, 0.3)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Fault:
    """The fault of a server: the rest of a sentence that begins with "Redis", and whether it soon passes."""

    meaning: str
    passes: bool = False


_CHANGED_ROLE = _Fault("is no longer the primary", passes=True)
# The first word of a server's error → the fault.
_CODES = {
    "MISCONF": _Fault("cannot persist writes"),
    "NOREPLICAS": _Fault("has too few replicas"),
    "UNKILLABLE": _Fault("is busy"),
    "BUSY": _Fault("is busy"),
    "UNBLOCKED": _CHANGED_ROLE,
    "WRONGTYPE": _Fault("holds a key of another kind than this service writes"),
}
# What the error of a script says that fails by itself, which no state of a server explains.
_OWN = "user_script"
# The class of an error → the fault; the first that fits.
_FAULTS: tuple[tuple[type[Exception], _Fault], ...] = (
    (MaxConnectionsError, _Fault("has no connection free")),
    (AuthenticationError, _Fault("refuses the credentials")),
    (AuthorizationError, _Fault("refuses the credentials")),
    (NoPermissionError, _Fault("does not let this user do what the service does")),
    (OutOfMemoryError, _Fault("is out of memory")),
    (ReadOnlyError, _Fault("is read-only", passes=True)),
    (BusyLoadingError, _Fault("is loading its data", passes=True)),
    (MasterDownError, _Fault("primary is down", passes=True)),
    (ClusterDownError, _Fault("cluster is down", passes=True)),
    (TryAgainError, _Fault("cluster is moving these keys", passes=True)),
    (AskError, _Fault("cluster keeps these keys on another node")),
    (
        MasterNotFoundError,
        _Fault("has no primary of that name that a Sentinel can be asked for", passes=True),
    ),
    (InvalidResponse, _Fault("answers in another protocol", passes=True)),
    (RedisTimeoutError, _Fault("did not answer in time", passes=True)),
    (RedisConnectionError, _Fault("cannot be reached", passes=True)),
    # Python's own time limit is an OSError, too.
    (TimeoutError, _Fault("did not answer in time")),
    (OSError, _Fault("cannot be reached", passes=True)),
)


def open_client(url: str, *, connections: int) -> Redis:
    """Open a client of at most `connections` connections, without timeouts of its own: `ask` sets them.

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
    pool: ConnectionPool = _sentinel_pool(url, options) if sentinel else _Pool.from_url(url, **options)
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


class _Pool(BlockingConnectionPool):
    """Connections of which, after `aclose`, none stays open; when all are taken, a command waits for one.

    The command that is under way then loses its connection, and `ask` repeats it over a new one, which
    redis-py would keep open.

    While nobody waits, a connection is taken and given back at once: nobody else runs in between. The two
    locks that redis-py takes each time cost as much as the command itself.
    """

    _closed = False
    _waiting = 0  # calls that wait for a connection, or open one
    _serializer = HiredisRespSerializer()

    def make_connection(self) -> AbstractConnection:
        connection: AbstractConnection = super().make_connection()  # type: ignore[no-untyped-call]
        # Asyncio connections pack in Python otherwise, one after the other the forty arguments of a script.
        connection.pack_command = self._serializer.pack  # type: ignore[assignment,method-assign]
        return connection

    async def get_connection(self, *words: Any, **options: Any) -> AbstractConnection:
        if self._waiting or self._in_maintenance or not self._available_connections:
            self._waiting += 1
            try:
                waited: AbstractConnection = await super().get_connection()  # type: ignore[no-untyped-call]
                return waited
            finally:
                self._waiting -= 1
        connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]
        try:
            await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        if self._closed:
            await connection.disconnect(nowait=True)
        if self._waiting or self._in_maintenance or connection.should_reconnect():
            await super().release(connection)
        else:
            self._in_use_connections.remove(connection)
            self._available_connections.append(connection)

    async def aclose(self) -> None:
        self._closed = True
        await super().aclose()


class _SentinelPool(SentinelConnectionPool, _Pool):
    """Connections to the primary that the Sentinels name."""

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


async def ask(
    client: Redis, call: Callable[[], Awaitable[T]], *, timeout_s: float, repeatable: bool = True
) -> T:
    """Return the answer of `call`, a command or several on this client, within `timeout_s` seconds in all.

    `repeatable`: a second call after a lost answer does no harm. Such a call is made again after a fault that
    soon passes: a connection that was cut, a server that loads its data or hands over to its replica.

    Raises:
        QueueUnavailable: the server fails, or answers with an error. The error of a script that fails by
        itself is this code's own, and is raised as it is.
    """
    told: Exception | None = None
    with _known_errors():
        try:
            async with asyncio.timeout(timeout_s):
                for pause_s in PAUSES_S if repeatable else ():
                    try:
                        return await call()
                    except (RedisError, OSError) as error:
                        fault = _fault(error)
                        if fault is None or not fault.passes:
                            raise
                        told = error
                    await _drop_idle(client)
                    await asyncio.sleep(pause_s)
                return await call()
        except TimeoutError as error:
            # The server's own error says more than the time that has run out since.
            raise told or error from None


async def commands(client: Redis, *batch: Sequence[bytes | str | float]) -> list[Any]:
    """Return the answers to several commands, in one exchange; the answer may be the error of its command.

    The client's own way there is twice as long: it may retry, and keeps a record of every command.

    Raises:
        RedisError, OSError: the exchange failed.
    """
    pool = client.connection_pool
    connection = await pool.get_connection()
    answers: list[Any] = []
    try:
        packed = (part for words in batch for part in connection.pack_command(*words))
        await connection.send_packed_command(b"".join(packed))
        for _ in batch:
            try:
                answers.append(await connection.read_response())
            except ResponseError as error:
                answers.append(error)
    finally:
        await pool.release(connection)
    return answers


async def command(client: Redis, *words: bytes | str | float) -> Any:
    """Return the answer to one command, or raise its error as `commands` does that of an exchange."""
    (answer,) = await commands(client, words)
    if isinstance(answer, Exception):
        raise answer
    return answer


async def _drop_idle(client: Redis) -> None:
    """Close the connections that wait in the pool: the fault of one is most likely that of all.

    Nobody else runs in between, so none is closed after another call has taken it.
    """
    for connection in tuple(client.connection_pool._available_connections):
        await connection.disconnect(nowait=True)


async def patiently(read: Callable[[], Awaitable[T]], *, outage_s: float) -> T:
    """Return what `read` returns, which is called again for `outage_s` seconds while Redis cannot be used."""
    clock = asyncio.get_running_loop().time
    until = clock() + outage_s
    while True:
        try:
            return await read()
        except QueueUnavailable:
            if clock() > until:
                raise
        await asyncio.sleep(RETRY_S)


@contextmanager
def _known_errors() -> Iterator[None]:
    """Turn the errors of a failing server into `QueueUnavailable`."""
    try:
        yield
    except (RedisError, OSError) as error:
        fault = _fault(error)
        if fault is None:
            raise
        raise QueueUnavailable(f"Redis {fault.meaning}.", retry_after=RETRY_AFTER_S) from error


def _fault(error: Exception) -> _Fault | None:
    """Return the server's fault that an error tells of, None if it is no fault of the server."""
    if _untrusted(error):
        return _Fault("presents no certificate that is trusted here")
    for kind, fault in _FAULTS:
        if isinstance(error, kind):
            return fault
    text = str(error)
    code = text.partition(" ")[0]
    if not isinstance(error, ResponseError) or (_OWN in text and not code.isupper()):
        return None
    return _CODES.get(code, _Fault(f"answers {code}" if code.isupper() else f"answers {text[:80]!r}"))


def _untrusted(error: BaseException | None) -> bool:
    """Return whether TLS is at the root of an error."""
    return error is not None and (
        isinstance(error, SSLError) or _untrusted(error.__cause__ or error.__context__)
    )


def of_another_kind(error: BaseException | None) -> bool:
    """Return whether an error tells of a key of another kind than this code writes."""
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


class Scripts:
    """The Lua scripts of `lua/`, each after the shared prelude.

    They run by hash, and are sent again to a server that has lost them (a restart, a new primary).
    """

    def __init__(self, client: Redis, keys: Sequence[str], *, timeout_s: float) -> None:
        folder = files("ditserve.service.queue") / "lua"
        prelude = (folder / "prelude.lua").read_text(encoding="utf-8")
        self._client = client
        self._keys = tuple(key.encode() for key in keys)
        self._timeout_s = timeout_s
        self._sources = {
            entry.name.removesuffix(".lua"): prelude + entry.read_text(encoding="utf-8")
            for entry in folder.iterdir()
            if entry.name.endswith(".lua") and entry.name != "prelude.lua"
        }
        self._hashes = {
            name: hashlib.sha1(source.encode()).hexdigest() for name, source in self._sources.items()
        }

    async def load(self) -> None:
        """Send every script to the server."""
        await ask(self._client, self._load, timeout_s=self._timeout_s)

    async def run(self, name: str, *args: bytes | str | float, repeatable: bool = True) -> Any:
        """Run one script, as `ask` does. Raise `QueueUnavailable`."""
        return await ask(
            self._client,
            lambda: self._evaluate(name, args),
            timeout_s=self._timeout_s,
            repeatable=repeatable,
        )

    async def _load(self) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for source in self._sources.values():
            pipeline.script_load(source)
        await pipeline.execute()

    async def _evaluate(self, name: str, args: Sequence[bytes | str | float]) -> Any:
        operands = (len(self._keys), *self._keys, *args)
        try:
            return await command(self._client, "EVALSHA", self._hashes[name], *operands)
        except NoScriptError:
            return await command(self._client, "EVAL", self._sources[name], *operands)
