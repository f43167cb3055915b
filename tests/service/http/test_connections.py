"""Connections over real sockets: every phase of every message ends, whatever a client does."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from ditserve.service.http import protocol
from tests.conftest import wait_until
from tests.service.http.conftest import OpenStage, Serve, Stage

pytestmark = pytest.mark.anyio

GET = b"GET /startupz HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def until_closed(self, seconds: float = 5.0) -> bytes:
        return await asyncio.wait_for(self.reader.read(), seconds)

    async def answer(self) -> tuple[int, bytes]:
        """The next response of the connection: its status and its body."""
        async with asyncio.timeout(5):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.partition(b":")[2])
                for line in head.lower().splitlines()
                if b"content-length" in line
            )
            return int(head.split()[1]), await self.reader.readexactly(length)


Dial = Callable[[int], Awaitable[Connection]]


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    async with AsyncExitStack() as stack:

        async def open_(port: int) -> Connection:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            # The writer itself is kept: one that is forgotten open is a warning.
            stack.callback(lambda: writer.transport.abort())
            return Connection(reader, writer)

        yield open_


@pytest.fixture
async def port(open_stage: OpenStage, serve: Serve) -> int:
    return await serve(await open_stage(body_timeout_s=0.2, max_picture_bytes=256))


@pytest.mark.parametrize("length", [b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
async def test_a_get_that_announces_a_body_and_falls_silent_is_closed(
    port: int, dial: Dial, length: bytes
) -> None:
    connection = await dial(port)
    connection.writer.write(GET + length + b"1")
    assert (await connection.until_closed()).startswith(b"HTTP/1.1 200")


async def test_a_stream_is_cut_when_its_client_keeps_sending_a_body(
    open_stage: OpenStage, serve: Serve, dial: Dial
) -> None:
    stage = await open_stage(body_timeout_s=0.2)
    stage.worker.hold = True
    address = await stage.queued()
    connection = await dial(await serve(stage))
    request = f"GET {address}/events HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    connection.writer.write(request.encode())
    assert not (await connection.until_closed()).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "fields",
    [
        b"X-Long: " + b"a" * 120_000 + b"\r\n\r\n",
        b"X-Many: aaaaaaaa\r\n" * 6000 + b"\r\n",
        b"X-Endless: " + b"a" * 120_000,
    ],
    ids=["one", "many", "endless"],
)
@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["first", "second"])
async def test_a_head_of_120_kilobytes_in_one_write_is_refused(
    port: int, dial: Dial, fields: bytes, before: bytes
) -> None:
    connection = await dial(port)
    connection.writer.write(before + GET + fields)
    received = await connection.until_closed()
    if before:
        assert received.startswith(b"HTTP/1.1 200")
        assert received.count(b"HTTP/1.1 ") == 1, "no error where the first answer is due"
    else:
        assert received.startswith(b"HTTP/1.1 431")
        assert json.loads(received.partition(b"\r\n\r\n")[2])["code"] == "head-too-large"


@pytest.mark.parametrize(
    "body",
    [
        b"1;x=" + b"a" * 200_000 + b"\r\n{",
        b"".join(b"1;x=%s\r\n \r\n" % (b"a" * 500) for _ in range(400)),
        b"2\r\n{}\r\n0\r\n" + b"X-Trailer: " + b"a" * 200_000,
        b"2\r\n{}\r\n0\r\n" + b"X-Trailer: a\r\n" * 20_000,
    ],
    ids=["extension", "extensions", "trailer", "trailers"],
)
async def test_what_surrounds_the_chunks_of_a_body_is_counted(
    stage: Stage, serve: Serve, dial: Dial, body: bytes
) -> None:
    connection = await dial(await serve(stage))
    connection.writer.write(CHUNKED + body)
    assert (await connection.until_closed()).startswith(b"HTTP/1.1 413")


async def test_a_body_refused_before_the_application_runs_is_answered_once(
    port: int, dial: Dial, capsys: pytest.CaptureFixture[str]
) -> None:
    connection = await dial(port)
    connection.writer.write(POST + b"Content-Length: 10000000\r\n\r\n" + b"x" * 300_000)
    response = await connection.until_closed()
    assert response.count(b"HTTP/1.1 ") == 1
    assert response.startswith(b"HTTP/1.1 413")
    assert "request crashed" not in capsys.readouterr().out


async def test_a_trailer_is_no_header(stage: Stage, serve: Serve, dial: Dial) -> None:
    connection = await dial(await serve(stage))
    connection.writer.write(CHUNKED + b"2\r\n{}\r\n0\r\nPrefer: respond-async\r\nX-Request-ID: mine\r\n\r\n")
    status, _ = await connection.answer()
    assert status == 200


async def test_a_body_in_many_small_chunks_is_welcome(stage: Stage, serve: Serve, dial: Dial) -> None:
    connection = await dial(await serve(stage))
    body = b'{"n": 1' + b" " * 2000 + b"}"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    connection.writer.write(CHUNKED + chunks + b"0\r\n\r\n")
    assert (await connection.answer())[0] == 200


async def test_empty_lines_do_not_keep_an_idle_connection(
    open_stage: OpenStage, serve: Serve, dial: Dial
) -> None:
    stage = await open_stage(body_timeout_s=0.3)
    port = await serve(stage, timeout_keep_alive=0.3)
    fresh, used = await dial(port), await dial(port)
    used.writer.write(GET + b"\r\n")
    assert (await used.answer())[0] == 200

    async def drip(connection: Connection) -> None:
        while True:
            connection.writer.write(b"\r\n")
            await asyncio.sleep(0.05)

    dripping = [asyncio.create_task(drip(connection)) for connection in (fresh, used)]
    assert (await fresh.until_closed()).startswith(b"HTTP/1.1 408")
    assert await used.until_closed() == b""
    for task in dripping:
        task.cancel()


async def test_requests_sent_ahead_are_bounded_and_those_taken_are_answered(port: int, dial: Dial) -> None:
    connection = await dial(port)
    connection.writer.write((GET + b"\r\n") * 1000)
    received = await connection.until_closed(10)
    assert received.count(b"HTTP/1.1 200") == received.count(b"HTTP/1.1 ") == protocol.MAX_PIPELINED + 1


async def test_garbage_behind_a_request_leaves_its_answer_alone(
    stage: Stage, serve: Serve, dial: Dial
) -> None:
    stage.worker.hold = True
    connection = await dial(await serve(stage))
    connection.writer.write(POST + b"Content-Length: 2\r\n\r\n{}")
    await wait_until(lambda: stage.worker.claimed)
    connection.writer.write(b"GARBAGE\r\n\r\n")
    await connection.writer.drain()
    (claim,) = stage.worker.claimed
    await stage.broker.finish(claim.lease, stage.worker.result(claim))
    received = await connection.until_closed()
    assert received.startswith(b"HTTP/1.1 200")
    assert received.count(b"HTTP/1.1 ") == 1


async def test_a_client_that_does_not_read_is_cut_off(
    stage: Stage, serve: Serve, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STALL_S", 0.2)
    port = await serve(stage)
    connection = await dial(port)
    connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"

    async def keep_asking() -> None:
        while True:
            connection.writer.write(ask)
            await connection.writer.drain()
            await asyncio.sleep(0.001)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(keep_asking(), 20)


async def test_the_connection_that_has_waited_longest_makes_room(
    open_stage: OpenStage, serve: Serve, dial: Dial
) -> None:
    port = await serve(await open_stage(max_connections=3))
    idle = [await dial(port) for _ in range(3)]
    for connection in idle:
        connection.writer.write(GET + b"\r\n")
        assert (await connection.answer())[0] == 200
    idle[0].writer.write(GET + b"\r\n")
    assert (await idle[0].answer())[0] == 200
    fresh = await dial(port)
    fresh.writer.write(GET + b"\r\n")
    assert (await fresh.answer())[0] == 200
    assert await idle[1].until_closed() == b""
    idle[0].writer.write(GET + b"\r\n")
    assert (await idle[0].answer())[0] == 200


async def test_when_all_connections_are_busy_probes_are_answered_and_others_refused(
    open_stage: OpenStage, serve: Serve, dial: Dial
) -> None:
    stage = await open_stage(max_connections=2)
    stage.worker.hold = True
    port = await serve(stage)
    for _ in range(2):
        (await dial(port)).writer.write(POST + b"Content-Length: 2\r\n\r\n{}")
    await wait_until(lambda: len(stage.worker.claimed) == 2)
    crowded = await dial(port)
    crowded.writer.write(GET + b"\r\n")
    assert (await crowded.answer())[0] == 200
    crowded.writer.write(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
    received = await crowded.until_closed()
    assert received.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in received
    problem: dict[str, Any] = json.loads(received.partition(b"\r\n\r\n")[2])
    assert (problem["code"], bool(problem["request_id"])) == ("too-many-connections", True)


async def test_a_flood_of_connections_is_bounded(open_stage: OpenStage, serve: Serve, dial: Dial) -> None:
    stage = await open_stage(max_connections=20)
    port = await serve(stage)
    flood = [await dial(port) for _ in range(200)]
    began = time.monotonic()
    guest = await dial(port)
    guest.writer.write(GET + b"\r\n")
    assert (await guest.answer())[0] == 200
    assert time.monotonic() - began < 5
    cut = [connection for connection in flood if connection.reader.at_eof() or connection.reader.exception()]
    assert len(cut) >= len(flood) - 20


@pytest.mark.parametrize("protocol_name", [b"h2c", b"websocket", b"TLS/1.0, IRC/6.9"])
@pytest.mark.parametrize(
    "body",
    [b'Content-Length: 8\r\n\r\n{"n": 2}', b'Transfer-Encoding: chunked\r\n\r\n8\r\n{"n": 2}\r\n0\r\n\r\n'],
)
async def test_a_request_to_upgrade_is_served_as_it_is(
    stage: Stage, serve: Serve, dial: Dial, protocol_name: bytes, body: bytes
) -> None:
    connection = await dial(await serve(stage))
    upgrade = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMA\r\n" % protocol_name
    )
    connection.writer.write(POST + upgrade + body + GET + upgrade + b"\r\n")
    connection.writer.write(POST + upgrade + body[:-1])
    assert [(await connection.answer())[0] for _ in range(2)] == [200, 200]
    connection.writer.write(body[-1:] + GET + b"\r\n")
    assert [(await connection.answer())[0] for _ in range(2)] == [200, 200]
    assert [len(claim.job.seeds) for claim in stage.worker.claimed] == [2, 2]


async def test_a_request_to_upgrade_may_be_the_last_of_its_connection(port: int, dial: Dial) -> None:
    connection = await dial(port)
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nConnection: close\r\n"
    connection.writer.write(GET + upgrade + b"\r\n")
    assert (await connection.until_closed(10)).startswith(b"HTTP/1.1 200")


async def test_requests_to_upgrade_are_bounded_like_others(port: int, dial: Dial) -> None:
    connection = await dial(port)
    connection.writer.write((GET + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n") * 1000)
    received = await connection.until_closed(10)
    assert received.count(b"HTTP/1.1 200") == received.count(b"HTTP/1.1 ") == protocol.MAX_PIPELINED + 1


@pytest.mark.parametrize(
    "announced", [b"Content-Length: 30000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"]
)
@pytest.mark.parametrize(
    ("keyed", "status", "code"), [(False, 413, "payload-too-large"), (True, 401, "unauthorized")]
)
async def test_a_client_that_is_still_sending_reads_why_it_was_refused(
    open_stage: OpenStage, serve: Serve, tmp_path: Path, announced: bytes, keyed: bool, status: int, code: str
) -> None:
    stage = await open_stage(keys_file=tmp_path / "keys.json" if keyed else None)
    # A blocking socket, as simple clients have: it reads nothing before it has sent all.
    port, chunk = await serve(stage), b"10000\r\n" + b"x" * 65536 + b"\r\n"

    def upload() -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(10)
            client.sendall(POST + announced)
            for _ in range(400):
                client.sendall(chunk)
            received = b""
            while data := client.recv(65536):
                received += data
            return received

    received = await asyncio.to_thread(upload)
    assert received.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(received.partition(b"\r\n\r\n")[2])["code"] == code


async def test_a_client_that_sends_for_ever_after_its_last_response_is_cut(
    stage: Stage, serve: Serve, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.1)
    monkeypatch.setattr(protocol, "LONGEST_LINGER_S", 0.5)
    connection = await dial(await serve(stage))
    connection.writer.write(POST + b"Content-Length: 1000000000\r\n\r\n")

    async def keep_sending() -> None:
        while True:
            connection.writer.write(b"x" * 1000)
            await connection.writer.drain()
            await asyncio.sleep(0.01)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(keep_sending(), 10)
