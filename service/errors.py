"""Every way the service can refuse or fail, as one tree.

An error knows its HTTP status, its stable code and, where it helps, when to come back. It crosses the queue
as plain data (`to_wire` / `from_wire`) under its code, so the API raises the same error that a worker met.
`http.problems` renders errors as RFC 9457 bodies and in OpenAI's shape. Pure: imports nothing of the service.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar


class ServiceError(Exception):
    """Root of the tree.

    Attributes:
        status: the HTTP status.
        code: a stable kebab-case name.
        title: a short text, the same for every instance.
        detail: one sentence or more about this instance, safe to show.
        retry_after: seconds after which another try may succeed, None if that is not known.
        extra: plain data shown with the error.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "service-error"
    title: ClassVar[str] = "Service error"

    def __init__(
        self,
        detail: str = "",
        *,
        retry_after: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.detail = detail or f"{self.title}."
        self.retry_after = retry_after
        self.extra: dict[str, Any] = dict(extra or {})
        super().__init__(self.detail)


# The request itself is at fault.


class MalformedRequest(ServiceError):
    status, code, title = 400, "malformed-request", "Malformed request"


class NotFound(ServiceError):
    status, code, title = 404, "not-found", "Nothing here"


class MethodNotAllowed(ServiceError):
    status, code, title = 405, "method-not-allowed", "Method not allowed"


class NotAcceptable(ServiceError):
    status, code, title = 406, "not-acceptable", "No acceptable representation"


class RequestTimeout(ServiceError):
    status, code, title = 408, "request-timeout", "The request body took too long"


class PayloadTooLarge(ServiceError):
    status, code, title = 413, "payload-too-large", "Request body too large"


class HeadTooLarge(ServiceError):
    status, code, title = 431, "head-too-large", "Request head too large"


class UnsupportedMediaType(ServiceError):
    status, code, title = 415, "unsupported-media-type", "Unsupported media type"


class MisdirectedRequest(ServiceError):
    status, code, title = 421, "misdirected-request", "Not a host of this service"


class InvalidRequest(ServiceError):
    status, code, title = 422, "invalid-request", "Invalid request"


class UnknownCondition(InvalidRequest):
    """A class, factor or style the model does not have; `suggestions` are the closest names it does have."""

    code, title = "unknown-condition", "Unknown condition"

    def __init__(
        self,
        detail: str = "",
        *,
        suggestions: Sequence[str] = (),
        retry_after: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        merged = dict(extra or {})
        if suggestions:
            merged["suggestions"] = list(suggestions)
        super().__init__(detail, retry_after=retry_after, extra=merged)

    @property
    def suggestions(self) -> tuple[str, ...]:
        return tuple(self.extra.get("suggestions", ()))


class CallbackRefused(InvalidRequest):
    code, title = "callback-refused", "Not an address that is called back"


class ModelNotFound(ServiceError):
    status, code, title = 404, "model-not-found", "Model not found"


class JobNotFound(ServiceError):
    status, code, title = 404, "job-not-found", "Job not found"


class ImageNotFound(ServiceError):
    status, code, title = 404, "image-not-found", "Image not found"


class JobUnfinished(ServiceError):
    status, code, title = 409, "job-unfinished", "Job not finished"


class JobExpired(ServiceError):
    status, code, title = 410, "job-expired", "Job expired"


class IdempotencyConflict(ServiceError):
    status, code, title = 409, "idempotency-conflict", "A request with this key is in flight"


class IdempotencyMismatch(ServiceError):
    status, code, title = 422, "idempotency-mismatch", "This key was used with another request"


class Unauthorized(ServiceError):
    status, code, title = 401, "unauthorized", "Missing or wrong API key"


class Forbidden(ServiceError):
    status, code, title = 403, "forbidden", "Not allowed with this API key"


class QuotaExceeded(ServiceError):
    status, code, title = 429, "quota-exceeded", "Your quota is used up"


# The service cannot take the request now.


class TooManyConnections(ServiceError):
    status, code, title = 503, "too-many-connections", "Too many connections"


class TooManyUploads(ServiceError):
    status, code, title = 503, "too-many-uploads", "Too many pictures at once"


class QueueFull(ServiceError):
    status, code, title = 503, "queue-full", "The queue is full"


class Overloaded(ServiceError):
    """The deadline cannot be met, not even on the lowest rung the request allows."""

    status, code, title = 503, "overloaded", "The deadline cannot be met"


class QueueUnavailable(ServiceError):
    status, code, title = 503, "queue-unavailable", "The queue is unavailable"


class Draining(ServiceError):
    status, code, title = 503, "draining", "The service is shutting down"


# The job was accepted and did not end with images.


class JobLost(ServiceError):
    """The queue has no record of a job that it had accepted: Redis lost or evicted its data."""

    status, code, title = 503, "job-lost", "The job was lost"

    def __init__(
        self,
        detail: str = "The queue has lost this job; send the request again.",
        *,
        retry_after: float | None = 1.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail, retry_after=retry_after, extra=extra)


class ModelReplaced(ServiceError):
    """The job was made for another version of the model, with other classes or other networks."""

    status, code, title = 503, "model-replaced", "The model was replaced meanwhile"


class DeadlineExceeded(ServiceError):
    status, code, title = 504, "deadline-exceeded", "The deadline has passed"


class Cancelled(ServiceError):
    status, code, title = 499, "cancelled", "Cancelled"


class NumericalError(ServiceError):
    status, code, title = 500, "numerical-error", "The model produced invalid numbers"


class WorkerLost(ServiceError):
    status, code, title = 500, "worker-lost", "The job kept losing its worker"


class InternalError(ServiceError):
    status, code, title = 500, "internal-error", "Internal error"


def _tree(root: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


ERRORS: Mapping[str, type[ServiceError]] = {error.code: error for error in _tree(ServiceError)}


def to_wire(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data for the queue: `code`, `detail`, `retry_after`, `extra`.

    Any other exception becomes an `InternalError` without detail, because its text may hold paths or data
    that are not the caller's.
    """
    if not isinstance(error, ServiceError):
        error = InternalError(extra={"exception": type(error).__name__})
    return {
        "code": error.code,
        "detail": error.detail,
        "retry_after": error.retry_after,
        "extra": error.extra,
    }


def from_wire(data: Mapping[str, Any]) -> ServiceError:
    """Return the error that `to_wire` wrote.

    A code that this version does not know (a newer worker's) becomes an `InternalError` that names it. Fields
    of another form than `to_wire` writes are left out.
    """
    code = str(data.get("code", "missing"))
    retry_after = data.get("retry_after")
    extra = _shown(data.get("extra"))
    kind = ERRORS.get(code)
    if kind is None:
        kind, extra = InternalError, {**extra, "unknown_code": code}
    seconds = retry_after if isinstance(retry_after, int | float) and isfinite(retry_after) else None
    return kind(str(data.get("detail") or ""), retry_after=seconds, extra=extra)


def _shown(extra: object) -> dict[str, Any]:
    """Return the fields of `extra` that can be shown with an error."""
    if not isinstance(extra, Mapping):
        return {}
    return {
        name: value
        for name, value in extra.items()
        if isinstance(name, str) and name not in _RENDERED and _FORMS.get(name, _is_plain)(value)
    }


def _is_plain(value: object) -> bool:
    """Return True for what JSON can hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_field_errors(value: object) -> bool:
    """Return True for a list of at least one field's place and what is wrong there."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(error, Mapping) and {"pointer", "detail"} <= {*error} and _are_names([*error.values()])
            for error in value
        )
    )


# Names that a rendered error gives to fields of its own (`http.problems`).
_RENDERED = frozenset(
    {"type", "title", "status", "detail", "instance", "code", "request_id", "retry_after_s"}
)
_RENDERED |= {"message", "param"}
# Fields that readers of an error rely on, and their forms.
_FORMS: Mapping[str, Callable[[object], bool]] = {
    "errors": _are_field_errors,
    "suggestions": _are_names,
}
