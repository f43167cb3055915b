"""Jobs that several requests wait for: one leaves without the others, and equal jobs are found."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from ditserve.service.jobs import Claim, EqualJobs, Job, JobResult
from ditserve.service.queue.broker import Broker, Overtaken

pytestmark = pytest.mark.anyio

MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]


async def claimed(broker: Broker) -> Claim:
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=100)
    return claim


async def state(broker: Broker, job: Job) -> str:
    status = await broker.status(job.id)
    assert status is not None
    return status.state


async def test_a_job_that_others_joined_is_cancelled_for_its_own_request_alone(
    broker: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await broker.submit(job)
    claim = await claimed(broker)
    assert await broker.join(job.id, "b")
    assert await broker.join(job.id, "c")
    assert await broker.cancel(job.id)
    assert await state(broker, job) == "cancelled"
    assert not await broker.cancel(job.id), "it was cancelled before"
    assert not (await broker.renew([claim.lease])).lost, "its worker goes on"
    assert not await broker.join(job.id, "d"), "nobody joins a job that was cancelled"
    assert [event.kind async for event in broker.events(job.id)] == ["queued", "started", "cancelled"]
    assert await broker.cancel(job.id, holder="b")
    assert await broker.finish(claim.lease, make_result())
    assert await broker.outcome(job.id) == make_result()
    assert await state(broker, job) == "cancelled"


@pytest.mark.parametrize("running", [True, False])
async def test_the_last_to_leave_ends_the_job(broker: Broker, make_job: MakeJob, running: bool) -> None:
    job = make_job()
    await broker.submit(job)
    claim = await claimed(broker) if running else None
    assert await broker.join(job.id, "b")
    assert await broker.cancel(job.id)
    assert await broker.cancel(job.id, holder="b")
    assert not await broker.cancel(job.id, holder="b")
    assert await broker.claim("w2", models=["emoji"], max_samples=100) == []
    if claim is not None:
        assert (await broker.renew([claim.lease])).cancelled == {job.id}


async def test_one_that_joined_leaves_and_the_job_goes_on(
    broker: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await broker.submit(job)
    for _ in range(2):
        assert await broker.join(job.id, "b"), "a repeated call does no harm"
        assert await broker.cancel(job.id, holder="b")
    claim = await claimed(broker)
    assert await broker.finish(claim.lease, make_result())
    assert await state(broker, job) == "done"
    assert not await broker.join(job.id, "b")
    assert not await broker.cancel(job.id, holder="b")


async def test_an_equal_job_that_came_in_between_is_told(
    broker: Broker, connect: Callable[..., Awaitable[Broker]], make_job: MakeJob
) -> None:
    first, second, third = make_job(), make_job(), make_job()
    assert await broker.equal_job("d") == ""
    assert await broker.submit(first, equal=EqualJobs("d", "", 60))
    assert not await broker.submit(first, equal=EqualJobs("d", "", 60)), "its id is known"
    other = await connect()
    with pytest.raises(Overtaken):
        await other.submit(second, equal=EqualJobs("d", "", 60))
    assert await other.status(second.id) is None
    assert await other.equal_job("d") == first.id
    assert await other.submit(second, equal=EqualJobs("d", first.id, 60))
    assert await broker.equal_job("d") == second.id
    assert await broker.submit(third, equal=EqualJobs("e", "", 60)), "another picture"
