"""Reads of the queue: status, events, results, load; and the notifications that wake a worker."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from ditserve.service.errors import JobExpired, JobLost
from ditserve.service.fleet import WorkerState
from ditserve.service.jobs import ANY_FLOW, Job, JobEvent, JobResult, Lease, Progress
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
Connect = Callable[..., Awaitable[Broker]]


async def claim_one(broker: Broker, owner: str = "w1") -> Lease:
    (claim,) = await broker.claim(owner, models=["emoji"], max_samples=1)
    return claim.lease


async def read_events(broker: Broker, job_id: str, after: str = "0-0") -> list[JobEvent]:
    return [event async for event in broker.events(job_id, after)]


async def test_status_counts_the_jobs_ahead(broker: Broker, make_job: MakeJob) -> None:
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await broker.submit(job)
    positions = [status.position for job in jobs if (status := await broker.status(job.id)) is not None]
    assert positions == [0, 1, 2]
    await claim_one(broker)
    statuses = [await broker.status(job.id) for job in jobs]
    assert [status and status.position for status in statuses] == [None, 0, 1]
    assert await broker.status("unknown") is None


async def test_waiting_for_work_ends_when_work_comes(broker: Broker, make_job: MakeJob) -> None:
    # Once the subscription stands, any job may have come before.
    assert await broker.work.wait(5) == {ANY_FLOW}
    waiting = asyncio.create_task(broker.work.wait(30))
    await asyncio.sleep(0)
    job = make_job()
    await broker.submit(job)
    async with asyncio.timeout(5):
        assert await waiting == {job.flow}
    assert await broker.work.wait(0.01) == {ANY_FLOW}  # nothing new: the timeout ends it
    broker.work.notify()
    assert await broker.work.wait(5) == frozenset()
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
    assert await broker.hand_back(claim.lease)
    assert await broker.work.wait(5) == {ANY_FLOW}  # it goes before its turn


async def test_events_resume_after_an_id_and_end(
    broker: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await broker.submit(job)
    followed = asyncio.create_task(read_events(broker, job.id))
    lease = await claim_one(broker)
    for step in range(3):
        await broker.progress(Progress(lease, "preview", {"step": step, "image": b"\x89PNG"}))
    await broker.finish(lease, make_result())
    events = await followed
    assert [event.kind for event in events] == ["queued", "started", "preview", "preview", "preview", "done"]
    assert events[2].data == {"step": 0, "image": b"\x89PNG"}
    assert await read_events(broker, job.id, after=events[3].id) == events[4:]
    assert await read_events(broker, job.id, after=events[-1].id) == []
    with pytest.raises(JobLost):
        await read_events(broker, "unknown")


async def test_events_per_job_are_bounded(broker: Broker, make_job: MakeJob, make_result: MakeResult) -> None:
    job = make_job()
    await broker.submit(job)
    lease = await claim_one(broker)
    # A worker tells a few at a time.
    for first in range(0, 900, 50):
        await broker.progress(*(Progress(lease, "step", {"step": first + k}) for k in range(50)))
    await broker.finish(lease, make_result())
    events = await read_events(broker, job.id)
    assert len(events) <= broker.limits.events_kept + 100
    assert events[-1].kind == "done"


async def test_results_stay_within_their_budget(
    connect: Connect, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    broker = await connect(result_bytes=5000, clock=clock)
    jobs = [make_job() for _ in range(6)]
    for job in jobs:
        await broker.submit(job)
        await broker.finish(await claim_one(broker), make_result(bytes(1500)))
        # Results of one millisecond have no order among them.
        clock.advance(0.001)
    kept = [await broker.result(job.id) is not None for job in jobs]
    assert kept == [False, False, False, False, True, True] or kept == [False] * 3 + [True] * 3
    with pytest.raises(JobExpired):
        await broker.outcome(jobs[0].id)
    large = make_job()
    await broker.submit(large)
    await broker.finish(await claim_one(broker), make_result(bytes(9000)))
    assert await broker.result(large.id) is not None, "the newest is kept, whatever its size"


async def test_results_expire(
    connect: Connect, make_job: MakeJob, make_result: MakeResult, wait_until: Any
) -> None:
    broker = await connect(result_ttl_s=0.02, record_ttl_s=30)
    job = make_job()
    await broker.submit(job)
    await broker.finish(await claim_one(broker), make_result())
    await wait_until(lambda: no_result(broker, job.id))
    with pytest.raises(JobExpired):
        await broker.outcome(job.id)
    await broker.submit(make_job())
    await broker.finish(await claim_one(broker), make_result())


async def no_result(broker: Broker, job_id: str) -> bool:
    return await broker.result(job_id) is None


async def test_load_shows_the_queue_and_the_living_workers(
    connect: Connect, make_job: MakeJob, clock: Any
) -> None:
    broker = await connect(clock=clock)
    state = WorkerState("w1", ("emoji",), 16, 0.01, 0.002, 0.001, 3, 60, 0.0, clock.now)
    await broker.submit(make_job(cost_rows=30))
    clock.advance(4)
    await broker.submit(make_job(cost_rows=12))
    await broker.report(state)
    await broker.report(replace(state, worker="w2"))
    await broker.report(replace(state, backlog_rows=50))
    load = await broker.load()
    assert (load.queued_jobs, load.queued_rows, load.oldest_age_s, load.taken_at) == (2, 42, 4.0, clock.now)
    assert set(load.workers) == {replace(state, backlog_rows=50), replace(state, worker="w2")}
    await broker.retire("w2")
    assert [worker.worker for worker in (await broker.load()).workers] == ["w1"]
    clock.advance(broker.limits.report_ttl_s + 1)
    assert (await broker.load()).workers == ()


async def test_what_a_worker_was_given_since_it_reported_still_counts_as_waiting(
    connect: Connect, clock: Any, make_job: MakeJob
) -> None:
    broker = await connect(clock=clock)
    state = WorkerState("w1", ("emoji",), 16, 0.01, 0.002, 0.001, 0, 0, 0.0, clock.now)

    async def waiting() -> tuple[int, int]:
        load = await broker.load()
        return load.queued_jobs, load.queued_rows

    await broker.report(state)
    for rows in (40, 20, 8):
        await broker.submit(make_job(cost_rows=rows))
    await broker.claim("w1", models=["emoji"], max_samples=1)
    assert await waiting() == (2, 68), "nobody else knows yet who has the first"
    await broker.report(replace(state, backlog_rows=40, given_rows=broker.given_rows("w1")))
    assert await waiting() == (2, 28)
    await broker.claim("w1", models=["emoji"], max_samples=1)
    assert await waiting() == (1, 28)
    await broker.report(replace(state, backlog_rows=60, given_rows=broker.given_rows("w1")))
    assert (broker.given_rows("w1"), await waiting()) == (60, (1, 8))
    await broker.retire("w1")
    await broker.report(replace(state, given_rows=60))
    assert await waiting() == (1, 8), "what one of that name once had is forgotten with it"
