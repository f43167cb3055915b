"""Jobs over HTTP: where one stands, its events as they come, its images, and the way to stop it."""

import base64
import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from ditserve.service.errors import (
    ImageNotFound,
    InvalidRequest,
    JobExpired,
    JobNotFound,
    JobUnfinished,
    MalformedRequest,
    QueueUnavailable,
    ServiceError,
    from_wire,
)
from ditserve.service.http import answers
from ditserve.service.http.context import Api, Context, Found, Sighting
from ditserve.service.http.openapi import problems
from ditserve.service.http.problems import problem
from ditserve.service.http.schemas import JobOut, Links, Outcome, Problem
from ditserve.service.http.sse import EventStream, encode
from ditserve.service.jobs import TERMINAL_STATES, Job, JobEvent, JobResult
from ditserve.service.planning.load import eta_s

router = APIRouter(prefix="/jobs", tags=["jobs"])

_EVENT_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
_FAILED = frozenset({"failed", "cancelled"})
_ENDINGS = {"done": "done", "cancelled": "cancelled", "failed": "failed", "dead": "failed"}


def links(job: Job) -> Links:
    """The addresses of a job."""
    base = f"/jobs/{job.id}"
    return Links(
        self=base, events=f"{base}/events", images=[f"{base}/images/{k}" for k in range(len(job.seeds))]
    )


@router.get(
    "/{job_id}",
    summary="Where a job stands",
    response_model=JobOut,
    responses=problems(JobNotFound, JobExpired, QueueUnavailable),
)
async def get_job(found: Found) -> JobOut:
    """State, place in the queue, step, predicted time left; once done, how the images were made."""
    return await described(found)


@router.delete(
    "/{job_id}",
    summary="Cancel a job",
    response_model=JobOut,
    responses=problems(JobNotFound, JobExpired, QueueUnavailable),
)
async def delete_job(found: Found, api: Api) -> JobOut:
    """Stops a waiting job at once and a running one at its next step. A job that has ended stays as it is."""
    await found.model.backplane.queue.cancel(found.status.id)
    return await described(await api.job(found.status.id))


@router.get(
    "/{job_id}/images/{k}",
    summary="An image of a job",
    response_class=Response,
    responses={
        200: {"content": {f"image/{name}": {} for name in answers.FORMATS}, "description": "The image file."},
        **problems(JobNotFound, ImageNotFound, JobUnfinished, JobExpired, QueueUnavailable),
    },
)
async def get_image(found: Found, k: str) -> Response:
    """Image `k`, counted from 0, of a job that is done."""
    job, state = found.status.job, found.status.state
    if state not in TERMINAL_STATES:
        raise JobUnfinished(f"The job is {state}; follow its events.", retry_after=1)
    if state != "done":
        raise ImageNotFound(f"The job ended as {state}, without images.")
    result = await _result(found)
    if not (k.isdecimal() and len(k) < 4 and int(k) < len(result.images)):
        raise ImageNotFound(f"The job has images 0 to {len(result.images) - 1}.")
    headers = answers.facts(job, result) | {"cache-control": "private, max-age=3600, immutable"}
    return answers.file(job, result.images[int(k)], headers)


@router.get(
    "/{job_id}/events",
    summary="A job's events as they come",
    response_class=Response,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "Server-sent events until the job has ended.",
        },
        **problems(MalformedRequest, InvalidRequest, JobNotFound, QueueUnavailable),
    },
)
async def get_events(
    found: Found,
    request: Request,
    api: Api,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """`queued`, `started`, `step` (k of n), `preview` (an image of the current estimate, base64 in `b64`), `degraded`, and last
    one of `done`, `failed`, `cancelled`. Resumes after `Last-Event-ID`. Leaving the stream does not cancel the job."""
    after = last_event_id or "0-0"
    if not _EVENT_ID.fullmatch(after):
        raise MalformedRequest("Last-Event-ID is not an id of this stream.")
    events = _told(found, after, api, request.state.request_id)
    return EventStream(events, keepalive_s=api.settings.keepalive_s, stop=api.draining)


async def _told(found: Sighting, after: str, api: Context, request_id: str) -> AsyncGenerator[bytes]:
    """The job's events, encoded; always ends with how the job ended, even when its stream is gone."""
    job_id = found.status.id
    path = f"/jobs/{job_id}"
    try:
        async for event in found.model.backplane.queue.events(job_id, after):
            yield encode(event.kind, _data(event, path), event_id=event.id)
            if event.terminal:
                return
        status = (await api.job(job_id)).status
        ending = _ENDINGS.get(status.state)
        if ending:
            yield encode(ending, problem(from_wire(status.error), path) if status.error else {})
    except ServiceError as error:
        yield encode("error", problem(error, path, request_id))


def _data(event: JobEvent, path: str) -> dict[str, Any]:
    """An event's data as JSON: an image becomes base64 under `b64`, an error becomes a problem."""
    if event.kind in _FAILED:
        return problem(from_wire(event.data), path)
    data = dict(event.data)
    if "image" in data:
        data["b64"] = base64.b64encode(data.pop("image")).decode()
    return data


async def _result(found: Sighting) -> JobResult:
    result = await found.model.backplane.queue.result(found.status.id)
    if result is None:
        raise JobExpired("The images of this job are no longer kept.")
    return result


async def described(found: Sighting) -> JobOut:
    """Where a job stands, as it is told. Raises `JobExpired` when it is done and its images are gone."""
    status, job = found.status, found.status.job
    outcome = error = eta = None
    if status.state == "done":
        result = await _result(found)
        outcome = Outcome(
            seeds=[image.seed for image in result.images],
            steps_requested=result.steps_requested,
            steps_used=result.steps_used,
            sampler=result.solver,
            rung=result.rung,
            degraded=result.degraded,
            reason=result.reason,
            timings_ms=result.timings_ms,
        )
    elif status.error is not None:
        error = Problem(**problem(from_wire(status.error), f"/jobs/{status.id}"))
    else:
        eta = eta_s(status, await found.model.intake.load())
    return JobOut(
        id=status.id,
        model=job.model,
        state=status.state,
        position=status.position,
        step=status.step,
        steps=status.steps,
        attempt=status.attempt,
        eta_s=eta,
        created_at=status.created_at,
        deadline_at=job.deadline_at,
        result=outcome,
        error=error,
        links=links(job),
    )
