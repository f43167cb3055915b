"""A primary that dies under Sentinels: its replica takes over, and no job is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from ditserve.service.errors import QueueUnavailable
from ditserve.service.jobs import Job, JobResult
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from tests.service.queue.servers import Server, free_port, serving

pytestmark = pytest.mark.anyio
WaitUntil = Callable[..., Awaitable[Any]]


@pytest.fixture
async def watched(tmp_path: Path, wait_until: WaitUntil) -> AsyncIterator[tuple[str, Server]]:
    """Start a primary, a replica and a Sentinel; yield the URL by way of the Sentinel, and the primary."""
    primary = Server(tmp_path, "repl-diskless-sync-delay 0")
    replica = Server(tmp_path, f"replicaof 127.0.0.1 {primary.port}")
    with serving(primary, replica):
        await wait_until(primary.answers)
        async with Redis.from_url(replica.url) as client:

            async def synced() -> bool:
                with suppress(OSError, ConnectionError):
                    return bool((await client.info("replication"))["master_link_status"] == "up")
                return False

            await wait_until(replica.answers)
            await wait_until(synced)
        sentinel = Server(
            tmp_path,
            f"sentinel monitor the-queue 127.0.0.1 {primary.port} 1",
            "sentinel down-after-milliseconds the-queue 300",
            "sentinel failover-timeout the-queue 3000",
            sentinel=True,
        )
        with serving(sentinel):
            await wait_until(sentinel.answers)
            async with Redis.from_url(sentinel.url) as client:

                async def known() -> bool:
                    return len(await client.sentinel_slaves("the-queue")) == 1

                await wait_until(known)
            silent = free_port()  # nobody listens there: the next Sentinel is asked
            yield f"redis+sentinel://127.0.0.1:{silent},127.0.0.1:{sentinel.port}/the-queue", primary


async def test_jobs_go_on_after_a_failover(
    watched: tuple[str, Server],
    make_job: Callable[..., Job],
    make_result: Callable[..., JobResult],
    wait_until: WaitUntil,
) -> None:
    url, primary = watched
    broker = await Broker.connect(url)
    listener = Listener(broker)
    running, waiting = make_job(), make_job()
    await broker.submit(running)
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
    await broker.submit(waiting)
    answered = asyncio.create_task(listener.wait(running.id))
    await wait_until(lambda: listener.live)
    assert await broker._client.wait(1, 5000) == 1, "the replica has it all"

    primary.kill()
    async with asyncio.timeout(30):
        assert await insist(lambda: broker.finish(claim.lease, make_result())), (
            "the lease holds at the new primary"
        )
        assert await answered == make_result()
        (claim,) = await insist(lambda: broker.claim("w1", models=["emoji"], max_samples=1))
    assert claim.job == waiting
    assert await insist(lambda: broker.submit(make_job()))
    await listener.aclose()
    await broker.aclose()


async def insist(call: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        with suppress(QueueUnavailable):
            return await call()
        await asyncio.sleep(0.05)


async def test_an_unknown_primary_is_named(watched: tuple[str, Server]) -> None:
    url, _ = watched
    with pytest.raises(QueueUnavailable, match="no primary of that name"):
        await Broker.connect(url.replace("the-queue", "another"))
