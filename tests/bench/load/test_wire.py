"""The bare HTTP client: it keeps its connection, reads whole answers, and raises a refusal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import repeat

import pytest

from ditserve.bench.load.wire import Wire, exchange, post

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def server(status: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Run a server that echoes every request; yield its port and the list of all bodies it was sent."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                body = await reader.readexactly(length)
                seen.append(body)
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        except asyncio.IncompleteReadError:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], seen
    finally:
        listening.close()


async def test_requests_go_one_after_the_other_over_one_connection() -> None:
    async with server(b"200 OK") as (port, seen):
        wire = await Wire.open(port)
        for seed in (1, 2):
            answer = await wire.ask(post("/generate", {"seed": seed}, accept="image/png"))
            assert json.loads(answer.body) == {"seed": seed}
            assert answer.seconds > 0
        await wire.aclose()
        assert len(seen) == 2


async def test_a_refusal_is_raised_with_what_it_says() -> None:
    async with server(b"503 Service Unavailable") as (port, _):
        with pytest.raises(RuntimeError, match=r"answered 503: .*full"):
            await exchange(port, repeat(post("/", {"why": "full"}, accept="*/*")), connections=1, n=1)


async def test_all_connections_share_the_requests() -> None:
    async with server(b"200 OK") as (port, seen):
        timings = await exchange(port, repeat(post("/", {}, accept="*/*")), connections=3, n=10)
    assert len(seen) == len(timings.seconds) == 10
    assert timings.per_s > 0
    assert timings.milliseconds(50) <= timings.milliseconds(99)
