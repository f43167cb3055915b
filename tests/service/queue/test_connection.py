"""Connections to Redis: TLS, passwords, a cluster; and the errors when it cannot be used."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio import Redis

from ditserve.service.errors import QueueUnavailable
from ditserve.service.fleet import WorkerState
from ditserve.service.jobs import Job, JobResult, Progress
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.connection import ask, command, open_client
from ditserve.service.queue.listener import Listener
from tests.service.queue.servers import Server, free_port, serving

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
WaitUntil = Callable[..., Awaitable[Any]]


async def live_through(broker: Broker, job: Job, result: JobResult) -> None:
    """Call every verb once, as the API and a worker do for a job, and for one that fails."""
    await broker.report(WorkerState("w1", ("emoji",), 16, 0.01, 0.002, 0.001, 3, 60, 0.0, 0.0))
    listener = Listener(broker)
    assert await broker.submit(job)
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=4)
    assert await broker.progress(Progress(claim.lease, "step", {"step": 4, "steps": 8})) == [True]
    assert await broker.hand_back(claim.lease, checkpoint=b"half", step=4)
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=4)
    assert claim.checkpoint == b"half"
    assert (await broker.renew([claim.lease])).lost == frozenset()
    assert await broker.sweep() == 0
    assert await broker.fail(claim.lease, {"code": "internal-error"}, retry=True)
    assert [status.id for status in await broker.dead()] == [job.id]
    assert await broker.requeue(job.id)
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=4)
    assert await broker.finish(claim.lease, result)
    async with asyncio.timeout(5):
        assert await listener.wait(job.id) == result
    assert [event.kind async for event in broker.events(job.id)][-1] == "done"
    assert not await broker.cancel(job.id)
    await broker.load()
    await broker.retire("w1")
    await listener.aclose()


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Broker]:
    broker = await Broker.connect(url, **options)
    try:
        yield broker
    finally:
        await broker.aclose()


@pytest.mark.parametrize("connections", [1, 2])
async def test_commands_share_the_connections_and_wait_for_their_turn(
    redis_url: str, connections: int
) -> None:
    client = open_client(redis_url, connections=connections)
    pool, answered = client.connection_pool, []

    async def echo(number: int) -> None:
        answer = await command(client, "ECHO", str(number))
        assert int(answer) == number
        answered.append(number)

    tasks = [asyncio.create_task(echo(number)) for number in range(40)]
    await asyncio.sleep(0)
    # Those that give up take no connection along, whether they wait for one or for their answer.
    for task in tasks[::4]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    in_use, available = len(pool._in_use_connections), len(pool._available_connections)
    await client.aclose()
    assert (in_use, available) == (0, connections)
    # Two answers that are on their way together may arrive in either order.
    expected = [number for number in range(40) if number % 4]
    assert answered == expected if connections == 1 else sorted(answered) == expected


async def test_what_is_under_way_when_a_client_is_closed_leaves_no_connection_open(
    redis_url: str, namespace: str, wait_until: WaitUntil
) -> None:
    """It loses its connection and is repeated, over a new one that nobody would close any more."""
    client = open_client(redis_url, connections=2)
    tries = 0

    async def waiting() -> Any:
        nonlocal tries
        tries += 1
        return await client.blpop([namespace], timeout=0.2 if tries > 1 else 60)

    asking = asyncio.create_task(ask(client, waiting, timeout_s=30))
    pool = client.connection_pool
    await wait_until(lambda: any(connection.is_connected for connection in pool._in_use_connections))
    await client.aclose()
    assert await asking is None
    assert tries == 2
    assert not any(connection.is_connected for connection in pool._available_connections)


@pytest.fixture
async def tls(embedded_url: str, tmp_path: Path) -> AsyncIterator[tuple[str, Path]]:
    """Put TLS before the embedded server; yield its URL without a CA, and the file of the CA."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(trusted)
    host, _, port = embedded_url.partition("://")[2].split("/")[0].rpartition(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection(host, int(port))
        ways = [asyncio.create_task(copy(reader, outer)), asyncio.create_task(copy(inner, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
        outer.close()
        writer.close()

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=context)
    yield f"rediss://localhost:{server.sockets[0].getsockname()[1]}", trusted
    server.close()


async def test_tls_with_a_ca_of_ones_own(
    tls: tuple[str, Path], namespace: str, make_job: MakeJob, make_result: MakeResult
) -> None:
    url, trusted = tls
    async with opened(f"{url}?ssl_ca_certs={trusted}", namespace=namespace, max_attempts=1) as broker:
        await live_through(broker, make_job(), make_result())


async def test_a_certificate_that_is_not_trusted_is_named(tls: tuple[str, Path], tmp_path: Path) -> None:
    url, trusted = tls
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    wrong_name = url.replace("localhost", "127.0.0.1")
    for refused in (url, f"{url}?ssl_ca_certs={stranger}", f"{wrong_name}?ssl_ca_certs={trusted}"):
        with pytest.raises(QueueUnavailable, match="no certificate that is trusted"):
            await Broker.connect(refused, timeout_s=5)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:1", "scheme"),
        ("redis://127.0.0.1:x", "Port"),
        ("redis://127.0.0.1:1?tls=yes", "'tls'"),
        ("redis://127.0.0.1:1?db=first", "db"),
        ("rediss://127.0.0.1:1?ssl_ca_certs=/no/such/file", "/no/such/file, which is not a file"),
        ("redis+sentinel://127.0.0.1:1", "reads redis"),
        ("redis+sentinel:///primary", "reads redis"),
        ("http+sentinel://127.0.0.1:1/primary", "reads redis"),
        ("redis+sentinel://127.0.0.1:1/primary?tls=yes", "'tls'"),
    ],
)
async def test_a_mistake_in_the_url_is_one_sentence(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        await Broker.connect(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("BUSY Redis is busy running a script.", "Redis is busy."),
        ("MISCONF Redis cannot save.", "Redis cannot persist writes."),
        ("EXECABORT Transaction discarded.", "Redis answers"),
        ("CROSSSLOT Keys do not hash to the same slot", "Redis answers"),
        ("NOSCRIPT No matching script.", "Redis answers"),
        ("NEWCODE of a later Redis", "Redis answers NEWCODE."),
        ("ERR unknown command 'EVALSHA'", "Redis answers \"unknown command 'EVALSHA'\"."),
        ("", "Redis answers"),
    ],
)
@pytest.mark.parametrize("verb", ["ping", "status", "outcomes", "load"])
async def test_whatever_error_a_server_answers_with_is_the_known_one(
    verb: str, text: str, sentence: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while commands := await reader.read(1 << 16):
            greets = b"CLIENT" in commands or b"HELLO" in commands
            line = b"+OK\r\n" if greets else f"-{text}\r\n".encode()
            writer.write(line * commands.count(b"*"))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    broker = Broker(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "status": lambda: broker.status("job"),
        "outcomes": lambda: broker.outcomes(["job", "other"]),
        "load": broker.load,
    }
    if verb == "ping":
        assert not await broker.ping()
    else:
        with pytest.raises(QueueUnavailable) as caught:
            await calls[verb]()
        assert caught.value.detail.startswith(sentence)
    await broker.aclose()
    server.close()


ACL = (
    "user default off",
    "user dit on >secret resetkeys ~{dit}:* resetchannels &{dit}:* -@all +@connection +@hash +@pubsub "
    "+@scripting +@sortedset +@stream +@string +@transaction +del +exists +pexpire +persist +time "
    "-@dangerous",
)


async def test_a_user_who_may_do_only_what_the_service_does(
    tmp_path: Path, make_job: MakeJob, make_result: MakeResult, wait_until: WaitUntil
) -> None:
    server = Server(tmp_path, *ACL)
    with serving(server):
        await wait_until(server.answers)
        url = server.url.replace("://", "://dit:{}@")
        async with opened(url.format("secret"), max_attempts=1) as broker:
            await live_through(broker, make_job(), make_result())
        for refused in (url.format("wrong"), server.url):
            with pytest.raises(QueueUnavailable, match="credentials"):
                await Broker.connect(refused)
        with pytest.raises(QueueUnavailable, match="does not let this user"):
            async with opened(url.format("secret"), namespace="theirs") as stranger:
                await stranger.submit(make_job())


async def test_all_keys_are_in_one_slot_of_a_cluster(
    tmp_path: Path, make_job: MakeJob, make_result: MakeResult, wait_until: WaitUntil
) -> None:
    server = Server(tmp_path, "cluster-enabled yes", f"cluster-port {free_port()}")
    with serving(server):
        await wait_until(server.answers)
        async with Redis.from_url(server.url) as client:
            await client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

            async def formed() -> bool:
                return "cluster_state:ok" in str(await client.execute_command("CLUSTER", "INFO"))

            await wait_until(formed)
            async with opened(server.url, max_attempts=1) as broker:
                await live_through(broker, make_job(), make_result())
                slots = {
                    await client.execute_command("CLUSTER", "KEYSLOT", key) for key in await client.keys("*")
                }
        assert len(slots) == 1
