"""Workers that are killed for real: accepted jobs are still answered, once, and with the same image."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from ditserve.model.spec.stretches import Stretch
from ditserve.service.errors import InternalError, JobLost, WorkerLost
from ditserve.service.jobs import ConditionTerm, Job, JobResult
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from ditserve.service.rung import Rung
from ditserve.service.wire import NEWEST

pytestmark = pytest.mark.anyio
LEASE_S = 1.0
BLUE = ConditionTerm((2,))  # kills the worker
Start = Callable[..., subprocess.Popen[bytes]]
Connect = Callable[..., Awaitable[Broker]]
MakeJob = Callable[..., Job]
WaitUntil = Callable[..., Awaitable[Any]]


@pytest.fixture
async def queue(connect: Connect) -> Broker:
    return await connect(lease_s=LEASE_S)


@pytest.fixture
async def listener(queue: Broker) -> AsyncIterator[Listener]:
    listener = Listener(queue)
    yield listener
    await listener.aclose()


@pytest.fixture
async def start(redis_url: str, namespace: str) -> AsyncIterator[Start]:
    """Give a function that starts worker processes; none outlives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_worker(*flags: str, program: str = "lone_worker") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tests.service.worker.{program}", f"--namespace={namespace}"]
        environment = {**os.environ, "REDIS_URL": redis_url, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([*command, f"--lease-s={LEASE_S}", *flags], env=environment))
        return started[-1]

    yield start_worker
    for process in started:
        process.kill()
        process.wait()


async def step_of(queue: Broker, job: Job) -> int:
    status = await queue.status(job.id)
    return 0 if status is None else status.step


async def answers(listener: Listener, jobs: list[Job]) -> list[JobResult | BaseException]:
    async with asyncio.timeout(60):
        return await asyncio.gather(*(listener.wait(job.id) for job in jobs), return_exceptions=True)


async def test_killed_workers_lose_nothing(
    queue: Broker, listener: Listener, start: Start, make_job: MakeJob, wait_until: WaitUntil
) -> None:
    jobs = [make_job(model="fake", seeds=(k % 3,), steps=200) for k in range(6)]
    victim = start()
    for job in jobs:
        await queue.submit(job)
    await wait_until(lambda: step_of(queue, jobs[0]), timeout=120)
    os.kill(victim.pid, signal.SIGKILL)
    start()
    results = await answers(listener, jobs)
    images: dict[int, set[bytes]] = {}
    for job, result in zip(jobs, results, strict=True):
        assert isinstance(result, JobResult)
        images.setdefault(job.seeds[0], set()).add(result.images[0].data)
    assert {len(same) for same in images.values()} == {1}, "a seed gives one image, killed or not"
    attempts = {result.attempt for result in results if isinstance(result, JobResult)}
    assert max(attempts) == 2, "the killed worker's jobs ran twice, and were answered once"
    for job in jobs:
        kinds = [event.kind async for event in queue.events(job.id)]
        assert kinds.count("done") == 1


async def test_a_job_that_kills_its_workers_is_put_aside_and_its_companions_are_answered(
    queue: Broker, listener: Listener, start: Start, make_job: MakeJob
) -> None:
    poison = make_job(model="fake", condition=(BLUE,))
    others = [make_job(model="fake", steps=20) for _ in range(3)]
    for job in [others[0], poison, *others[1:]]:
        await queue.submit(job)
    waiting = asyncio.create_task(answers(listener, [poison, *others]))
    while not waiting.done():
        worker = start()
        ended = asyncio.create_task(asyncio.to_thread(worker.wait))
        await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
        worker.kill()
        await ended
    lost, *answered = waiting.result()
    assert isinstance(lost, WorkerLost)
    assert all(isinstance(result, JobResult) for result in answered)
    assert [status.id for status in await queue.dead()] == [poison.id]


async def test_a_worker_that_is_told_to_stop_hands_over(
    queue: Broker, listener: Listener, start: Start, make_job: MakeJob, wait_until: WaitUntil
) -> None:
    jobs = [make_job(model="fake", steps=900) for _ in range(3)]
    leaving = start("--drain-s=0.2")
    for job in jobs:
        await queue.submit(job)
    await wait_until(lambda: step_of(queue, jobs[0]), timeout=120)
    leaving.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(leaving.wait, 20) == 0
    statuses = [await queue.status(job.id) for job in jobs]
    assert [status and status.state for status in statuses] == ["queued"] * 3
    load = await queue.load()
    assert (load.queued_jobs, load.workers) == (3, ())
    assert [claim.run_isolated for claim in await queue.claim("w2", models=["fake"], max_samples=9)] == [
        False
    ] * 3
    for job in jobs:
        await queue.cancel(job.id)


