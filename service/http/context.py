"""The state that the routes of one API process share, and how they wait for a job."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Receive

from ditserve.service.addresses import share
from ditserve.service.api_keys import ApiKey
from ditserve.service.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    JobExpired,
    JobLost,
    JobNotFound,
    ModelNotFound,
    QueueUnavailable,
)
from ditserve.service.http.feeds import Feeds
from ditserve.service.http.middleware import disconnected
from ditserve.service.http.models import Model
from ditserve.service.http.streams import Stream, Streams
from ditserve.service.http.submission import Caller, Idempotency, Submission
from ditserve.service.jobs import JobResult, JobStatus
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics

_JOB_ID = re.compile(r"[0-9a-f]{32}")
# The ends of a job that say nothing of another request that waits for its images.
_OF_THE_OTHER = (Cancelled, DeadlineExceeded, JobExpired, JobLost)


class Unshared(Exception):
    """The job that a request had joined ended, and its images are to be drawn for this request alone."""


@dataclass(frozen=True, slots=True)
class JobLookup:
    """A job that was looked up: its status, and the model it belongs to."""

    status: JobStatus
    model: Model


@dataclass(slots=True)
class Context:
    """The shared state of one API process, opened by the application's lifespan.

    `models` holds the models by name, the default first; a reload replaces the whole mapping. `started` is
    True once enough workers of each model were seen; `draining` is set once the process is to stop.
    """

    settings: Settings
    models: Mapping[str, Model]
    draining: asyncio.Event
    streams: Streams
    feeds: Feeds = field(default_factory=Feeds)
    started: bool = field(default=False)

    @property
    def default(self) -> Model:
        """The model of requests that name none."""
        return next(iter(self.models.values()))

    def model(self, name: str | None) -> Model:
        """Return the model of that name, the default for None. Raises `ModelNotFound`."""
        if name is None:
            return self.default
        model = self.models.get(name)
        if model is None:
            raise ModelNotFound(f"There is no model {name!r}; this service runs {', '.join(self.models)}.")
        return model

    async def aclose(self) -> None:
        """End what the models ask of their queues at this moment."""
        for model in self.models.values():
            await model.submissions.aclose()

    def address(self, path: str) -> str:
        """Return the address of a path as clients reach it, through a proxy or not."""
        return self.settings.root_path + path

    def open_stream(self, request: Request, *, lasting: bool = False) -> Stream:
        """Count an event stream of the sender of a request. Raises `QuotaExceeded`."""
        key: ApiKey | None = getattr(request.state, "key", None)
        return self.streams.open(caller(request).name, key, lasting=lasting)

    async def job(self, job_id: str, key: ApiKey | None = None) -> JobLookup:
        """Look a job up among all models. With `key`, only jobs that its holder may see are found.

        A key sees its own jobs; a key of the scope admin sees everybody's.

        Raises `JobNotFound`, `JobLost` (this process had queued it), `QueueUnavailable`.
        """
        for model in self.models.values() if _JOB_ID.fullmatch(job_id) else ():
            status = await model.queue_client.queue.status(job_id)
            if status is not None and (key is None or key.may_see(status.job.caller)):
                return JobLookup(status, model)
            if status is None and model.queue_client.queue.accepted(job_id):
                raise JobLost()
        raise JobNotFound(f"There is no job {job_id[:64]!r}.")

    async def result(
        self, model: Model, submission: Submission, receive: Receive, *, keep: bool = False
    ) -> JobResult:
        """Wait for the result of a queued job until its answer is due.

        If the client goes away first, or Redis for long, the job is cancelled, unless `keep`. A job that
        misses its deadline is cancelled in any case. One that was joined is left, and runs on for others.

        Raises `Cancelled`, `DeadlineExceeded`, `Draining`, `QueueUnavailable`, or the job's own error; where
        that is not this request's, `Unshared`.
        """
        if submission.result is not None:
            return submission.result
        job = submission.job
        result = asyncio.create_task(model.queue_client.listener.wait(job.id, new=submission.new))
        gone = asyncio.create_task(disconnected(receive))
        drained = asyncio.create_task(self._drained())
        clock = model.queue_client.queue.clock
        timeout = None if submission.answer_by is None else max(0.0, submission.answer_by - clock())
        try:
            await asyncio.wait((result, gone, drained), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                if submission.holder and isinstance(result.exception(), _OF_THE_OTHER):
                    raise Unshared() from result.exception()
                made = result.result()
                if submission.new:
                    _observe_delivery(model, made)
                return made
            if gone.done():
                raise Cancelled("The client went away.")
            if drained.done():
                raise Draining("The images were not ready when this process had to stop.", retry_after=1)
            keep = False
            raise DeadlineExceeded("The images were not ready by the deadline.")
        finally:
            ended = result.done() and not _says_nothing(result)
            result.cancel()
            gone.cancel()
            drained.cancel()
            await asyncio.wait((result, gone, drained))
            if not ended and not keep:
                await model.submissions.abandoned.cancel(job.id, holder=submission.holder)

    async def _drained(self) -> None:
        """Return once this process is to stop and has waited for its requests as long as it may."""
        await self.draining.wait()
        await asyncio.sleep(self.settings.drain_s)


def _observe_delivery(model: Model, made: JobResult) -> None:
    """Learn how long an image was under way from its last step until now."""
    if made.denoised_at:
        delivery_s = max(0.0, model.queue_client.queue.clock() - made.denoised_at)
        metrics.DELIVERY_SECONDS.observe(delivery_s)
        decoding_ms = sum(made.timings_ms.get(phase, 0.0) for phase in ("decode", "encode"))
        model.submissions.delivery.observe(delivery_s - decoding_ms / 1e3)


def _says_nothing(result: asyncio.Task[JobResult]) -> bool:
    """Return True if waiting ended because Redis could not be asked, so that the job may still run."""
    return not result.cancelled() and isinstance(result.exception(), QueueUnavailable)


def context_of(request: Request) -> Context:
    """Return the state of the process that serves a request."""
    context: Context = request.app.state.context
    return context


# A coroutine, because FastAPI would run a plain function in another thread.
async def _context(request: Request) -> Context:
    return context_of(request)


Api = Annotated[Context, Depends(_context)]


async def _lookup(job_id: str, request: Request, api: Api) -> JobLookup:
    return await api.job(job_id, getattr(request.state, "key", None))


# The job that the path names.
PathJob = Annotated[JobLookup, Depends(_lookup)]


def caller(request: Request, *, idempotency: Idempotency | None = None) -> Caller:
    """Return the sender of a request: the API key, or the network address where keys are not used.

    Queueing is fair between callers, and an Idempotency-Key counts within its caller.
    """
    trace = {"request_id": request.state.request_id, **request.state.trace}
    key: ApiKey | None = getattr(request.state, "key", None)
    if key is not None:
        return Caller(key.caller, idempotency, key.concurrency, trace)
    name = share(request.client.host) if request.client else "unknown"
    return Caller(name, idempotency, None, trace)


def note(request: Request, **fields: str) -> None:
    """Add fields to the log line of this request."""
    notes: dict[str, str] = request.scope["state"].setdefault("notes", {})
    notes.update(fields)


def server_timing(timings_ms: Mapping[str, float]) -> str:
    """Return the `Server-Timing` header (W3C), durations in milliseconds."""
    return ", ".join(f"{name};dur={duration:.1f}" for name, duration in timings_ms.items())
