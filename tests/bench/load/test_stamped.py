"""The client that leaves its own delay out: the time of an answer ends when it came, not when it was read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ditserve.bench.load.stamped import STAMPED, StampedConnection
from ditserve.bench.load.wire import post

pytestmark = pytest.mark.anyio
LATE_S = 0.5
REQUEST = post("/generate", {"seed": 1}, accept="image/png")
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\nContent-Length: 4\r\n\r\n"


@asynccontextmanager
async def server(
    answer: Callable[[asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[StampedConnection]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            await answer(writer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    connection = await StampedConnection.open(listening.sockets[0].getsockname()[1])
    try:
        yield connection
    finally:
        connection.close()
        listening.close()


async def test_an_answer_in_parts_is_read_whole_and_the_connection_is_kept() -> None:
    async def in_parts(writer: asyncio.StreamWriter) -> None:
        for part in (REFUSAL[:20], REFUSAL[20:], b"fu", b"ll"):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    async with server(in_parts) as connection:
        for _ in range(2):
            answer = await connection.ask(REQUEST)
            assert (answer.status, answer.headers["retry-after"]) == (503, "3")
            assert 0.0 < answer.seconds < LATE_S


@pytest.mark.skipif(not STAMPED, reason="only Linux stamps what a socket receives: run it there")
async def test_the_delay_of_the_client_does_not_count() -> None:
    async def then_stall(writer: asyncio.StreamWriter) -> None:
        writer.write(REFUSAL + b"full")
        # Client and server share this loop: the answer has come, and nobody reads it.
        time.sleep(LATE_S)  # noqa: ASYNC251

    async with server(then_stall) as connection:
        # The kernel begins to stamp a moment after it was first asked to.
        await connection.ask(REQUEST)
        assert (await connection.ask(REQUEST)).seconds < LATE_S / 2


async def test_a_connection_that_ends_before_its_answer_is_an_error() -> None:
    async def hang_up(writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with server(hang_up) as connection:
        with pytest.raises(ConnectionError):
            await connection.ask(REQUEST)


async def test_a_connection_that_the_server_has_ended_says_so_before_it_is_asked() -> None:
    async def answer_once(writer: asyncio.StreamWriter) -> None:
        writer.write(REFUSAL + b"full")
        await asyncio.sleep(0.1)
        writer.close()

    async with server(answer_once) as connection:
        assert not connection.ended
        await connection.ask(REQUEST)
        assert not connection.ended
        await asyncio.sleep(0.3)
        assert connection.ended
