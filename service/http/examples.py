"""Examples for the OpenAPI document: parameters, responses and headers of every operation. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

JSON: Final = "application/json"
_JOB: Final = "d3f41bb7af225f8256061ed7de2aaa37"
_PNG: Final = "iVBORw0KGgo="
_LINKS: Final = {
    "self": f"/jobs/{_JOB}",
    "events": f"/jobs/{_JOB}/events",
    "images": [f"/jobs/{_JOB}/images/0"],
}
_OUTCOME: Final = {
    "steps_requested": 30,
    "steps_used": 30,
    "sampler": "ddim",
    "rung": "ddim-30",
    "degraded": False,
    "reason": None,
    "timings_ms": {"queue": 6.5, "denoise": 539.4, "decode": 0.2, "encode": 1.5},
}
_QUEUED: Final = {
    "id": _JOB,
    "model": "emoji",
    "state": "queued",
    "position": 2,
    "step": 0,
    "steps": 30,
    "attempt": 0,
    "eta_s": 1.9,
    "created_at": 1790000000.25,
    "deadline_at": 1790000008.25,
    "result": None,
    "error": None,
    "callback": None,
    "links": _LINKS,
}
_ENDED: Final = {**_QUEUED, "position": None, "attempt": 1, "eta_s": None}
_DONE: Final = {**_ENDED, "state": "done", "step": 30, "result": {"seeds": [7], **_OUTCOME}}
_GENERATED: Final = {
    "id": _JOB,
    "model": "emoji",
    "images": [{"b64": _PNG, "seed": 7, "content_type": "image/png"}],
    **_OUTCOME,
}
_PARTS: Final = f"""--dit-{_JOB}\r
content-type: image/png\r
content-length: 6120\r
content-disposition: inline; filename="emoji-7.png"\r
x-seed: 7\r
\r
(the file)\r
--dit-{_JOB}--\r
"""
_OPERATING_POINT: Final = {
    "sampler": "ddim",
    "steps": 50,
    "grid": "trailing",
    "guidance_interval": [0.0, 1.0],
}
_MODEL: Final = {
    "name": "emoji",
    "version": "1.0",
    "description": "Emoji in six drawing styles, 128×128 pixels",
    "size": "128x128",
    "size_step": None,
    "kind": "picture",
    "formats": ["png", "webp", "jpeg"],
    "frames": None,
    "frames_step": None,
    "fps": None,
    "text": True,
    "pictures": True,
    "guidance": "classifier-free",
    "networks": ["onnx fp32"],
    "factors": [
        {"name": "label", "classes": ["lemon", "strawberry"]},
        {"name": "style", "classes": ["noto", "twemoji"]},
    ],
    "samplers": ["ddim", "dpmpp-2m"],
    "grids": ["leading", "trailing", "uniform-t", "linspace", "respaced", "ddim-stride"],
    "step_counts": [],
    "defaults": {**_OPERATING_POINT, "guidance_scale": 2.0},
    "ladder": [
        {"name": "ddim-50", **_OPERATING_POINT, "rows": 100.0, "quality": 0.096, "own": 0.013, "real": 0.096}
    ],
    "ladder_order": "real",
    "limits": {"n": 16, "steps": 1000, "deadline_ms": 600000, "body_bytes": 65536, "picture_bytes": 8388608},
    "metrics": {"label_top1": 0.97},
    "licence": "Apache-2.0",
    "attribution": ["Noto Emoji: Google LLC, Apache-2.0, https://github.com/googlefonts/noto-emoji"],
}
_EVENTS: Final = f"""id: 1790000000250-0
event: queued
data: {{}}

id: 1790000000310-0
event: started
data: {{"worker":"gpu-0-17-9b1c2d"}}

id: 1790000000530-0
event: step
data: {{"step":15,"steps":30}}

id: 1790000000540-0
event: preview
data: {{"sample":0,"step":15,"steps":30,"content_type":"image/png","b64":"{_PNG}"}}

id: 1790000000790-0
event: done
data: {{"rung":"ddim-30","degraded":false,"steps":30}}

"""
_USAGE: Final = {
    "input_tokens": 2,
    "output_tokens": 256,
    "total_tokens": 258,
    "input_tokens_details": {"text_tokens": 2, "image_tokens": 0},
}
_OPENAI_IMAGES: Final = {
    "created": 1790000000,
    "data": [{"b64_json": _PNG}],
    "background": "opaque",
    "output_format": "png",
    "quality": "auto",
    "size": "128x128",
    "usage": _USAGE,
}
_PARTIAL_IMAGE: Final = (
    f'{{"type":"image_generation.partial_image","b64_json":"{_PNG}",'
    '"partial_image_index":0,"created_at":1790000000}'
)
_OPENAI_EVENTS: Final = f"""event: image_generation.partial_image
data: {_PARTIAL_IMAGE}

event: image_generation.completed
data: {{"type":"image_generation.completed","b64_json":"{_PNG}","created_at":1790000001}}

