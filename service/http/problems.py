"""Errors as HTTP responses: RFC 9457 problem details, and OpenAI's shape under `/v1`.

One module decides what a client sees of an error; routes and middleware only raise. Nothing unforeseen leaks:
an exception outside the tree of `errors` becomes a bare 500 with the request's id.
"""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
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
from ditserve.service.http.routing import JSON
from ditserve.service.telemetry import metrics

MEDIA_TYPE = "application/problem+json"
OPENAI_PREFIX = "/v1/"
_SHOWN_ERRORS = 20

# The statuses that Starlette and FastAPI raise by themselves, as errors of the tree.
_BY_STATUS: Mapping[int, type[ServiceError]] = {400: MalformedRequest, 404: NotFound, 405: MethodNotAllowed}
# The messages of pydantic that a caller could not act on, by the type of error.
_MESSAGES = {"extra_forbidden": "There is no such field; leave it out."}
# The `type` of an error in OpenAI's shape, by its status.
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_response(error: Exception, scope: Scope) -> Response:
    """Return the response to `error`, in the shape that the request's path calls for."""
    service_error = as_service_error(error)
    metrics.REFUSED.labels(service_error.code).inc()
    # OpenAI's clients repeat a 5xx unless told not to; here another try would end the same.
    hopeless = isinstance(service_error, Overloaded) and service_error.retry_after is None
    headers = {"x-should-retry": "false"} if hopeless or service_error.status == 500 else {}
    if service_error.retry_after is not None:
        headers["retry-after"] = str(seconds_header(service_error.retry_after))
    if isinstance(error, HTTPException) and error.headers:
        headers.update({name.lower(): value for name, value in error.headers.items()})
    state = scope.get("state", {})
    request_id = state.get("request_id")
    if scope["path"].startswith(OPENAI_PREFIX):
        status = 400 if service_error.status == 422 else service_error.status
        body, media_type = openai_error(service_error, request_id), "application/json"
    else:
        status, media_type = service_error.status, MEDIA_TYPE
        body = problem(service_error, state.get("root_path", "") + scope["path"], request_id)
    return Response(json.dumps(body), status, headers, media_type)


def as_service_error(error: Exception) -> ServiceError:
    """Return any exception as an error of the tree."""
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
    """Return the RFC 9457 object of an error."""
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
    """Return an error in the shape that OpenAI's clients parse."""
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    message, param = error.detail, None
    if suggestions := error.extra.get("suggestions"):
        message = f"{message} (closest: {', '.join(map(str, suggestions))})"
    if field_errors := error.extra.get("errors"):
        param = field_errors[0]["pointer"].removeprefix("#/")
        message = f"{param}: {field_errors[0]['detail']}"
    fields = {
        "message": message,
        "type": _OPENAI_TYPES.get(error.status, fallback),
        "param": param,
        "code": error.code,
    }
    return {"error": {**fields, **error.extra, "request_id": request_id}}


def invalid_body(error: ValidationError) -> ServiceError:
    """Return the error of a body whose fields pydantic refused."""
    errors = error.errors(include_url=False, include_input=False)
    return _invalid([{**each, "loc": ("body", *each["loc"])} for each in errors])


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ServiceError:
    """Return the error of a request that pydantic refused."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return MalformedRequest(
            f"The body is not valid JSON: {first['ctx']['error']} at position {first['loc'][-1]}."
        )
    if first["loc"] == ("body",) and first["type"] == "missing":
        return InvalidRequest("A body is required.", extra={"errors": _field_errors(errors)})
    if first["loc"] == ("body",) and first["type"] in ("model_attributes_type", "model_type"):
        return InvalidRequest("The body must be a JSON object.", extra={"errors": _field_errors(errors)})
    fields = _field_errors(errors)
    return InvalidRequest(f"{fields[0]['pointer']}: {fields[0]['detail']}", extra={"errors": fields})


def _field_errors(errors: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return for each error its place and its message.

    The place is a JSON pointer into the body, or the name of a header.
    """
    fields = []
    for error in errors[:_SHOWN_ERRORS]:
        source, *path = error["loc"]
        pointer = "/".join(_escaped(str(part)) for part in path if not str(part).startswith("as-"))
        message = _MESSAGES.get(error["type"]) or re.sub(r"^Value error, ", "", str(error["msg"]))
        fields.append(
            {"pointer": f"#/{pointer}" if source == "body" else f"{source}: {pointer}", "detail": message}
        )
    return fields


def _escaped(part: str) -> str:
    """Return a part of a JSON pointer (RFC 6901), at most 100 characters of it."""
    return part.replace("~", "~0").replace("/", "~1")[:100]


def require_type(headers: Headers, types: Sequence[str]) -> None:
    """Raise `UnsupportedMediaType` unless the body is declared to be one of `types` and uncompressed.

    A charset is not looked at: JSON is always UTF-8.
    """
    if (coding := headers.get("content-encoding", "identity")) != "identity":
        raise UnsupportedMediaType(f"Send the body as it is, not in Content-Encoding {coding[:60]}.")
    kind = media_type(headers)
    if kind not in types:
        raise UnsupportedMediaType(
            f"Send {' or '.join(types)}, not {kind[:60] or 'a body without Content-Type'}."
        )


def media_type(headers: Headers) -> str:
    """Return the media type of a body; whatever is JSON is application/json."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return JSON if kind.startswith("application/") and kind.endswith("+json") else kind
