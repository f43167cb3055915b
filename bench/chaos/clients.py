"""The clients: they pursue each request to its end, whatever breaks between them and the service.

Every request carries an Idempotency-Key, so that asking again is not asking twice.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from ditserve.bench.chaos.doors import Door

RETRY_S = 0.2
PROMISE_MS = 4000
REFUSED = {"overloaded"}  # ends of requests that were never accepted
# Problems that pass by themselves: the client asks again.
TRANSIENT_PROBLEMS = {"queue-unavailable", "queue-full", "draining", "idempotency-conflict"}


@dataclass(frozen=True, slots=True)
class ReferenceRequest:
    """A request and its right images: the files of the same request, run alone."""

    body: dict[str, Any]
    images: tuple[bytes, ...] = ()


@dataclass(slots=True)
class RequestOutcome:
    """The fate of one request.

    Attributes:
        request: index of the reference request.
        way: the way it was sent, one of `WAYS`.
        end: "done", the code of a problem, or "waiting" for as long as it has no end.
        due: True if it has a deadline that was accepted.
        match: of its images with the right ones: "equal", "close" (one level of 255), "wrong".
        undocumented: answers that the API's document does not list.
        asked_at, ended_at: seconds since the epoch.
    """

    request: int
    way: str
    job: str | None = None
    end: str = "waiting"
    due: bool = False
    match: str = ""
    undocumented: int = 0
    asked_at: float = 0.0
    ended_at: float = 0.0


def reference_requests(classes: tuple[str, ...], factor: str, *, steps: int) -> list[ReferenceRequest]:
    """Return requests of mixed solvers, lengths, guidance and numbers of images, without their images."""
    variants: list[dict[str, Any]] = [
        {"sampler": "ddim", "steps": steps},
        {"sampler": "dpmpp-2m", "steps": max(2, steps // 2), "n": 2},
        {"sampler": "ddpm", "steps": steps + 3},
        {"sampler": "ddim", "steps": 2 * steps, "guidance_scale": 1.0},
        {"sampler": "dpmpp-2m", "steps": 3 * steps, "guidance_scale": 3.0, "previews": steps},
        {"sampler": "ddim", "steps": 2, "n": 3},
    ]
    return [
        ReferenceRequest(
            {
                "condition": {factor: classes[(7 * k) % len(classes)]},
                "seed": 100 + k,
                "allow_degraded": False,
                **variant,
            }
        )
        for k, variant in enumerate(variants)
    ]


async def with_images(doors: Sequence[Door], requests: list[ReferenceRequest]) -> list[ReferenceRequest]:
    """Return the requests with their images, each made alone now."""
    client = LoadClient(doors, requests, random.Random(0), [])
    return [await client.with_images(request) for request in requests]


def compare(images: Sequence[bytes], expected: Sequence[bytes]) -> str:
    """Return "equal", "close" if no pixel differs by more than one level, or "wrong"."""
    if images == expected:
        return "equal"
    if len(images) != len(expected):
        return "wrong"
    pairs = zip(map(_pixels, images), map(_pixels, expected), strict=True)
    return "close" if all(np.abs(a - b).max() <= 1 for a, b in pairs) else "wrong"


def _pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


@dataclass(slots=True)
class LoadClient:
    """A client that sends random requests, one after another, each in a random way of `WAYS`.

    Each exchange goes to any of the doors, as behind a load balancer.
    """

    doors: Sequence[Door]
    requests: list[ReferenceRequest]
    rng: random.Random
    outcomes: list[RequestOutcome]

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.send_one(self.rng.choice(tuple(WAYS)))

    async def with_images(self, request: ReferenceRequest) -> ReferenceRequest:
        """Return the request with its images, made now."""
        outcome = RequestOutcome(0, "waiting")
        images = await self._images(outcome, await self._post(request.body, outcome, {}))
        return ReferenceRequest(request.body, images)

    async def send_one(self, way: str) -> None:
        """Send a random request, and pursue it to its end."""
        outcome = RequestOutcome(self.rng.randrange(len(self.requests)), way, asked_at=time.time())
        self.outcomes.append(outcome)
        key = f"{self.rng.getrandbits(64):016x}"
        await {**WAYS, **FURTHER_WAYS}[way](self, outcome, key)
        outcome.ended_at = time.time()

    async def _wait(self, outcome: RequestOutcome, key: str) -> None:
        """Wait for the images in the request itself."""
        body = self.requests[outcome.request].body
        answer = await self._post(body, outcome, {"idempotency-key": key})
        self._judge(outcome, await self._images(outcome, answer))

    async def _follow(self, outcome: RequestOutcome, key: str) -> None:
        """Queue the request, follow its events, then fetch its images."""
        if await self._queue(outcome, key):
            await self._read_events(outcome)
            await self._fetch(outcome)

    async def _cancel(self, outcome: RequestOutcome, key: str) -> None:
        """Queue the request, and cancel it a moment later."""
        if await self._queue(outcome, key):
            await asyncio.sleep(self.rng.random() * 0.3)
            await self._request_until_answered(outcome, "DELETE", f"/jobs/{outcome.job}")
            await self._fetch(outcome)

    async def _hurry(self, outcome: RequestOutcome, key: str) -> None:
        """Wait for the images, with a deadline that may not be kept."""
        await self._wait_until(self.rng.randrange(300, 3000), outcome, key)

    async def _promise(self, outcome: RequestOutcome, key: str) -> None:
        """Wait for the images, with a deadline that a service with little to do keeps."""
        await self._wait_until(PROMISE_MS, outcome, key)

    async def _wait_until(self, deadline_ms: int, outcome: RequestOutcome, key: str) -> None:
        body = {**self.requests[outcome.request].body, "deadline_ms": deadline_ms}
        answer = await self._post(body, outcome, {"idempotency-key": key})
        outcome.due = answer is not None or outcome.end not in REFUSED
        self._judge(outcome, await self._images(outcome, answer))

    async def _queue(self, outcome: RequestOutcome, key: str) -> bool:
        headers = {"idempotency-key": key, "prefer": "respond-async"}
        return await self._post(self.requests[outcome.request].body, outcome, headers) is not None

    async def _post(
        self, body: dict[str, Any], outcome: RequestOutcome, headers: dict[str, str]
    ) -> httpx.Response | None:
        """Return the answer to a request that was accepted, None for one that ended otherwise."""
        answer = await self._request_until_answered(outcome, "POST", "/generate", json=body, headers=headers)
        outcome.job = answer.headers.get("x-job-id")
        if answer.is_success:
            return answer
        outcome.end = answer.json()["code"]
        return None

    async def _read_events(self, outcome: RequestOutcome) -> None:
        """Read the job's events to the last, across as many connections as it takes."""
        last = "0-0"
        while True:
            door = self.rng.choice(self.doors)
            try:
                path, headers = f"/jobs/{outcome.job}/events", {"last-event-id": last}
                async with door.http.stream("GET", path, headers=headers) as stream:
                    outcome.undocumented += not door.documents("GET", path, stream)
                    if stream.status_code != 200 and not _is_transient(stream, await stream.aread()):
                        return
                    async for line in stream.aiter_lines():
                        name, _, value = line.partition(": ")
                        if name == "id":
                            last = value
                        if name == "event" and value in ("done", "failed", "cancelled"):
                            return
            except httpx.TransportError:
                pass
            await asyncio.sleep(RETRY_S)

    async def _fetch(self, outcome: RequestOutcome) -> None:
        """Wait for the end of the job, then fetch its images, or note why it has none."""
        while True:
            answer = await self._request_until_answered(outcome, "GET", f"/jobs/{outcome.job}")
            job = answer.json()
            if not answer.is_success:
                # The job was accepted, and the service has lost it.
                outcome.end = job["code"]
                return
            if job["state"] not in ("queued", "running"):
                break
            await asyncio.sleep(RETRY_S)
        if job["state"] != "done":
            outcome.end = job["error"]["code"]
            return
        self._judge(outcome, await self._files(outcome, job["links"]["images"]))

    async def _images(self, outcome: RequestOutcome, answer: httpx.Response | None) -> tuple[bytes, ...]:
        if answer is None:
            return ()
        job, count = answer.headers["x-job-id"], len(answer.json()["images"])
        return await self._files(outcome, [f"/jobs/{job}/images/{k}" for k in range(count)])

    async def _files(self, outcome: RequestOutcome, links: list[str]) -> tuple[bytes, ...]:
        answers = [await self._request_until_answered(outcome, "GET", link) for link in links]
        for answer in answers:
            if not answer.is_success:
                outcome.end = answer.json()["code"]
                return ()
        return tuple(answer.content for answer in answers)

    def _judge(self, outcome: RequestOutcome, images: tuple[bytes, ...]) -> None:
        if images:
            outcome.end = "done"
            outcome.match = compare(images, self.requests[outcome.request].images)

    async def _request_until_answered(
        self, outcome: RequestOutcome, method: str, path: str, **content: Any
    ) -> httpx.Response:
        """Repeat a request until its answer is about the request itself, and not about a passing failure."""
        while True:
            door = self.rng.choice(self.doors)
            try:
                answer = await door.http.request(method, path, **content)
            except httpx.TransportError:
                await asyncio.sleep(RETRY_S)
                continue
            outcome.undocumented += not door.documents(method, path, answer)
            if not _is_transient(answer, answer.content):
                return answer
            await asyncio.sleep(RETRY_S)


def _is_transient(answer: httpx.Response, content: bytes) -> bool:
    """Return True if asking again may give another answer: a failure that passes, or one without a reason."""
    if answer.is_success:
        return False
    explained = answer.headers.get("content-type") == "application/problem+json"
    return not explained or json.loads(content)["code"] in TRANSIENT_PROBLEMS


WAYS = {
    "waiting": LoadClient._wait,
    "following": LoadClient._follow,
    "cancelling": LoadClient._cancel,
    "hurrying": LoadClient._hurry,
}
FURTHER_WAYS = {"promised": LoadClient._promise}
