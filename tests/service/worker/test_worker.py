"""The worker around a real engine and a made-up network, talking to a real queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from io import BytesIO
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image as Picture

from ditserve.service.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    ModelReplaced,
    NumericalError,
    QueueUnavailable,
    ServiceError,
)
from ditserve.service.fleet import LoadedAdapter, WorkerState
from ditserve.service.images import from_pixels
from ditserve.service.jobs import AdapterUse, ConditionTerm, Job, JobResult
from ditserve.service.limits import WorkerPolicy
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from ditserve.service.source_picture import SourcePicture, encode
from ditserve.service.worker.engine_monitor import WorkerIdentity
from ditserve.service.worker.worker import Worker, WorkerParts

pytestmark = pytest.mark.anyio
Floats = npt.NDArray[np.float32]
Make = Callable[..., Any]
Connect = Callable[..., Awaitable[Broker]]
WaitUntil = Callable[..., Awaitable[Any]]
POISON = ConditionTerm((3,))  # a class whose rows come out as NaN


class Gate:
    """Stands before a backend: while closed, a step waits in the engine's thread."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.fault: Exception | None = None
        self.decode_fault: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        if not self.open.is_set():
            self.waiting.set()
            self.open.wait(30)
        if self.fault is not None:
            raise self.fault
        output: Floats = self._backend.denoise(x, state)
        return output

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        if self.decode_fault is not None:
            raise self.decode_fault
        pixels = np.clip(128 + 50 * latents, 0, 255).astype(np.uint8)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


@pytest.fixture
def gate(make_backend: Make) -> Gate:
    return Gate(make_backend())


@pytest.fixture
def make_worker(make_engine: Make, gate: Gate) -> Make:
    def make(broker: Broker, name: str = "w1", *, slots: int = 16, origin: str = "", **policy: Any) -> Worker:
        engine = make_engine(gate, clock=time.monotonic, slots=slots)
        quick = {"max_rows": 8, "report_s": 0.05, "export_s": 0.2, "step_event_s": 0.0, "retry_s": 0.01}
        return Worker(
            WorkerParts(broker, engine, gate, engine.ladder),
            WorkerIdentity(name, "fake", origin=origin),
            WorkerPolicy(**{**quick, **policy}),
        )

    return make


@asynccontextmanager
async def working(*workers: Worker) -> AsyncIterator[asyncio.Event]:
    """Run workers until the block ends, then stop them."""
    stop, force_stop = asyncio.Event(), asyncio.Event()
    runs = [asyncio.create_task(worker.run(stop, force_stop)) for worker in workers]
    try:
        yield stop
        stop.set()
        async with asyncio.timeout(10):
            assert all(await asyncio.gather(*runs))
    finally:
        stop.set()
        force_stop.set()
        await asyncio.wait(runs, timeout=10)


@pytest.fixture
def make_fake_job(make_job: Make) -> Make:
    return lambda **fields: make_job(model="fake", **fields)


@pytest.fixture
async def wait(broker: Broker) -> AsyncIterator[Callable[[Job], Awaitable[JobResult]]]:
    listener = Listener(broker)

    async def answered(job: Job) -> JobResult:
        async with asyncio.timeout(15):
            return await listener.wait(job.id)

    yield answered
    await listener.aclose()


async def test_jobs_are_answered_with_their_images(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make
) -> None:
    jobs = [
        make_fake_job(seeds=(5, 6, 7), format="png", steps=9),
        make_fake_job(format="webp", guidance_scale=1.0),
        make_fake_job(format="jpeg", solver="dpmpp-2m", steps=3),
    ]
    async with working(make_worker(broker)):
        for job in jobs:
            await broker.submit(job)
        results = [await wait(job) for job in jobs]
    for job, result in zip(jobs, results, strict=True):
        assert [image.seed for image in result.images] == list(job.seeds)
        assert {image.content_type for image in result.images} == {f"image/{job.format}"}
        assert {Picture.open(BytesIO(image.data)).size for image in result.images} == {(6, 4)}
        assert (result.steps_requested, result.steps_used, result.solver) == (
            job.steps,
            job.steps,
            job.solver,
        )
        assert (result.worker, result.attempt, result.degraded, result.reason) == ("w1", 1, False, None)
        assert set(result.timings_ms) == {"queue", "denoise", "decode", "encode"}
        assert all(duration >= 0 for duration in result.timings_ms.values())
    assert len({image.data for image in results[0].images}) == 3, "every seed its own image"
    with Picture.open(BytesIO(results[0].images[1].data)) as picture:
        assert picture.info["seed"] == "6"
    load = await broker.load()
    assert load.workers == (), "a worker that left is not counted on"


