"""The image API that OpenAI's clients speak: `POST /v1/images/generations` and `GET /v1/models`.

A request is translated into one of `POST /generate`, and keeps all that one promises: the prompt's words
choose classes (`vocabulary.match`), `quality` chooses a rung of the ladder, and partial images are previews
of the estimate. A parameter that cannot be honoured is refused, unless OpenAI's reference makes it a hint for
OpenAI's own monitoring. Shapes: openai-python `types/image_generate_params.py`, `types/images_response.py`,
`types/image_gen_partial_image_event.py`, `types/image_gen_completed_event.py`.
"""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack
from math import prod
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from ditserve.model.spec.manifest import Manifest
from ditserve.service.errors import ModelNotFound, QuotaExceeded
from ditserve.service.http.answers import result_headers
from ditserve.service.http.context import Api
from ditserve.service.http.intake import Intake, RequestIntake, replay_headers
from ditserve.service.http.models import Model
from ditserve.service.http.openapi import BODY, ENDED, SUBMIT, openai_error_responses
from ditserve.service.http.operating_point import field_error
from ditserve.service.http.problems import openai_error
from ditserve.service.http.schemas import (
    COMPOSITION_EXAMPLE,
    MAX_PREVIEWS,
    MAX_TEXT,
    SIZE,
    DrawingOptions,
    Format,
    GenerateRequest,
    written_size,
)
from ditserve.service.http.sizes import size_text
from ditserve.service.http.sse import EventStream, encode
from ditserve.service.http.submission import Submission, Submissions
from ditserve.service.jobs import Job, JobEvent, JobResult
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung

router = APIRouter(prefix="/v1", tags=["openai"])

Quality = Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"]
# The position of each quality in the ladder, from 0 (best) to 1 (cheapest).
_POSITIONS: dict[str, float] = {
    "max": 0.0,
    "xhigh": 0.0,
    "high": 0.0,
    "hd": 0.0,
    "medium": 0.5,
    "standard": 0.5,
    "low": 1.0,
}


def _refused(reason: str) -> BeforeValidator:
    """Return the validator of a parameter that this service cannot honour, so it must be null."""

    def refuse(value: object) -> None:
        if value is not None:
            raise ValueError(reason)

    return BeforeValidator(refuse)


