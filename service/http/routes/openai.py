"""The image API that OpenAI's clients speak: `POST /v1/images/…` and `GET /v1/models`."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ditserve.service.errors import ModelNotFound, QuotaExceeded
from ditserve.service.http.body_reader import read_body
from ditserve.service.http.context import Api
from ditserve.service.http.intake import Intake
from ditserve.service.http.openai_drawing import drawn
from ditserve.service.http.openai_schemas import (
    EditRequest,
    ImagesRequest,
    ImagesResponse,
    ModelEntry,
    ModelList,
    OpenAIError,
    VariationRequest,
)
from ditserve.service.http.openapi import BODY, ENDED, SUBMIT, openai_error_responses, request_body
from ditserve.service.http.request_headers import IDEMPOTENCY_KEY, header_parameters
from ditserve.service.http.routing import FORM

router = APIRouter(prefix="/v1", tags=["openai"])

_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": OpenAIError, "description": "Any error."}}
_IMAGES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The images, or events with `stream`."},
    **_ERRORS,
    **openai_error_responses(*BODY, *SUBMIT, *ENDED, QuotaExceeded),
}


@router.post(
    "/images/generations",
    summary="Generate images, as OpenAI's clients ask",
    response_model=ImagesResponse,
    responses=_IMAGES,
    openapi_extra=header_parameters(IDEMPOTENCY_KEY),
)
async def generations(body: ImagesRequest, request: Request) -> Response:
    """Draw the images that a prompt describes. The prompt must name a class of the model's first factor, and
    may name one of each other: "a strawberry in noto style". Names match by their words; the longest match
    wins. An unknown prompt is refused with the closest names. A model that reads text is given the prompt
    itself. In place of a prompt a `condition` may say it, or several, as `POST /generate` takes them. An
    `Idempotency-Key` works as for `POST /generate`."""
    return await drawn(body, Intake.of(request))


@router.post(
    "/images/edits",
    summary="Edit a picture, as OpenAI's clients ask",
    response_model=ImagesResponse,
    responses=_IMAGES,
    openapi_extra=request_body(EditRequest, FORM) | header_parameters(IDEMPOTENCY_KEY),
)
async def edits(request: Request) -> Response:
    """Repaint a picture as a prompt says, or the part of it that is transparent in `mask`. The rest is as for
    generations; `strength` is an extension."""
    return await drawn(await read_body(request, EditRequest), Intake.of(request))


@router.post(
    "/images/variations",
    summary="Vary a picture, as OpenAI's clients ask",
    response_model=ImagesResponse,
    responses=_ERRORS | openai_error_responses(*BODY, *SUBMIT, *ENDED),
    openapi_extra=request_body(VariationRequest, FORM) | header_parameters(IDEMPOTENCY_KEY),
)
async def variations(request: Request) -> Response:
    """Draw pictures like another one, without a prompt. The model must draw without a condition, too."""
    return await drawn(await read_body(request, VariationRequest), Intake.of(request))


@router.get("/models", summary="Models, as OpenAI's clients list them")
async def models(api: Api) -> ModelList:
    """The models served, the default first."""
    return ModelList(data=[ModelEntry(id=name) for name in api.models])


@router.get(
    "/models/{name}",
    summary="One model, as OpenAI's clients ask for it",
    responses=openai_error_responses(ModelNotFound),
)
async def model(name: str, api: Api) -> ModelEntry:
    """The model of that name, if it is served."""
    return ModelEntry(id=api.model(name).manifest.name)