async def test_the_same_request_gives_the_same_bytes_in_any_company(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make
) -> None:
    job = make_fake_job(seeds=(1, 2))
    again = make_fake_job(seeds=(1, 2))
    async with working(make_worker(broker)):
        await broker.submit(job)
        alone = await wait(job)
        for other in [make_fake_job(seeds=(k,), steps=3 + k) for k in range(6)]:
            await broker.submit(other)
        await broker.submit(again)
        together = await wait(again)
    assert [image.data for image in alone.images] == [image.data for image in together.images]


async def test_events_tell_steps_previews_and_the_end(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make, gate: Gate, wait_until: WaitUntil
) -> None:
    job = make_fake_job(steps=6, previews=2)
    gate.open.clear()
    async with working(make_worker(broker)):
        await broker.submit(job)
        await wait_until(gate.waiting.is_set)
        gate.open.set()
        await wait(job)
    events = [event async for event in broker.events(job.id)]
    kinds = [event.kind for event in events]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "done"
    for event in events:
        if event.kind == "preview":
            assert event.data["content_type"] == "image/png"
            assert Picture.open(BytesIO(event.data["image"])).size == (6, 4)
            assert event.data["step"] in (2, 4)
        if event.kind == "step":
            assert 0 < event.data["step"] < event.data["steps"] == 6


class Encoder:
    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        return from_pixels(pixels)


async def test_a_picture_that_cannot_be_encoded_fails_its_job_alone(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make
) -> None:
    picture = SourcePicture(encode(np.zeros((4, 6, 3), np.uint8)), None, 0.5)
    damaged, other = SourcePicture(b"no PNG", None, 0.5), make_fake_job()
    worker = make_worker(broker)
    async with working(worker):
        await broker.submit(job := make_fake_job(source=picture))
        with pytest.raises(InvalidRequest, match="no encoder"):
            await wait(job)
        worker._postprocessor._encoder = Encoder()
        await broker.submit(job := make_fake_job(source=damaged))
        with pytest.raises(InternalError, match="could not be encoded"):
            await wait(job)
        await broker.submit(other)
        await wait(other)


async def test_a_broken_sample_fails_its_job_alone(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make
) -> None:
    bad, good = make_fake_job(condition=(POISON,), seeds=(1, 2)), make_fake_job()
    async with working(make_worker(broker)):
        await broker.submit(bad)
        await broker.submit(good)
        with pytest.raises(NumericalError, match="not finite"):
            await wait(bad)
        assert (await wait(good)).steps_used == good.steps


async def test_what_the_engine_cannot_take_fails(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make
) -> None:
    jobs = [
        make_fake_job(solver="no-such-solver"),
        make_fake_job(grid="no-such-grid", rung="no-such-rung"),
        make_fake_job(condition=(ConditionTerm((0,), -1.0),)),
        make_fake_job(seeds=tuple(range(40))),
        make_fake_job(deadline_at=time.time() + 0.01, steps=1000, seeds=tuple(range(8))),
    ]
    codes = []
    async with working(make_worker(broker)):
        for job in jobs:
            await broker.submit(job)
            with pytest.raises(ServiceError) as caught:
                await wait(job)
            codes.append(caught.value.code)
        good = make_fake_job()
        await broker.submit(good)
        await wait(good)
    assert codes == [
        "internal-error",
        "internal-error",
        "invalid-request",
        "internal-error",
        "deadline-exceeded",
    ]


