"""Callbacks in the queue: no end of a job is missed, and each is leased to one process at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from ditserve.service.errors import NumericalError, to_wire
from ditserve.service.jobs import DueCallback, Job, JobResult
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio

Connect = Callable[..., Awaitable[Broker]]
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
LEASE_S = 60.0
URL = "https://hooks.example.org/dit"
ENDS = {
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "cancelled while it waits": "cancelled",
    "expired": "failed",
    "dead": "dead",
}


@pytest.fixture
async def timed(connect: Connect, clock: Any) -> Broker:
    return await connect(clock=clock, lease_s=10, max_attempts=1)


async def due(broker: Broker, most: int = 32) -> list[DueCallback]:
    return await broker.due_callbacks(most, lease_s=LEASE_S)


async def end(broker: Broker, job: Job, end: str, clock: Any, make_result: MakeResult) -> None:
    """Queue a job and bring it to an end."""
    await broker.submit(job)
    if end == "expired":
        clock.advance(1000)
    claims = [] if "waits" in end else await broker.claim("w1", models=["emoji"], max_samples=100)
    if end == "done":
        assert await broker.finish(claims[0].lease, make_result())
    elif end == "failed":
        assert await broker.fail(claims[0].lease, to_wire(NumericalError()))
    elif end.startswith("cancelled"):
        assert await broker.cancel(job.id)
    elif end == "dead":
        clock.advance(11)
        await broker.sweep()


@pytest.mark.parametrize("how", ENDS)
async def test_every_end_of_a_job_is_due_once(
    how: str, timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    job = make_job(callback_url=URL, deadline_at=clock() + 100 if how == "expired" else None)
    silent = make_job()
    for each in (silent, job):
        await end(timed, each, how if each is job else "done", clock, make_result)
    status = await timed.status(job.id)
    assert status is not None
    assert status.callback is not None
    assert (status.state, status.callback.state, status.callback.attempts) == (ENDS[how], "pending", 0)
    (callback,) = await due(timed)
    assert (callback.job_id, callback.number) == (job.id, 1)
    assert callback.ended_at == pytest.approx(clock(), abs=0.01)
    assert await due(timed) == []
    assert await timed.settle_callback(callback, "delivered")
    assert not await timed.settle_callback(callback, "delivered")
    clock.advance(LEASE_S + 1)
    assert await due(timed) == []
    status = await timed.status(job.id)
    assert status is not None
    assert status.callback is not None
    assert (status.callback.state, status.callback.attempts) == ("delivered", 1)


async def test_a_lease_that_ends_is_another_process_s(
    timed: Broker, connect: Connect, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    for _ in range(3):
        await end(timed, make_job(callback_url=URL), "done", clock, make_result)
    other = await connect(clock=clock)
    first, second = await due(timed, 2), await due(other)
    assert (len(first), len(second)) == (2, 1)
    assert len({callback.job_id for callback in (*first, *second)}) == 3
    clock.advance(LEASE_S + 1)
    assert await other.settle_callback(second[0], "delivered"), "late, and nobody has taken it"
    again = await due(other)
    assert [callback.number for callback in again] == [2, 2]
    assert not await timed.settle_callback(first[0], "delivered"), "it is another's now"
    for callback in again:
        assert await other.settle_callback(callback, "pending", delay_s=30, fault="the answer was 500")
    assert await due(timed) == []
    clock.advance(31)
    third = await due(timed)
    assert [callback.number for callback in third] == [3, 3]
    status = await timed.status(third[0].job_id)
    assert status is not None
    assert status.callback is not None
    assert status.callback.fault == "the answer was 500"


async def test_a_lost_index_is_made_again(
    timed: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    pending, gone, old = (make_job(callback_url=URL) for _ in range(3))
    for job in (pending, gone, old):
        await end(timed, job, "done", clock, make_result)
    # A worker of an earlier release ends a job without a word of its callback.
    await client.hset(timed.keys.job(old.id), "callback", "waiting")
    await client.hdel(timed.keys.job(old.id), "called", "ended_at")
    await client.delete(timed.keys.job(gone.id))
    clock.advance(1)
    assert [callback.number for callback in await due(timed) if callback.job_id == gone.id] == [0]
    await client.delete(timed.keys.callbacks)
    clock.advance(1)
    await timed.sweep()
    assert {callback.job_id for callback in await due(timed)} == {pending.id, old.id}
    await client.delete(timed.keys.callbacks)
    await client.rpush(timed.keys.callbacks, "of another kind")
    assert await due(timed) == []
    clock.advance(1)
    await timed.sweep()
    assert {callback.job_id for callback in await due(timed)} == {pending.id, old.id}


async def test_a_job_that_was_joined_calls_back_when_its_own_request_leaves(
    timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    job = make_job(callback_url=URL)
    await timed.submit(job)
    (claim,) = await timed.claim("w1", models=["emoji"], max_samples=100)
    await timed.join(job.id, "b")
    assert await timed.cancel(job.id)
    (callback,) = await due(timed)
    assert await timed.settle_callback(callback, "delivered")
    assert await timed.finish(claim.lease, make_result())
    clock.advance(LEASE_S + 1)
    assert await due(timed) == [], "it is told of one end"


async def test_a_dead_job_that_is_queued_again_calls_back_again(
    timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    job = make_job(callback_url=URL)
    await end(timed, job, "dead", clock, make_result)
    (first,) = await due(timed)
    assert await timed.settle_callback(first, "delivered")
    clock.advance(1)
    assert await timed.requeue(job.id)
    (claim,) = await timed.claim("w1", models=["emoji"], max_samples=100)
    assert await timed.finish(claim.lease, make_result())
    (second,) = await due(timed)
    assert second.ended_at > first.ended_at
