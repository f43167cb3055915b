"""`POST /generate` and `GET /models`: what an application needs."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import JSONResponse, Response

from ditserve.model.spec.bundle import Manifest
from ditserve.model.spec.diffusion import GRIDS
from ditserve.model.spec.solvers import SOLVERS
from ditserve.service.errors import (
    IdempotencyConflict,
    IdempotencyMismatch,
    JobExpired,
    NotAcceptable,
    QueueUnavailable,
)
from ditserve.service.http import job_routes
from ditserve.service.http.answers import negotiate, render
from ditserve.service.http.context import Api, Context, caller, note
from ditserve.service.http.intake import Ticket, size
from ditserve.service.http.models import Model
from ditserve.service.http.openapi import BODY, ENDED, SUBMIT, problems
from ditserve.service.http.schemas import (
    DefaultsOut,
    FactorOut,
    GenerateRequest,
    GenerateResponse,
    JobOut,
    LimitsOut,
    ModelOut,
    ModelsOut,
    RungOut,
)
from ditserve.service.http.sizes import size_step
from ditserve.service.jobs import WorkerState
from ditserve.service.settings import Settings

router = APIRouter()

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_IMAGES = {f"image/{name}": _BINARY for name in ("png", "webp", "jpeg")} | {"multipart/mixed": _BINARY}
_ERRORS = problems(
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
    """Draws images and waits for them; if the client goes away meanwhile, the job is cancelled. With
    `Prefer: respond-async` it answers at once with the job's address.

    With an `Idempotency-Key` a repeated request draws nothing anew: while the first runs it is refused with 409, afterwards
    the first answer is given again. Such a job is not cancelled when the client goes away, so that it can come back for it.
    """
    at_once = _responds_async(prefer)
    representation = negotiate("application/json" if at_once else request.headers.get("accept"), body)
    model = api.model(body.model)
    ticket = await model.intake.submit(
        body, caller(request, key=idempotency_key), image_format=representation.format
    )
    note(request, job=ticket.job.id)
    if at_once:
        return await _accepted(ticket, api)
    if ticket.pending and not ticket.new:
        raise IdempotencyConflict(
            "The first request with this Idempotency-Key is still running.", retry_after=1
        )
    result = await api.result(model, ticket, request.receive, keep=idempotency_key is not None)
    response = render(representation, ticket.job, result)
    if not ticket.new:
        response.headers["idempotency-replayed"] = "true"
    return response


def _responds_async(prefer: str | None) -> bool:
    """Whether `respond-async` is among the preferences (RFC 7240)."""
    wishes = (wish.partition(";")[0].strip().lower() for wish in (prefer or "").split(","))
    return "respond-async" in wishes


async def _accepted(ticket: Ticket, api: Context) -> Response:
    place = _queued(ticket) if ticket.new else await job_routes.described(await api.job(ticket.job.id))
    headers = {
        "location": place.links.self,
        "preference-applied": "respond-async",
        "x-job-id": ticket.job.id,
        **({} if ticket.new else {"idempotency-replayed": "true"}),
    }
    return JSONResponse(place.model_dump(mode="json"), 202, headers)


def _queued(ticket: Ticket) -> JobOut:
    """Where a job stands that was queued this moment."""
    job = ticket.job
    return JobOut(
        id=job.id,
        model=job.model,
        state="queued",
        position=None,
        step=0,
        steps=job.steps,
        attempt=0,
        eta_s=ticket.predicted_s,
        created_at=job.created_at,
        deadline_at=job.deadline_at,
        links=job_routes.links(job),
    )


@router.get("/models", tags=["models"], summary="What is being served", response_model=ModelsOut)
async def models(api: Api) -> Response:
    """Names, classes, samplers, defaults, limits, licence, and the measured operating points of each model, the default first."""
    described = [
        _described(model.manifest, await _workers(model), api.settings) for model in api.models.values()
    ]
    content = json.dumps({"models": [each.model_dump(mode="json") for each in described]}, ensure_ascii=False)
    return Response(content, media_type="application/json")


async def _workers(model: Model) -> Sequence[WorkerState]:
    try:
        return (await model.intake.load()).workers
    except QueueUnavailable:
        return ()


def _described(manifest: Manifest, workers: Sequence[WorkerState], settings: Settings) -> ModelOut:
    defaults = manifest.defaults
    return ModelOut(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        size=size(manifest),
        size_step=size_step(manifest, workers),
        text=manifest.config.text_size > 0,
        networks=sorted({f"{each.network.backend} {each.network.precision}".strip() for each in workers}),
        factors=[FactorOut(name=factor.name, classes=list(factor.classes)) for factor in manifest.factors],
        samplers=list(SOLVERS),
        grids=list(GRIDS),
        defaults=DefaultsOut(
            steps=defaults.steps,
            sampler=defaults.solver,
            grid=defaults.grid,
            guidance_scale=defaults.guidance_scale,
            guidance_interval=defaults.guidance_interval,
        ),
        ladder=[
            RungOut(
                name=rung.name,
                sampler=rung.solver,
                steps=rung.steps,
                grid=rung.grid,
                guidance_interval=rung.guidance_interval,
                rows=rung.rows,
                quality=rung.quality,
            )
            for rung in manifest.ladder
        ],
        limits=LimitsOut(
            n=settings.max_images,
            steps=manifest.diffusion.timesteps,
            deadline_ms=round(settings.max_deadline_s * 1000),
            body_bytes=settings.max_body_bytes,
        ),
        metrics=manifest.metrics,
        licence=manifest.licence,
        attribution=list(manifest.attribution),
    )