class ImagesRequest(DrawingOptions):
    """OpenAI's parameters, and as extensions those of `POST /generate` that OpenAI has no name for."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a strawberry, noto", "n": 2}, COMPOSITION_EXAMPLE]}
    )

    prompt: str = Field(
        "",
        max_length=MAX_TEXT,
        description="Names a class of each factor, where the model reads no text; other words are ignored. "
        "Empty where a `condition` says it.",
    )
    model: str | None = Field(None, max_length=100)
    n: int | None = Field(None, ge=1, le=10)
    size: (
        Annotated[
            str,
            AfterValidator(lambda size: size if size == "auto" else written_size(size)),
            WithJsonSchema({"type": "string", "pattern": f"^(auto|{SIZE})$"}),
        ]
        | None
    ) = Field(None, description="Width x height, where the model has a choice, or auto.")
    quality: Quality | None = Field(
        None, description="high (xhigh, max), medium and low are the top, middle and end of the ladder."
    )
    output_format: Format | None = None
    response_format: Literal["b64_json"] | None = Field(
        None, description="Images are answered in the body; there are no URLs."
    )
    output_compression: Literal[100] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    # Hints for OpenAI's own monitoring; nothing here depends on them.
    moderation: Literal["auto", "low"] | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, max_length=500, description="Has no effect.")
    user: str | None = Field(None, max_length=500, description="Has no effect.")
    style: Annotated[None, _refused("Name the style in the prompt instead.")] = None
    complexity: Annotated[None, _refused("Choose a quality instead.")] = None
    frame_count: Annotated[None, _refused("Images here are not animated.")] = None
    frame_duration_ms: Annotated[None, _refused("Images here are not animated.")] = None
    svg: Annotated[None, _refused("Images here are png, webp or jpeg.")] = None


class ImageData(BaseModel):
    b64_json: str


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    background: str
    output_format: str
    quality: str
    size: str
    usage: dict[str, Any]


class OpenAIErrorBody(BaseModel):
    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None


class OpenAIError(BaseModel):
    error: OpenAIErrorBody


@router.post(
    "/images/generations",
    summary="Generate images, as OpenAI's clients ask",
    response_model=ImagesResponse,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "The images, or events with `stream`."},
        "default": {"model": OpenAIError, "description": "Any error."},
        **openai_error_responses(*BODY, *SUBMIT, *ENDED, QuotaExceeded),
    },
)
async def generations(body: ImagesRequest, intake: RequestIntake) -> Response:
    """Draw the images that a prompt describes. The prompt must name a class of the model's first factor, and
    may name one of each other: "a strawberry in noto style". Names match by their words; the longest match
    wins. An unknown prompt is refused with the closest names. A model that reads text is given the prompt
    itself. In place of a prompt a `condition` may say it, or several, as `POST /generate` takes them. An
    `Idempotency-Key` works as for `POST /generate`."""
    if not (body.prompt or body.condition):
        raise field_error("prompt", "Give a prompt, or a condition in its place.")
    if body.stream and (body.n or 1) > 1:
        raise field_error("n", "One image at a time can be streamed.")
    if body.partial_images and not body.stream:
        raise field_error("partial_images", "Partial images need stream=true.")
    if body.stream:
        return await _streamed(body, intake)
    model = intake.api.model(body.model)
    submission = await _submitted(body, model, intake)
    submission, result = await intake.result(model, submission)
    job = submission.job
    data = [ImageData(b64_json=base64.b64encode(image.data).decode()) for image in result.images]
    response = ImagesResponse(created=int(job.created_at), data=data, **_metadata(job, body, model.manifest))
    return JSONResponse(
        response.model_dump(), headers=result_headers(job, result) | replay_headers(submission)
    )


async def _streamed(body: ImagesRequest, intake: Intake) -> Response:
    """Return the stream of a request that asks for one."""
    model = intake.api.model(body.model)
    with ExitStack() as closing:
        stream = closing.enter_context(intake.api.open_stream(intake.request, lasting=True))
        submission = await _submitted(body, model, intake)
        # A new stream tells of its job as that runs, and so does one that joined a job; a repeated one is
        # refused unless the first has ended.
        if not submission.new and not submission.holder:
            await intake.result(model, submission)
        request_id = intake.request.state.request_id
        response = EventStream(
            _stream(intake, model, submission, body),
            on_error=lambda error: _event("error", openai_error(error, request_id)),
            keepalive_s=intake.api.settings.keepalive_s,
            stream=stream,
        )
        response.headers.update({"x-job-id": submission.job.id} | replay_headers(submission))
        # From here on the response closes the stream.
        closing.pop_all()
        return response


async def _submitted(body: ImagesRequest, model: Model, intake: Intake) -> Submission:
    return await intake.submit(
        model, translate(body, model.submissions), body=body, image_format=body.output_format or "png"
    )


def translate(body: ImagesRequest, submissions: Submissions) -> GenerateRequest:
    """Return the request of `POST /generate` that asks for the same."""
    manifest = submissions.manifest
    rung = rung_for(body.quality, submissions.ladder)
    steps = rung.steps if rung else manifest.defaults.steps
    operating_point: dict[str, Any] = {"steps": steps}
    if rung:
        operating_point |= {
            "sampler": rung.solver,
            "grid": rung.grid,
            "guidance_interval": list(rung.guidance_interval),
        }
    interval = min(MAX_PREVIEWS, max(1, steps // (body.partial_images + 1))) if body.partial_images else 0
    # Every value was checked as a field of the body, under the bounds that it has here.
    return GenerateRequest(
        model=body.model,
        prompt=body.prompt or None,
        n=body.n or 1,
        size=None if body.size == "auto" else body.size,
        format=body.output_format,
        previews=interval,
        **operating_point,
        **body.model_dump(include=set(DrawingOptions.model_fields)),
    )


def rung_for(quality: str | None, ladder: Ladder) -> Rung | None:
    """Return the rung that a `quality` stands for, None for the model's default.

    Of 5 rungs "high" is the first, "medium" the third and "low" the last.
    """
    position = _POSITIONS.get(quality or "auto")
    rungs = ladder.descent
    return rungs[round(position * (len(rungs) - 1))] if rungs and position is not None else None


def _metadata(job: Job, body: ImagesRequest, manifest: Manifest) -> dict[str, Any]:
    """Return what OpenAI's responses and events tell about an image.

    Input tokens are the classes that the prompt named, output tokens the patches of the images.
    """
    named = sum(label is not None for term in job.condition for label in term.labels)
    own_size = manifest.config.image_size
    drawn = len(job.seeds) * manifest.config.tokens * prod(job.size or own_size) // prod(own_size)
    usage = {
        "input_tokens": named,
        "output_tokens": drawn,
        "total_tokens": named + drawn,
        "input_tokens_details": {"text_tokens": named, "image_tokens": 0},
    }
    return {
        "background": "opaque",
        "output_format": job.format,
        "quality": body.quality or "auto",
        "size": size_text(manifest, job.size),
        "usage": usage,
    }


async def _stream(
    intake: Intake, model: Model, submission: Submission, body: ImagesRequest
) -> AsyncGenerator[bytes]:
    """Yield partial images as they come, then the image.

    The result is waited for as it is without a stream, so the same promises hold: its deadline, and the end
    of its job when the client leaves.
    """
    metadata = _metadata(submission.job, body, model.manifest)
    partial = {name: value for name, value in metadata.items() if name != "usage"}
    result = asyncio.create_task(intake.result(model, submission, receive=_stays))
    events = _until_failed(result, model.queue_client.queue.events(submission.job.id))
    shown = 0
    try:
        async for event in events:
            if event.kind == "preview" and shown < (body.partial_images or 0):
                data = _image(event.data["image"]) | {"partial_image_index": shown} | partial
                yield _event("image_generation.partial_image", data)
                shown += 1
        yield _event("image_generation.completed", _image((await result)[1].images[0].data) | metadata)
    finally:
        await events.aclose()
        result.cancel()
        await asyncio.gather(result, return_exceptions=True)


async def _stays() -> Message:
    """Wait for ever: the stream itself notices that its client leaves, and is closed then."""
    forever: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await forever


async def _until_failed(
    result: asyncio.Task[tuple[Submission, JobResult]], events: AsyncIterator[JobEvent]
) -> AsyncGenerator[JobEvent]:
    """Yield events to their end. Raises the error of `result` as soon as it has one."""
    while True:
        upcoming = asyncio.ensure_future(anext(events, None))
        try:
            # The images may be known before the last preview was read.
            waiting = {upcoming} if result.done() else {upcoming, result}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                result.result()
            event = await upcoming
        finally:
            upcoming.cancel()
        if event is None:
            return
        yield event


def _image(data: bytes) -> dict[str, Any]:
    return {"b64_json": base64.b64encode(data).decode(), "created_at": int(time.time())}


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return encode(kind, {"type": kind, **data})


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "dit"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


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
