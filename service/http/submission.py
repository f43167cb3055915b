"""From a request to a job in the queue: the rung at which its deadline can be kept, and equal jobs.

`POST /generate` and OpenAI's route both submit through here. Knows no HTTP; raises the errors of `errors`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf

from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.prompt_limit import PromptLimit
from ditserve.service.callback_url import AllowedCallbacks
from ditserve.service.errors import (
    IdempotencyMismatch,
    JobLost,
    QueueFull,
    QueueUnavailable,
)
from ditserve.service.formats import MediaFormat
from ditserve.service.http.abandoned import Abandoned
from ditserve.service.http.adapters import RETRY_S
from ditserve.service.http.callbacks import check_callback
from ditserve.service.http.load_cache import LoadCache
from ditserve.service.http.loop_lag import LoopLag
from ditserve.service.http.media import frame_rate
from ditserve.service.http.operating_point import (
    field_error,
    guidance_embedded,
    guidance_scale,
)
from ditserve.service.http.picture_reader import PictureReader
from ditserve.service.http.promises import Promises
from ditserve.service.http.request_reader import RequestReader, ResolvedRequest
from ditserve.service.http.reuse import CacheOutcome, Lookup, Reuse, SharedJob, Sharing
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.identity import vocabulary_digest
from ditserve.service.jobs import TERMINAL_STATES, EqualJobs, Job, JobResult, JobStatus
from ditserve.service.planning.admission import Admission, AdmissionRequest
from ditserve.service.planning.capacity import drain_time
from ditserve.service.planning.delivery import Delivery
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.load import finite
from ditserve.service.queue.queue_client import Queue
from ditserve.service.rung import Consent, Rung
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics

# A client of a full queue is asked to come back once this share of it should have drained, or after `RETRY_S`
# where that cannot be predicted.
_DRAINED_SHARE = 0.1
# The key in a job's trace of the request's fingerprint. It tells a replay from another request under the same
# Idempotency-Key.
_FINGERPRINT = "body"


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The Idempotency-Key of a request, and a `fingerprint` that only equal requests share."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    `name` identifies the sender for fair queueing; `concurrency` is the number of unfinished jobs that the
    sender may have; `trace` travels with the job into logs and spans.
    """

    name: str
    idempotency: Idempotency | None = None
    concurrency: int | None = None
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that is in the queue.

    `new` is False when an Idempotency-Key led to a job that was there already; `pending` is True until the
    job has ended; `predicted_s` is the predicted time to its last image, None where nothing can be predicted.
    The answer is due at `answer_by`, later than the job by the room for its delivery.

    While images are reused, `cache` tells how: the job may be an equal one whose `result` is stored, or one
    that runs and was joined as its `holder`. `again` then has the request drawn by itself.
    """

    job: Job
    new: bool
    pending: bool
    predicted_s: float | None
    answer_by: float | None
    cache: CacheOutcome | None = None
    result: JobResult | None = None
    holder: str = ""
    again: Callable[[], Awaitable[Submission]] | None = None


class Submissions:
    """Turns requests for one model into jobs in the queue; `bundle` is the digest that its workers report."""

    def __init__(
        self,
        manifest: Manifest,
        settings: Settings,
        queue: Queue,
        *,
        prompts: PromptLimit,
        pictures: PictureReader,
        bundle: str,
    ) -> None:
        self.manifest = manifest
        self.prompts = prompts
        self.pictures = pictures
        self.ladder = Ladder.from_manifest(manifest)
        self.load = LoadCache(queue, manifest.name)
        self._reader = RequestReader(
            manifest, settings, prompts=prompts, pictures=pictures, ladder=self.ladder, load=self.load
        )
        self.abandoned = Abandoned(queue)
        self.promises = Promises(manifest.name, self.ladder)
        self.delivery = Delivery()
        self._lag = LoopLag()
        self._digest = vocabulary_digest(manifest)
        self._reuse = Reuse(queue, bundle, settings)
        self._callbacks = AllowedCallbacks.parse(settings.callback_allow)
        self._settings = settings
        self._queue = queue

    async def aclose(self) -> None:
        await self.load.aclose()
        await self.abandoned.aclose()

    async def submit(
        self,
        request: GenerateRequest,
        caller: Caller,
        *,
        media_format: MediaFormat = "png",
        rung: Rung | None = None,
        sharing: Sharing = "none",
    ) -> Submission:
        """Admit a request and queue it, unless the job of an equal one can answer that `sharing` allows.

        `rung` is one of the ladder that has the solver and steps of the request, and may have further
        backbones, which the request itself cannot name.

        Raises:
            UnknownCondition, InvalidRequest: the model cannot do what the request asks for.
            PayloadTooLarge: its picture is too large a file.
            Overloaded, QueueFull, QueueUnavailable, TooManyUploads: the service cannot take the request now.
            IdempotencyMismatch: the caller's key was used for another request.
        """
        reader = self._reader
        conditions = reader.conditions(request)
        check_callback(request.callback_url, self._callbacks)
        asked, output = reader.rung(request, rung), await reader.size(request)
        # What is to be done with a picture takes of the time that the request has.
        answer_by = self._answer_by(request, self._queue.clock())
        if caller.idempotency is not None:
            status = await self._queue.status(self._job_id(caller.name, caller.idempotency.key))
            if status is not None:
                return _replayed(status, caller.idempotency)
        source = await reader.source(request, output, strength=asked.strength)
        adapters = await reader.adapters(request)
        fps = frame_rate(request, self.manifest, media_format)
        resolved = ResolvedRequest(request, media_format, conditions, asked, output, source, adapters, fps)
        lookup = self._reuse.lookup(sharing, seeded=request.seed is not None)
        return await self._admitted(resolved, caller, answer_by, lookup)

    async def _admitted(
        self, resolved: ResolvedRequest, caller: Caller, answer_by: float | None, lookup: Lookup
    ) -> Submission:
        """Answer a request by an equal job, or else admit and queue its own. Raises as `submit` does."""
        now = self._queue.clock()
        admission_request = self._admission_request(resolved, answer_by, now)
        if lookup.active:
            as_asked = Admission(True, resolved.rung, False, None, None, inf)
            shared = await lookup.find(self._job(resolved, admission_request, as_asked, caller, now))
            if shared is not None:
                return _shared(shared, answer_by)
        sender = caller.name, resolved.request.model_dump_json()
        admission = self.promises.admit(admission_request, await self.load(), sender=sender, now=now)
        job = self._job(resolved, admission_request, admission, caller, now)
        # Nothing is awaited between admission and this reservation, so concurrent requests see each other.
        with self.load.reserved(job):
            # A degraded picture is another than the one that was asked for.
            shared = await lookup.find(job) if admission.degraded else None
            queued = shared or await lookup.queue(job, partial(self._enqueue, job, caller))
        if isinstance(queued, SharedJob):
            return _shared(queued, answer_by)
        if not queued:
            return _replayed(await self._existing(job), caller.idempotency)
        if admission.degraded:
            metrics.ADMITTED_DEGRADED.labels(admission.rung.name).inc()
        return Submission(job, True, True, finite(admission.predicted_s), answer_by, lookup.missed())

    def _admission_request(
        self, resolved: ResolvedRequest, answer_by: float | None, now: float
    ) -> AdmissionRequest:
        request, conditions = resolved.request, resolved.conditions
        deadline_at = None if answer_by is None else answer_by - self.delivery.room_s(answer_by - now)
        consent = Consent.to(
            request.min_steps or 1 if request.may_degrade else resolved.rung.walked,
            request.min_quality,
            negative_prompt=conditions.negative_prompt,
            mix=conditions.how,
            adapted=bool(resolved.adapters),
        )
        return AdmissionRequest(
            rung=resolved.rung,
            guidance_scale=guidance_scale(request, self.manifest) if conditions.can_be_guided else 1.0,
            samples=request.n,
            deadline_at=deadline_at,
            allow_degraded=request.may_degrade,
            consent=consent,
            row_cost=resolved.output.row_cost,
            conditions=conditions.composed,
        )

    def _answer_by(self, request: GenerateRequest, now: float) -> float | None:
        """Return the deadline of the answer by the queue's clock, None without one. Raises `InvalidRequest`.

        It counts from when the request came, which on a busy host is earlier than now.
        """
        now -= self._lag.waited_s()
        limit = self._settings.max_deadline_s
        if request.deadline_ms is None:
            default = self._settings.default_deadline_s
            return None if default is None else now + default
        if request.deadline_ms > limit * 1000:
            raise field_error("deadline_ms", f"At most {limit * 1000:.0f} ms.")
        return now + request.deadline_ms / 1000

    def _job(
        self,
        resolved: ResolvedRequest,
        admission_request: AdmissionRequest,
        admission: Admission,
        caller: Caller,
        now: float,
    ) -> Job:
        request, rung = resolved.request, resolved.rung
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        below = self.ladder.below(rung, admission_request.consent) if request.may_degrade else ()
        lowest = (admission.rung, *below)[-1]
        job_id, trace = secrets.token_hex(16), dict(caller.trace)
        if caller.idempotency is not None:
            job_id = self._job_id(caller.name, caller.idempotency.key)
            trace[_FINGERPRINT] = caller.idempotency.fingerprint
        return Job(
            id=job_id,
            model=self.manifest.name,
            condition=resolved.conditions.terms,
            mix=resolved.conditions.how,
            seeds=tuple(range(seed, seed + request.n)),
            steps=rung.walked,
            solver=rung.solver,
            grid=rung.grid,
            guidance_scale=admission_request.guidance_scale,
            guidance_interval=rung.guidance_interval,
            format=resolved.media_format,
            previews=request.previews,
            caller=caller.name,
            priority=request.priority,
            created_at=now,
            deadline_at=admission_request.deadline_at,
            allow_degraded=request.may_degrade,
            min_steps=admission_request.consent.min_steps,
            rung=admission.rung.name if admission.degraded else None,
            reason=admission.reason,
            cost_rows=admission_request.rows(self.ladder, admission.rung),
            floor_rows=admission_request.rows(self.ladder, lowest),
            trace=trace,
            size=resolved.output.size,
            windows=resolved.output.windows,
            vocabulary=self._digest,
            requested=rung,
            admitted=admission.rung,
            negative_prompt=resolved.conditions.negative_prompt,
            guidance_embedded=guidance_embedded(request, self.manifest),
            min_quality=request.min_quality,
            callback_url=request.callback_url or "",
            source=resolved.source,
            adapters=resolved.adapters,
            fps=resolved.fps,
            row_cost=resolved.output.row_cost,
        )

    def _job_id(self, caller: str, key: str) -> str:
        """Return the id of the job that a caller's Idempotency-Key stands for.

        The class names are part of it: images made for old classes do not answer a request for new ones.
        """
        identity = f"{caller}\0{key}\0{self.manifest.name} {self._digest}"
        return hashlib.blake2s(identity.encode(), digest_size=16).hexdigest()

    async def _enqueue(self, job: Job, caller: Caller, place: EqualJobs | None) -> bool:
        """Queue a job; return False if one of its id is there.

        Raises `QueueFull`, `QueueUnavailable`, `Overtaken`.
        """
        try:
            return await self._queue.submit(job, at_once=caller.concurrency, equal=place)
        except QueueUnavailable:
            # Redis may have taken the job before its answer was lost, or take it once it runs again.
            if caller.idempotency is None:
                self.abandoned.add(job.id, denials=2)
            raise
        except QueueFull as error:
            wait = finite(drain_time(await self.load()) * _DRAINED_SHARE)
            raise QueueFull(error.detail, retry_after=RETRY_S if wait is None else max(1.0, wait)) from None

    async def _existing(self, job: Job) -> JobStatus:
        status = await self._queue.status(job.id)
        if status is None:
            raise JobLost()
        return status


def _shared(shared: SharedJob, answer_by: float | None) -> Submission:
    """Return the submission that another job answers."""
    result = shared.result
    return Submission(
        shared.job, False, result is None, None, answer_by, shared.outcome, result, shared.holder
    )


def _replayed(status: JobStatus, idempotency: Idempotency | None) -> Submission:
    """Return the job that an earlier request queued.

    Raises `IdempotencyMismatch` if that request was another one.
    """
    if idempotency is None or status.job.trace.get(_FINGERPRINT) != idempotency.fingerprint:
        raise IdempotencyMismatch("This Idempotency-Key was sent before with another request.")
    pending = status.state not in TERMINAL_STATES
    return Submission(status.job, False, pending, predicted_s=None, answer_by=status.job.deadline_at)
