"""A job that a worker leaves under way is continued by the next, from where it stood, to the same image."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.service.errors import InternalError
from ditserve.service.jobs import ConditionTerm, Job, JobResult
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.load import hung
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from ditserve.service.rung import Rung
from ditserve.service.source_picture import SourcePicture, encode
from ditserve.service.worker.engine_monitor import WorkerIdentity
from ditserve.service.worker.handoff import write_checkpoint
from ditserve.service.worker.running_job import RunningJob
from ditserve.service.worker.worker import Worker, WorkerParts

pytestmark = pytest.mark.anyio
Floats = npt.NDArray[np.float32]
Make = Callable[..., Any]
WaitUntil = Callable[..., Awaitable[Any]]


class Turnstile:
    """A backend that lets so many steps through, and then holds the engine's thread until it is opened."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.steps = 0  # taken in all
        self.allowed = threading.Semaphore(0)
        self.held = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def let(self, steps: int) -> None:
        self.held.clear()
        self.allowed.release(steps)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        if not self.allowed.acquire(blocking=False):
            self.held.set()
            self.allowed.acquire(timeout=30)
        self.steps += 1
        output: Floats = self._backend.denoise(x, state)
        return output

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        pixels = np.clip(128 + 50 * latents, 0, 255).astype(np.uint8)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


@pytest.fixture
def turnstile(make_backend: Make) -> Turnstile:
    return Turnstile(make_backend())


@pytest.fixture
def make_worker(make_engine: Make, turnstile: Turnstile) -> Make:
    def make(broker: Broker, name: str, *, origin: str = "here", **policy: Any) -> Worker:
        engine = make_engine(turnstile, clock=time.monotonic)
        quick = {"max_rows": 8, "report_s": 0.05, "step_event_s": 0.0, "retry_s": 0.01, **policy}
        return Worker(
            WorkerParts(broker, engine, turnstile, engine.ladder, encoder=turnstile._backend),
            WorkerIdentity(name, "fake", origin=origin),
            WorkerPolicy(**quick),
        )

    return make


@asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[asyncio.Event]:
    stop, force_stop = asyncio.Event(), asyncio.Event()
    run = asyncio.create_task(worker.run(stop, force_stop))
    try:
        yield stop
        async with asyncio.timeout(10):
            stop.set()
            await run
    finally:
        stop.set()
        force_stop.set()
        await asyncio.wait([run], timeout=10)


@pytest.fixture
async def answer(broker: Broker) -> AsyncIterator[Callable[[Job], Awaitable[JobResult]]]:
    listener = Listener(broker)

    async def answered(job: Job) -> JobResult:
        async with asyncio.timeout(15):
            return await listener.wait(job.id)

    yield answered
    await listener.aclose()


async def step_of(broker: Broker, job: Job) -> int:
    status = await broker.status(job.id)
    return 0 if status is None else status.step


async def leave_after(
    broker: Broker,
    worker: Worker,
    job: Job,
    turnstile: Turnstile,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int,
    ends_after_s: float = 0.0,
) -> None:
    """Let a worker take so many steps of a job, and one more during which it is told to leave.

    That one ends `ends_after_s` seconds after the engine was asked where its samples stand.
    """
    export, stop_thread = worker._engine.export, worker._engine.stop

    def exporting(sample_ids: Any) -> Any:
        exported = export(sample_ids)
        # The engine answers between two steps.
        asyncio.get_running_loop().call_later(ends_after_s, turnstile.let, 1)
        return exported

    def stopping(timeout_s: float) -> bool:
        turnstile.let(1)  # which may have begun
        return stop_thread(timeout_s)

    monkeypatch.setattr(worker._engine, "export", exporting)
    monkeypatch.setattr(worker._engine, "stop", stopping)
    turnstile.let(steps)
    async with working(worker) as stop:
        await broker.submit(job)
        await wait_until(lambda: turnstile.held.is_set() and step_of(broker, job))
        stop.set()


COMPOSED = (ConditionTerm((0,), 2.0), ConditionTerm((1,), -0.5))
RANDOM = np.random.default_rng(0)
PICTURE = SourcePicture(
    encode(RANDOM.integers(0, 256, (4, 6, 3), np.uint8)),
    encode(RANDOM.choice(np.array([0, 90, 255], np.uint8), (4, 6))),
    strength=0.75,
)
EDITING = Rung("dpmpp-2m-16", "dpmpp-2m", 16, "trailing", (0.0, 1.0), 0.0, strength=0.75)
DECAYING = Rung("ddim-12", "ddim", 12, "leading", (0.0, 0.8), 0.0, guidance_decay=0.75)


@pytest.mark.parametrize(
    "asked",
    [
        {"solver": "ddim"},
        {"solver": "dpmpp-2m"},
        {"solver": "ddpm"},
        {"solver": "ddpm", "size": (4, 12), "windows": 3, "guidance_scale": 1.0},
        {"condition": COMPOSED, "mix": "compose", "requested": DECAYING, "admitted": DECAYING, "seeds": (3,)},
        {"source": PICTURE, "requested": EDITING, "admitted": EDITING},
    ],
)
async def test_the_next_worker_goes_on_to_the_same_image(
    broker: Broker,
    make_worker: Make,
    make_job: Make,
    turnstile: Turnstile,
    answer: Make,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
) -> None:
    fields = {"model": "fake", "steps": 12, "seeds": (3, 4), "previews": 5, **asked}
    whole, job = make_job(**fields), make_job(**fields)
    turnstile.let(1000)
    async with working(make_worker(broker, "w0")):
        await broker.submit(whole)
        expected = await answer(whole)
    turnstile.allowed = threading.Semaphore(0)

    await leave_after(
        broker, make_worker(broker, "w1", drain_s=0.05), job, turnstile, wait_until, monkeypatch, steps=7
    )
    status = await broker.status(job.id)
    assert status is not None
    assert (status.state, status.step, status.attempt) == ("queued", 8, 1)
    before = turnstile.steps
    turnstile.let(1000)
    async with working(make_worker(broker, "w2")):
        made = await answer(job)
    assert [image.data for image in made.images] == [image.data for image in expected.images]
    assert (made.worker, made.attempt, made.steps_used) == ("w2", 2, 12)
    assert turnstile.steps - before == 4, "what was done is not done again"
    assert await broker._client.exists(broker.keys.checkpoint(job.id)) == 0


