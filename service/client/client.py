"""A thin client of the HTTP API, for programs: `Client` and `AsyncClient`, the same verbs.

    with Client("http://127.0.0.1:8000") as client:
        drawn = client.generate({"label": "strawberry"}, steps=30, seed=7)
        Path("strawberry.png").write_bytes(drawn.images[0].data)

What may pass is tried again, after the `Retry-After` the service computed; a request carries an Idempotency-Key, so that trying
again never draws twice. What a refusal says is raised as its own error of `service.errors`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Self

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse

from ditserve.service.client.operations import ATTEMPTS, Event, Flow, T, Verbs, refusal

TERMINAL = frozenset({"done", "failed", "cancelled"})


class Client(Verbs):
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

    def events(self, job_id: str) -> Iterator[Event]:
        """The events of a job until it has ended; a broken stream is taken up where it broke."""
        after, broken = "", 0
        while True:
            try:
                with connect_sse(self._http, **self.stream(job_id, after)) as source:
                    if not source.response.is_success:
                        source.response.read()
                        raise refusal(source.response)
                    for event in source.iter_sse():
                        after, broken = event.id or after, 0
                        yield (told := _told(event))
                        if told.kind in TERMINAL:
                            return
            except httpx.TransportError as error:
                broken += 1
                if broken == self._attempts:
                    raise refusal(error) from error
            time.sleep(0.2 * broken)

    def run(self, flow: Flow[T]) -> T:
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


class AsyncClient(Verbs):
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

    async def events(self, job_id: str) -> AsyncIterator[Event]:
        """The events of a job until it has ended; a broken stream is taken up where it broke."""
        after, broken = "", 0
        while True:
            try:
                async with aconnect_sse(self._http, **self.stream(job_id, after)) as source:
                    if not source.response.is_success:
                        await source.response.aread()
                        raise refusal(source.response)
                    async for event in source.aiter_sse():
                        after, broken = event.id or after, 0
                        yield (told := _told(event))
                        if told.kind in TERMINAL:
                            return
            except httpx.TransportError as error:
                broken += 1
                if broken == self._attempts:
                    raise refusal(error) from error
            await asyncio.sleep(0.2 * broken)

    async def run(self, flow: Flow[T]) -> T:
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


def _told(event: ServerSentEvent) -> Event:
    return Event(event.event, event.json() if event.data else {})