async def test_a_job_whose_classes_are_numbered_otherwise_is_to_be_sent_again(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make
) -> None:
    other, untold = make_fake_job(vocabulary="other"), make_fake_job()
    async with working(make_worker(broker)):
        await broker.submit(other)
        with pytest.raises(ModelReplaced) as caught:
            await wait(other)
        assert caught.value.retry_after
        await broker.submit(untold)
        assert (await wait(untold)).images


async def test_a_job_of_an_adapter_that_was_replaced_is_to_be_sent_again(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make
) -> None:
    """It is never drawn with another adapter of the name, nor without one."""
    worker = make_worker(broker)
    loaded = (LoadedAdapter("noir", "new"),)
    for adapters in (loaded, None):
        worker.identity = replace(worker.identity, adapters=adapters)
        job = make_fake_job(adapters=(AdapterUse("noir", 0.5, "old"),))
        await broker.submit(job)
        async with working(worker):
            with pytest.raises(ModelReplaced, match="The adapter 'noir' was replaced or removed"):
                await wait(job)
        worker = make_worker(broker)


async def test_decoding_that_fails_fails_the_job(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make, gate: Gate
) -> None:
    gate.decode_fault = RuntimeError("no decoder")
    async with working(make_worker(broker)):
        bad = make_fake_job(seeds=(1, 2), previews=1)
        await broker.submit(bad)
        with pytest.raises(InternalError, match="decoded"):
            await wait(bad)
        gate.decode_fault = None
        good = make_fake_job()
        await broker.submit(good)
        await wait(good)


async def test_a_cancelled_job_stops_and_makes_room(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait: Make, gate: Gate, wait_until: WaitUntil
) -> None:
    worker = make_worker(broker, slots=2, lookahead_rows=0)
    large, next_one = make_fake_job(seeds=(1, 2), steps=1000), make_fake_job()
    gate.open.clear()
    async with working(worker):
        await broker.submit(large)
        await wait_until(gate.waiting.is_set)
        await broker.submit(next_one)
        assert await broker.cancel(large.id)
        gate.open.set()
        with pytest.raises(Cancelled):
            await wait(large)
        assert (await wait(next_one)).steps_used == next_one.steps


async def test_a_worker_claims_no_more_than_it_has_room_for(
    broker: Broker, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil, wait: Make
) -> None:
    jobs = [make_fake_job() for _ in range(12)]
    gate.open.clear()
    # It wants 8 rows of a worthwhile batch, and as many ahead.
    async with working(make_worker(broker, lookahead_rows=4)):
        for job in jobs:
            await broker.submit(job)
        await wait_until(gate.waiting.is_set)
        await wait_until(lambda: queued(broker, 4))
        load = await wait_until(lambda: one_worker(broker, 8))
        assert load.queued_jobs == 4
        gate.open.set()
        for job in jobs:
            await wait(job)


async def test_work_is_claimed_ahead_only_while_no_other_worker_is_idler(
    broker: Broker, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil, wait: Make
) -> None:
    """Claimed work does not move: a worker that stalls would break the promises of all that it holds."""
    idle = WorkerState("idle", ("fake",), 8, 0.0, 0.01, 0.0, 0, 0, 0.0, 0.0)
    await broker.report(idle)
    jobs = [make_fake_job() for _ in range(12)]
    gate.open.clear()
    worker = make_worker(broker, lookahead_rows=16, balance_s=-0.1)
    async with working(worker):
        await wait_until(lambda: worker._reporting.peers == 2)
        for job in jobs:
            await broker.submit(job)
        await wait_until(gate.waiting.is_set)
        # 8 rows of a worthwhile batch, in samples of 2 rows, a reserved place, and none of the 8 rows ahead.
        load = await wait_until(lambda: running(broker, 4))
        assert load.queued_jobs in (7, 8)
        await broker.retire("idle")
        gate.open.set()
        for job in jobs:
            await wait(job)


