"""The verbs of the queue, one by one, and their races."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from ditserve.service.errors import Cancelled, DeadlineExceeded, NumericalError, QueueFull, to_wire
from ditserve.service.jobs import Job, JobEvent, JobResult, Lease, Progress
from ditserve.service.queue import connection
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
Connect = Callable[..., Awaitable[Broker]]


async def claim_ids(broker: Broker, owner: str = "w1", room: int = 100, **options: Any) -> list[str]:
    return [
        claim.job.id for claim in await broker.claim(owner, models=["emoji"], max_samples=room, **options)
    ]


async def claim_one(broker: Broker, owner: str = "w1") -> Lease:
    (claim,) = await broker.claim(owner, models=["emoji"], max_samples=1)
    return claim.lease


async def read_events(broker: Broker, job_id: str, after: str = "0-0") -> list[JobEvent]:
    return [event async for event in broker.events(job_id, after)]


async def test_a_job_goes_through(broker: Broker, make_job: MakeJob, make_result: MakeResult) -> None:
    job = make_job()
    assert await broker.submit(job)
    (claim,) = await broker.claim("w1", models=["emoji"], max_samples=4)
    assert claim.job == job
    assert claim.lease == Lease(job.id, "w1", 1)
    assert not claim.run_isolated
    step = Progress(claim.lease, "step", {"step": 4, "steps": 8})
    preview = Progress(claim.lease, "preview", {"step": 6, "steps": 8, "image": b""})
    assert await broker.progress(step) == await broker.progress(preview) == [True]
    status = await broker.status(job.id)
    assert status is not None
    assert (status.state, status.step, status.steps, status.attempt) == ("running", 4, 8, 1)
    assert await broker.result(job.id) is None
    result = make_result(steps_used=8)
    assert await broker.finish(claim.lease, result)
    assert await broker.result(job.id) == await broker.outcome(job.id) == result
    status = await broker.status(job.id)
    assert status is not None
    assert (status.state, status.step, status.error) == ("done", 8, None)
    assert [event.kind for event in await read_events(broker, job.id)] == [
        "queued",
        "started",
        "step",
        "preview",
        "done",
    ]


async def test_submitting_twice_queues_once(broker: Broker, make_job: MakeJob) -> None:
    job = make_job()
    answers = await asyncio.gather(*(broker.submit(job) for _ in range(16)))
    assert sorted(answers) == [False] * 15 + [True]
    assert await claim_ids(broker) == [job.id]
    assert not await broker.submit(job)
    assert await claim_ids(broker) == []


async def test_a_submit_whose_answer_is_lost_is_still_new(
    broker: Broker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_next_answer(monkeypatch)
    job = make_job()
    assert await broker.submit(job)
    assert await claim_ids(broker) == [job.id]


def lose_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next script run on the server, and lose its answer."""
    command = connection.command
    lost: list[Any] = []

    async def lossy(client: Redis, *words: bytes | str | float) -> Any:
        answer = await command(client, *words)
        if not lost:
            lost.append(answer)
            raise RedisTimeoutError("Timeout reading from socket")
        return answer

    monkeypatch.setattr(connection, "command", lossy)


async def test_the_queue_is_bounded_by_count(connect: Connect, make_job: MakeJob) -> None:
    broker = await connect(queue_limit=3)
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await broker.submit(job)
    with pytest.raises(QueueFull, match="3 jobs"):
        await broker.submit(make_job())
    assert not await broker.submit(jobs[0]), "a known job is known, full or not"
    await claim_ids(broker, room=1)
    assert await broker.submit(make_job())


async def test_the_queue_is_bounded_by_predicted_work(connect: Connect, make_job: MakeJob) -> None:
    broker = await connect(queue_rows=100)
    assert await broker.submit(make_job(cost_rows=150)), "an empty queue takes a job of any size"
    with pytest.raises(QueueFull, match="predicted work"):
        await broker.submit(make_job(cost_rows=1))
    await claim_ids(broker)
    assert await broker.submit(make_job(cost_rows=60))
    assert await broker.submit(make_job(cost_rows=40))
    with pytest.raises(QueueFull):
        await broker.submit(make_job(cost_rows=1))


