"""Jobs over HTTP: their state, their events as they come, their images, and the way to stop them."""

import base64
import json
import re
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from ditserve.service.errors import (
    ImageNotFound,
    InvalidRequest,
    JobExpired,
    JobLost,
    JobNotFound,
    JobUnfinished,
    MalformedRequest,
    QueueUnavailable,
    QuotaExceeded,
    ServiceError,
    from_wire,
)
from ditserve.service.formats import CONTENT_TYPES
from ditserve.service.http.answer_schemas import CallbackOut, JobOut, JobOutcome, Links, Problem
from ditserve.service.http.answers import image_response, result_headers
from ditserve.service.http.context import Api, Context, JobLookup, PathJob
from ditserve.service.http.feeds import END, EncodedEvent, Position
from ditserve.service.http.openapi import problem_responses
from ditserve.service.http.problems import problem
from ditserve.service.http.sse import EventStream, encode
from ditserve.service.jobs import TERMINAL_STATES, CallbackStatus, Job, JobEvent, JobResult
from ditserve.service.planning.load import eta_s

router = APIRouter(prefix="/jobs", tags=["jobs"])

_EVENT_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
_IMAGE_NUMBER = re.compile(r"[0-9]{1,3}")
_FAILURES = frozenset({"failed", "cancelled"})
# The last event of a job, by the state it ended in.
_LAST_EVENTS = {"done": "done", "cancelled": "cancelled", "failed": "failed", "dead": "failed"}


def links(job: Job, api: Context) -> Links:
    """Return the addresses of a job."""
    base = api.address(f"/jobs/{job.id}")
    return Links(
        self=base, events=f"{base}/events", images=[f"{base}/images/{k}" for k in range(len(job.seeds))]
    )


@router.get(
    "/{job_id}",
    summary="Where a job stands",
    response_model=JobOut,
    responses=problem_responses(JobNotFound, JobExpired, JobLost, QueueUnavailable),
)
async def get_job(lookup: PathJob, api: Api) -> JobOut:
    """State, place in the queue, step, predicted time left; once done, how the images were made."""
    return await describe(lookup, api)


@router.delete(
    "/{job_id}",
    summary="Cancel a job",
    response_model=JobOut,
    responses=problem_responses(JobNotFound, JobExpired, JobLost, QueueUnavailable),
)
async def delete_job(lookup: PathJob, api: Api) -> JobOut:
    """Stop a waiting job at once and a running one at its next step. A job that has ended stays as it is."""
    await lookup.model.queue_client.queue.cancel(lookup.status.id)
    return await describe(await api.job(lookup.status.id), api)


@router.get(
    "/{job_id}/images/{k}",
    summary="An image of a job",
    response_class=Response,
    responses={
        200: {"content": {name: {} for name in CONTENT_TYPES.values()}, "description": "The file."},
        **problem_responses(JobNotFound, ImageNotFound, JobUnfinished, JobExpired, JobLost, QueueUnavailable),
    },
)
async def get_image(lookup: PathJob, k: str) -> Response:
    """Image `k`, counted from 0, of a job that is done."""
    job, state = lookup.status.job, lookup.status.state
    if state not in TERMINAL_STATES:
        raise JobUnfinished(f"The job is {state}; follow its events.", retry_after=1)
    if state != "done":
        raise ImageNotFound(f"The job ended as {state}, without images.")
    result = await _result(lookup)
    if not (_IMAGE_NUMBER.fullmatch(k) and int(k) < len(result.images)):
        raise ImageNotFound(f"The job has images 0 to {len(result.images) - 1}.")
    headers = result_headers(job, result) | {"cache-control": "private, max-age=3600, immutable"}
    return image_response(job, result.images[int(k)], headers)