@pytest.mark.parametrize(
    "stretch", [Stretch(0.5, "student", 0.25, False), Stretch(0.0, "every-3", 0.5)], ids=["student", "cache"]
)
async def test_the_next_worker_goes_on_across_backbones_to_the_same_image(
    stretch: Stretch,
    queue: Broker,
    listener: Listener,
    start: Start,
    make_job: MakeJob,
    wait_until: WaitUntil,
) -> None:
    """The student draws the noisy half: one worker leaves in it, and the other ends on the own network.

    Or the own one has a block cache, in the midst of which the worker leaves.
    """
    rung = Rung("other", "dpmpp-2m", 400, "leading", (0.0, 1.0), 0.0, stretches=(stretch,))
    asked = {"solver": rung.solver, "steps": rung.steps, "grid": rung.grid, "requested": rung}
    fields = {"model": "fake", "seeds": (5,), "admitted": rung, **asked}
    whole, left, plain = make_job(**fields), make_job(**fields), make_job(**{**fields, "requested": None})
    leaving = start("--drain-s=0.2")
    await queue.submit(left)
    await wait_until(lambda: step_of(queue, left), timeout=120)
    leaving.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(leaving.wait, 20) == 0
    assert 0 < await step_of(queue, left) < rung.steps
    start()
    for job in (whole, plain):
        await queue.submit(job)
    continued, alone, own = await answers(listener, [left, whole, plain])
    assert isinstance(continued, JobResult)
    assert isinstance(alone, JobResult)
    assert isinstance(own, JobResult)
    assert (continued.attempt, continued.backbones) == (2, (stretch.backbone,))
    assert continued.steps_used == rung.steps
    assert continued.images[0].data == alone.images[0].data != own.images[0].data


@pytest.mark.parametrize("programs", [("lone_worker", "next_release"), ("next_release", "lone_worker")])
async def test_a_rolling_upgrade_in_either_order_loses_no_job(
    programs: tuple[str, str],
    queue: Broker,
    listener: Listener,
    start: Start,
    make_job: MakeJob,
    wait_until: WaitUntil,
    redis_url: str,
) -> None:
    """Jobs of this release and of the next, while workers of one follow those of the other."""
    jobs = [make_job(model="fake", seeds=(k,), steps=150) for k in range(6)]
    newer = make_job(model="fake", steps=20)
    client = Redis.from_url(redis_url)
    for job in [*jobs, newer]:
        await queue.submit(job)
    waiting = asyncio.create_task(answers(listener, jobs))
    await client.hset(queue.keys.job(newer.id), "wire", newer.to_bytes(NEWEST + 1))
    leaving = start("--drain-s=0.2", program=programs[0])
    await wait_until(lambda: step_of(queue, jobs[0]), timeout=120)
    start(program=programs[1])
    leaving.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(leaving.wait, 20) == 0
    assert all(isinstance(result, JobResult) for result in await waiting)
    assert all(worker.backlog_rows >= 0 for worker in (await queue.load()).workers)
    start(program="next_release")
    await wait_until(lambda: client.exists(queue.keys.result(newer.id)), timeout=120)
    await client.aclose()


async def test_lost_records_and_unreadable_bytes_end_no_worker(
    queue: Broker, listener: Listener, start: Start, make_job: MakeJob, wait_until: WaitUntil, redis_url: str
) -> None:
    client = Redis.from_url(redis_url)
    lost, broken, waiting_lost, fine = (make_job(model="fake", steps=900) for _ in range(4))
    worker = start()
    await queue.submit(lost)
    waiting = asyncio.create_task(listener.wait(lost.id))
    await wait_until(lambda: step_of(queue, lost), timeout=120)
    await client.hset(queue.keys.reports, "stranger", b"garbage")
    await client.zadd(queue.keys.workers, {"stranger": 2e12})
    await client.publish(queue.keys.cancelled_channel, b"\xff")
    await client.delete(queue.keys.job(lost.id))
    with pytest.raises(JobLost):
        async with asyncio.timeout(5):
            await waiting
    worker.send_signal(signal.SIGSTOP)
    for job in (waiting_lost, broken, fine):
        await queue.submit(job)
    await client.hset(queue.keys.job(broken.id), "wire", b"garbage")
    await client.hdel(queue.keys.job(waiting_lost.id), "rows")
    worker.send_signal(signal.SIGCONT)
    second = start()
    outcomes = await answers(listener, [waiting_lost, broken, fine])
    assert [type(outcome) for outcome in outcomes] == [JobLost, InternalError, JobResult]
    assert worker.poll() is None
    assert second.poll() is None
    assert (await queue.load()).orphans == 2
    await client.zrem(queue.keys.workers, "stranger")
    await client.hdel(queue.keys.reports, "stranger")
    await client.aclose()
