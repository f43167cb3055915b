"""One subscription, many waiters."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis

from ditserve.service.errors import Cancelled, InternalError, JobLost, NumericalError, to_wire
from ditserve.service.jobs import Job, JobResult
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import READ_AT_ONCE, Listener

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
WaitUntil = Callable[..., Awaitable[Any]]


@pytest.fixture
async def listener(broker: Broker) -> AsyncIterator[Listener]:
    listener = Listener(broker)
    yield listener
    await listener.aclose()


async def test_every_waiter_gets_its_own_result(
    broker: Broker, listener: Listener, make_job: MakeJob, make_result: MakeResult
) -> None:
    jobs = [make_job() for _ in range(100)]
    for job in jobs:
        await broker.submit(job)
    waiting = {job.id: asyncio.create_task(listener.wait(job.id)) for job in jobs}
    for claim in await broker.claim("w1", models=["emoji"], max_samples=100):
        await broker.finish(claim.lease, make_result(claim.job.id.encode()))
    async with asyncio.timeout(10):
        for job_id, task in waiting.items():
            assert (await task).images[0].data == job_id.encode()


async def test_many_outcomes_are_read_together(
    broker: Broker,
    listener: Listener,
    make_job: MakeJob,
    make_result: MakeResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [make_job() for _ in range(READ_AT_ONCE + 20)]
    for job in jobs:
        await broker.submit(job)
    for claim in await broker.claim("w1", models=["emoji"], max_samples=len(jobs)):
        await broker.finish(claim.lease, make_result())
    asked: list[int] = []
    outcomes = broker.outcomes

    async def counted(job_ids: Sequence[str]) -> list[Any]:
        asked.append(len(job_ids))
        return await outcomes(job_ids)

    monkeypatch.setattr(broker, "outcomes", counted)
    async with asyncio.timeout(10):
        results = await asyncio.gather(*(listener.wait(job.id) for job in jobs))
    assert results == [make_result()] * len(jobs)
    assert len(asked) < len(jobs) / 4
    assert max(asked) <= READ_AT_ONCE


async def test_what_cannot_be_read_ends_one_wait_and_no_other(
    broker: Broker, listener: Listener, make_job: MakeJob, make_result: MakeResult, redis_url: str
) -> None:
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await broker.submit(job)
    for claim in await broker.claim("w1", models=["emoji"], max_samples=3):
        if claim.job == jobs[1]:
            await broker.fail(claim.lease, to_wire(NumericalError("not finite")))
        else:
            await broker.finish(claim.lease, make_result())
    async with Redis.from_url(redis_url) as client:
        await client.set(broker.keys.result(jobs[0].id), b"garbage", keepttl=True)
        await client.hset(broker.keys.job(jobs[1].id), "error", b"garbage")
    async with asyncio.timeout(5):
        waits = (listener.wait(job.id) for job in jobs)
        *broken, sound = await asyncio.gather(*waits, return_exceptions=True)
    assert ([type(outcome) for outcome in broken], sound) == ([InternalError] * 2, make_result())


async def test_a_job_that_ended_before_is_answered_at_once(
    broker: Broker, listener: Listener, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await broker.submit(job)
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
    await broker.finish(claim.lease, make_result())
    async with asyncio.timeout(5):
        assert await listener.wait(job.id) == make_result()


async def test_a_new_job_is_read_once_it_has_ended_and_not_before(
    broker: Broker,
    listener: Listener,
    make_job: MakeJob,
    make_result: MakeResult,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: WaitUntil,
) -> None:
    monkeypatch.setattr("ditserve.service.queue.listener.REREAD_S", 60.0)
    await wait_until(lambda: listener.live)
    read: list[str] = []
    outcomes = broker.outcomes

    async def watched(job_ids: Sequence[str]) -> list[Any]:
        read.extend(job_ids)
        return await outcomes(job_ids)

    monkeypatch.setattr(broker, "outcomes", watched)
    job = make_job()
    await broker.submit(job)
    waiting = asyncio.create_task(listener.wait(job.id, new=True))
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
    assert not read
    await broker.finish(claim.lease, make_result())
    async with asyncio.timeout(5):
        assert await waiting == make_result()
    assert read == [job.id]


@pytest.mark.parametrize("heard", [True, False])
async def test_a_new_job_that_ended_before_anybody_waited_is_answered(
    broker: Broker,
    make_job: MakeJob,
    make_result: MakeResult,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: WaitUntil,
    heard: bool,
) -> None:
    monkeypatch.setattr("ditserve.service.queue.listener.REREAD_S", 60.0 if heard else 0.05)
    jobs = [make_job(), make_job()]
    for job in jobs:
        await broker.submit(job)
    claims = await broker.claim("w1", models=["emoji"], max_samples=2)
    if not heard:
        await broker.finish(claims[0].lease, make_result())
    async with aclosing(Listener(broker)) as listener, asyncio.timeout(5):
        await wait_until(lambda: listener.live)
        if heard:
            await broker.finish(claims[0].lease, make_result())
        await broker.finish(claims[1].lease, make_result())
        await listener.wait(jobs[1].id)  # by now it has heard of the first as well
        assert await listener.wait(jobs[0].id, new=True) == make_result()


async def test_a_job_that_ends_while_it_is_read_is_read_again(
    broker: Broker,
    listener: Listener,
    make_job: MakeJob,
    make_result: MakeResult,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: WaitUntil,
) -> None:
    job, other = make_job(), make_job()
    await broker.submit(job)
    await broker.submit(other)
    (claim, second) = await broker.claim("w1", models=["emoji"], max_samples=2)
    await wait_until(lambda: listener.live)
    outcomes = broker.outcomes
    reads = 0

    async def stale(job_ids: Sequence[str]) -> list[Any]:
        nonlocal reads
        reads += 1
        before = await outcomes(job_ids)
        if reads == 1:
            await broker.finish(claim.lease, make_result())
            await broker.finish(second.lease, make_result())
            # The listener has heard of both ends once it remembers the one that nobody waits for.
            await wait_until(lambda: other.id in listener._early_ends)
        return before

    monkeypatch.setattr(broker, "outcomes", stale)
    async with asyncio.timeout(5):
        assert await listener.wait(job.id) == make_result()
    assert reads == 2


async def test_failures_cancellations_and_unknown_jobs_are_raised(
    broker: Broker, listener: Listener, make_job: MakeJob
) -> None:
    failed, cancelled = make_job(), make_job()
    await broker.submit(failed)
    await broker.submit(cancelled)
    waits = [asyncio.create_task(listener.wait(job_id)) for job_id in (failed.id, cancelled.id, "unknown")]
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
    await broker.fail(claim.lease, to_wire(NumericalError("NaN.")))
    await broker.cancel(cancelled.id)
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [NumericalError, Cancelled, JobLost]


async def test_a_mistake_of_ours_ends_the_wait(
    broker: Broker, listener: Listener, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(job_ids: Sequence[str]) -> list[JobResult]:
        raise RuntimeError(job_ids)

    monkeypatch.setattr(broker, "outcomes", broken)
    async with asyncio.timeout(5):
        with pytest.raises(InternalError):
            await listener.wait(make_job().id)


async def test_waiters_of_one_job_share_and_may_leave(
    broker: Broker, listener: Listener, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await broker.submit(job)
    leaving, staying = (asyncio.create_task(listener.wait(job.id)) for _ in range(2))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(leaving, 0.02)
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
    await broker.finish(claim.lease, make_result())
    async with asyncio.timeout(5):
        assert await staying == make_result()
    assert listener.waiting == 0


async def test_a_waiter_that_leaves_is_forgotten(
    broker: Broker, listener: Listener, make_job: MakeJob
) -> None:
    job = make_job()
    await broker.submit(job)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(listener.wait(job.id), 0.02)
    assert listener.waiting == 0
    await broker.cancel(job.id)