async def test_a_newcomer_finds_a_place_in_a_worker_full_of_anothers_long_jobs(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait_until: WaitUntil, wait: Make
) -> None:
    long = [make_fake_job(caller="flood", steps=1000, cost_rows=2000) for _ in range(12)]
    async with working(make_worker(broker, slots=24, lookahead_rows=4)):
        for job in long:
            await broker.submit(job)
        await wait_until(lambda: queued(broker, 4))
        short = [make_fake_job(caller=f"caller-{k}", steps=5, cost_rows=10) for k in range(3)]
        for job in short:
            await broker.submit(job)
        for job in short:
            await wait(job)
        assert await queued(broker, 4), "the flood has as many samples in the engine as before"
        for job in long:
            await broker.cancel(job.id)


async def queued(broker: Broker, count: int) -> bool:
    return (await broker.load()).queued_jobs == count


async def running(broker: Broker, least: int) -> Any:
    load = await broker.load()
    return load if sum(state.running_samples for state in load.workers) >= least else None


async def one_worker(broker: Broker, running: int) -> Any:
    load = await broker.load()
    return load if [state.running_samples for state in load.workers] == [running] else None


async def test_a_report_follows_what_changes(
    broker: Broker, make_worker: Make, make_fake_job: Make, wait_until: WaitUntil, wait: Make
) -> None:
    async def reported() -> float:
        return max((state.updated_at for state in (await broker.load()).workers), default=0.0)

    async with working(make_worker(broker, report_s=60.0, busy_report_s=0.01)):
        before = await wait_until(reported)
        job = make_fake_job()
        await broker.submit(job)
        await wait(job)
        await wait_until(lambda: over(reported, before))


async def test_what_is_claimed_counts_before_the_step_that_runs_has_ended(
    broker: Broker, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil, wait: Make
) -> None:
    async def claimed() -> tuple[int, list[tuple[float, int]]]:
        load = await broker.load()
        demand = [(bucket.at, bucket.rows) for state in load.workers for bucket in state.dues]
        return sum(state.backlog_rows for state in load.workers), sorted(demand)

    async def both() -> bool:
        return await claimed() == (50, [(due, 20), (inf, 30)])

    async def nothing() -> bool:
        return await claimed() == (0, [])

    due = time.time() + 60.0
    jobs = [make_fake_job(cost_rows=20, deadline_at=due), make_fake_job(cost_rows=30)]
    gate.open.clear()
    async with working(make_worker(broker, report_s=60.0, busy_report_s=0.01)):
        for job in jobs:
            await broker.submit(job)
            await wait_until(gate.waiting.is_set)
        await wait_until(both)
        gate.open.set()
        for job in jobs:
            await wait(job)
        await wait_until(nothing)


async def test_the_report_shows_a_worker_that_hangs(
    broker: Broker, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil, wait: Make
) -> None:
    async def age() -> float:
        load = await broker.load()
        return max((state.last_step_age_s for state in load.workers if state.running_samples), default=0.0)

    job = make_fake_job()
    gate.open.clear()
    async with working(make_worker(broker)):
        await broker.submit(job)
        await wait_until(lambda: over(age, 0.3))
        gate.open.set()
        await wait(job)
        await wait_until(lambda: under(age, 0.1))


async def over(value: Callable[[], Awaitable[float]], bound: float) -> bool:
    return await value() > bound


async def under(value: Callable[[], Awaitable[float]], bound: float) -> bool:
    return await value() < bound


async def test_leases_are_kept_while_the_engine_computes(
    connect: Connect, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil
) -> None:
    # By the steps of 10 s that the engine predicts, the job may run for longer than the least time.
    broker = await connect(lease_s=0.3, max_run_s=0.3)
    job = make_fake_job()
    gate.open.clear()
    async with working(make_worker(broker)):
        await broker.submit(job)
        await wait_until(gate.waiting.is_set)
        began = time.monotonic()
        await wait_until(lambda: swept_for(broker, began, 1.0))
        status = await broker.status(job.id)
        assert status is not None
        assert (status.state, status.attempt) == ("running", 1)
        gate.open.set()
        await wait_until(lambda: ended(broker, job))


async def swept_for(broker: Broker, began: float, seconds: float) -> bool:
    """Sweep; return True once it has taken back nothing for so long."""
    assert await broker.sweep() == 0
    return time.monotonic() - began > seconds


