"""The OpenAPI document: with an example of every request, response and error."""

import copy
from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ditserve.service import errors
from ditserve.service.http.access import OPEN
from ditserve.service.http.body_reader import PICTURES
from ditserve.service.http.examples import ANSWERS, HEADERS, PARAMETERS
from ditserve.service.http.openai_schemas import EditRequest, VariationRequest
from ditserve.service.http.problems import MEDIA_TYPE, OPENAI_PREFIX, openai_error, problem
from ditserve.service.http.routing import FORM
from ditserve.service.http.schemas import GenerateRequest

Responses = dict[int | str, dict[str, Any]]
ErrorType = type[errors.ServiceError]
_REFERENCE = "#/components/schemas/{model}"

# The errors of a body, of a submission, and of a job that ended without images.
BODY: tuple[ErrorType, ...] = (
    errors.MalformedRequest,
    errors.RequestTimeout,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.InvalidRequest,
    errors.UnknownCondition,
)
SUBMIT: tuple[ErrorType, ...] = (
    errors.ModelNotFound,
    errors.IdempotencyConflict,
    errors.IdempotencyMismatch,
    errors.TooManyUploads,
    errors.QueueFull,
    errors.Overloaded,
    errors.QueueUnavailable,
    errors.Draining,
)
ENDED: tuple[ErrorType, ...] = (
    errors.JobExpired,
    errors.Cancelled,
    errors.JobLost,
    errors.ModelReplaced,
    errors.NumericalError,
    errors.WorkerLost,
    errors.InternalError,
    errors.DeadlineExceeded,
)

_EXAMPLES: dict[ErrorType, dict[str, Any]] = {
    errors.MalformedRequest: {"detail": "The body is not valid JSON: Expecting value at position 14."},
    errors.RequestTimeout: {"detail": "Send the body within 10 s."},
    errors.PayloadTooLarge: {"detail": "The body may be 65536 bytes, not 90000."},
    errors.UnsupportedMediaType: {"detail": "Send application/json, not text/plain."},
    errors.NotAcceptable: {
        "detail": "None of application/json, image/png, image/webp, image/jpeg, multipart/mixed is in Accept."
    },
    errors.ModelNotFound: {"detail": "There is no model 'imagenet'; this service runs emoji."},
    errors.JobNotFound: {"detail": "There is no job 'd3f41bb7af225f8256061ed7de2aaa37'."},
    errors.JobUnfinished: {"detail": "The job is running; follow its events.", "retry_after": 1.0},
    errors.JobExpired: {"detail": "The images of this job are no longer kept."},
    errors.ImageNotFound: {"detail": "The job has images 0 to 3."},
    errors.IdempotencyConflict: {
        "detail": "The first request with this Idempotency-Key is still running.",
        "retry_after": 1.0,
    },
    errors.IdempotencyMismatch: {"detail": "This Idempotency-Key was sent before with another request."},
    errors.Cancelled: {"detail": "The client went away."},
    errors.DeadlineExceeded: {"detail": "The images were not ready by the deadline."},
    errors.NumericalError: {"detail": "The model's output at step 12 was not finite."},
    errors.WorkerLost: {"detail": "Three workers were lost with this job."},
    errors.Forbidden: {"detail": "This API key lacks the scope 'generate'."},
    errors.UnknownCondition: {
        "detail": "This model has no label 'strawbery'.",
        "extra": {"suggestions": ["strawberry"], "factor": "label"},
    },
    errors.InvalidRequest: {
        "detail": "#/steps: Input should be a valid integer",
        "extra": {"errors": [{"pointer": "#/steps", "detail": "Input should be a valid integer"}]},
    },
    errors.Overloaded: {
        "detail": "The images would take about 9.1 s, too long for the deadline now, even in fewer steps.",
        "retry_after": 4.0,
    },
    errors.TooManyUploads: {
        "detail": "This process holds as many pictures as it may.",
        "retry_after": 1.0,
    },
    errors.QueueFull: {"detail": "The queue holds its limit of 1000 jobs.", "retry_after": 5.0},
    errors.QueueUnavailable: {"detail": "Redis cannot be reached.", "retry_after": 2.0},
    errors.Draining: {"detail": "This process is shutting down; try again.", "retry_after": 1.0},
    errors.JobLost: {"detail": errors.JobLost().detail, "retry_after": 1.0},
    errors.ModelReplaced: {
        "detail": "The model was replaced by a version with other classes; send the request again.",
        "retry_after": 1.0,
    },
    errors.Unauthorized: {"detail": "Send an API key: Authorization: Bearer dit_…"},
    errors.QuotaExceeded: {"detail": "This key may send 60 requests a minute.", "retry_after": 12.0},
}


