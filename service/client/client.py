"""A thin client of the HTTP API, for programs: `Client`, and `AsyncClient` with the same methods.

    with Client("http://127.0.0.1:8000") as client:
        generation = client.generate({"label": "strawberry"}, steps=30, seed=7)
        Path("strawberry.png").write_bytes(generation.images[0].data)

A failure that may pass is tried again, after the `Retry-After` that the service computed. A request carries
an Idempotency-Key, so that another attempt never draws twice. A refusal is raised as its own error of
`service.errors`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any, Self

import httpx
from httpx_sse import aconnect_sse, connect_sse

from ditserve.service.client import messages
from ditserve.service.client.messages import (
    ATTEMPTS,
    TERMINAL,
    Condition,
    GeneratedImage,
    Generation,
    Requests,
    StreamEvent,
)
from ditserve.service.errors import QueueUnavailable


class Client:
    """Blocking.

    `timeout_s` bounds one answer, not a method with its retries. Every method raises `ServiceError`.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        attempts: int = ATTEMPTS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._requests = Requests(base_url, api_key)
        self._attempts = attempts
        self._http = httpx.Client(timeout=httpx.Timeout(timeout_s, connect=10.0), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def generate(self, /, condition: Condition | None = None, **options: Any) -> Generation:
        """Draw images and wait; `options` are the fields of POST /generate, such as `prompt`.

        A picture to start from (`image`, `mask`) is the bytes of its file.
        """
        return messages.generation(self._send(self._requests.generate(condition, options)))

    def submit(self, /, condition: Condition | None = None, **options: Any) -> str:
        """Queue a job and return its id at once; `options` are the fields of POST /generate."""
        return str(self._send(self._requests.generate(condition, options, wait=False)).json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """Return the state of a job."""
        return dict(self._send(self._requests.plain("GET", f"/jobs/{job_id}")).json())

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a job and return its state."""
        return dict(self._send(self._requests.plain("DELETE", f"/jobs/{job_id}")).json())

    def image(self, job_id: str, k: int = 0) -> GeneratedImage:
        """Return image `k` of a job that is done."""
        response = self._send(self._requests.plain("GET", f"/jobs/{job_id}/images/{k}"))
        return messages.generated_image(response)

    def models(self) -> dict[str, Any]:
        """Return the models that are served."""
        return dict(self._send(self._requests.plain("GET", "/models")).json())

    def events(self, job_id: str) -> Iterator[StreamEvent]:
        """Yield the events of a job until it has ended. A broken stream is resumed where it broke."""
        last_event_id, failures = "", 0
        while True:
            try:
                with connect_sse(self._http, **self._requests.events(job_id, last_event_id)) as source:
                    if not source.response.is_success:
                        source.response.read()
                        raise messages.refusal(source.response)
                    for received in source.iter_sse():
                        event = messages.stream_event(received)
                        last_event_id, failures = received.id or last_event_id, 0
                        yield event
                        if event.kind in TERMINAL:
                            return
            except (httpx.TransportError, QueueUnavailable) as error:
                failures += 1
                if failures == self._attempts:
                    raise messages.refusal(error) from error
            time.sleep(0.2 * failures)

    def _send(self, request: httpx.Request) -> httpx.Response:
        """Send a request, again while its failure may pass. Raises the service's error."""
        for attempt in count(1):
            answer: httpx.Response | httpx.TransportError
            try:
                answer = self._http.send(request)
            except httpx.TransportError as error:
                answer = error
            if isinstance(answer, httpx.Response) and answer.is_success:
                return answer
            time.sleep(messages.wait_before_retry(answer, attempt, self._attempts))
        raise AssertionError("unreachable")


class AsyncClient:
    """The same as `Client`, asynchronous, with at most `connections` connections at a time."""

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
        self._requests = Requests(base_url, api_key)
        self._attempts = attempts
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        timeout = httpx.Timeout(timeout_s, connect=10.0, pool=None)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def generate(self, /, condition: Condition | None = None, **options: Any) -> Generation:
        """Draw images and wait; `options` are the fields of POST /generate, such as `prompt`.

        A picture to start from (`image`, `mask`) is the bytes of its file.
        """
        return messages.generation(await self._send(self._requests.generate(condition, options)))

    async def submit(self, /, condition: Condition | None = None, **options: Any) -> str:
        """Queue a job and return its id at once; `options` are the fields of POST /generate."""
        return str((await self._send(self._requests.generate(condition, options, wait=False))).json()["id"])

    async def job(self, job_id: str) -> dict[str, Any]:
        """Return the state of a job."""
        return dict((await self._send(self._requests.plain("GET", f"/jobs/{job_id}"))).json())

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a job and return its state."""
        return dict((await self._send(self._requests.plain("DELETE", f"/jobs/{job_id}"))).json())

    async def image(self, job_id: str, k: int = 0) -> GeneratedImage:
        """Return image `k` of a job that is done."""
        response = await self._send(self._requests.plain("GET", f"/jobs/{job_id}/images/{k}"))
        return messages.generated_image(response)

    async def models(self) -> dict[str, Any]:
        """Return the models that are served."""
        return dict((await self._send(self._requests.plain("GET", "/models"))).json())

    async def events(self, job_id: str) -> AsyncIterator[StreamEvent]:
        """Yield the events of a job until it has ended. A broken stream is resumed where it broke."""
        last_event_id, failures = "", 0
        while True:
            try:
                async with aconnect_sse(self._http, **self._requests.events(job_id, last_event_id)) as source:
                    if not source.response.is_success:
                        await source.response.aread()
                        raise messages.refusal(source.response)
                    async for received in source.aiter_sse():
                        event = messages.stream_event(received)
                        last_event_id, failures = received.id or last_event_id, 0
                        yield event
                        if event.kind in TERMINAL:
                            return
            except (httpx.TransportError, QueueUnavailable) as error:
                failures += 1
                if failures == self._attempts:
                    raise messages.refusal(error) from error
            await asyncio.sleep(0.2 * failures)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        """Send a request, again while its failure may pass. Raises the service's error."""
        for attempt in count(1):
            answer: httpx.Response | httpx.TransportError
            try:
                answer = await self._http.send(request)
            except httpx.TransportError as error:
                answer = error
            if isinstance(answer, httpx.Response) and answer.is_success:
                return answer
            await asyncio.sleep(messages.wait_before_retry(answer, attempt, self._attempts))
        raise AssertionError("unreachable")
