"""A thin client of the HTTP API, for programs: `Client` and `AsyncClient`, the same verbs.

    with Client("http://127.0.0.1:8000") as client:
        drawn = client.generate({"label": "strawberry"}, steps=30, seed=7)
        Path("strawberry.png").write_bytes(drawn.images[0].data)

What may pass is tried again, after the `Retry-After` the service computed; a request carries an Idempotency-Key, so that trying
again never draws twice. What a refusal says is raised as its own error of `service.errors`. Each verb is written once, as a
generator of requests that a blocking and an asynchronous driver both run (as httpx does for authentication).
"""

from __future__ import annotations

import asyncio
import base64
import random
import secrets
import time
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse

from service.errors import ServiceError, from_wire

Condition = Mapping[str, Any] | Sequence[Mapping[str, Any]]
ATTEMPTS = 6
LONGEST_WAIT_S = 120.0
TERMINAL = frozenset({"done", "failed", "cancelled"})
_PASSING = frozenset({408, 429, 502, 503, 504})
_IN_FLIGHT = "idempotency-conflict"  # a try of ours whose answer was lost is still being drawn


class Unreachable(ServiceError):
    """No answer came: the service is down, or not where it was looked for."""

    status, code, title = 503, "unreachable", "The service cannot be reached"


T = TypeVar("T")
Flow = Generator["httpx.Request | float", httpx.Response | Exception | None, T]


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


class _Requests:
    """What both clients know: addresses, headers, and the flow of each verb."""

    def __init__(self, base_url: str, api_key: str | None, attempts: int) -> None:
        self._base = base_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._attempts = attempts

    def _sent(self, method: str, path: str, body: Any = None, **headers: str) -> Flow[httpx.Response]:
        """One request, tried again while its failure may pass: yields requests and waits (seconds). Raises the service's error."""
        for attempt in range(1, self._attempts + 1):
            content = {} if body is None else {"json": body}
            answer = yield httpx.Request(
                method, self._base + path, headers={**self._headers, **headers}, **content
            )
            if isinstance(answer, httpx.Response) and answer.is_success:
                return answer
            error = _refusal(answer)
            last = attempt == self._attempts or not _passes(answer, error)
            if last or (error.retry_after or 0) > LONGEST_WAIT_S:
                raise error
            hint = min(2.0**attempt, 20.0) / 4 if error.retry_after is None else error.retry_after
            yield hint * random.uniform(1.0, 1.2)  # so that those refused together do not return together
        raise AssertionError("unreachable")

    def _generate(self, condition: Condition, options: Mapping[str, Any]) -> Flow[Drawn]:
        key = secrets.token_hex(16)
        body = {"condition": condition, **options}
        answer = yield from self._sent("POST", "/generate", body, **{"idempotency-key": key})
        facts = answer.json()
        images = tuple(
            Picture(base64.b64decode(image["b64"]), image["seed"], image["content_type"])
            for image in facts.pop("images")
        )
        return Drawn(images, facts)

    def _submit(self, condition: Condition, options: Mapping[str, Any]) -> Flow[str]:
        headers = {"prefer": "respond-async", "idempotency-key": secrets.token_hex(16)}
        answer = yield from self._sent("POST", "/generate", {"condition": condition, **options}, **headers)
        return str(answer.json()["id"])

    def _json(self, method: str, path: str) -> Flow[dict[str, Any]]:
        answer = yield from self._sent(method, path)
        return dict(answer.json())

    def _image(self, job_id: str, k: int) -> Flow[Picture]:
        answer = yield from self._sent("GET", f"/jobs/{job_id}/images/{k}")
        return Picture(answer.content, int(answer.headers["x-seed"]), answer.headers["content-type"])

    def _stream(self, job_id: str, after: str) -> dict[str, Any]:
        resume = {"last-event-id": after} if after else {}
        return {
            "method": "GET",
            "url": f"{self._base}/jobs/{job_id}/events",
            "headers": {**self._headers, **resume},
        }


