"""`POST /generate`: draw images, and wait for them or not."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import JSONResponse, Response

from ditserve.service.errors import IdempotencyConflict, IdempotencyMismatch, JobExpired, NotAcceptable
from ditserve.service.http.answers import negotiate, render
from ditserve.service.http.context import Api, Context, caller, note
from ditserve.service.http.openapi import BODY, ENDED, SUBMIT, problem_responses
from ditserve.service.http.routes.jobs import describe, links
from ditserve.service.http.schemas import GenerateRequest, GenerateResponse, JobOut
from ditserve.service.http.submission import Submission

router = APIRouter()

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_IMAGES = {f"image/{name}": _BINARY for name in ("png", "webp", "jpeg")} | {"multipart/mixed": _BINARY}
_ERRORS = problem_responses(
    *BODY, NotAcceptable, IdempotencyConflict, IdempotencyMismatch, JobExpired, *SUBMIT, *ENDED
)


@router.post(
    "/generate",
    tags=["images"],
    summary="Generate images",
    response_model=GenerateResponse,
    responses={
        200: {
            "content": _IMAGES,
            "description": "The images, as `Accept` asks: JSON, one file, or multipart.",
        },
        202: {"model": JobOut, "description": "Queued, as `Prefer: respond-async` asks; see `Location`."},
        **_ERRORS,
    },
)
async def generate(
    body: GenerateRequest,
    request: Request,
    api: Api,
    prefer: Annotated[str | None, Header(max_length=200)] = None,
    idempotency_key: Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")] = None,
) -> Response:
    """Draw images and wait for them. If the client goes away meanwhile, the job is cancelled.

    With `Prefer: respond-async` the response comes at once and holds the job's address.

    With an `Idempotency-Key` a repeated request draws nothing anew: while the first runs it is refused with
    409, afterwards it gets the images of the first. Such a job is not cancelled when the client goes away, so
    that the client can come back for it.
    """
    respond_async = _responds_async(prefer)
    representation = negotiate("application/json" if respond_async else request.headers.get("accept"), body)
    model = api.model(body.model)
    submission = await model.submissions.submit(
        body, caller(request, idempotency_key=idempotency_key), image_format=representation.format
    )
    note(request, job=submission.job.id)
    if respond_async:
        return await _accepted(submission, api)
    if submission.pending and not submission.new:
        raise IdempotencyConflict(
            "The first request with this Idempotency-Key is still running.", retry_after=1
        )
    result = await api.result(model, submission, request.receive, keep=idempotency_key is not None)
    response = render(representation, submission.job, result)
    if not submission.new:
        response.headers["idempotency-replayed"] = "true"
    return response


def _responds_async(prefer: str | None) -> bool:
    """Return True if `respond-async` is among the preferences (RFC 7240)."""
    preferences = (part.partition(";")[0].strip().lower() for part in (prefer or "").split(","))
    return "respond-async" in preferences


async def _accepted(submission: Submission, api: Context) -> Response:
    job_id = submission.job.id
    job = _queued(submission, api) if submission.new else await describe(await api.job(job_id), api)
    headers = {"location": job.links.self, "preference-applied": "respond-async", "x-job-id": job_id}
    if not submission.new:
        headers["idempotency-replayed"] = "true"
    return JSONResponse(job.model_dump(mode="json"), 202, headers)


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
        links=links(job, api),
    )
