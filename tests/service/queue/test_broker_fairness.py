"""Who is served when many want to be."""

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from service.jobs import Job
from service.queue.broker import Broker

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]


async def claim_order(broker: Broker, count: int) -> list[Job]:
    """The next jobs, as one worker after another is free for one sample."""
    order: list[Job] = []
    while len(order) < count:
        order += [entry.job for entry in await broker.claim("w1", models=["emoji"], max_samples=1)]
    return order


async def test_a_thousand_jobs_delay_anothers_single_job_by_no_more_than_one(
    broker: Broker, make_job: MakeJob
) -> None:
    await asyncio.gather(*(broker.submit(make_job(caller="greedy")) for _ in range(999)))
    await claim_order(broker, 100)
    single = make_job(caller="modest")
    await broker.submit(single)
    assert single.id in [job.id for job in await claim_order(broker, 2)]


async def test_callers_share_by_work_not_by_jobs(broker: Broker, make_job: MakeJob) -> None:
    for _ in range(40):
        await broker.submit(make_job(caller="large", cost_rows=100))
    for _ in range(160):
        await broker.submit(make_job(caller="small", cost_rows=25))
    rows = Counter[str]()
    for job in await claim_order(broker, 100):
        rows[job.caller] += job.cost_rows
    assert abs(rows["large"] - rows["small"]) <= 125


async def test_priority_is_a_weight_and_nobody_starves(broker: Broker, make_job: MakeJob) -> None:
    for priority in ("low", "normal", "high"):
        for _ in range(70):
            await broker.submit(make_job(priority=priority))
    share = Counter(job.priority for job in await claim_order(broker, 84))
    assert share == {"high": 64, "normal": 16, "low": 4}


async def test_an_absent_caller_saves_no_credit(broker: Broker, make_job: MakeJob) -> None:
    await broker.submit(make_job(caller="early"))
    for _ in range(50):
        await broker.submit(make_job(caller="steady"))
    await claim_order(broker, 31)
    for _ in range(20):
        await broker.submit(make_job(caller="early"))
    share = Counter(job.caller for job in await claim_order(broker, 20))
    assert share == {"early": 10, "steady": 10}


async def test_one_callers_jobs_are_served_in_order(broker: Broker, make_job: MakeJob) -> None:
    jobs = [make_job(cost_rows=1 + k % 7) for k in range(50)]
    for job in jobs:
        await broker.submit(job)
    assert await claim_order(broker, 50) == jobs
