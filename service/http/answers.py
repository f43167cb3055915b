"""A finished job as an HTTP answer: JSON with base64, one image file, or several in multipart/mixed."""

import base64
import hashlib
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from ditserve.service.errors import NotAcceptable
from ditserve.service.http.context import server_timing
from ditserve.service.http.negotiation import preferred
from ditserve.service.http.schemas import Format, GenerateRequest, GenerateResponse, ImageOut
from ditserve.service.jobs import Image, ImageFormat, Job, JobResult

JSON, MULTIPART = "application/json", "multipart/mixed"
FORMATS: tuple[Format, ...] = ("png", "webp", "jpeg")


@dataclass(frozen=True, slots=True)
class Representation:
    """What the answer looks like: its media type, and the format of the images in it."""

    media_type: str
    format: ImageFormat


def negotiate(accept: str | None, request: GenerateRequest) -> Representation:
    """Raises `NotAcceptable`. An image type in `Accept` chooses the format where the request names none."""
    formats = (request.format,) if request.format else FORMATS
    images = [f"image/{name}" for name in formats] if request.n == 1 else []
    chosen = preferred(accept, [JSON, *images, MULTIPART])
    if chosen is None:
        several = " (for several images ask for application/json or multipart/mixed)" if request.n > 1 else ""
        raise NotAcceptable(f"None of {', '.join([JSON, *images, MULTIPART])} is in Accept{several}.")
    if chosen in images:
        return Representation(chosen, formats[images.index(chosen)])
    return Representation(chosen, request.format or "png")


def render(representation: Representation, job: Job, result: JobResult) -> Response:
    """The answer to a request whose job has finished."""
    headers = facts(job, result)
    if representation.media_type == JSON:
        response: Response = JSONResponse(body(job, result).model_dump(mode="json"), headers=headers)
    elif representation.media_type == MULTIPART:
        boundary = f"dit-{job.id}"
        parts = b"".join(_part(boundary, job, image) for image in result.images)
        content = parts + f"--{boundary}--\r\n".encode()
        response = Response(content, headers=headers, media_type=f'{MULTIPART}; boundary="{boundary}"')
    else:
        return file(job, result.images[0], headers)
    response.headers["content-digest"] = _digest(bytes(response.body))
    return response


def file(job: Job, image: Image, headers: dict[str, str]) -> Response:
    """One image file."""
    named = {
        "content-digest": _digest(image.data),
        "content-disposition": f'inline; filename="{_filename(job, image)}"',
        "x-seed": str(image.seed),
    }
    return Response(image.data, headers={**headers, **named}, media_type=image.content_type)


def _digest(content: bytes) -> str:
    """The value of `Content-Digest` (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def facts(job: Job, result: JobResult) -> dict[str, str]:
    """How the images were made, as headers."""
    return {
        "x-job-id": job.id,
        "x-steps-requested": str(result.steps_requested),
        "x-steps-used": str(result.steps_used),
        "x-rung": result.rung,
        "x-degraded": "true" if result.degraded else "false",
        "x-seed": ", ".join(str(image.seed) for image in result.images),
        "server-timing": server_timing(result.timings_ms),
        "vary": "accept",
    }


def body(job: Job, result: JobResult) -> GenerateResponse:
    images = [
        ImageOut(b64=base64.b64encode(image.data).decode(), seed=image.seed, content_type=image.content_type)
        for image in result.images
    ]
    return GenerateResponse(
        id=job.id,
        model=job.model,
        images=images,
        steps_requested=result.steps_requested,
        steps_used=result.steps_used,
        sampler=result.solver,
        rung=result.rung,
        degraded=result.degraded,
        reason=result.reason,
        timings_ms=result.timings_ms,
    )


def _part(boundary: str, job: Job, image: Image) -> bytes:
    head = (
        f"--{boundary}\r\ncontent-type: {image.content_type}\r\ncontent-length: {len(image.data)}\r\n"
        f'content-disposition: inline; filename="{_filename(job, image)}"\r\nx-seed: {image.seed}\r\n\r\n'
    )
    return head.encode() + image.data + b"\r\n"


def _filename(job: Job, image: Image) -> str:
    return f"{job.model}-{image.seed}.{image.content_type.rpartition('/')[2]}"