"""
_OPENAI_ERROR: Final = {
    "error": {
        "message": "size: This model makes 128x128 images only.",
        "type": "invalid_request_error",
        "param": "size",
        "code": "invalid-request",
        "request_id": "req-1",
    }
}
_METRICS: Final = """# HELP dit_queue_depth Jobs waiting
# TYPE dit_queue_depth gauge
dit_queue_depth 3.0
"""


def _healthy(**checks: bool) -> dict[str, Any]:
    return {"status": "ok" if all(checks.values()) else "failing", "checks": checks}


# "METHOD /path" → status → media type → a response. Image files are not here because they are bytes, and the
# examples of errors are in `openapi`.
ANSWERS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "POST /generate": {
        "200": {JSON: _GENERATED, "multipart/mixed": _PARTS},
        "202": {JSON: _QUEUED},
    },
    "GET /models": {"200": {JSON: {"models": [_MODEL]}}},
    "GET /jobs/{job_id}": {"200": {JSON: _DONE}},
    "DELETE /jobs/{job_id}": {"200": {JSON: {**_ENDED, "state": "cancelled", "step": 12}}},
    "GET /jobs/{job_id}/events": {"200": {"text/event-stream": _EVENTS}},
    "POST /v1/images/generations": {
        "200": {JSON: _OPENAI_IMAGES, "text/event-stream": _OPENAI_EVENTS},
        "default": {JSON: _OPENAI_ERROR},
    },
    "POST /v1/images/edits": {
        "200": {JSON: _OPENAI_IMAGES, "text/event-stream": _OPENAI_EVENTS.replace("generation", "edit")},
        "default": {JSON: _OPENAI_ERROR},
    },
    "POST /v1/images/variations": {"200": {JSON: _OPENAI_IMAGES}, "default": {JSON: _OPENAI_ERROR}},
    "GET /v1/models": {
        "200": {
            JSON: {
                "object": "list",
                "data": [{"id": "emoji", "object": "model", "created": 0, "owned_by": "dit"}],
            }
        }
    },
    "GET /v1/models/{name}": {
        "200": {JSON: {"id": "emoji", "object": "model", "created": 0, "owned_by": "dit"}}
    },
    "GET /livez": {"200": {JSON: _healthy()}},
    "GET /readyz": {
        "200": {JSON: _healthy(accepting=True, queue=True, workers=True)},
        "503": {JSON: _healthy(accepting=True, queue=True, workers=False)},
    },
    "GET /startupz": {
        "200": {JSON: {**_healthy(started=True), "starting": []}},
        "503": {JSON: {**_healthy(started=False), "starting": ["emoji: loading the network"]}},
    },
    "GET /metrics": {"200": {"text/plain": _METRICS}},
}

# A parameter, wherever it occurs → its value.
PARAMETERS: Final[Mapping[str, Any]] = {
    "job_id": _JOB,
    "k": "0",
    "name": "emoji",
    "prefer": "respond-async",
    "idempotency-key": "order-1234",
    "last-event-id": "1790000000310-0",
}

_RESULT_HEADERS: Final = {
    "X-Job-ID": (_JOB, "The job that made the images; `/jobs/{id}` knows it as long as results are kept."),
    "X-Steps-Requested": ("30", "Denoising steps asked for."),
    "X-Steps-Used": ("30", "Denoising steps run; fewer under load, where the request allows it."),
    "X-Rung": ("ddim-30", "The operating point used."),
    "X-Degraded": ("false", "Whether fewer or cheaper steps were run than asked for."),
    "X-Seed": ("7", "Seed of each image."),
    "Server-Timing": ("queue;dur=6.5, denoise;dur=539.4", "Time spent in each phase, in milliseconds."),
    "Content-Digest": (
        "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:",
        "Digest of the body (RFC 9530).",
    ),
}
# Only of answers to requests, and only where images are reused.
_REUSE_HEADER: Final = {
    "X-Cache": ("miss", "With `--reuse-s`: hit (stored), joined (drawn for an equal request), or miss."),
}
_OPENAI_HEADERS: Final = {
    name: header for name, header in (_RESULT_HEADERS | _REUSE_HEADER).items() if name != "Content-Digest"
}
_ACCEPTED_HEADERS: Final = {
    **_REUSE_HEADER,
    "Location": (f"/jobs/{_JOB}", "The job's address."),
    "Preference-Applied": ("respond-async", "The preference that was honoured (RFC 7240)."),
    "X-Job-ID": (_JOB, "The job."),
}

# "METHOD /path" → status → header → (value, description).
HEADERS: Final[Mapping[str, Mapping[str, Mapping[str, tuple[str, str]]]]] = {
    "POST /generate": {"200": _RESULT_HEADERS | _REUSE_HEADER, "202": _ACCEPTED_HEADERS},
    "GET /jobs/{job_id}/images/{k}": {"200": _RESULT_HEADERS},
    **{
        f"POST /v1/images/{name}": {"200": _OPENAI_HEADERS} for name in ("generations", "edits", "variations")
    },
}