async def ended(broker: Broker, job: Job) -> bool:
    status = await broker.status(job.id)
    return status is not None and status.state == "done"


async def test_a_step_that_raises_is_retried_and_then_put_aside(
    broker: Broker, make_worker: Make, make_fake_job: Make, gate: Gate, wait: Make
) -> None:
    gate.fault = RuntimeError("the device is lost")
    job = make_fake_job()
    stop, force_stop = asyncio.Event(), asyncio.Event()
    await broker.submit(job)
    orderly = await make_worker(broker).run(stop, force_stop)
    assert not orderly, "an engine that keeps raising ends the worker, for someone to start a new one"
    with pytest.raises(InternalError, match="step of the engine failed"):
        await wait(job)
    assert [status.id for status in await broker.dead()] == [job.id]


async def test_stopping_finishes_what_has_begun_and_hands_back_the_rest(
    broker: Broker, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil, wait: Make
) -> None:
    begun = make_fake_job(steps=50)
    async with working(make_worker(broker)) as stop:
        gate.open.clear()
        await broker.submit(begun)
        await wait_until(gate.waiting.is_set)
        gate.open.set()
        await wait_until(lambda: step_of(broker, begun))
        gate.open.clear()
        gate.waiting.clear()
        waiting = [make_fake_job() for _ in range(3)]
        for job in waiting:
            await broker.submit(job)
        await wait_until(lambda: queued(broker, 0))
        stop.set()
        await wait_until(lambda: queued(broker, 3))
        gate.open.set()
        assert (await wait(begun)).attempt == 1
    for job in waiting:
        status = await broker.status(job.id)
        assert status is not None
        assert (status.state, status.position is None) == ("queued", False)
    async with working(make_worker(broker, "w2")):
        for job in waiting:
            result = await wait(job)
            assert result.worker == "w2"


async def step_of(broker: Broker, job: Job) -> int:
    status = await broker.status(job.id)
    return 0 if status is None else status.step


async def test_draining_has_an_end(
    broker: Broker, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil, wait: Make
) -> None:
    job = make_fake_job(steps=20)
    async with working(make_worker(broker, drain_s=0.05)) as stop:
        gate.open.clear()
        await broker.submit(job)
        await wait_until(gate.waiting.is_set)
        stop.set()
        await wait_until(lambda: queued(broker, 1))
        gate.open.set()
    async with working(make_worker(broker, "w2")):
        assert (await wait(job)).worker == "w2"


async def test_results_are_kept_while_the_queue_is_away(
    broker: Broker,
    make_worker: Make,
    make_fake_job: Make,
    gate: Gate,
    wait: Make,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = 0
    run = broker._scripts.run

    async def unreliable(name: str, *args: Any, **options: Any) -> Any:
        nonlocal away
        if name in ("finish", "renew", "progress") and away < 8:
            away += 1
            raise QueueUnavailable("Redis cannot be reached.")
        return await run(name, *args, **options)

    monkeypatch.setattr(broker._scripts, "run", unreliable)
    job = make_fake_job()
    async with working(make_worker(broker)):
        await broker.submit(job)
        assert (await wait(job)).attempt == 1
    assert away == 8


async def test_a_late_result_of_a_lost_lease_is_dropped(
    connect: Connect, make_worker: Make, make_fake_job: Make, gate: Gate, wait_until: WaitUntil
) -> None:
    broker = await connect(lease_s=30)
    job = make_fake_job()
    gate.open.clear()
    async with working(make_worker(broker)):
        await broker.submit(job)
        await wait_until(gate.waiting.is_set)
        later = await connect(clock=lambda: time.time() + 60)
        assert await later.sweep() == 1
        (claim,) = await later.claim("w2", models=["fake"], max_samples=1)
        gate.open.set()
        await wait_until(lambda: idle(broker))
        status = await broker.status(job.id)
        assert status is not None
        assert (status.state, status.attempt) == ("running", 2)
        assert await later.hand_back(claim.lease)
        assert await later.cancel(job.id)


async def idle(broker: Broker) -> bool:
    load = await broker.load()
    return [state.running_samples for state in load.workers] == [0]