async def test_concurrent_submits_do_not_pass_the_bound(connect: Connect, make_job: MakeJob) -> None:
    broker = await connect(queue_limit=5)
    answers = await asyncio.gather(*(broker.submit(make_job()) for _ in range(20)), return_exceptions=True)
    assert sum(answer is True for answer in answers) == 5
    assert sum(isinstance(answer, QueueFull) for answer in answers) == 15


async def test_a_claim_takes_what_fits_in_order(broker: Broker, make_job: MakeJob) -> None:
    jobs = [make_job(seeds=tuple(range(n))) for n in (2, 1, 4, 1)]
    for job in jobs:
        await broker.submit(job)
    ids = [job.id for job in jobs]
    assert await claim_ids(broker, room=5, idle=False) == ids[:2]
    assert await claim_ids(broker, room=3, idle=False) == [], (
        "the small job must not overtake the large one for ever"
    )
    assert await claim_ids(broker, room=3, idle=True) == ids[2:3], (
        "an idle worker takes a job larger than its room"
    )
    assert await claim_ids(broker, room=3, idle=False) == ids[3:]
    assert await claim_ids(broker, room=0) == []


async def test_a_claim_is_for_the_models_asked(broker: Broker, make_job: MakeJob) -> None:
    others = [make_job(model="faces") for _ in range(70)]
    for job in others:
        await broker.submit(job)
    mine = make_job(model="emoji")
    await broker.submit(mine)
    assert await claim_ids(broker) == [mine.id]
    claims = await broker.claim("w2", models=["faces", "emoji"], max_samples=100)
    assert [claim.job.id for claim in claims] == [job.id for job in others]


async def test_no_job_is_claimed_twice(broker: Broker, make_job: MakeJob) -> None:
    jobs = [make_job() for _ in range(60)]
    await asyncio.gather(*(broker.submit(job) for job in jobs))
    claims = await asyncio.gather(*(claim_ids(broker, f"w{k}", room=3) for k in range(25)))
    claimed = [job_id for ids in claims for job_id in ids]
    assert sorted(claimed) == sorted(job.id for job in jobs)


