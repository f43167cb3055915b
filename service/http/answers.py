"""A finished job as an HTTP response: JSON with base64, one image file, or several in multipart/mixed.

The `Accept` header chooses among them (RFC 9110 §12.5.1).
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from ditserve.service.errors import NotAcceptable
from ditserve.service.formats import CONTENT_TYPES, FORMATS, MediaFormat
from ditserve.service.http.answer_schemas import GenerateResponse, ImageOut
from ditserve.service.http.context import server_timing
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.jobs import Image, Job, JobResult

JSON, MULTIPART = "application/json", "multipart/mixed"


@dataclass(frozen=True, slots=True)
class Representation:
    """The form of a response: its media type, and the format of the files in it."""

    media_type: str
    format: MediaFormat


def negotiate(
    accept: str | None, request: GenerateRequest, written: Sequence[MediaFormat] = FORMATS["picture"]
) -> Representation:
    """Choose the form of a response. A file's type in `Accept` chooses the format if the request names none.

    `written` are the formats of the model's workers, of which the first is the usual one.

    Raises:
        NotAcceptable: `Accept` allows none of the forms.
    """
    formats = (request.format,) if request.format else written
    files: dict[str, MediaFormat] = {CONTENT_TYPES[name]: name for name in formats} if request.n == 1 else {}
    media_type = preferred(accept, [JSON, *files, MULTIPART])
    if media_type is None:
        several = " (for several images ask for application/json or multipart/mixed)" if request.n > 1 else ""
        raise NotAcceptable(f"None of {', '.join([JSON, *files, MULTIPART])} is in Accept{several}.")
    return Representation(media_type, files.get(media_type, formats[0]))


def preferred(accept: str | None, offers: Sequence[str]) -> str | None:
    """Return the offered media type that `accept` prefers, the first of equals, or None if it accepts none.

    No header accepts everything. A malformed part of the header counts as absent.
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [parsed for part in accept.split(",")[:50] if (parsed := _media_range(part))]
    best, *_ = sorted(offers, key=lambda offer: -_quality(offer, ranges))
    return best if _quality(best, ranges) > 0 else None


def _media_range(part: str) -> tuple[str, float] | None:
    """Return a media range and its quality: "image/*;q=0.5" → ("image/*", 0.5)."""
    media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
    if media_range.count("/") != 1:
        return None
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = min(max(float(value), 0.0), 1.0)
            except ValueError:
                return None
    return media_range, quality


def _quality(offer: str, ranges: Sequence[tuple[str, float]]) -> float:
    """Return the quality of the most specific range that covers `offer`, 0 if none does."""
    family = offer.partition("/")[0]
    for covering in (offer, f"{family}/*", "*/*"):
        for media_range, quality in ranges:
            if media_range == covering:
                return quality
    return 0.0


def render(representation: Representation, job: Job, result: JobResult) -> Response:
    """Return the response to a request whose job has finished."""
    headers = result_headers(job, result)
    if representation.media_type == JSON:
        content = _json(job, result).model_dump(mode="json")
        response: Response = JSONResponse(content, headers=headers)
    elif representation.media_type == MULTIPART:
        boundary = f"dit-{job.id}"
        parts = b"".join(_part(boundary, job, image) for image in result.images)
        response = Response(
            parts + f"--{boundary}--\r\n".encode(),
            headers=headers,
            media_type=f'{MULTIPART}; boundary="{boundary}"',
        )
    else:
        return image_response(job, result.images[0], headers)
    response.headers["content-digest"] = _digest(bytes(response.body))
    return response


def image_response(job: Job, image: Image, headers: dict[str, str]) -> Response:
    """Return one image file."""
    own_headers = {
        "content-digest": _digest(image.data),
        "content-disposition": f'inline; filename="{_filename(job, image)}"',
        "x-seed": str(image.seed),
    }
    return Response(image.data, headers={**headers, **own_headers}, media_type=image.content_type)


def result_headers(job: Job, result: JobResult) -> dict[str, str]:
    """Return the headers that tell how the images were made."""
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


def _json(job: Job, result: JobResult) -> GenerateResponse:
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
        backbones=list(result.backbones),
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
    return f"{job.model}-{image.seed}.{job.format}"


def _digest(content: bytes) -> str:
    """Return the value of `Content-Digest` (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"
