"""The requests that a client sends, how it reads the answers, and when it tries again.

Sends nothing itself.
"""

from __future__ import annotations

import base64
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import ServerSentEvent

from ditserve.service.errors import ServiceError, from_wire

Condition = Mapping[str, Any] | Sequence[Mapping[str, Any]]
ATTEMPTS = 6
LONGEST_WAIT_S = 120.0
# The kinds of event after which a job's stream ends.
TERMINAL = frozenset({"done", "failed", "cancelled"})
_TRANSIENT = frozenset({408, 429, 502, 503, 504})
_SECONDS = re.compile(r"[0-9]{1,9}")
# An earlier attempt of this client whose answer was lost is still being drawn.
_IN_FLIGHT = "idempotency-conflict"
# The members of a problem that every error has; all others are its `extra`.
_MEMBERS = {"code", "detail", "type", "title", "status", "instance", "request_id", "retry_after_s"}


class Unreachable(ServiceError):
    """No answer came: the service is down, or not at this address."""

    status, code, title = 503, "unreachable", "The service cannot be reached"


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """An image file as the service encoded it."""

    data: bytes
    seed: int
    content_type: str


@dataclass(frozen=True, slots=True)
class Generation:
    """Images, and how they were made: `facts` is the JSON answer without the images."""

    images: tuple[GeneratedImage, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event of a job.

    `kind` is `queued`, `started`, `step`, `preview`, `degraded`, `done`, `failed` or `cancelled`.
    """

    kind: str
    data: dict[str, Any]


class Requests:
    """Builds the requests to one service, with its address and the API key."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self._base = base_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def plain(self, method: str, path: str) -> httpx.Request:
        return httpx.Request(method, self._base + path, headers=self._headers)

    def generate(
        self, condition: Condition | None, options: Mapping[str, Any], *, wait: bool = True
    ) -> httpx.Request:
        """Build POST /generate with an Idempotency-Key of its own, so that no further attempt draws again."""
        headers = {**self._headers, "idempotency-key": secrets.token_hex(16)}
        if not wait:
            headers["prefer"] = "respond-async"
        body = {name: _told(value) for name, value in options.items()}
        if condition is not None:
            body = {"condition": condition, **body}
        return httpx.Request("POST", f"{self._base}/generate", headers=headers, json=body)

    def events(self, job_id: str, last_event_id: str) -> dict[str, Any]:
        """Build the request for a job's events after `last_event_id` ("" for all), as arguments of httpx."""
        resume = {"last-event-id": last_event_id} if last_event_id else {}
        url = f"{self._base}/jobs/{job_id}/events"
        return {"method": "GET", "url": url, "headers": {**self._headers, **resume}}


def _told(value: Any) -> Any:
    """Return a field's value as JSON tells it: the bytes of a picture as a data URL."""
    if not isinstance(value, bytes):
        return value
    return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"


def generation(response: httpx.Response) -> Generation:
    """Read the answer to POST /generate."""
    facts = response.json()
    images = tuple(
        GeneratedImage(base64.b64decode(image["b64"]), image["seed"], image["content_type"])
        for image in facts.pop("images")
    )
    return Generation(images, facts)


def generated_image(response: httpx.Response) -> GeneratedImage:
    """Read the answer to GET /jobs/{id}/images/{k}."""
    return GeneratedImage(response.content, int(response.headers["x-seed"]), response.headers["content-type"])


def stream_event(event: ServerSentEvent) -> StreamEvent:
    """Return an event of a job. Raise the error that ended its stream, though not the job."""
    data = event.json() if event.data else {}
    if event.event == "error":
        raise _from_problem({"code": "error", **data}, retry_after=data.get("retry_after_s"))
    return StreamEvent(event.event, data)


def wait_before_retry(answer: httpx.Response | httpx.TransportError, attempt: int, attempts: int) -> float:
    """Return how many seconds to wait after attempt number `attempt` failed.

    Raise its error if no other may succeed.

    Without a `Retry-After` the wait doubles: about 0.5 s, 1 s, 2 s, 4 s, and 5 s from then on. Up to a fifth
    is added at random, so that clients refused together do not return together.
    """
    error = refusal(answer)
    if attempt == attempts or not _transient(answer, error) or (error.retry_after or 0) > LONGEST_WAIT_S:
        raise error
    wait_s = min(2.0**attempt, 20.0) / 4 if error.retry_after is None else error.retry_after
    return wait_s * random.uniform(1.0, 1.2)


def refusal(answer: httpx.Response | httpx.TransportError | ServiceError) -> ServiceError:
    """Return what went wrong as an error of the tree."""
    if isinstance(answer, ServiceError):
        return answer
    if not isinstance(answer, httpx.Response):
        return Unreachable(f"The service cannot be reached: {str(answer) or type(answer).__name__}.")
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    problem = {"code": f"http-{answer.status_code}", "title": answer.reason_phrase, **problem}
    retry_after = answer.headers.get("retry-after", "")
    return _from_problem(problem, retry_after=float(retry_after) if _SECONDS.fullmatch(retry_after) else None)


def _from_problem(problem: Mapping[str, Any], *, retry_after: float | None) -> ServiceError:
    return from_wire(
        {
            "code": problem["code"],
            "detail": problem.get("detail") or problem.get("title"),
            "retry_after": retry_after,
            "extra": {name: value for name, value in problem.items() if name not in _MEMBERS},
        }
    )


def _transient(answer: httpx.Response | httpx.TransportError, error: ServiceError) -> bool:
    if not isinstance(answer, httpx.Response):
        return True
    if answer.headers.get("x-should-retry") == "false":
        return False
    return answer.status_code in _TRANSIENT or error.code == _IN_FLIGHT
