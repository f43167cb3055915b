"""Fairness between callers and priorities, and the order by deadline within each."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ditserve.service.jobs import Job
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
Connect = Callable[..., Awaitable[Broker]]


async def claim_order(broker: Broker, count: int) -> list[Job]:
    """Return the next jobs in the order in which a worker with room for one sample claims them."""
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


async def test_one_callers_earliest_deadline_goes_first(
    connect: Connect, make_job: MakeJob, clock: Any
) -> None:
    broker = await connect(clock=clock)
    due = {name: make_job(deadline_at=clock.now + seconds) for name, seconds in DEADLINES.items()}
    patient = make_job()  # as if due in a minute
    for job in (due["late"], patient, due["soon"], due["next"]):
        await broker.submit(job)
    positions = [status.position for job in due.values() if (status := await broker.status(job.id))]
    assert positions == [0, 1, 3]
    order = await claim_order(broker, 4)
    assert order == [due["soon"], due["next"], patient, due["late"]]


DEADLINES = {"soon": 10, "next": 20, "late": 600}


async def test_a_deadline_is_no_way_past_other_callers(broker: Broker, make_job: MakeJob) -> None:
    for k in range(40):
        await broker.submit(make_job(caller="calm", cost_rows=20))
        # Each deadline is before the one submitted last.
        await broker.submit(make_job(caller="hasty", cost_rows=30, deadline_at=2e9 - k))
    rows = Counter[str]()
    for job in await claim_order(broker, 40):
        rows[job.caller] += job.cost_rows
    assert abs(rows["calm"] - rows["hasty"]) <= 50


async def test_overtaking_costs_the_overtaken_no_more_than_the_work_put_before_them(
    connect: Connect, make_job: MakeJob, clock: Any
) -> None:
    broker = await connect(clock=clock)
    large = make_job(caller="a", cost_rows=100)
    await broker.submit(large)
    await broker.submit(make_job(caller="b", cost_rows=60))
    urgent = [
        make_job(caller="a", cost_rows=10, deadline_at=clock.now + 9),
        make_job(caller="a", cost_rows=20, deadline_at=clock.now + 5),
    ]
    for job in urgent:
        await broker.submit(job)
    others = make_job(caller="b", cost_rows=60)
    await broker.submit(others)
    order = [job.id for job in await claim_order(broker, 5)]
    assert order[:2] == [urgent[1].id, urgent[0].id]
    assert order[3:] == [others.id, large.id], "130 rows of one caller, after 120 of the other"


async def test_a_full_worker_reads_no_record_of_those_it_holds_enough_of(
    broker: Broker, make_job: MakeJob
) -> None:
    async def claim() -> tuple[list[str], int]:
        """Return the jobs that a full worker is given, and how many records that took."""
        before = await broker._client.info("commandstats")
        claims = await broker.claim(
            "w1", models=["emoji"], max_samples=0, idle=False, reserved=8, crowded=["normal:greedy"]
        )
        after = await broker._client.info("commandstats")
        reads = after["cmdstat_hmget"]["calls"] - before["cmdstat_hmget"]["calls"]
        return [claim.job.id for claim in claims], reads

    for _ in range(100):
        await broker.submit(make_job(caller="greedy"))
    assert await claim() == ([], 0)
    modest = make_job(caller="modest")
    await broker.submit(modest)
    given, reads = await claim()
    assert given == [modest.id]
    assert reads <= 100