def request_body(kind: type[BaseModel], *media_types: str) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads its body as `kind`, in one of `media_types`."""
    content = {
        media_type: {"schema": {"$ref": _REFERENCE.format(model=_schema_name(kind, media_type))}}
        for media_type in media_types
    }
    return {"requestBody": {"content": content, "required": True}}


def _schema_name(kind: type[BaseModel], media_type: str) -> str:
    return f"{kind.__name__}Form" if media_type == FORM else kind.__name__


def _body_schemas() -> dict[str, Any]:
    """Return the schemas of the bodies that routes read themselves; in a form pictures are files."""
    kinds = (GenerateRequest, EditRequest, VariationRequest)
    _, described = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REFERENCE)
    schemas: dict[str, Any] = described["$defs"]
    for kind in kinds:
        form = copy.deepcopy(schemas[kind.__name__])
        for name in PICTURES & form["properties"].keys():
            description = form["properties"][name]["description"]
            form["properties"][name] = {"type": "string", "format": "binary", "description": description}
        form["title"] = _schema_name(kind, FORM)
        schemas[form["title"]] = form
    return schemas


def problem_responses(*kinds: ErrorType) -> Responses:
    """Return the `responses` of a route that may raise `kinds`, by status, with an example of each."""
    return _responses(kinds, MEDIA_TYPE, "Problem")


def openai_error_responses(*kinds: ErrorType) -> Responses:
    """Return the same in OpenAI's shape, in which 422 is 400."""
    return _responses(kinds, "application/json", "OpenAIError", fold_422=True)


def _responses(
    kinds: tuple[ErrorType, ...], media_type: str, schema: str, *, fold_422: bool = False
) -> Responses:
    # `openapi_document` fills in the values of the examples: it knows the path, and FastAPI would drop nulls.
    by_status: dict[int, list[ErrorType]] = defaultdict(list)
    for kind in kinds:
        by_status[400 if fold_422 and kind.status == 422 else kind.status].append(kind)
    responses: Responses = {}
    for status, members in sorted(by_status.items()):
        examples = {kind.code: {"summary": kind.title} for kind in members}
        content = {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}, "examples": examples}}
        responses[status] = {"description": "; ".join(kind.title for kind in members), "content": content}
        if any("retry_after" in _EXAMPLES.get(kind, {}) for kind in members):
            header = {"description": "Whole seconds to wait.", "schema": {"type": "integer"}, "example": 1}
            responses[status]["headers"] = {"Retry-After": header}
    return responses


def _example(kind: ErrorType) -> errors.ServiceError:
    details = _EXAMPLES.get(kind, {})
    return kind(details.get("detail", ""), retry_after=details.get("retry_after"), extra=details.get("extra"))


def openapi_document(app: FastAPI, *, keyed: bool = False, root_path: str = "") -> dict[str, Any]:
    """Return the OpenAPI document of the app, built once.

    `keyed` is True if requests need an API key. `root_path` is the path under which a proxy serves the API.
    """
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
            servers=[{"url": root_path}] if root_path else None,
        )
        document["components"]["schemas"] |= _body_schemas()
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        if keyed:
            _require_keys(document)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _remove_defaults(operation)
                _add_examples(operation, method, path, document["components"]["schemas"])
        app.openapi_schema = document
    return app.openapi_schema


def _remove_defaults(operation: dict[str, Any]) -> None:
    """Remove the response to invalid input that FastAPI adds; ours is another."""
    content = operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
    if content.get("schema", {}).get("$ref", "").endswith("HTTPValidationError"):
        del operation["responses"]["422"]


def _add_examples(operation: dict[str, Any], method: str, path: str, schemas: dict[str, Any]) -> None:
    """Put the examples of `examples` and of the request's schema into an operation."""
    key = f"{method.upper()} {path}"
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in PARAMETERS:
            parameter["example"] = PARAMETERS[parameter["name"]]
    for body in operation.get("requestBody", {}).get("content", {}).values():
        values = schemas[body["schema"]["$ref"].rpartition("/")[2]].get("examples", ())
        body["examples"] = {str(number): {"value": value} for number, value in enumerate(values, 1)}
    for status, response in operation["responses"].items():
        for media_type, value in ANSWERS.get(key, {}).get(status, {}).items():
            response["content"][media_type]["example"] = value
        for name, (value, description) in HEADERS.get(key, {}).get(status, {}).items():
            header = {"description": description, "schema": {"type": "string"}, "example": value}
            response.setdefault("headers", {})[name] = header
        for body in response.get("content", {}).values():
            for code, example in body.get("examples", {}).items():
                example["value"] = _error_body(errors.ERRORS[code], path)


def _error_body(kind: ErrorType, path: str) -> dict[str, Any]:
    """Return the body of an error of `kind`, as an operation of `path` sends it."""
    if path.startswith(OPENAI_PREFIX):
        return openai_error(_example(kind), "req-1")
    return problem(_example(kind), path.format_map(PARAMETERS), "req-1")


def _require_keys(document: dict[str, Any]) -> None:
    """Give every operation that is not open to all its need for a key, and the refusals that come of it."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in () if path in OPEN else operations.values():
            refusals = (errors.Unauthorized, errors.Forbidden, errors.QuotaExceeded)
            describe = openai_error_responses if path.startswith(OPENAI_PREFIX) else problem_responses
            operation["security"] = [{"key": []}]
            for status, response in describe(*refusals).items():
                operation["responses"][str(status)] = response
