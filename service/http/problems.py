"""Errors as HTTP answers: RFC 9457 problem details, and OpenAI's shape under `/v1`.

One place decides what a client sees of an error; routes and middleware only raise. Nothing unforeseen leaks: an exception outside
the tree of `errors` becomes a bare 500 with the request's id.
"""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from ditserve.service.errors import (
    InternalError,
    InvalidRequest,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    ServiceError,
    UnsupportedMediaType,
)
from ditserve.service.telemetry import metrics

MEDIA_TYPE = "application/problem+json"
OPENAI_PREFIX = "/v1/"
_SHOWN_ERRORS = 20

# What Starlette and FastAPI raise by themselves, as errors of the tree.
_BY_STATUS: Mapping[int, type[ServiceError]] = {400: MalformedRequest, 404: NotFound, 405: MethodNotAllowed}
# The last word of the error type in OpenAI's shape, by the class of the status.
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def answer(error: Exception, scope: Scope) -> Response:
    """The HTTP answer to `error` in the shape the request's path calls for."""
    known = understood(error)
    metrics.REFUSED.labels(known.code).inc()
    hopeless = known.status == 500 or (isinstance(known, Overloaded) and known.retry_after is None)
    headers = {"x-should-retry": "false"} if hopeless else {}
    if known.retry_after is not None:
        headers["retry-after"] = str(seconds_header(known.retry_after))
    if isinstance(error, HTTPException) and error.headers:
        headers.update({name.lower(): value for name, value in error.headers.items()})
    request_id = scope.get("state", {}).get("request_id")
    if scope["path"].startswith(OPENAI_PREFIX):
        status = 400 if known.status == 422 else known.status
        body, media_type = openai_error(known, request_id), "application/json"
    else:
        status, body, media_type = known.status, problem(known, scope["path"], request_id), MEDIA_TYPE
    return Response(json.dumps(body), status, headers, media_type)


def understood(error: Exception) -> ServiceError:
    """Any exception as an error of the tree."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        kind = _BY_STATUS.get(
            error.status_code, InternalError if error.status_code >= 500 else MalformedRequest
        )
        standard = {status.phrase for status in HTTPStatus}
        return kind("" if error.detail in standard else str(error.detail))
    return InternalError()


def problem(error: ServiceError, path: str, request_id: str | None = None) -> dict[str, Any]:
    """The RFC 9457 object of an error."""
    body: dict[str, Any] = {
        "type": f"urn:dit:error:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": path,
        "code": error.code,
    }
    if request_id:
        body["request_id"] = request_id
    if error.retry_after is not None:
        body["retry_after_s"] = seconds_header(error.retry_after)
    return {**error.extra, **body}


def seconds_header(retry_after_s: float) -> int:
    """Return the value of `Retry-After`: whole seconds, at least one."""
    return max(1, ceil(retry_after_s))


def openai_error(error: ServiceError, request_id: str | None = None) -> dict[str, Any]:
    """The same error as OpenAI's clients parse it."""
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    message = error.detail
    if suggestions := error.extra.get("suggestions"):
        message = f"{message} (closest: {', '.join(map(str, suggestions))})"
    for first in error.extra.get("errors", ())[:1]:
        message = f"{first['pointer'].removeprefix('#/')}: {first['detail']}"
    param = next((item["pointer"].removeprefix("#/") for item in error.extra.get("errors", ())), None)
    fields = {
        "message": message,
        "type": _OPENAI_TYPES.get(error.status, fallback),
        "param": param,
        "code": error.code,
    }
    return {"error": {**fields, **error.extra, "request_id": request_id}}


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ServiceError:
    first = errors[0]
    if first["type"] == "json_invalid":
        return MalformedRequest(
            f"The body is not valid JSON: {first['ctx']['error']} at position {first['loc'][-1]}."
        )
    if first["loc"] == ("body",) and first["type"] == "missing":
        return InvalidRequest("A JSON body is required.", extra={"errors": _listed(errors)})
    if first["loc"] == ("body",) and first["type"] in ("model_attributes_type", "model_type"):
        return InvalidRequest("The body must be a JSON object.", extra={"errors": _listed(errors)})
    listed = _listed(errors)
    return InvalidRequest(f"{listed[0]['pointer']}: {listed[0]['detail']}", extra={"errors": listed})


def _listed(errors: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Where (a JSON pointer into the body, or the header's name) and what, for each thing wrong."""
    shown = []
    for error in errors[:_SHOWN_ERRORS]:
        where, *path = error["loc"]
        pointer = "/".join(_escaped(str(part)) for part in path if not str(part).startswith("as-"))
        message = re.sub(r"^Value error, ", "", str(error["msg"]))
        shown.append(
            {"pointer": f"#/{pointer}" if where == "body" else f"{where}: {pointer}", "detail": message}
        )
    return shown


def _escaped(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")[:100]


def require_json(headers: Headers) -> None:
    """Raises `UnsupportedMediaType` unless the body is declared to be JSON (in UTF-8, the only encoding JSON has), uncompressed."""
    if (coding := headers.get("content-encoding", "identity")) != "identity":
        raise UnsupportedMediaType(f"Send the body as it is, not in Content-Encoding {coding[:60]}.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType(
            f"Send application/json, not {kind[:60] or 'a body without Content-Type'}."
        )