class Client(_Requests):
    """Blocking. `timeout_s` bounds one answer, not a verb with its retries."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        attempts: int = ATTEMPTS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, attempts)
        self._http = httpx.Client(timeout=httpx.Timeout(timeout_s, connect=10.0), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def generate(self, condition: Condition, **options: Any) -> Drawn:
        """Draw and wait; `options` are the fields of POST /generate. Raises `ServiceError`."""
        return self._run(self._generate(condition, options))

    def submit(self, condition: Condition, **options: Any) -> str:
        """Queue a job and return its id at once."""
        return self._run(self._submit(condition, options))

    def job(self, job_id: str) -> dict[str, Any]:
        return self._run(self._json("GET", f"/jobs/{job_id}"))

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._run(self._json("DELETE", f"/jobs/{job_id}"))

    def image(self, job_id: str, k: int = 0) -> Picture:
        return self._run(self._image(job_id, k))

    def models(self) -> dict[str, Any]:
        return self._run(self._json("GET", "/models"))

    def events(self, job_id: str) -> Iterator[Event]:
        """The events of a job until it has ended; a broken stream is taken up where it broke."""
        after, broken = "", 0
        while True:
            try:
                with connect_sse(self._http, **self._stream(job_id, after)) as source:
                    if not source.response.is_success:
                        source.response.read()
                        raise _refusal(source.response)
                    for event in source.iter_sse():
                        after, broken = event.id or after, 0
                        yield (told := _told(event))
                        if told.kind in TERMINAL:
                            return
            except httpx.TransportError as error:
                broken += 1
                if broken == self._attempts:
                    raise _refusal(error) from error
            time.sleep(0.2 * broken)

    def _run(self, flow: Flow[T]) -> T:
        answer: httpx.Response | Exception | None = None
        while True:
            try:
                wanted = flow.send(answer)
            except StopIteration as ended:
                result: T = ended.value
                return result
            answer = None
            if isinstance(wanted, httpx.Request):
                try:
                    answer = self._http.send(wanted)
                except httpx.TransportError as error:
                    answer = error
            else:
                time.sleep(wanted)


class AsyncClient(_Requests):
    """The same, asynchronous."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        attempts: int = ATTEMPTS,
        connections: int = 100,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, attempts)
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        timeout = httpx.Timeout(timeout_s, connect=10.0, pool=None)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def generate(self, condition: Condition, **options: Any) -> Drawn:
        """Draw and wait; `options` are the fields of POST /generate. Raises `ServiceError`."""
        return await self._run(self._generate(condition, options))

    async def submit(self, condition: Condition, **options: Any) -> str:
        """Queue a job and return its id at once."""
        return await self._run(self._submit(condition, options))

    async def job(self, job_id: str) -> dict[str, Any]:
        return await self._run(self._json("GET", f"/jobs/{job_id}"))

    async def cancel(self, job_id: str) -> dict[str, Any]:
        return await self._run(self._json("DELETE", f"/jobs/{job_id}"))

    async def image(self, job_id: str, k: int = 0) -> Picture:
        return await self._run(self._image(job_id, k))

    async def models(self) -> dict[str, Any]:
        return await self._run(self._json("GET", "/models"))

    async def events(self, job_id: str) -> AsyncIterator[Event]:
        """The events of a job until it has ended; a broken stream is taken up where it broke."""
        after, broken = "", 0
        while True:
            try:
                async with aconnect_sse(self._http, **self._stream(job_id, after)) as source:
                    if not source.response.is_success:
                        await source.response.aread()
                        raise _refusal(source.response)
                    async for event in source.aiter_sse():
                        after, broken = event.id or after, 0
                        yield (told := _told(event))
                        if told.kind in TERMINAL:
                            return
            except httpx.TransportError as error:
                broken += 1
                if broken == self._attempts:
                    raise _refusal(error) from error
            await asyncio.sleep(0.2 * broken)

    async def _run(self, flow: Flow[T]) -> T:
        answer: httpx.Response | Exception | None = None
        while True:
            try:
                wanted = flow.send(answer)
            except StopIteration as ended:
                result: T = ended.value
                return result
            answer = None
            if isinstance(wanted, httpx.Request):
                try:
                    answer = await self._http.send(wanted)
                except httpx.TransportError as error:
                    answer = error
            else:
                await asyncio.sleep(wanted)


def _refusal(answer: httpx.Response | Exception | None) -> ServiceError:
    """What went wrong as an error of the tree."""
    if not isinstance(answer, httpx.Response):
        return Unreachable(f"The service cannot be reached: {str(answer) or type(answer).__name__}.")
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    known = {"code", "detail", "type", "title", "status", "instance", "request_id", "retry_after_s"}
    extra = {name: value for name, value in problem.items() if name not in known}
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


def _told(event: ServerSentEvent) -> Event:
    return Event(event.event, event.json() if event.data else {})
