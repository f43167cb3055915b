"""`POST /generate`: draw images, and wait for them or not."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, Response

from ditserve.service.errors import NotAcceptable
from ditserve.service.formats import CONTENT_TYPES
from ditserve.service.http.answer_schemas import CallbackOut, GenerateResponse, JobOut
from ditserve.service.http.answers import negotiate, render
from ditserve.service.http.body_reader import read_body
from ditserve.service.http.context import Context
from ditserve.service.http.intake import Intake, replay_headers
from ditserve.service.http.openapi import BODY, ENDED, SUBMIT, problem_responses, request_body
from ditserve.service.http.operating_point import field_error
from ditserve.service.http.request_headers import IDEMPOTENCY_KEY, PREFER, header_parameters
from ditserve.service.http.reuse import Sharing
from ditserve.service.http.routes.jobs import describe, links
from ditserve.service.http.routing import FORM, JSON
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.http.submission import Submission


class DirectRoute(APIRoute):
    """A route whose function takes the request and returns the response, and is called with nothing between.

    FastAPI looks each time for arguments and for a model of the answer, and there are none of these.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


router = APIRouter(route_class=DirectRoute)

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_FILES = dict.fromkeys((*CONTENT_TYPES.values(), "multipart/mixed"), _BINARY)
_ERRORS = problem_responses(*BODY, NotAcceptable, *SUBMIT, *ENDED)


@router.post(
    "/generate",
    tags=["images"],
    summary="Generate images",
    openapi_extra=request_body(GenerateRequest, JSON, FORM) | header_parameters(PREFER, IDEMPOTENCY_KEY),
    response_model=GenerateResponse,
    responses={
        200: {
            "content": _FILES,
            "description": "The images, as `Accept` asks: JSON, one file, or multipart.",
        },
        202: {"model": JobOut, "description": "Queued, as `Prefer: respond-async` asks; see `Location`."},
        **_ERRORS,
    },
)
async def generate(request: Request) -> Response:
    """Draw images and wait for them. If the client goes away meanwhile, the job is cancelled.

    A picture to start from is a data URL in `image`, or a file of that name in a form. The other fields are
    parts of the form then, written as in JSON, but texts without their quotes.

    With `Prefer: respond-async` the response comes at once and holds the job's address.

    With an `Idempotency-Key` a repeated request draws nothing anew: while the first runs it is refused with
    409, afterwards it gets the images of the first. Such a job is not cancelled when the client goes away, so
    that the client can come back for it.
    """
    body, intake = await read_body(request, GenerateRequest), Intake.of(request)
    respond_async = _responds_async(PREFER.of(request))
    model = intake.api.model(body.model)
    accept = "application/json" if respond_async else request.headers.get("accept")
    representation = negotiate(accept, body, await model.written_formats(body.format))
    sharing: Sharing = "done" if respond_async else "running"
    if body.callback_url is not None:
        if not respond_async:
            raise field_error("callback_url", "Only jobs are called back for: send Prefer: respond-async.")
        # The job of another request has the address of that request.
        sharing = "none"
    submission = await intake.submit(
        model, body, body=body, media_format=representation.format, sharing=sharing
    )
    if respond_async:
        return await _accepted(submission, intake.api)
    submission, result = await intake.result(model, submission)
    response = render(representation, submission.job, result)
    response.headers.update(replay_headers(submission))
    return response


def _responds_async(prefer: str | None) -> bool:
    """Return True if `respond-async` is among the preferences (RFC 7240)."""
    preferences = (part.partition(";")[0].strip().lower() for part in (prefer or "").split(","))
    return "respond-async" in preferences


async def _accepted(submission: Submission, api: Context) -> Response:
    job_id = submission.job.id
    job = _queued(submission, api) if submission.new else await describe(await api.job(job_id), api)
    headers = {"location": job.links.self, "preference-applied": "respond-async", "x-job-id": job_id}
    return JSONResponse(job.model_dump(mode="json"), 202, headers | replay_headers(submission))


def _queued(submission: Submission, api: Context) -> JobOut:
    """Return the state of a job that was queued this moment."""
    job = submission.job
    return JobOut(
        id=job.id,
        model=job.model,
        state="queued",
        position=None,
        step=0,
        steps=job.steps,
        attempt=0,
        eta_s=submission.predicted_s,
        created_at=job.created_at,
        deadline_at=job.deadline_at,
        callback=CallbackOut(state="waiting", attempts=0, fault=None) if job.callback_url else None,
        links=links(job, api),
    )
