"""A worker: claims jobs it has room for, lets the engine step them, and answers.

The event loop keeps the leases, claims, cancels and reports; the engine steps in a thread of its own (`driver`), and images are
decoded and encoded in another (`finishing`). While Redis is away the engine works on, and what is finished is published, fenced,
once it is back. Built from parts that are handed in; knows no settings and no signals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

import structlog

from ditserve.model.spec.bundle import Factor
from ditserve.service.engine.samples import Failed, Finished, Preview, StepReport
from ditserve.service.errors import InternalError, ModelReplaced, QueueUnavailable, ServiceError, to_wire
from ditserve.service.jobs import Claim, Due, Lease, Network, Renewal, WorkerState
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.ladder import Ladder
from ditserve.service.queue.broker import Broker
from ditserve.service.signals import first
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.tracing import Tracing
from ditserve.service.worker.assembly import RunningJob
from ditserve.service.worker.driver import Beat, Driver, Stepper
from ditserve.service.worker.finishing import Decoder, Finishing
from ditserve.service.worker.handover import Handover
from ditserve.service.worker.leases import Leases
from ditserve.service.worker.reporting import Reporting
from ditserve.service.worker.telling import Telling

_REPLACED = "The model was replaced by a version with other classes; send the request again."

log = structlog.get_logger()


class Worker:
    """Runs the jobs of one model on one engine.

    Args:
        name: unique among all workers, ever: a restarted one has a new name.
        network: what is told about the engine's.
        origin: of the checkpoints it leaves and goes on from.
        bundle, vocabulary: digests of what it serves (`identity`); jobs of another vocabulary are refused.
        observe: called with every step's report, in the engine's thread.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        broker: Broker,
        engine: Stepper,
        decoder: Decoder,
        factors: Sequence[Factor] = (),
        ladder: Ladder,
        name: str,
        model: str,
        policy: WorkerPolicy,
        origin: str = "",
        bundle: str = "",
        vocabulary: str = "",
        network: Network | None = None,
        observe: Callable[[StepReport], None] = lambda report: None,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name, self.model, self.policy = name, model, policy
        self._bundle, self._vocabulary = bundle, vocabulary
        self._broker, self._ladder, self._clock = broker, ladder, clock
        self._tracing = tracing or Tracing()
        self._slots, self._network = engine.free_samples, network or Network()
        self._finishing = Finishing(decoder, factors)
        self._telling = Telling(broker, step_event_s=policy.step_event_s)
        self._leases = Leases(broker, clock=clock)
        self._reporting = Reporting(broker, every_s=policy.report_s, busy_s=policy.busy_report_s)
        self._driver = Driver(
            engine,
            deliver=self._deliver,
            observe=observe,
            broken=self._break,
            clock=clock,
            max_rows=policy.max_rows,
        )
        self._handover = Handover(broker, self._driver, origin=origin, export_s=policy.export_s)
        self._jobs: dict[str, RunningJob] = {}
        self._samples: dict[str, RunningJob] = {}  # what is in the engine
        self._busy_since = 0.0
        self._beat: Beat | None = None
        self._leaving = False
        self._broken = asyncio.Event()
        self._ended = asyncio.Event()  # some job has

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event) -> bool:
        """Work until `stop`, then drain, at most until `hurry`. False if it ended because the engine is broken."""
        self._loop = asyncio.get_running_loop()
        self._broker.watch(self._cancelled)
        self._driver.start()
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                claiming = group.create_task(self._claim())
                reporting = group.create_task(self._reporting.run(self._state, self._driver))
                keeping = group.create_task(self._leases.keep(self._held, self._lost))
                telling = group.create_task(self._telling.run())
                guarding = group.create_task(self._guard())
                await first(stop, self._broken)
                reporting.cancel()
                await self._drain(claiming, hurry)
                for task in (keeping, telling, guarding):
                    task.cancel()
        finally:
            await asyncio.to_thread(self._driver.stop, timeout_s=5.0)
            self._finishing.close()
        return not self._broken.is_set()

    async def _claim(self) -> None:
        while not self._leaving:
            room = self._room()
            try:
                claims = await self._broker.claim(
                    self.name, models=[self.model], max_samples=room, idle=not self._jobs
                )
            except QueueUnavailable as error:
                log.warning("claim failed", detail=error.detail)
                await asyncio.sleep(self.policy.retry_s)
                continue
            for claim in claims:
                self._start(claim)
                self._reporting.changed()
            # Less than there is room for: nothing else was to be had, and what comes from now on rings.
            if sum(len(claim.job.seeds) for claim in claims) < max(1, room) and not self._leaving:
                await self._broker.wait_for_work(self.policy.idle_s)

    async def _drain(self, claiming: asyncio.Task[None], hurry: asyncio.Event) -> None:
        """Finish what has begun, as far as the time allows, and give back the rest."""
        log.info("draining", jobs=len(self._jobs))
        self._leaving = True
        self._broker.wake()
        await self._reporting.retire(self.name)
        await claiming
        await self._hand_back([job for job in self._jobs.values() if not self._begun(job)])
        deadline = self._loop.time() + self.policy.drain_s
        while self._jobs and not hurry.is_set() and not self._broken.is_set():
            self._ended.clear()
            if not await first(self._ended, hurry, self._broken, timeout_s=deadline - self._loop.time()):
                break
        await self._hand_back(list(self._jobs.values()))

    def _begun(self, job: RunningJob) -> bool:
        """Whether a step of it has been taken."""
        progress = self._beat.progress if self._beat else {}
        return any(each.id not in self._samples or progress.get(each.id, (0, 0))[0] for each in job.requests)

    def _held(self) -> list[Lease]:
        return [job.lease for job in self._jobs.values()]

    def _lost(self, renewal: Renewal) -> None:
        for job_id in renewal.lost:
            job = self._jobs.get(job_id)
            if job is not None:
                self._drop(job, "cancelled" if job_id in renewal.cancelled else "lost")

    def _start(self, claim: Claim) -> None:
        if claim.job.vocabulary not in ("", self._vocabulary):
            log.warning("job of another vocabulary", job=claim.job.id)
            self._answer(claim.lease, ModelReplaced(_REPLACED, retry_after=1.0))
            return
        earlier = self._jobs.get(claim.job.id)
        if earlier is not None:
            self._drop(earlier, "lost")
        try:
            job = RunningJob(
                claim, self._ladder, claimed_at=self._clock(), standings=self._handover.standings(claim)
            )
        except ValueError as error:  # a solver, grid or interval this release does not know
            self._answer(claim.lease, InternalError(f"The worker cannot run this job: {error}."))
            return
        if not self._samples:
            self._busy_since = self._clock()
        self._jobs[job.id] = job
        self._samples.update((request.id, job) for request, _ in job.starts)
        self._driver.add(job.starts)
        if job.done:
            self._finished([(job, finished) for finished in job.done])
        log.debug("claimed", job=job.id, attempt=job.lease.attempt, alone=job.alone)

    def _room(self) -> int:
        """Samples to claim: for a worthwhile batch, and this worker's part of the look-ahead. None beside a suspect."""
        if self._beat is None or any(job.alone for job in self._jobs.values()):
            return 0
        held = sum(job.missing for job in self._jobs.values())
        wanted = self._beat.pace.knee + self.policy.lookahead_rows // self._reporting.peers
        rows = wanted - sum(job.rows for job in self._jobs.values())
        return max(0, min(self._slots - held, (rows + 1) // 2))

    def _cancelled(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            self._drop(job, "cancelled")

    def _drop(self, job: RunningJob, outcome: str) -> None:
        """Stop work on a job; whatever of it still arrives is ignored."""
        del self._jobs[job.id]
        ids = [request.id for request in job.requests if self._samples.pop(request.id, None)]
        self._driver.cancel(ids)
        self._ended.set()
        self._broker.wake()
        metrics.JOBS.labels(outcome).inc()
        log.info(
            "job ended",
            job=job.id,
            request_id=job.job.trace.get("request_id"),
            outcome=outcome,
            attempt=job.lease.attempt,
        )

    def _fail(self, job: RunningJob, error: ServiceError, *, retry: bool = False) -> None:
        self._drop(job, "failed")
        log.warning("job failed", job=job.id, code=error.code, detail=error.detail, retry=retry)
        self._answer(job.lease, error, retry=retry)

    def _answer(self, lease: Lease, error: ServiceError, *, retry: bool = False) -> None:
        wire = to_wire(error)
        self._group.create_task(self._leases.insist(lambda: self._broker.fail(lease, wire, retry=retry)))

    async def _hand_back(self, jobs: Sequence[RunningJob]) -> None:
        snapshots = {} if self._broken.is_set() else await self._handover.export(jobs)
        for job in jobs:
            if self._jobs.get(job.id) is job:
                standings = job.standings(snapshots)
                self._drop(job, "handed-back")
                await self._handover.give_back(job, standings)

    async def _guard(self) -> None:
        """Give up when the engine hangs: its jobs are tried again elsewhere, and a new process takes this one's place."""
        late = 0
        while late < 2:  # a second look, for a process that was itself stopped for a while
            await asyncio.sleep(self.policy.hang_s / 10)
            late = late + 1 if self._age() > self.policy.hang_s else 0
        log.error("the engine hangs", seconds=round(self._age(), 1))
        for job in list(self._jobs.values()):
            self._fail(job, InternalError("The engine of the worker hung."), retry=True)
        self._broken.set()

    # What the engine says.

    def _deliver(self, beat: Beat) -> None:
        self._loop.call_soon_threadsafe(self._hear, beat)

    def _break(self) -> None:
        self._loop.call_soon_threadsafe(self._broken.set)

    def _hear(self, beat: Beat) -> None:
        if self._beat is None:
            self._broker.wake()
        self._beat, report = beat, beat.report
        self._reporting.changed()
        for change in report.changes:
            if job := self._samples.get(change.sample_id):
                self._telling.degraded(job, change)
        self._failed((*report.failed, *beat.refused), retry=False)
        self._failed(beat.crashed, retry=True)
        batch = [(job, each) for each in report.finished if (job := self._samples.pop(each.id, None))]
        if batch:
            self._finished(batch)
        for preview in report.previews:
            job = self._samples.get(preview.id)
            if job is not None and self._finishing.pending < self.policy.previews_pending:
                self._group.create_task(self._preview(job, preview))
        self._telling.steps(self._jobs.values(), beat.progress, self._clock())

    def _failed(self, failures: Iterable[Failed], *, retry: bool) -> None:
        for failure in failures:
            job = self._samples.get(failure.id)
            if job is not None:
                self._fail(job, failure.error, retry=retry)

    def _finished(self, batch: Sequence[tuple[RunningJob, Finished]]) -> None:
        for job, finished in batch:
            job.finish(finished)
        self._group.create_task(self._finish(batch))

    async def _finish(self, batch: Sequence[tuple[RunningJob, Finished]]) -> None:
        try:
            images = await self._finishing.images(batch)
        except Exception:
            log.exception("decoding failed", samples=len(batch))
            for job, _ in batch:
                if self._jobs.get(job.id) is job:
                    self._fail(job, InternalError("The image could not be decoded."))
            return
        for (job, _), made in zip(batch, images, strict=True):
            self._driver.observe_decode((made.decode_ms + made.encode_ms) / 1e3)
            if job.add(made) and self._jobs.get(job.id) is job:
                await self._publish(job)

    async def _publish(self, job: RunningJob) -> None:
        result = job.result(self.name)
        kept = await self._leases.insist(lambda: self._broker.finish(job.lease, result))
        if self._jobs.get(job.id) is job:
            self._drop(job, "done" if kept else "lost")
        if kept:
            self._tracing.job(job.job, result, self._clock())
            metrics.QUEUE_WAIT_SECONDS.observe(result.timings_ms["queue"] / 1e3)
            metrics.STEPS_REQUESTED.inc(result.steps_requested * len(result.images))

    async def _preview(self, job: RunningJob, preview: Preview) -> None:
        try:
            image = await self._finishing.preview(job, preview)
        except Exception:
            log.exception("preview failed", job=job.id)
            return
        self._telling.preview(job, preview, image)

    def _state(self) -> WorkerState | None:
        if self._beat is None:
            return None
        now, pace, fresh = self._clock(), self._beat.pace, self._fresh(self._beat)
        return WorkerState(
            worker=self.name,
            models=(self.model,),
            max_rows=self.policy.max_rows,
            step_fixed_s=pace.fixed_s,
            step_per_row_s=pace.per_row_s,
            decode_s=pace.decode_s,
            running_samples=len(self._samples),
            backlog_rows=self._beat.backlog_rows + sum(due.rows for due in fresh),
            dues=self._beat.dues + fresh,
            network=self._network,
            bundle=self._bundle,
            given_rows=self._broker.given_rows(self.name),
            last_step_age_s=self._age(),
            updated_at=now,
        )

    def _fresh(self, beat: Beat) -> tuple[Due, ...]:
        """What was claimed since the engine last said how it stands: a step may take seconds."""
        return tuple(
            job.job.due
            for job in self._jobs.values()
            if all(each.id in self._samples and each.id not in beat.progress for each in job.requests)
        )

    def _age(self) -> float:
        """Seconds without a step, while there is something to step."""
        if self._beat is None or not self._samples:
            return 0.0
        return self._clock() - max(self._beat.stepped_at, self._busy_since)
