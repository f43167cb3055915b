"""Releases that share a queue: fields not known to one, versions not read by one, and bytes of no release."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgpack
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from ditserve.service import wire
from ditserve.service.errors import InternalError, NumericalError, QueueUnavailable, to_wire
from ditserve.service.fleet import Starting
from ditserve.service.jobs import Claim, Job, JobEvent, JobResult, Progress
from ditserve.service.queue.broker import Broker
from ditserve.service.telemetry import metrics
from ditserve.service.wire import NEWEST, pack, unpack
from tests.service import wire_examples as examples

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]
MakeResult = Callable[..., JobResult]
Connect = Callable[..., Awaitable[Broker]]

LATEST = NEWEST + 1  # the version of an imaginary release
LATER = {"surprise": {"of": ["a later release", b"\xff"]}}
# What may stand where a report is expected: (bytes, whether a worker is counted all the same).
REPORTS = {
    "with a field more": (pack({**unpack(examples.STATE.to_bytes()), **LATER}), True),
    "with a field more inside": (
        pack({**unpack(examples.STATE.to_bytes()), "network": {"backend": "onnx", **LATER}}),
        True,
    ),
    "with a field of another report": (pack({**unpack(examples.STATE.to_bytes()), "doing": "well"}), True),
    "of a later version": (examples.STATE.to_bytes(LATEST), False),
    "of no kind": (pack(LATER), False),
    "without a number": (pack({**unpack(examples.STATE.to_bytes()), "max_rows": None}), False),
    "not a number": (pack({**unpack(examples.STATE.to_bytes()), "step_per_row_s": float("nan")}), False),
    "a pass without end": (pack({**unpack(examples.STATE.to_bytes()), "max_rows": 10**12}), False),
    "less than no time": (pack({**unpack(examples.STATE.to_bytes()), "step_fixed_s": -1.0}), False),
    "endless steps": (pack({**unpack(examples.STATE.to_bytes()), "step_fixed_s": float("inf")}), False),
    "garbage": (b"\xc1\x00garbage", False),
    "nothing": (b"", False),
    "a number": (msgpack.packb(7), False),
}


async def claim(broker: Broker, owner: str = "w1", room: int = 100) -> list[Claim]:
    return await broker.claim(owner, models=["emoji"], max_samples=room)


async def read_events(broker: Broker, job_id: str) -> list[JobEvent]:
    return [event async for event in broker.events(job_id)]


@pytest.mark.parametrize("name", REPORTS)
async def test_a_report_of_another_release_is_read_or_left_out(
    name: str, connect: Connect, client: Redis, clock: Any
) -> None:
    broker = await connect(clock=clock)
    data, counted = REPORTS[name]
    await broker.report(Starting("w2", "emoji", "warming up"))
    await client.zadd(broker.keys.workers, {"w1": 1000 * clock.now + 9000})
    await client.hset(broker.keys.reports, "w1", data)
    with capture_logs() as lines:
        loads = [await broker.load() for _ in range(3)]
    for load in loads:
        assert [worker.worker for worker in load.workers] == ["w1"] * counted
        assert [worker.worker for worker in load.starting] == ["w2"]
    assert [line["worker"] for line in lines if line["event"] == "report left out"] == ["w1"] * (not counted)
    await client.delete(broker.keys.reports)
    assert (await broker.load()).workers == (), "the report of a known worker may be evicted"


async def test_jobs_results_errors_and_events_may_have_more_fields(
    broker: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult
) -> None:
    async def widen(key: str, field: str) -> None:
        data: Any = await client.hget(key, field)
        await client.hset(key, field, pack({**unpack(data), **LATER}))

    done, failed = make_job(), make_job()
    for job in (done, failed):
        await broker.submit(job)
        await widen(broker.keys.job(job.id), "wire")
    first, second = [entry.lease for entry in await claim(broker)]
    await broker.progress(Progress(first, "step", {"step": 1, **LATER}))
    await broker.finish(first, make_result())
    await broker.fail(second, to_wire(NumericalError("Not finite.")))
    await widen(broker.keys.job(failed.id), "error")
    result: Any = await client.get(broker.keys.result(done.id))
    await client.set(broker.keys.result(done.id), pack({**unpack(result), **LATER}), keepttl=True)
    assert await broker.outcome(done.id) == await broker.result(done.id) == make_result()
    with pytest.raises(NumericalError, match="Not finite"):
        await broker.outcome(failed.id)
    status = await broker.status(failed.id)
    assert status is not None
    assert status.job == failed
    assert [event.kind for event in await read_events(broker, done.id)] == [
        "queued",
        "started",
        "step",
        "done",
    ]


async def test_a_job_of_a_later_version_waits_for_a_worker_that_reads_it(
    broker: Broker, client: Redis, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, fine = make_job(), make_job()
    for job in (newer, fine):
        await broker.submit(job)
    await client.hset(broker.keys.job(newer.id), "wire", newer.to_bytes(LATEST))
    assert [entry.job.id for entry in await claim(broker)] == [fine.id]
    assert await claim(broker) == []
    assert (await broker.load()).queued_jobs == 1
    with pytest.raises(QueueUnavailable, match="another release") as caught:
        await broker.status(newer.id)
    assert caught.value.retry_after
    assert await broker.outcome(newer.id) is None, "its waiter waits on"
    monkeypatch.setattr(wire, "READABLE", (*wire.READABLE, LATEST))
    monkeypatch.setattr("ditserve.service.queue.leases.NEWEST", LATEST)
    (upgraded,) = await claim(broker, "w2")
    assert (upgraded.job, upgraded.lease.attempt) == (newer, 1), "no attempt was wasted on it"


async def test_what_is_written_about_a_job_has_the_version_of_the_job(
    broker: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = make_job(), make_job()
    for job in (older, newer):
        await broker.submit(job)
    await client.hset(broker.keys.job(newer.id), "wire", newer.to_bytes(LATEST))
    monkeypatch.setattr(wire, "READABLE", (*wire.READABLE, LATEST))
    monkeypatch.setattr("ditserve.service.queue.leases.NEWEST", LATEST)
    for entry in await claim(broker):
        await broker.progress(Progress(entry.lease, "step", {"step": 1}))
        await broker.finish(entry.lease, make_result())
    monkeypatch.undo()
    assert await broker.outcome(older.id) == make_result()
    assert [event.kind for event in await read_events(broker, older.id)] == [
        "queued",
        "started",
        "step",
        "done",
    ]
    with pytest.raises(QueueUnavailable, match="another release"):
        await broker.outcome(newer.id)
    with pytest.raises(QueueUnavailable, match="another release"):
        await broker.result(newer.id)
    with capture_logs() as lines:
        assert [event.kind for event in await read_events(broker, newer.id)] == ["queued", "started"]
    assert [line["event"] for line in lines] == ["event left out"], "once for each reader"


NO_SEEDS = pack({**unpack(examples.PLAIN_JOB.to_bytes()), "seeds": []})


@pytest.mark.parametrize("data", [b"", b"garbage", pack({"id": "half"}), msgpack.packb([1]), NO_SEEDS])
async def test_a_job_that_nobody_can_read_fails_alone(
    data: bytes, broker: Broker, client: Redis, make_job: MakeJob
) -> None:
    broken, fine = make_job(), make_job()
    for job in (broken, fine):
        await broker.submit(job)
    await client.hset(broker.keys.job(broken.id), "wire", data)
    assert [entry.job.id for entry in await claim(broker)] == [fine.id]
    with pytest.raises(InternalError, match="cannot read this job"):
        await broker.outcome(broken.id)
    with pytest.raises(InternalError, match="cannot be read"):
        await broker.status(broken.id)


async def test_a_claim_is_repeated_whose_unreadable_job_could_not_be_failed(
    broker: Broker, client: Redis, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine, broken = make_job(), make_job()
    for job in (fine, broken):
        await broker.submit(job)
    await client.hset(broker.keys.job(broken.id), "wire", b"garbage")
    with monkeypatch.context() as patch:

        async def away(*_: Any, **__: Any) -> bool:
            raise QueueUnavailable()

        patch.setattr(broker, "fail", away)
        with pytest.raises(QueueUnavailable):
            await claim(broker)
    (entry,) = await claim(broker)
    assert (entry.job.id, entry.lease.attempt) == (fine.id, 1)


async def test_unreadable_dead_letters_are_left_out(
    connect: Connect, client: Redis, make_job: MakeJob
) -> None:
    broker = await connect(max_attempts=1)
    jobs = [make_job() for _ in range(4)]
    for job in jobs:
        await broker.submit(job)
    for entry in await claim(broker):
        await broker.fail(entry.lease, to_wire(NumericalError()), retry=True)
    await client.hset(broker.keys.job(jobs[0].id), "wire", b"garbage")
    await client.hset(broker.keys.job(jobs[1].id), "wire", jobs[1].to_bytes(LATEST))
    await client.hset(broker.keys.job(jobs[2].id), "error", b"garbage")
    with capture_logs() as lines:
        dead = await broker.dead()
    errors = {status.id: status.error for status in dead}
    assert errors.keys() == {jobs[2].id, jobs[3].id}
    assert "cannot be read" in (errors[jobs[2].id] or {})["detail"]
    assert [line["event"] for line in lines] == ["dead job left out"] * 2


async def test_a_state_of_a_later_release_is_a_known_error(
    broker: Broker, client: Redis, make_job: MakeJob
) -> None:
    job = make_job()
    await broker.submit(job)
    await client.hset(broker.keys.job(job.id), "state", "paused")
    with pytest.raises(QueueUnavailable, match="another release"):
        await broker.status(job.id)
    await client.hset(broker.keys.job(job.id), "state", "queued")


@pytest.mark.parametrize(
    "fields",
    [
        {"timings_ms": {"queue": float("nan")}},
        {"timings_ms": {"denoise": float("inf")}},
        {"images": []},
        {"images": [{"data": b"", "seed": 1, "content_type": "text/html"}]},
        {"steps_used": "many"},
    ],
)
async def test_a_result_that_cannot_be_read_is_counted_and_told_to_its_own_caller_alone(
    fields: dict[str, Any], broker: Broker, client: Redis, make_job: MakeJob, make_result: MakeResult
) -> None:
    broken, fine = make_job(), make_job()
    for job in (broken, fine):
        await broker.submit(job)
    for entry in await claim(broker):
        await broker.finish(entry.lease, make_result())
    written = pack({**unpack(make_result().to_bytes()), **fields})
    await client.set(broker.keys.result(broken.id), written, keepttl=True)
    counted = metrics.UNREADABLE.labels("result")._value
    before = counted.get()
    unreadable, whole = await broker.outcomes([broken.id, fine.id])
    assert isinstance(unreadable, InternalError)
    assert "cannot be read" in unreadable.detail
    assert isinstance(whole, JobResult)
    assert counted.get() == before + 1
    with pytest.raises(InternalError, match="cannot be read"):
        await broker.result(broken.id)


async def test_events_that_cannot_be_read_are_left_out(
    broker: Broker,
    client: Redis,
    make_job: MakeJob,
    make_result: MakeResult,
    request: pytest.FixtureRequest,
) -> None:
    # As PyTorch's compiler does to its process.
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(5000)
    job = make_job()
    await broker.submit(job)
    (entry,) = await claim(broker)
    stream: Any = broker.keys.events(job.id)
    entries: tuple[dict[Any, Any], ...] = (
        {"kind": "step", "data": b"garbage"},
        {"kind": "applause", "data": pack({})},
        {"kind": "preview", "data": pack({"step": 1})},
        {"data": pack({})},
        {"kind": "step"},
        {"kind": "step", "data": pack({"step": float("inf")})},
        {"kind": "step", "data": pack({"step": float("nan"), "of": [1]})},
        {"kind": "step", "data": b"\x82\xa1v\x01\xa1x" + b"\x91" * 1000 + b"\x01"},
    )
    for fields in entries:
        await client.xadd(stream, fields)
    await broker.finish(entry.lease, make_result())
    assert [event.kind for event in await read_events(broker, job.id)] == ["queued", "started", "done"]
    await client.xtrim(stream, maxlen=0)
    await client.xadd(stream, {"kind": "done", "data": b"garbage"})
    assert await read_events(broker, job.id) == [], "the end is known from the job's state"