async def test_a_worker_of_another_bundle_starts_anew(
    broker: Broker,
    make_worker: Make,
    make_job: Make,
    turnstile: Turnstile,
    answer: Make,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(model="fake", steps=9, previews=2)
    leaving = make_worker(broker, "w1", origin="before", drain_s=0.05)
    await leave_after(broker, leaving, job, turnstile, wait_until, monkeypatch, steps=4)
    before = turnstile.steps
    turnstile.let(1000)
    async with working(make_worker(broker, "w2", origin="after")):
        made = await answer(job)
    assert turnstile.steps - before == made.steps_used == 9


async def test_images_that_are_done_are_not_made_again(
    broker: Broker, make_worker: Make, make_job: Make, turnstile: Turnstile, answer: Make
) -> None:
    """A checkpoint may hold finished samples beside one that is under way."""
    whole = make_job(model="fake", steps=6, seeds=(1, 2, 3))
    turnstile.let(1000)
    async with working(make_worker(broker, "w0")):
        await broker.submit(whole)
        expected = await answer(whole)
    first = make_worker(broker, "w1")
    await broker.submit(job := make_job(model="fake", steps=6, seeds=(1, 2, 3)))
    (claim,) = await broker.claim("w1", models=["fake"], max_samples=4)
    job_of = _left(first, claim, taken=(6, 2, 0))
    assert await broker.hand_back(claim.lease, checkpoint=job_of, step=0)
    before = turnstile.steps
    async with working(make_worker(broker, "w2")):
        made = await answer(job)
    assert [image.data for image in made.images] == [image.data for image in expected.images]
    assert turnstile.steps - before == 6, "as many as the one that had not begun needs"


def _left(worker: Worker, claim: Any, *, taken: tuple[int, ...]) -> bytes:
    """Return the checkpoint of a worker whose samples took so many steps each."""
    engine = worker._engine._engine
    running = RunningJob(claim, worker._ladder, claimed_at=0.0, states=[None] * len(taken))
    states: list[Any] = []
    for request, steps in zip(running.requests, taken, strict=True):
        engine.add(request)
        finished = [sample for _ in range(steps) for sample in engine.step().finished]
        states.append(finished[0] if finished else engine.export(request.id))
        engine.cancel(request.id)
    return write_checkpoint(states, origin="here", version=1)


async def test_a_hung_engine_ends_the_worker_and_its_jobs_are_tried_again(
    broker: Broker, make_worker: Make, make_job: Make, turnstile: Turnstile, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(model="fake", steps=9, previews=2)
    await broker.submit(job)
    stop, force_stop = asyncio.Event(), asyncio.Event()
    worker = make_worker(broker, "w1", hang_s=0.3, hang_steps=0.0)
    monkeypatch.setattr(worker._engine, "stop", lambda timeout_s: turnstile.let(1000))
    async with asyncio.timeout(15):
        assert not await worker.run(stop, force_stop), "for its supervisor to start another"
    (claim,) = await broker.claim("w2", models=["fake"], max_samples=1)
    assert (claim.job.id, claim.run_isolated) == (job.id, True)
    kinds = [event async for event in _until(broker, job, "queued")]
    assert kinds[-1].data["code"] == InternalError.code
    assert await broker.cancel(job.id)


async def test_a_step_that_is_predicted_to_be_long_is_no_hang(
    broker: Broker,
    make_worker: Make,
    make_job: Make,
    turnstile: Turnstile,
    answer: Make,
    wait_until: WaitUntil,
) -> None:
    job = make_job(model="fake", steps=3)
    await broker.submit(job)
    # The engine predicts 10 s for a step.
    async with working(make_worker(broker, "w1", hang_s=0.05, hang_steps=20.0)):

        async def late() -> bool:
            return any(state.last_step_age_s > 0.5 for state in (await broker.load()).workers)

        await wait_until(late)
        load = await broker.load()
        assert load.workers[0].hang_s == pytest.approx(200.0, rel=0.01)
        assert not hung(load, 0.05), "an API judges a worker by the worker's own limit"
        turnstile.let(1000)
        assert (await answer(job)).attempt == 1


async def test_a_leaving_worker_waits_for_the_end_of_a_long_step(
    broker: Broker,
    make_worker: Make,
    make_job: Make,
    turnstile: Turnstile,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(model="fake", steps=9, previews=2)
    # By the predicted steps all of the time is kept for the hand-over.
    leaving = make_worker(broker, "w1", drain_s=8.0, export_s=0.01)
    monkeypatch.setattr(leaving._engine._engine.costs, "predict", lambda rows: 10.0)
    await leave_after(broker, leaving, job, turnstile, wait_until, monkeypatch, steps=4, ends_after_s=0.3)
    status = await broker.status(job.id)
    assert status is not None
    assert (status.state, status.step) == ("queued", 5)
    assert await broker.cancel(job.id)


async def _until(broker: Broker, job: Job, kind: str) -> AsyncIterator[Any]:
    """Yield the events of a job up to the second of a kind."""
    seen = 0
    async for event in broker.events(job.id):
        yield event
        seen += event.kind == kind
        if seen == 2:
            return
