"""What a client of the HTTP API asks, how it reads the answers, and when it asks again; `client` sends it.

Each verb is written once, as a generator of requests and waits that a blocking and an asynchronous driver both run (as httpx does
for authentication).
"""

from __future__ import annotations

import base64
import random
import secrets
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

import httpx

from ditserve.service.errors import ServiceError, from_wire

P = ParamSpec("P")
T = TypeVar("T")

Condition = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Flow = Generator["httpx.Request | float", httpx.Response | Exception | None, T]
ATTEMPTS = 6
LONGEST_WAIT_S = 120.0
_PASSING = frozenset({408, 429, 502, 503, 504})
_IN_FLIGHT = "idempotency-conflict"  # a try of ours whose answer was lost is still being drawn
# Members of a problem that are no extension of it.
_MEMBERS = {"code", "detail", "type", "title", "status", "instance", "request_id", "retry_after_s"}


class Unreachable(ServiceError):
    """No answer came: the service is down, or not where it was looked for."""

    status, code, title = 503, "unreachable", "The service cannot be reached"


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file as the service encoded it."""

    data: bytes
    seed: int
    content_type: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images, and how they were made: `facts` is the JSON answer without them."""

    images: tuple[Picture, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a job: `queued`, `started`, `step`, `preview`, `degraded`, `done`, `failed` or `cancelled`."""

    kind: str
    data: dict[str, Any]


class Blocking(Protocol):
    def run(self, flow: Flow[T], /) -> T: ...


class Awaiting(Protocol):
    async def run(self, flow: Flow[T], /) -> T: ...


class Verb(Generic[P, T]):
    """A verb of both clients, written once as a flow: a call of a `Blocking` client returns the result, of an `Awaiting` one what to await."""

    def __init__(self, flow: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self._flow = flow

    @overload
    def __get__(self, client: Blocking, owner: object) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: object) -> Callable[P, Awaitable[T]]: ...
    def __get__(self, client: Any, owner: object) -> Any:
        @wraps(self._flow)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.run(self._flow(client, *args, **kwargs))

        return call


class Verbs:
    """What both clients do: addresses, headers, and the flow of each verb."""

    def __init__(self, base_url: str, api_key: str | None, attempts: int) -> None:
        self._base = base_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._attempts = attempts

    @Verb
    def generate(self, /, condition: Condition, **options: Any) -> Flow[Drawn]:
        """Draw and wait; `options` are the fields of POST /generate. Raises `ServiceError`."""
        answer = yield from self._asked(condition, options)
        facts = answer.json()
        images = tuple(
            Picture(base64.b64decode(image["b64"]), image["seed"], image["content_type"])
            for image in facts.pop("images")
        )
        return Drawn(images, facts)

    @Verb
    def submit(self, /, condition: Condition, **options: Any) -> Flow[str]:
        """Queue a job and return its id at once."""
        answer = yield from self._asked(condition, options, prefer="respond-async")
        return str(answer.json()["id"])

    @Verb
    def job(self, job_id: str) -> Flow[dict[str, Any]]:
        """Where a job stands."""
        return dict((yield from self._sent("GET", f"/jobs/{job_id}")).json())

    @Verb
    def cancel(self, job_id: str) -> Flow[dict[str, Any]]:
        """Stop a job, and say where it stands."""
        return dict((yield from self._sent("DELETE", f"/jobs/{job_id}")).json())

    @Verb
    def image(self, job_id: str, k: int = 0) -> Flow[Picture]:
        """Image `k` of a job that is done."""
        answer = yield from self._sent("GET", f"/jobs/{job_id}/images/{k}")
        return Picture(answer.content, int(answer.headers["x-seed"]), answer.headers["content-type"])

    @Verb
    def models(self) -> Flow[dict[str, Any]]:
        """What is being served."""
        return dict((yield from self._sent("GET", "/models")).json())

    def _asked(
        self, condition: Condition, options: Mapping[str, Any], **headers: str
    ) -> Flow[httpx.Response]:
        """POST /generate, under a key of its own, so that no further try draws again."""
        headers["idempotency-key"] = secrets.token_hex(16)
        return (yield from self._sent("POST", "/generate", {"condition": condition, **options}, **headers))

    def _sent(self, method: str, path: str, body: Any = None, **headers: str) -> Flow[httpx.Response]:
        """One request, tried again while its failure may pass: yields requests and waits (seconds). Raises the service's error."""
        for attempt in range(1, self._attempts + 1):
            content = {} if body is None else {"json": body}
            answer = yield httpx.Request(
                method, self._base + path, headers={**self._headers, **headers}, **content
            )
            if isinstance(answer, httpx.Response) and answer.is_success:
                return answer
            error = refusal(answer)
            last = attempt == self._attempts or not _passes(answer, error)
            if last or (error.retry_after or 0) > LONGEST_WAIT_S:
                raise error
            hint = min(2.0**attempt, 20.0) / 4 if error.retry_after is None else error.retry_after
            yield hint * random.uniform(1.0, 1.2)  # so that those refused together do not return together
        raise AssertionError("unreachable")

    def stream(self, job_id: str, after: str) -> dict[str, Any]:
        """The request for a job's events, as httpx takes it; `after`: the id of the last one seen, or nothing."""
        resume = {"last-event-id": after} if after else {}
        return {
            "method": "GET",
            "url": f"{self._base}/jobs/{job_id}/events",
            "headers": {**self._headers, **resume},
        }


def refusal(answer: httpx.Response | Exception | None) -> ServiceError:
    """What went wrong as an error of the tree."""
    if not isinstance(answer, httpx.Response):
        return Unreachable(f"The service cannot be reached: {str(answer) or type(answer).__name__}.")
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    extra = {name: value for name, value in problem.items() if name not in _MEMBERS}
    wait = answer.headers.get("retry-after", "")
    return from_wire(
        {
            "code": problem.get("code", f"http-{answer.status_code}"),
            "detail": problem.get("detail") or problem.get("title") or answer.reason_phrase,
            "retry_after": float(wait) if wait.isdecimal() else None,
            "extra": extra,
        }
    )


def _passes(answer: httpx.Response | Exception | None, error: ServiceError) -> bool:
    if not isinstance(answer, httpx.Response):
        return True
    if answer.headers.get("x-should-retry") == "false":
        return False
    return answer.status_code in _PASSING or error.code == _IN_FLIGHT
