"""What the routes of one API process share, and how they wait for a job."""

import asyncio
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Receive

from ditserve.service.api_keys import ApiKey
from ditserve.service.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    JobNotFound,
    ModelNotFound,
    QueueUnavailable,
)
from ditserve.service.http.intake import Caller, Ticket
from ditserve.service.http.middleware import disconnected
from ditserve.service.http.models import Model
from ditserve.service.jobs import JobResult, JobStatus
from ditserve.service.settings import Settings

_JOB_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where a job stands, and the model that has it."""

    status: JobStatus
    model: Model


@dataclass(slots=True)
class Context:
    """Opened by the app's lifespan. `models` by name, the default first; replaced as a whole when one is. `started` once workers of
    each were seen; `draining` once the process is to stop."""

    settings: Settings
    models: Mapping[str, Model]
    draining: asyncio.Event
    started: bool = field(default=False)

    @property
    def default(self) -> Model:
        """What requests get that name no model."""
        return next(iter(self.models.values()))

    def model(self, name: str | None) -> Model:
        """Raises `ModelNotFound`."""
        if name is None:
            return self.default
        model = self.models.get(name)
        if model is None:
            raise ModelNotFound(f"There is no model {name!r}; this service runs {', '.join(self.models)}.")
        return model

    async def job(self, job_id: str, held: ApiKey | None = None) -> Sighting:
        """A job of any model as the holder of a key may see it: their own, with the scope admin anybody's.

        Raises `JobNotFound`, `QueueUnavailable`.
        """
        for model in self.models.values() if _JOB_ID.fullmatch(job_id) else ():
            status = await model.backplane.queue.status(job_id)
            if status is not None and (held is None or held.may_see(status.job.caller)):
                return Sighting(status, model)
        raise JobNotFound(f"There is no job {job_id[:64]!r}.")

    async def result(
        self, model: Model, ticket: Ticket, receive: Receive, *, keep: bool = False
    ) -> JobResult:
        """The result of a queued job, waited for until its deadline or until the client goes, which cancels it (unless `keep`).

        Raises `Cancelled`, `DeadlineExceeded`, `Draining`, or the job's own error.
        """
        job = ticket.job
        waiting = asyncio.create_task(model.backplane.listener.wait(job.id, new=ticket.new))
        gone = asyncio.create_task(disconnected(receive))
        leaving = asyncio.create_task(self._drained())
        patience = None if job.deadline_at is None else max(0.0, job.deadline_at - time.time())
        try:
            await asyncio.wait(
                (waiting, gone, leaving), timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
            if waiting.done():
                return waiting.result()
            if gone.done():
                raise Cancelled("The client went away.")
            if leaving.done():
                raise Draining("The images were not ready when this process had to stop.", retry_after=1)
            keep = False
            raise DeadlineExceeded("The images were not ready by the deadline.")
        finally:
            ended = waiting.done()
            waiting.cancel()
            gone.cancel()
            leaving.cancel()
            await asyncio.wait((waiting, gone, leaving))
            if not ended and not keep:
                await cancel(model, job.id)

    async def _drained(self) -> None:
        """Returns when this process was told to stop and has waited as long as it may."""
        await self.draining.wait()
        await asyncio.sleep(self.settings.drain_s)


async def cancel(model: Model, job_id: str) -> None:
    """Cancel a job nobody waits for. If the queue cannot be asked the job runs on, which costs time but harms nobody."""
    with suppress(QueueUnavailable):
        await model.backplane.queue.cancel(job_id)


async def _context(request: Request) -> Context:  # `def` would cost a hop to another thread
    context: Context = request.app.state.context
    return context


Api = Annotated[Context, Depends(_context)]


async def _found(job_id: str, request: Request, api: Api) -> Sighting:
    return await api.job(job_id, getattr(request.state, "key", None))


Found = Annotated[Sighting, Depends(_found)]  # the job of the path


def caller(request: Request, *, key: str | None = None) -> Caller:
    """Who sent this request: fair queueing and idempotency keys are per API key, or per network address where keys are not used."""
    trace = {"request_id": request.state.request_id, **request.state.trace}
    held: ApiKey | None = getattr(request.state, "key", None)
    address = request.client.host if request.client else "unknown"
    return Caller(held.caller if held else address, key, held.concurrency if held else None, trace)


def note(request: Request, **fields: str) -> None:
    """Add fields to the log line of this request."""
    notes: dict[str, str] = request.scope["state"].setdefault("notes", {})
    notes.update(fields)


def server_timing(timings_ms: Mapping[str, float]) -> str:
    """The `Server-Timing` header (W3C), durations in milliseconds."""
    return ", ".join(f"{name};dur={duration:.1f}" for name, duration in timings_ms.items())
