"""A worker: claims jobs it has room for, lets the engine step them, and publishes their results.

The event loop keeps the leases, claims, cancels and reports. The engine steps in a thread of its own
(`engine_thread`), and images are decoded and encoded in another (`postprocess`). While Redis is away the
engine works on; what is finished is published when Redis is back, if the lease still holds. A worker knows no
settings and no signals (`main` does).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.source import SourceLatent
from ditserve.service.engine.samples import Failed, Latent, Preview, StepReport
from ditserve.service.errors import InternalError, ModelReplaced, QueueUnavailable, ServiceError, to_wire
from ditserve.service.formats import MediaKind
from ditserve.service.jobs import ANY_FLOW, Claim, Lease, Renewal
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.capacity import backlog_time
from ditserve.service.planning.ladder import Ladder
from ditserve.service.queue.broker import Broker
from ditserve.service.signals import first
from ditserve.service.source_picture import SourcePicture
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.faults import kept_running, surviving
from ditserve.service.telemetry.tracing import Tracing
from ditserve.service.worker.engine_monitor import EngineMonitor, WorkerIdentity
from ditserve.service.worker.engine_thread import EngineReport, EngineThread, Stepper
from ditserve.service.worker.handoff import Handoff
from ditserve.service.worker.heartbeat import Leases, Reporting
from ditserve.service.worker.postprocess import Decoder, FinishedSample, PictureEncoder, Postprocessor
from ditserve.service.worker.progress_events import ProgressEvents
from ditserve.service.worker.room import Room, claim_room, wanted_rows
from ditserve.service.worker.running_job import RunningJob, RunningJobs

STOP_THREAD_S = 5.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """The parts that a worker is built from.

    `factors` name the classes in the metadata of files, which are of this `kind` and count guidance from
    `unguided_scale`.
    `observe` is called with the report of every step, in the engine's thread. `further` decodes what a
    further backbone of that name finished, and `previews` previews, in place of `decoder`. `encoder` makes
    latents of the pictures that requests start from.
    """

    broker: Broker
    engine: Stepper
    decoder: Decoder
    ladder: Ladder
    factors: Sequence[Factor] = ()
    kind: MediaKind = "picture"
    unguided_scale: float = 1.0
    further: Mapping[str, Decoder] | None = None
    previews: Decoder | None = None
    encoder: PictureEncoder | None = None
    observe: Callable[[StepReport], None] = lambda report: None
    tracing: Tracing = field(default_factory=Tracing)


class Worker:
    """The jobs of one model on one engine. Construct it inside the event loop.

    Methods `_on_…` are called when something has happened: they note it, start what follows, and return at
    once. All others are named for what they do.
    """

    def __init__(self, parts: WorkerParts, identity: WorkerIdentity, policy: WorkerPolicy) -> None:
        broker = parts.broker
        self.identity, self.policy = identity, policy
        self._broker, self._ladder, self._tracing = broker, parts.ladder, parts.tracing
        self._slots = parts.engine.free_samples
        self._postprocessor = Postprocessor(
            parts.decoder,
            parts.factors,
            kind=parts.kind,
            unguided_scale=parts.unguided_scale,
            further=parts.further,
            previews=parts.previews,
            encoder=parts.encoder,
        )
        self._events = ProgressEvents(broker, step_event_s=policy.step_event_s)
        self._leases = Leases(broker)
        self._reporting = Reporting(broker, every_s=policy.report_s, busy_s=policy.busy_report_s)
        self._broken = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._engine = EngineThread(
            parts.engine,
            deliver=lambda report: loop.call_soon_threadsafe(self._on_engine_report, report),
            observe=parts.observe,
            on_broken=lambda: loop.call_soon_threadsafe(self._broken.set),
            clock=broker.clock,
            max_rows=policy.max_rows,
        )
        self._handoff = Handoff(broker, self._engine, origin=identity.origin)
        self._jobs = RunningJobs()
        self._monitor = EngineMonitor(self._engine, self._jobs, broker, identity=identity, policy=policy)
        self._leaving = False
        self._may_claim_later = False  # another worker was idler at the last claim
        self._job_ended = asyncio.Event()
        self._tasks = asyncio.TaskGroup()

    async def run(self, stop: asyncio.Event, force_stop: asyncio.Event) -> bool:
        """Work until `stop`, then drain, at most until `force_stop`. Return False if the engine is broken."""
        self._broker.work.watch(self._on_cancelled)
        self._engine.start()
        try:
            async with self._tasks as tasks:
                claiming = tasks.create_task(kept_running("claiming", self._claim_jobs))
                reporting = tasks.create_task(kept_running("reporting", self._report_state))
                until_drained = (
                    tasks.create_task(kept_running("keeping leases", self._keep_leases)),
                    tasks.create_task(kept_running("publishing events", self._events.run)),
                    tasks.create_task(kept_running("watching the engine", self._watch_for_hang)),
                )
                await first(stop, self._broken)
                reporting.cancel()
                await self._drain(claiming, force_stop)
                for task in until_drained:
                    task.cancel()
        finally:
            await asyncio.to_thread(self._engine.stop, timeout_s=STOP_THREAD_S)
            self._postprocessor.close()
        return not self._broken.is_set()

    # Jobs come.

    async def _claim_jobs(self) -> None:
        available = frozenset({ANY_FLOW})
        while not self._leaving:
            room = self._room()
            if not room.may_take(available):
                available = await self._broker.work.wait(self.policy.idle_s)
                continue
            try:
                claims = await self._broker.claim(
                    self.identity.name,
                    models=[self.identity.model],
                    max_samples=room.samples,
                    idle=not self._jobs,
                    reserved=room.reserved,
                    crowded=room.crowded,
                )
            except QueueUnavailable as error:
                log.warning("claim failed", detail=error.detail)
                await asyncio.sleep(self.policy.retry_s)
                continue
            for claim in claims:
                self._start_job(claim)
                self._reporting.changed()
            available = frozenset()
            # Fewer samples than there is room for: the queue has no more to give, and notifies of what comes
            # later.
            if sum(len(claim.job.seeds) for claim in claims) < max(1, room.samples) and not self._leaving:
                available = await self._broker.work.wait(self.policy.idle_s)

    def _room(self) -> Room:
        """Return how much to claim now.

        There is no room before the engine is ready.
        """
        report, state = self._monitor.report, self._monitor.worker_state()
        if report is None:
            return Room()
        held = sum(job.missing for job in self._jobs)
        ahead_s = (backlog_time(state) if state else 0.0) - self._reporting.idlest_peer_s
        self._may_claim_later = ahead_s > self.policy.balance_s
        wanted = wanted_rows(
            report.costs.saturation_rows,
            lookahead_rows=self.policy.lookahead_rows,
            peers=self._reporting.peers,
            ahead_s=ahead_s,
            balance_s=self.policy.balance_s,
        )
        return claim_room(self._jobs, wanted_rows=wanted, free_slots=self._slots - held)

    def _start_job(self, claim: Claim) -> None:
        if replaced := self.identity.replaced(claim.job):
            log.warning("job of what was replaced", job=claim.job.id, reason=replaced)
            self._publish_error(claim.lease, ModelReplaced(replaced, retry_after=1.0))
            return
        earlier = self._jobs.get(claim.job.id)
        if earlier is not None:
            self._drop(earlier, "lost")
        states = self._handoff.sample_states(claim)
        try:
            job = RunningJob(claim, self._ladder, claimed_at=self._broker.clock(), states=states)
        except ValueError as error:
            # The job names a solver, grid or interval that this release does not know.
            self._publish_error(claim.lease, InternalError(f"The worker cannot run this job: {error}."))
            return
        except Exception as error:
            log.exception("job refused", job=claim.job.id)
            self._publish_error(claim.lease, error)
            return
        self._jobs.add(job)
        if job.job.source is None or not job.starts:
            self._join(job)
        else:
            self._start_task(self._encode_source(job, job.job.source), [job])
        if job.done:
            self._on_finished([(job, finished) for finished in job.done], at=job.claimed_at)
        log.debug("claimed", job=job.id, attempt=job.lease.attempt, alone=job.run_isolated)

    async def _encode_source(self, job: RunningJob, picture: SourcePicture) -> None:
        """Let the samples of a job join once the picture that they start from is encoded."""
        try:
            source = await self._postprocessor.source(picture)
        except Exception as error:
            if not isinstance(error, ServiceError):
                log.exception("encoding failed", job=job.id)
                error = InternalError("The picture to start from could not be encoded.")
            if job in self._jobs:
                self._fail(job, error)
            return
        if job in self._jobs:
            self._join(job, source)

    def _join(self, job: RunningJob, source: SourceLatent[Latent] | None = None) -> None:
        if not self._jobs.samples_in_engine:
            self._monitor.became_busy()
        self._engine.add(job.join(source))

    # The engine reports.

    def _on_engine_report(self, report: EngineReport) -> None:
        if self._monitor.report is None:
            # The first report: the engine is ready, so the loop that claims may begin.
            self._broker.work.notify(ANY_FLOW)
        self._monitor.report, step = report, report.step
        self._reporting.changed()
        if self._may_claim_later:
            self._broker.work.notify()
        for change in step.changes:
            if job := self._jobs.of_sample(change.sample_id):
                self._events.degraded(job, change)
        self._on_failed((*step.failed, *report.refused), retry=False)
        self._on_failed(report.crashed, retry=True)
        batch = [
            (job, finished) for finished in step.finished if (job := self._jobs.leave_engine(finished.id))
        ]
        if batch:
            self._on_finished(batch, at=self._broker.clock.shared(report.stepped_at))
        for preview in step.previews:
            self._on_preview(preview)
        self._events.steps(self._jobs, report.progress, time.monotonic())

    def _on_failed(self, failures: Iterable[Failed], *, retry: bool) -> None:
        for failure in failures:
            # Its job may have failed already, with an earlier one of these samples.
            job = self._jobs.of_sample(failure.id)
            if job is not None:
                self._fail(job, failure.error, retry=retry)

    def _on_finished(self, batch: Sequence[FinishedSample], *, at: float) -> None:
        for job, finished in batch:
            job.finish(finished, at=at)
        self._start_task(self._make_images(batch), [job for job, _ in batch])

    def _on_preview(self, preview: Preview) -> None:
        job = self._jobs.of_sample(preview.id)
        if job is not None and self._postprocessor.pending < self.policy.previews_pending:
            self._start_task(self._make_preview(job, preview), [])

    # Jobs end.

    async def _make_images(self, batch: Sequence[FinishedSample]) -> None:
        try:
            images = await self._postprocessor.images(batch)
        except Exception as error:
            log.exception("decoding failed", samples=len(batch))
            if len(batch) > 1:
                # The fault of one sample is not the fault of those decoded with it.
                for sample in batch:
                    await self._make_images([sample])
                return
            job, _ = batch[0]
            if not isinstance(error, ServiceError):
                error = InternalError("The image could not be decoded.")
            if job in self._jobs:
                self._fail(job, error)
            return
        for (job, _), image in zip(batch, images, strict=True):
            self._engine.observe_decode((image.decode_ms + image.encode_ms) / 1e3)
            if job.add(image) and job in self._jobs:
                await self._publish_result(job)

    async def _make_preview(self, job: RunningJob, preview: Preview) -> None:
        try:
            image = await self._postprocessor.preview(job, preview)
        except Exception:
            log.exception("preview failed", job=job.id)
            return
        self._events.preview(job, preview, image)

    async def _publish_result(self, job: RunningJob) -> None:
        result = job.result(self.identity.name, bundle=self.identity.bundle)
        stored = await self._leases.retry_until_published(lambda: self._broker.finish(job.lease, result))
        if job in self._jobs:
            self._drop(job, "done" if stored else "lost")
        if stored:
            self._tracing.job(job.job, result, self._broker.clock())
            metrics.QUEUE_WAIT_SECONDS.observe(result.timings_ms["queue"] / 1e3)
            metrics.STEPS_REQUESTED.inc(result.steps_requested * len(result.images))

    def _publish_error(self, lease: Lease, error: Exception, *, retry: bool = False) -> None:
        wire = to_wire(error)
        publishing = self._leases.retry_until_published(lambda: self._broker.fail(lease, wire, retry=retry))
        self._start_task(publishing, [])

    def _start_task(self, work: Coroutine[Any, Any, Any], jobs: Sequence[RunningJob]) -> None:
        """Let work on jobs go on by itself. An unforeseen error ends the attempts at them, and no more."""

        async def attempt() -> None:
            with surviving("working on jobs", jobs=[job.id for job in jobs]):
                await work
                return
            for job in jobs:
                if job in self._jobs:
                    self._fail(job, InternalError("The worker failed at this job."), retry=True)

        self._tasks.create_task(attempt())

    def _fail(self, job: RunningJob, error: ServiceError, *, retry: bool = False) -> None:
        self._drop(job, "failed")
        log.warning("job failed", job=job.id, code=error.code, detail=error.detail, retry=retry)
        self._publish_error(job.lease, error, retry=retry)

    def _drop(self, job: RunningJob, outcome: str) -> None:
        """Stop work on a job; whatever of it still arrives is ignored."""
        self._engine.cancel(self._jobs.remove(job))
        self._job_ended.set()
        self._broker.work.notify(ANY_FLOW)
        metrics.JOBS.labels(outcome).inc()
        log.info(
            "job ended",
            job=job.id,
            request_id=job.job.trace.get("request_id"),
            outcome=outcome,
            attempt=job.lease.attempt,
        )

    # Jobs are taken away.

    def _on_cancelled(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            self._drop(job, "cancelled")

    def _on_lost_leases(self, renewal: Renewal) -> None:
        for job_id in renewal.lost:
            job = self._jobs.get(job_id)
            if job is not None:
                self._drop(job, "cancelled" if job_id in renewal.cancelled else "lost")

    async def _watch_for_hang(self) -> None:
        """Give up when the engine hangs: its jobs are retried, and a new process replaces this one."""
        await self._monitor.until_hung()
        log.error("the engine hangs", seconds=round(self._monitor.step_age_s(), 1))
        for job in self._jobs:
            self._fail(job, InternalError("The engine of the worker hung."), retry=True)
        self._broken.set()

    # The worker leaves.

    async def _drain(self, claiming: asyncio.Task[None], force_stop: asyncio.Event) -> None:
        """Finish the jobs that have begun, as far as the time allows, and hand back the rest.

        The engine can only say where its samples stand between two steps, so the last steps of the time are
        kept for that.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.policy.drain_s
        log.info("draining", jobs=len(self._jobs))
        self._leaving = True
        self._broker.work.notify()
        await self._reporting.retire(self.identity.name)
        await claiming
        report = self._monitor.report
        progress = report.progress if report else {}
        not_begun = [job for job in self._jobs if not self._jobs.has_begun(job, progress)]
        await self._hand_back(not_begun, self.policy.export_s)
        while self._jobs and not force_stop.is_set() and not self._broken.is_set():
            self._job_ended.clear()
            left_s = deadline - clock() - self.policy.export_steps * self._engine.step_s
            if not await first(self._job_ended, force_stop, self._broken, timeout_s=left_s):
                break
        await self._hand_back(list(self._jobs), 0.0 if force_stop.is_set() else deadline - clock())

    async def _hand_back(self, jobs: Sequence[RunningJob], limit_s: float) -> None:
        limit_s = max(limit_s, self.policy.export_s)
        snapshots = {} if self._broken.is_set() else await self._handoff.export(jobs, limit_s=limit_s)
        for job in jobs:
            if job in self._jobs:
                states = job.sample_states(snapshots)
                self._drop(job, "handed-back")
                await self._handoff.hand_back(job, states)

    # The worker reports.

    async def _report_state(self) -> None:
        await self._reporting.run(self._monitor.worker_state, self._engine)

    async def _keep_leases(self) -> None:
        await self._leases.keep(
            self._held_leases, self._on_lost_leases, predicted_s=self._monitor.longest_run_s
        )

    def _held_leases(self) -> list[Lease]:
        return [job.lease for job in self._jobs]
