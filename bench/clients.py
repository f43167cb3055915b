"""Clients that do not give up: whatever breaks between them and the service, each request is pursued to its end.

Every request carries an Idempotency-Key, so that asking again is not asking twice.
"""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

RETRY_S = 0.2
TIMEOUT_S = 20.0  # of one exchange; then it is asked again


@dataclass(frozen=True, slots=True)
class Recipe:
    """A request whose images are known: `images` are the files of a run alone."""

    body: dict[str, Any]
    images: tuple[bytes, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What became of one request. `end` is "done", the code of a problem, or "lost"."""

    recipe: int
    way: str
    job: str | None = None
    end: str = "lost"
    match: str = ""  # of its images with the recipe's: "equal", "close" (one level of 255), "wrong"
    unexplained: int = 0  # answers that failed without saying why
    asked_at: float = 0.0
    ended_at: float = 0.0


def recipes(classes: tuple[str, ...], factor: str, *, steps: int) -> list[Recipe]:
    """Requests of mixed solvers, lengths, guidance and numbers of images."""
    mixed = [
        {"sampler": "ddim", "steps": steps},
        {"sampler": "dpmpp-2m", "steps": max(2, steps // 2), "n": 2},
        {"sampler": "ddpm", "steps": steps + 3},
        {"sampler": "ddim", "steps": 2 * steps, "guidance_scale": 1.0},
        {"sampler": "dpmpp-2m", "steps": 3 * steps, "guidance_scale": 3.0, "previews": steps},
        {"sampler": "ddim", "steps": 2, "n": 3},
    ]
    common = {"allow_degraded": False}
    return [
        Recipe({"condition": {factor: classes[(7 * k) % len(classes)]}, "seed": 100 + k, **common, **each})
        for k, each in enumerate(mixed)
    ]


def connected(url: str) -> httpx.AsyncClient:
    """Connections to an API that may be another process at the next request."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=limits)


def compare(made: tuple[bytes, ...], expected: tuple[bytes, ...]) -> str:
    if made == expected:
        return "equal"
    if len(made) != len(expected):
        return "wrong"
    pairs = zip(map(_pixels, made), map(_pixels, expected), strict=True)
    return "close" if all(np.abs(a - b).max() <= 1 for a, b in pairs) else "wrong"


def _pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


@dataclass(slots=True)
class Client:
    """Sends one request after another, in one of the ways of `WAYS`, until told to stop."""

    http: httpx.AsyncClient
    recipes: list[Recipe]
    rng: random.Random
    outcomes: list[Outcome]
    ended: Callable[[], None] = lambda: None

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._one()

    async def _one(self) -> None:
        way = self.rng.choice(tuple(WAYS))
        recipe = self.rng.randrange(len(self.recipes))
        outcome = Outcome(recipe, way, asked_at=time.time())
        self.outcomes.append(outcome)
        key = f"{self.rng.getrandbits(64):016x}"
        await WAYS[way](self, outcome, key)
        outcome.ended_at = time.time()
        self.ended()

    async def reference(self, recipe: Recipe) -> Recipe:
        """The recipe with its images, made now."""
        outcome = Outcome(0, "waiting")
        images = await self._images(outcome, await self._ask(recipe.body, outcome, {}))
        return Recipe(recipe.body, images)

    async def _waiting(self, outcome: Outcome, key: str) -> None:
        """Wait for the images in the request itself."""
        answer = await self._ask(self.recipes[outcome.recipe].body, outcome, {"idempotency-key": key})
        self._judge(outcome, await self._images(outcome, answer))

    async def _following(self, outcome: Outcome, key: str) -> None:
        """Queue it, follow its events, fetch its images."""
        if await self._queue(outcome, key):
            await self._follow(outcome)
            await self._fetch(outcome)

    async def _cancelling(self, outcome: Outcome, key: str) -> None:
        """Queue it and think better of it."""
        if await self._queue(outcome, key):
            await asyncio.sleep(self.rng.random() * 0.3)
            await self._insist(outcome, "DELETE", f"/jobs/{outcome.job}")
            await self._fetch(outcome)

    async def _hurrying(self, outcome: Outcome, key: str) -> None:
        """With a deadline that may not be kept."""
        body = {**self.recipes[outcome.recipe].body, "deadline_ms": self.rng.randrange(300, 3000)}
        answer = await self._ask(body, outcome, {"idempotency-key": key})
        self._judge(outcome, await self._images(outcome, answer))

    async def _queue(self, outcome: Outcome, key: str) -> bool:
        headers = {"idempotency-key": key, "prefer": "respond-async"}
        answer = await self._ask(self.recipes[outcome.recipe].body, outcome, headers)
        return answer is not None

    async def _ask(
        self, body: dict[str, Any], outcome: Outcome, headers: dict[str, str]
    ) -> httpx.Response | None:
        """The answer of a request that was taken; None for one that ended otherwise."""
        answer = await self._insist(outcome, "POST", "/generate", json=body, headers=headers)
        outcome.job = answer.headers.get("x-job-id")
        if answer.is_success:
            return answer
        outcome.end = answer.json()["code"]
        return None

    async def _follow(self, outcome: Outcome) -> None:
        """Read the job's events to the last, across as many connections as it takes."""
        last = "0-0"
        while True:
            try:
                path, headers = f"/jobs/{outcome.job}/events", {"last-event-id": last}
                async with self.http.stream("GET", path, headers=headers) as stream:
                    if stream.status_code == 404:
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

    async def _fetch(self, outcome: Outcome) -> None:
        """The images of a job that has ended, or why it has none."""
        while True:
            answer = await self._insist(outcome, "GET", f"/jobs/{outcome.job}")
            job = answer.json()
            if not answer.is_success:
                outcome.end = "lost"  # it was accepted, and is not known any more
                return
            if job["state"] not in ("queued", "running"):
                break
            await asyncio.sleep(RETRY_S)
        if job["state"] != "done":
            outcome.end = job["error"]["code"]
            return
        images = [(await self._insist(outcome, "GET", link)).content for link in job["links"]["images"]]
        self._judge(outcome, tuple(images))

    async def _images(self, outcome: Outcome, answer: httpx.Response | None) -> tuple[bytes, ...]:
        if answer is None:
            return ()
        links = [
            f"/jobs/{answer.headers['x-job-id']}/images/{k}" for k in range(len(answer.json()["images"]))
        ]
        return tuple([(await self._insist(outcome, "GET", link)).content for link in links])

    def _judge(self, outcome: Outcome, images: tuple[bytes, ...]) -> None:
        if images:
            outcome.end = "done"
            outcome.match = compare(images, self.recipes[outcome.recipe].images)

    async def _insist(self, outcome: Outcome, method: str, path: str, **content: Any) -> httpx.Response:
        """An answer that is about the request and not about the weather."""
        while True:
            try:
                answer = await self.http.request(method, path, **content)
            except httpx.TransportError:
                await asyncio.sleep(RETRY_S)
                continue
            explained = answer.is_success or answer.headers["content-type"] == "application/problem+json"
            outcome.unexplained += not explained
            if answer.is_success or (explained and answer.json()["code"] not in PASSING):
                return answer
            await asyncio.sleep(RETRY_S)


PASSING = {"queue-unavailable", "queue-full", "draining", "idempotency-conflict"}
WAYS = {
    "waiting": Client._waiting,
    "following": Client._following,
    "cancelling": Client._cancelling,
    "hurrying": Client._hurrying,
}