async def test_a_claim_whose_answer_is_lost_is_answered_again(
    broker: Broker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await broker.submit(job)
    lose_next_answer(monkeypatch)
    claims = await broker.claim("w1", models=["emoji"], max_samples=2)
    assert {claim.job.id for claim in claims} == {jobs[0].id, jobs[1].id}
    assert {claim.lease.attempt for claim in claims} == {1}
    assert await claim_ids(broker) == [jobs[2].id], "the next claim is a new one"


async def test_a_job_past_its_deadline_is_not_started(
    connect: Connect, make_job: MakeJob, clock: Any
) -> None:
    broker = await connect(clock=clock)
    late, fine = make_job(deadline_at=clock.now + 1), make_job(deadline_at=clock.now + 60)
    await broker.submit(late)
    await broker.submit(fine)
    clock.advance(2)
    assert await claim_ids(broker) == [fine.id]
    with pytest.raises(DeadlineExceeded):
        await broker.outcome(late.id)


async def test_events_of_several_jobs_come_in_order_and_those_of_a_lost_lease_do_not(
    broker: Broker, make_job: MakeJob
) -> None:
    jobs = [make_job(), make_job()]
    for job in jobs:
        await broker.submit(job)
    first, second = [claim.lease for claim in await broker.claim("w1", models=["emoji"], max_samples=4)]
    events = [
        Progress(first, "step", {"step": 1, "steps": 8}),
        Progress(replace(second, attempt=2), "step", {"step": 5, "steps": 8}),
        Progress(first, "degraded", {"rung": "ddim-20"}),
        Progress(second, "step", {"step": 2, "steps": 8}),
        Progress(first, "step", {"step": 3, "steps": 4}),
    ]
    assert await broker.progress(*events) == [True, False, True, True, True]
    statuses = [await broker.status(job.id) for job in jobs]
    assert [(status.step, status.steps) for status in statuses if status] == [(3, 4), (2, 8)]
    # They end, so that their events can be read to an end.
    for lease in (first, second):
        await broker.fail(lease, to_wire(NumericalError()))
    kinds = [[event.kind for event in await read_events(broker, job.id)] for job in jobs]
    assert kinds[0] == ["queued", "started", "step", "degraded", "step", "failed"]
    assert kinds[1] == ["queued", "started", "step", "failed"]


async def test_only_the_holder_of_the_lease_may_write(
    broker: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await broker.submit(job)
    lease = await claim_one(broker)
    for stranger in (replace(lease, owner="w2"), replace(lease, attempt=2), Lease("unknown", "w1", 1)):
        assert await broker.progress(Progress(stranger, "step", {"step": 1})) == [False]
        assert not await broker.finish(stranger, make_result())
        assert not await broker.fail(stranger, to_wire(NumericalError()))
        assert not await broker.hand_back(stranger)
        assert (await broker.renew([stranger])).lost == {stranger.job_id}
    assert await broker.finish(lease, make_result())


async def test_finish_may_be_repeated_but_not_changed(
    broker: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    job = make_job()
    await broker.submit(job)
    lease = await claim_one(broker)
    assert await broker.finish(lease, make_result(b"first"))
    assert await broker.finish(lease, make_result(b"second")), "a repeated call is told that the job is done"
    assert not await broker.fail(lease, to_wire(NumericalError()))
    result = await broker.result(job.id)
    assert result is not None
    assert result.images[0].data == b"first"
    assert [event.kind for event in await read_events(broker, job.id)] == ["queued", "started", "done"]


async def test_a_failure_is_the_callers_own_error(broker: Broker, make_job: MakeJob) -> None:
    job = make_job()
    await broker.submit(job)
    lease = await claim_one(broker)
    assert await broker.fail(lease, to_wire(NumericalError("NaN at step 3.", extra={"step": 3})))
    with pytest.raises(NumericalError, match="NaN at step 3") as caught:
        await broker.outcome(job.id)
    assert caught.value.extra == {"step": 3, "worker": "w1"}
    status = await broker.status(job.id)
    assert status is not None
    assert status.state == "failed"
    assert status.error is not None
    assert status.error["code"] == "numerical-error"


async def test_cancel_ends_waiting_and_running_jobs(
    broker: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    running, waiting = make_job(), make_job()
    await broker.submit(running)
    lease = await claim_one(broker)
    await broker.submit(waiting)
    assert await broker.cancel(waiting.id)
    assert await claim_ids(broker) == []
    assert await broker.cancel(running.id)
    renewal = await broker.renew([lease])
    assert renewal.lost == renewal.cancelled == {running.id}
    assert not await broker.finish(lease, make_result())
    for job in (running, waiting):
        assert not await broker.cancel(job.id)
        with pytest.raises(Cancelled):
            await broker.outcome(job.id)
    assert not await broker.cancel("unknown")


async def test_cancel_and_finish_have_one_winner(
    broker: Broker, make_job: MakeJob, make_result: MakeResult
) -> None:
    for _ in range(20):
        job = make_job()
        await broker.submit(job)
        lease = await claim_one(broker)
        cancelled, finished = await asyncio.gather(broker.cancel(job.id), broker.finish(lease, make_result()))
        assert cancelled != finished
        kinds = [event.kind for event in await read_events(broker, job.id)]
        assert kinds == ["queued", "started", "cancelled" if cancelled else "done"]


async def test_the_cancellation_of_a_running_job_is_notified(
    broker: Broker, make_job: MakeJob, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    cancelled: list[str] = []
    broker.work.watch(cancelled.append)
    await broker.work.wait(5)  # the subscription stands
    job = make_job()
    await broker.submit(job)
    await claim_one(broker)
    await broker.cancel(job.id)
    await wait_until(lambda: cancelled == [job.id])


async def test_what_cannot_have_expired_is_remembered(connect: Connect, make_job: MakeJob) -> None:
    broker, other = await connect(), await connect(record_ttl_s=0.0)
    job = make_job()
    await broker.submit(job)
    assert broker.accepted(job.id)
    assert not broker.accepted(make_job().id)
    await other.submit(job)
    assert not other.accepted(job.id), "its record may have expired"
