"""Requests of OpenAI's clients as requests of `POST /generate`, whose promises they keep, and their answers.

The prompt's words choose classes (`vocabulary.match`), `quality` chooses a rung of the ladder, and partial
images are previews of the estimate. Shapes of the events: openai-python
`types/image_gen_partial_image_event.py`, `types/image_gen_completed_event.py`,
`types/image_edit_partial_image_event.py`, `types/image_edit_completed_event.py`.
"""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack
from math import prod
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message

from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.source import walked_steps
from ditserve.service.formats import FORMATS, MediaFormat, kind_of
from ditserve.service.http.answers import result_headers
from ditserve.service.http.intake import Intake, replay_headers
from ditserve.service.http.models import Model
from ditserve.service.http.openai_schemas import (
    EditRequest,
    ImageData,
    ImagesRequest,
    ImagesResponse,
    OpenAIOptions,
    VariationRequest,
)
from ditserve.service.http.operating_point import field_error
from ditserve.service.http.problems import openai_error
from ditserve.service.http.schemas import MAX_PREVIEWS, DrawingOptions, GenerateRequest
from ditserve.service.http.sizes import size_text
from ditserve.service.http.sse import EventStream, encode
from ditserve.service.http.submission import Submission, Submissions
from ditserve.service.jobs import Job, JobEvent, JobResult
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Consent, Rung

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


async def drawn(body: OpenAIOptions, intake: Intake) -> Response:
    """Draw what a request asks for, and return the images, or their events with `stream`."""
    if not (isinstance(body, VariationRequest) or _prompt(body) or body.condition):
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


async def _streamed(body: OpenAIOptions, intake: Intake) -> Response:
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


async def _submitted(body: OpenAIOptions, model: Model, intake: Intake) -> Submission:
    return await intake.submit(
        model,
        translate(body, model.submissions),
        body=body,
        media_format=_format(body, model.manifest),
        rung=rung_for(body, model.submissions.ladder),
    )


def _format(body: OpenAIOptions, manifest: Manifest) -> MediaFormat:
    """Return the format that is asked for, or the usual one. Raises `InvalidRequest`."""
    kind = kind_of(manifest)
    chosen = body.output_format or ("png" if kind == "picture" else "webp")
    if chosen not in FORMATS[kind]:
        raise field_error(
            "output_format",
            f"This model makes {kind}s, which are no {chosen}: choose webp, or ask /generate.",
        )
    return chosen


def translate(body: OpenAIOptions, submissions: Submissions) -> GenerateRequest:
    """Return the request of `POST /generate` that asks for the same."""
    manifest = submissions.manifest
    rung = rung_for(body, submissions.ladder)
    steps = rung.steps if rung else manifest.defaults.steps
    operating_point: dict[str, Any] = {"steps": steps}
    if rung:
        operating_point |= {
            "sampler": rung.solver,
            "grid": rung.grid,
            "guidance_interval": list(rung.guidance_interval),
        }
    start = _start(body, manifest)
    walked = walked_steps(steps, start.get("strength", 1.0))
    interval = min(MAX_PREVIEWS, max(1, walked // (body.partial_images + 1))) if body.partial_images else 0
    # Every value was checked as a field of the body, under the bounds that it has here.
    return GenerateRequest(
        model=body.model,
        prompt=_prompt(body),
        n=body.n or 1,
        size=None if body.size == "auto" else body.size,
        format=body.output_format,
        previews=interval,
        **operating_point,
        **start,
        **body.model_dump(include=set(DrawingOptions.model_fields)),
    )


def _prompt(body: OpenAIOptions) -> str | None:
    return body.prompt or None if isinstance(body, ImagesRequest | EditRequest) else None


def _start(body: OpenAIOptions, manifest: Manifest) -> dict[str, Any]:
    """Return the fields of the picture that a request starts from.

    Raises:
        InvalidRequest: a variation is asked of a model that was not trained to draw without a condition.
    """
    strength = body.model_dump(include={"strength"}, exclude_unset=True)
    if isinstance(body, EditRequest):
        return {"image": body.image, "mask": body.mask} | strength
    if not isinstance(body, VariationRequest):
        return {}
    if manifest.guidance == "none" and not body.condition:
        raise field_error(
            "image",
            "No unconditional prediction of this model was trained, so it varies nothing by itself: give a "
            "condition, or send the picture and a prompt to /v1/images/edits.",
        )
    return {"image": body.image} | strength


def rung_for(body: OpenAIOptions, ladder: Ladder) -> Rung | None:
    """Return the rung that a request's `quality` stands for, None for the model's default.

    Of 5 rungs that the request consents to, "high" is the first, "medium" the third and "low" the last.
    """
    position = _POSITIONS.get(body.quality or "auto")
    consent = Consent.to(
        body.min_steps or 1,
        body.min_quality,
        negative_prompt=body.negative_prompt or "",
        mix=body.mix,
        adapted=bool(body.adapters),
    )
    rungs = ladder.descent(consent)
    return rungs[round(position * (len(rungs) - 1))] if rungs and position is not None else None


def _metadata(job: Job, body: OpenAIOptions, manifest: Manifest) -> dict[str, Any]:
    """Return what OpenAI's responses and events tell about an image.

    Input tokens are the words of the texts, or the classes that the prompt named, and the patches of the
    picture to start from; output tokens the patches of the images.
    """
    words = sum(len(term.text.split()) for term in job.condition)
    named = words + sum(label is not None for term in job.condition for label in term.labels)
    own_size = manifest.config.image_size
    patches = manifest.config.tokens * prod(job.size or own_size) // prod(own_size)
    seen, drawn = patches if job.source is not None else 0, len(job.seeds) * patches
    usage = {
        "input_tokens": named + seen,
        "output_tokens": drawn,
        "total_tokens": named + seen + drawn,
        "input_tokens_details": {"text_tokens": named, "image_tokens": seen},
    }
    return {
        "background": "opaque",
        "output_format": job.format,
        "quality": body.quality or "auto",
        "size": size_text(manifest, job.size),
        "usage": usage,
    }


async def _stream(
    intake: Intake, model: Model, submission: Submission, body: OpenAIOptions
) -> AsyncGenerator[bytes]:
    """Yield partial images as they come, then the image.

    The result is waited for as it is without a stream, so the same promises hold: its deadline, and the end
    of its job when the client leaves.
    """
    metadata = _metadata(submission.job, body, model.manifest)
    partial = {name: value for name, value in metadata.items() if name != "usage"}
    result = asyncio.create_task(intake.result(model, submission, receive=_stays))
    events = _until_failed(result, model.queue_client.queue.events(submission.job.id))
    action, shown = "image_generation" if isinstance(body, ImagesRequest) else "image_edit", 0
    try:
        async for event in events:
            if event.kind == "preview" and shown < (body.partial_images or 0):
                data = _image(event.data["image"]) | {"partial_image_index": shown} | partial
                yield _event(f"{action}.partial_image", data)
                shown += 1
        yield _event(f"{action}.completed", _image((await result)[1].images[0].data) | metadata)
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
