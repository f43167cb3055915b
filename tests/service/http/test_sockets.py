"""The API over a real socket: clients that go away, send slowly, or do not speak HTTP."""

import asyncio
import gzip
import json
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from tests.conftest import wait_until
from tests.service.http.conftest import OpenStage, Serve, Stage

pytestmark = pytest.mark.anyio


def request(body: bytes, *extra: str, length: int | None = None) -> bytes:
    """A raw `POST /generate`."""
    head = ["POST /generate HTTP/1.1", "Host: test", "Content-Type: application/json"]
    head += [f"Content-Length: {len(body) if length is None else length}", *extra]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def answered(port: int, raw: bytes) -> bytes:
    """Send `raw` and return all that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await writer.wait_closed()
    return answer


def parts(answer: bytes) -> tuple[int, httpx.Headers, dict[str, Any]]:
    """Return the status, the headers and the JSON of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = httpx.Headers(
        [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    )
    assert int(headers["content-length"]) == len(body)
    return int(first.split()[1]), headers, json.loads(body)


def unmatched() -> float:
    """Return how many requests for no route were counted as wrong."""
    labels = {"route": "unmatched", "outcome": "invalid"}
    return REGISTRY.get_sample_value("dit_requests_total", labels) or 0.0


async def running(stage: Stage) -> None:
    await wait_until(lambda: stage.worker.claimed)


async def state(stage: Stage) -> str:
    status = await stage.broker.status(stage.worker.claimed[-1].job.id)
    assert status is not None
    return status.state


async def test_a_client_that_goes_away_cancels_its_job(stage: Stage, serve: Serve) -> None:
    stage.worker.hold = True
    _, writer = await asyncio.open_connection("127.0.0.1", await serve(stage))
    writer.write(request(b"{}"))
    await running(stage)
    writer.close()

    async def cancelled() -> bool:
        return await state(stage) == "cancelled"

    await wait_until(cancelled)


async def test_with_an_idempotency_key_the_job_goes_on(stage: Stage, serve: Serve) -> None:
    stage.worker.hold = True
    port = await serve(stage)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(b"{}", "Idempotency-Key: k"))
    await running(stage)
    writer.close()
    await writer.wait_closed()
    (claim,) = stage.worker.claimed
    await stage.broker.finish(claim.lease, stage.worker.result(claim))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        again = await client.post("/generate", json={}, headers={"idempotency-key": "k"})
    assert again.status_code == 200
    assert again.json()["id"] == claim.job.id
    assert len(stage.worker.claimed) == 1


async def test_a_streaming_client_of_openai_that_goes_away_cancels(stage: Stage, serve: Serve) -> None:
    stage.worker.hold = True
    body = {"prompt": "lemon", "stream": True}
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client,
        client.stream("POST", "/v1/images/generations", json=body) as response,
    ):
        assert response.status_code == 200
        await running(stage)

    async def cancelled() -> bool:
        return await state(stage) == "cancelled"

    await wait_until(cancelled)


async def test_leaving_an_event_stream_does_not_cancel(stage: Stage, serve: Serve) -> None:
    stage.worker.hold = True
    address = await stage.queued()
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client,
        client.stream("GET", f"{address}/events") as response,
    ):
        await anext(response.aiter_text())
    await running(stage)
    assert await state(stage) == "running"


async def test_a_slow_body_is_408(open_stage: OpenStage, serve: Serve) -> None:
    port = await serve(await open_stage(body_timeout_s=0.1))
    answer = await answered(port, request(b'{"n"', length=100))
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "request-timeout"


async def test_a_body_that_is_cut_off_leaves_nothing(stage: Stage, serve: Serve) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", await serve(stage))
    writer.write(request(b'{"n": 1', length=100))
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await stage.generate()).status_code == 200
    assert len(stage.worker.claimed) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\n{}",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"CONNECT other:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["no-request", "no-version", "no-length", "two-lengths", "tls", "tunnel", "no-address", "no-ascii"],
)
async def test_what_is_not_http_is_400_and_the_server_lives(stage: Stage, serve: Serve, raw: bytes) -> None:
    port, before = await serve(stage), unmatched()
    status, headers, problem = parts(await answered(port, raw))
    assert (status, problem["code"]) == (400, "malformed-request")
    assert headers["x-request-id"] == problem["request_id"]
    assert (headers["content-type"], headers["connection"]) == ("application/problem+json", "close")
    assert unmatched() == before + 1
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/livez")).status_code == 200


async def test_an_announced_big_body_is_refused_before_it_is_sent(stage: Stage, serve: Serve) -> None:
    answer = await answered(await serve(stage), request(b"", length=10**9))
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("head", [b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"", b"GET /livez HT"])
async def test_a_head_that_never_ends_is_408(open_stage: OpenStage, serve: Serve, head: bytes) -> None:
    port = await serve(await open_stage(body_timeout_s=0.1))
    assert (await answered(port, head)).startswith(b"HTTP/1.1 408")


async def test_the_second_head_on_a_connection_is_timed_too(open_stage: OpenStage, serve: Serve) -> None:
    port = await serve(await open_stage(body_timeout_s=0.1))
    answer = await answered(port, b"GET /startupz HTTP/1.1\r\nHost: x\r\n\r\nGET /startupz HTTP")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in answer


async def test_a_head_without_measure_is_431(stage: Stage, serve: Serve) -> None:
    port = await serve(stage)
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 40_000
    before = unmatched()
    status, headers, problem = parts(await answered(port, head))
    assert (status, problem["code"], unmatched()) == (431, "head-too-large", before + 1)
    assert headers["x-request-id"] == problem["request_id"]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/livez")).status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_compressed_body_is_refused_unread(stage: Stage, serve: Serve, coding: str) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await serve(stage)}") as client:
        headers = {"content-type": "application/json", "content-encoding": coding}
        response = await client.post("/generate", content=bomb, headers=headers)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported-media-type")
