"""Recovery of jobs whose worker crashes, leaves, or hangs."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ditserve.service.errors import DeadlineExceeded, InternalError, NumericalError, WorkerLost, to_wire
from ditserve.service.jobs import Claim, Job, JobResult
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]


@pytest.fixture
async def timed(connect: Callable[..., Awaitable[Broker]], clock: Any) -> Broker:
    return await connect(clock=clock, lease_s=10, max_attempts=3, max_run_s=100)


async def claim(broker: Broker, owner: str = "w1", room: int = 100, **options: Any) -> list[Claim]:
    return await broker.claim(owner, models=["emoji"], max_samples=room, **options)


async def crash(broker: Broker, clock: Any) -> int:
    """Let the time of all leases pass, as if every worker had crashed, and sweep."""
    clock.advance(broker.limits.lease_s + 1)
    return await broker.sweep()


async def test_every_deadline_is_counted_as_kept_or_broken_once(
    timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    async def running(**fields: Any) -> Claim:
        await timed.submit(make_job(**fields))
        (claimed,) = await claim(timed)
        return claimed

    async def counts() -> tuple[int, int]:
        load = await timed.load()
        return load.kept, load.broken

    due = clock.now + 5
    done, undated = await running(deadline_at=due), await running(deadline_at=None)
    late, failed = await running(deadline_at=due), await running(deadline_at=due)
    unlucky, gone, given_up = [await running(deadline_at=due) for _ in range(3)]
    await timed.submit(make_job(deadline_at=due))
    await timed.finish(undated.lease, make_result())
    await timed.fail(unlucky.lease, to_wire(InternalError("The step failed.")))
    await timed.cancel(gone.job.id)
    assert await counts() == (0, 0)
    await timed.finish(done.lease, make_result())
    await timed.finish(done.lease, make_result())
    assert await counts() == (1, 0)
    await timed.fail(failed.lease, to_wire(DeadlineExceeded("The deadline passed after 3 of 9 steps.")))
    assert await counts() == (1, 1)
    clock.advance(5.001)
    await timed.cancel(given_up.job.id)
    await timed.finish(late.lease, make_result())
    assert await claim(timed) == []
    assert await counts() == (1, 4)


async def test_leases_that_are_renewed_stay(timed: Broker, make_job: MakeJob, clock: Any) -> None:
    await timed.submit(make_job())
    leases = [entry.lease for entry in await claim(timed)]
    for _ in range(5):
        clock.advance(8)
        assert (await timed.renew(leases)).lost == frozenset()
        assert await timed.sweep() == 0


async def test_the_job_of_a_crashed_worker_runs_again(
    timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    job = make_job()
    await timed.submit(job)
    (first,) = await claim(timed, "w1")
    assert await crash(timed, clock) == 1
    (second,) = await claim(timed, "w2")
    assert (second.job, second.lease.attempt) == (job, 2)
    assert (await timed.renew([first.lease])).lost == {job.id}, (
        "the first worker must not steal its lease back"
    )
    assert not await timed.finish(first.lease, make_result(b"late"))
    assert await timed.finish(second.lease, make_result(b"good"))
    result = await timed.result(job.id)
    assert result is not None
    assert result.images[0].data == b"good"


async def test_a_job_that_keeps_losing_its_worker_is_put_aside(
    timed: Broker, make_job: MakeJob, clock: Any
) -> None:
    job = make_job()
    await timed.submit(job)
    for attempt in range(1, 4):
        (entry,) = await claim(timed, f"w{attempt}")
        assert entry.lease.attempt == attempt
        await crash(timed, clock)
    assert await claim(timed) == []
    with pytest.raises(WorkerLost) as caught:
        await timed.outcome(job.id)
    assert caught.value.extra["worker"] == "w3"
    (status,) = await timed.dead()
    assert (status.id, status.state, status.attempt) == (job.id, "dead", 3)
    assert (await timed.load()).dead_jobs == 1
    kinds = [event.kind async for event in timed.events(job.id)]
    assert kinds == ["queued", "started", "queued", "started", "queued", "started", "failed"]


async def test_a_dead_job_can_be_given_a_new_life(
    timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    job = make_job()
    await timed.submit(job)
    for _ in range(3):
        await claim(timed)
        await crash(timed, clock)
    assert await timed.requeue(job.id)
    assert not await timed.requeue(job.id)
    assert not await timed.requeue("unknown")
    assert await timed.dead() == []
    for _ in range(2):
        await claim(timed)
        await crash(timed, clock)
    (last,) = await claim(timed)
    assert await timed.finish(last.lease, make_result())
    assert [event.kind async for event in timed.events(job.id)][-1] == "done"


async def test_the_companions_of_a_poison_job_are_not_blamed(
    timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    jobs = [make_job() for _ in range(4)]
    poison = jobs[2].id
    for job in jobs:
        await timed.submit(job)
    assert len(await claim(timed)) == 4
    await crash(timed, clock)
    finished = []
    for _ in range(5):
        claims = await claim(timed)
        assert len(claims) == 1
        assert claims[0].run_isolated
        if claims[0].job.id == poison:
            await crash(timed, clock)
        else:
            await timed.finish(claims[0].lease, make_result())
            finished.append(claims[0].job.id)
    assert sorted(finished) == sorted(job.id for job in jobs if job.id != poison)
    assert [status.id for status in await timed.dead()] == [poison]


async def test_suspects_go_to_an_idle_worker_and_do_not_wait_for_ever(
    timed: Broker, make_job: MakeJob, clock: Any
) -> None:
    suspect = make_job()
    await timed.submit(suspect)
    await claim(timed, "w1")
    await crash(timed, clock)
    others = [make_job() for _ in range(3)]
    for job in others:
        await timed.submit(job)
    (passing,) = await claim(timed, "busy", room=1, idle=False)
    assert passing.job.id == others[0].id
    clock.advance(timed.limits.lease_s + 1)
    assert await claim(timed, "busy", idle=False) == [], "it has waited long: the busy worker runs dry for it"
    (entry,) = await claim(timed, "busy")
    assert (entry.job.id, entry.run_isolated) == (suspect.id, True)


async def test_handing_back_costs_no_attempt_and_no_place(timed: Broker, make_job: MakeJob) -> None:
    first, second = make_job(), make_job()
    await timed.submit(first)
    await timed.submit(second)
    for attempt in range(1, 6):
        (entry,) = await claim(timed, room=1)
        assert (entry.job.id, entry.lease.attempt, entry.run_isolated) == (first.id, attempt, False)
        assert await timed.hand_back(entry.lease)
        assert not await timed.hand_back(entry.lease)
    status = await timed.status(first.id)
    assert status is not None
    assert (status.state, status.position) == ("queued", 0)


async def test_a_passing_fault_is_retried_then_put_aside(timed: Broker, make_job: MakeJob) -> None:
    job = make_job()
    await timed.submit(job)
    for _ in range(3):
        (entry,) = await claim(timed)
        assert await timed.fail(entry.lease, to_wire(NumericalError("Out of memory.")), retry=True)
    assert await claim(timed) == []
    with pytest.raises(NumericalError):
        await timed.outcome(job.id)
    assert [status.id for status in await timed.dead()] == [job.id]


async def test_no_lease_is_renewed_for_ever(timed: Broker, make_job: MakeJob, clock: Any) -> None:
    await timed.submit(make_job())
    (entry,) = await claim(timed)
    while clock.now < 1_700_000_000 + timed.limits.max_run_s:
        assert (await timed.renew([entry.lease])).lost == frozenset()
        clock.advance(9)
    # A job of a slow model is given ten times as long as predicted.
    assert (await timed.renew([entry.lease], predicted_s=20.0)).lost == frozenset()
    assert (await timed.renew([entry.lease])).lost == {entry.job.id}
    assert await crash(timed, clock) == 1


async def test_a_job_cancelled_while_its_worker_is_dead_ends(
    timed: Broker, make_job: MakeJob, clock: Any
) -> None:
    job = make_job()
    await timed.submit(job)
    await claim(timed)
    assert await timed.cancel(job.id)
    assert await crash(timed, clock) == 0
    assert await claim(timed) == []


async def test_the_dead_are_bounded(
    connect: Callable[..., Awaitable[Broker]], make_job: MakeJob, clock: Any
) -> None:
    broker = await connect(clock=clock, max_attempts=1)
    jobs = [make_job() for _ in range(4)]
    for job in jobs:
        await broker.submit(job)
        await claim(broker)
        await crash(broker, clock)
    assert [status.id for status in await broker.dead()] == [job.id for job in jobs]
    clock.advance(broker.limits.dead_ttl_s)
    last = make_job()
    await broker.submit(last)
    await claim(broker)
    await crash(broker, clock)
    assert [status.id for status in await broker.dead()] == [last.id]


async def test_what_a_leaving_worker_did_goes_to_the_next(
    timed: Broker, make_job: MakeJob, make_result: MakeResult, clock: Any
) -> None:
    job = make_job()
    await timed.submit(job)
    (first,) = await claim(timed, "w1")
    assert first.checkpoint == b""
    assert await timed.hand_back(first.lease, checkpoint=b"half", step=5)
    status = await timed.status(job.id)
    assert status is not None
    assert (status.state, status.step) == ("queued", 5)
    assert await timed._client.pttl(timed.keys.checkpoint(job.id)) > 0
    (second,) = await claim(timed, "w2")
    assert second.checkpoint == b"half"
    assert not await timed.hand_back(first.lease, checkpoint=b"late"), "only the holder may write"
    assert await timed.hand_back(second.lease), "it did nothing, so it has nothing to hand on"
    (third,) = await claim(timed, "w3")
    assert third.checkpoint == b""
    assert await timed.hand_back(third.lease, checkpoint=b"most")
    (last,) = await claim(timed, "w4")
    assert await timed.finish(last.lease, make_result())
    assert not await timed._client.exists(timed.keys.checkpoint(job.id))


async def test_a_job_that_lost_its_worker_starts_anew(timed: Broker, make_job: MakeJob, clock: Any) -> None:
    job = make_job()
    await timed.submit(job)
    (first,) = await claim(timed, "w1")
    await timed.hand_back(first.lease, checkpoint=b"what may have killed the next", step=5)
    await claim(timed, "w2")
    await crash(timed, clock)
    (second,) = await claim(timed, "w3")
    assert (second.checkpoint, second.run_isolated) == (b"", True)
    status = await timed.status(job.id)
    assert status is not None
    assert status.step == 0


async def test_checkpoints_are_bounded(connect: Callable[..., Awaitable[Broker]], make_job: MakeJob) -> None:
    broker = await connect(checkpoint_bytes=10)
    await broker.submit(make_job())
    (entry,) = await claim(broker)
    assert await broker.hand_back(entry.lease, checkpoint=bytes(11), step=5)
    (entry,) = await claim(broker)
    assert entry.checkpoint == b""
    assert await broker.hand_back(entry.lease, checkpoint=bytes(10), step=5)
    assert [again.checkpoint for again in await claim(broker)] == [bytes(10)]
