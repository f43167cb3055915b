"""The OpenAPI document: problem bodies with an example for every error, and nothing FastAPI adds that we never send."""

from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service import errors
from service.http.access import OPEN
from service.http.problems import MEDIA_TYPE, OPENAI_PREFIX, openai_error, problem

Responses = dict[int | str, dict[str, Any]]
Kind = type[errors.ServiceError]

BODY: tuple[Kind, ...] = (
    errors.MalformedRequest,
    errors.RequestTimeout,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.InvalidRequest,
    errors.UnknownCondition,
)
SUBMIT: tuple[Kind, ...] = (
    errors.ModelNotFound,
    errors.QueueFull,
    errors.Overloaded,
    errors.QueueUnavailable,
    errors.Draining,
)
ENDED: tuple[Kind, ...] = (
    errors.Cancelled,
    errors.NumericalError,
    errors.WorkerLost,
    errors.InternalError,
    errors.DeadlineExceeded,
)

_DETAILS: dict[Kind, dict[str, Any]] = {
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
    errors.QueueFull: {"detail": "The queue holds its limit of 1000 jobs.", "retry_after": 5.0},
    errors.QueueUnavailable: {"detail": "Redis cannot be reached.", "retry_after": 2.0},
    errors.Draining: {"retry_after": 1.0},
    errors.Unauthorized: {"detail": "Send an API key: Authorization: Bearer dit_…"},
    errors.QuotaExceeded: {"detail": "This key may send 60 requests a minute.", "retry_after": 12.0},
}


def problems(*kinds: Kind) -> Responses:
    """The `responses` of a route that may raise `kinds`, by status, with an example of each."""
    return _responses(kinds, MEDIA_TYPE, {"$ref": "#/components/schemas/Problem"}, _problem_example)


def openai_problems(*kinds: Kind) -> Responses:
    """The same in OpenAI's shape, in which 422 is 400."""
    schema = {"$ref": "#/components/schemas/OpenAIError"}
    return _responses(
        kinds, "application/json", schema, lambda error: openai_error(error, "req-1"), fold_422=True
    )


def _responses(
    kinds: tuple[Kind, ...], media_type: str, schema: Any, example: Any, *, fold_422: bool = False
) -> Responses:
    by_status: dict[int, list[Kind]] = defaultdict(list)
    for kind in kinds:
        by_status[400 if fold_422 and kind.status == 422 else kind.status].append(kind)
    responses: Responses = {}
    for status, members in sorted(by_status.items()):
        examples = {kind.code: {"summary": kind.title, "value": example(_instance(kind))} for kind in members}
        content = {media_type: {"schema": schema, "examples": examples}}
        responses[status] = {"description": "; ".join(kind.title for kind in members), "content": content}
        if any("retry_after" in _DETAILS.get(kind, {}) for kind in members):
            header = {"description": "Whole seconds to wait.", "schema": {"type": "integer"}}
            responses[status]["headers"] = {"Retry-After": header}
    return responses


def _instance(kind: Kind) -> errors.ServiceError:
    details = _DETAILS.get(kind, {})
    return kind(details.get("detail", ""), retry_after=details.get("retry_after"), extra=details.get("extra"))


def _problem_example(error: errors.ServiceError) -> dict[str, Any]:
    return problem(error, "/generate", "req-1")


def document(app: FastAPI, *, keyed: bool = False) -> dict[str, Any]:
    """The OpenAPI document of the app, made once. `keyed`: requests need an API key."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
        )
        for operations in made["paths"].values():
            for operation in operations.values():
                described = (
                    operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
                )
                if described.get("schema", {}).get("$ref", "").endswith("HTTPValidationError"):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        if keyed:
            _secure(made)
        app.openapi_schema = made
    return app.openapi_schema


def _secure(made: dict[str, Any]) -> None:
    """Every operation that is not open to all asks for a key, and may be refused."""
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        for operation in () if path in OPEN else operations.values():
            refusals = (errors.Unauthorized, errors.Forbidden, errors.QuotaExceeded)
            describe = openai_problems if path.startswith(OPENAI_PREFIX) else problems
            operation["security"] = [{"key": []}]
            operation["responses"].update({str(status): each for status, each in describe(*refusals).items()})
