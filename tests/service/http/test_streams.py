"""Event streams over real sockets: one reading for all, a limit for each caller, an end with the key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ditserve.service.api_keys import add, revoke
from ditserve.service.http.sse import encode
from ditserve.service.jobs import Progress
from tests.conftest import wait_until
from tests.service.http.conftest import PNG, OpenStage, Serve, Stage

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(stage: Stage, serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}", limits=limits) as client:
        yield client


async def preview(stage: Stage, step: int) -> None:
    (claim,) = stage.worker.claimed
    data = {"sample": 0, "step": step, "steps": 20, "image": PNG, "content_type": "image/png"}
    await stage.broker.progress(Progress(claim.lease, "preview", data))


async def test_each_event_is_encoded_once_for_all_its_readers(
    stage: Stage, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str | None] = []

    def counted(kind: str, data: Any, *, event_id: str | None = None) -> bytes:
        encoded.append(event_id)
        return encode(kind, data, event_id=event_id)

    monkeypatch.setattr("ditserve.service.http.routes.jobs.encode", counted)
    stage.worker.hold = True
    address = await stage.queued()
    reading = [asyncio.create_task(client.get(f"{address}/events", timeout=30)) for _ in range(50)]
    await wait_until(lambda: stage.worker.claimed)
    await wait_until(lambda: len(stage.app.state.context.streams._open) == 50)
    for step in range(1, 11):
        await preview(stage, step)
    (claim,) = stage.worker.claimed
    await stage.broker.finish(claim.lease, stage.worker.result(claim))
    texts = {(await response).text for response in reading}
    assert len(texts) == 1
    assert texts.pop().count("event: preview") == 11
    assert len(encoded) == len(set(encoded)) == 14


async def test_a_caller_has_a_number_of_streams(open_stage: OpenStage, serve: Serve) -> None:
    stage = await open_stage(max_streams=2)
    stage.worker.hold = True
    address = await stage.queued()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client:
        async with (
            client.stream("GET", f"{address}/events") as first,
            client.stream("GET", f"{address}/events") as second,
        ):
            assert (first.status_code, second.status_code) == (200, 200)
            refused = await client.get(f"{address}/events")
            assert (refused.status_code, refused.json()["code"]) == (429, "quota-exceeded")
            assert refused.headers["retry-after"] == "1"
            body = {"prompt": "lemon", "stream": True}
            assert (await client.post("/v1/images/generations", json=body)).status_code == 429
            assert len(stage.worker.claimed) <= 1, "a refused stream queues nothing"

        async def room() -> bool:
            async with client.stream("GET", f"{address}/events") as again:
                return again.status_code == 200

        await wait_until(room)


async def test_a_stream_ends_when_its_key_is_revoked(
    open_stage: OpenStage, serve: Serve, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    (key, text), (_, other) = add(keys, "shop"), add(keys, "operator", scopes=("generate", "admin"))
    stage = await open_stage(keys_file=keys)
    stage.worker.hold = True
    response = await stage.generate({"prefer": "respond-async", "authorization": f"Bearer {text}"})
    address = response.headers["location"]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client:

        async def follow(credentials: str) -> int:
            headers = {"authorization": f"Bearer {credentials}"}
            return (await client.get(f"{address}/events", headers=headers, timeout=30)).status_code

        revoked, valid = asyncio.create_task(follow(text)), asyncio.create_task(follow(other))
        await wait_until(lambda: len(stage.app.state.context.streams._open) == 2)
        revoke(keys, key.id)
        assert await asyncio.wait_for(revoked, 10) == 200
        assert not valid.done()
        assert await follow(text) == 401
        await stage.broker.cancel(response.json()["id"])
        assert await valid == 200


async def test_a_silent_stream_sends_keep_alives_and_ends_when_the_process_drains(
    open_stage: OpenStage, serve: Serve
) -> None:
    stage = await open_stage(keepalive_s=0.05)
    stage.worker.hold = True
    address = await stage.queued()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client:
        async with client.stream("GET", f"{address}/events") as response:
            received = ""
            async for text in response.aiter_text():
                received += text
                if received.count(": keep-alive") > 2:
                    stage.app.state.draining.set()
        assert "event: started" in received