@router.get(
    "/{job_id}/events",
    summary="A job's events as they come",
    response_class=Response,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "Server-sent events until the job has ended.",
        },
        204: {"description": "The job has ended, and `Last-Event-ID` is its last event: come no more."},
        **problem_responses(
            MalformedRequest, InvalidRequest, JobNotFound, QuotaExceeded, JobLost, QueueUnavailable
        ),
    },
)
async def get_events(
    lookup: PathJob,
    request: Request,
    api: Api,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """Events `queued`, `started`, `step` (k of n), `preview` (an image of the current estimate, base64 in
    `b64`), `degraded`, and last one of `done`, `failed`, `cancelled`. Resumes after `Last-Event-ID`. Leaving
    the stream does not cancel the job."""
    after = last_event_id or "0-0"
    if not _EVENT_ID.fullmatch(after):
        raise MalformedRequest("Last-Event-ID is not an id of this stream.")
    if await _is_past_end(lookup, after):
        return Response(status_code=204)
    path, request_id = api.address(f"/jobs/{lookup.status.id}"), request.state.request_id
    source = partial(_events, lookup, api, path)
    return EventStream(
        api.feeds.follow(lookup.status.id, _order(after), source),
        on_error=lambda error: encode("error", problem(error, path, request_id)),
        keepalive_s=api.settings.keepalive_s,
        stream=api.open_stream(request),
    )


async def _is_past_end(lookup: JobLookup, after: str) -> bool:
    """Return True if the job has ended and no event comes after this one."""
    if lookup.status.state not in TERMINAL_STATES:
        return False
    last = await lookup.model.queue_client.queue.last_event_id(lookup.status.id)
    return last is not None and _order(after) >= _order(last)


def _order(event_id: str) -> Position:
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number)


async def _events(
    lookup: JobLookup, api: Context, path: str, after: Position
) -> AsyncGenerator[EncodedEvent]:
    """Yield the job's encoded events.

    The last one tells how the job ended, even when its stream has expired.
    """
    job_id = lookup.status.id
    async for event in lookup.model.queue_client.queue.events(job_id, "{}-{}".format(*after)):
        data = encode(event.kind, _event_data(event, path), event_id=event.id)
        yield EncodedEvent(_order(event.id), data)
        if event.terminal:
            return
    status = (await api.job(job_id)).status
    last_event = _LAST_EVENTS.get(status.state)
    if last_event:
        data = encode(last_event, problem(from_wire(status.error), path) if status.error else {})
        yield EncodedEvent(END, data)


def _event_data(event: JobEvent, path: str) -> dict[str, Any]:
    """Return an event's data as JSON: an image becomes base64 under `b64`, an error becomes a problem."""
    if event.kind in _FAILURES:
        return problem(from_wire(event.data), path)
    data = dict(event.data)
    if "image" in data:
        data["b64"] = base64.b64encode(data.pop("image")).decode()
    return data


async def _result(lookup: JobLookup) -> JobResult:
    result = await lookup.model.queue_client.queue.result(lookup.status.id)
    if result is None:
        raise JobExpired("The images of this job are no longer kept.")
    return result


async def describe(lookup: JobLookup, api: Context) -> JobOut:
    """Return the state of a job. Raises `JobExpired` when it is done and its images are gone."""
    status, job = lookup.status, lookup.status.job
    outcome = error = eta = None
    if status.state == "done":
        outcome = _outcome(await _result(lookup))
    elif status.error is not None:
        error = Problem(**problem(from_wire(status.error), api.address(f"/jobs/{status.id}")))
    else:
        # Without the load nothing can be predicted; the job's state is known all the same.
        with suppress(QueueUnavailable):
            eta = eta_s(status, await lookup.model.submissions.load())
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
        callback=_callback(status.callback),
        links=links(job, api),
    )


async def described(lookup: JobLookup, api: Context) -> str:
    """Return the body that `GET /jobs/{id}` answers with, a problem included. Raises `QueueUnavailable`."""
    try:
        return (await describe(lookup, api)).model_dump_json()
    except QueueUnavailable:
        raise
    except ServiceError as error:
        return json.dumps(problem(error, api.address(f"/jobs/{lookup.status.id}")))


def _callback(status: CallbackStatus | None) -> CallbackOut | None:
    if status is None:
        return None
    return CallbackOut(state=status.state, attempts=status.attempts, fault=status.fault or None)


def _outcome(result: JobResult) -> JobOutcome:
    return JobOutcome(
        seeds=[image.seed for image in result.images],
        steps_requested=result.steps_requested,
        steps_used=result.steps_used,
        sampler=result.solver,
        rung=result.rung,
        backbones=list(result.backbones),
        degraded=result.degraded,
        reason=result.reason,
        timings_ms=result.timings_ms,
    )
