"""A receiver of callbacks on a socket of this machine, which answers as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

HANG, ENDLESS = "hang", "endless"
SECRETS = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw,whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


@dataclass
class Post:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def job(self) -> dict[str, Any]:
        job: dict[str, Any] = json.loads(self.body)
        return job


@dataclass
class Receiver:
    """Answers each request with the next of `answers`, and with 200 once there is none left.

    An answer is a status, a head of bytes, HANG or ENDLESS.
    """

    answers: list[int | bytes | str] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    cut: int = 0  # answers whose reader went before their end
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        lines = [line.partition(": ") for line in head[1:] if line]
        headers = {name.lower(): value for name, _, value in lines}
        body = await reader.readexactly(int(headers["content-length"]))
        self.posts.append(Post(head[0].split()[1], headers, body))
        answer = self.answers.pop(0) if self.answers else 200
        try:
            await self._answer(answer, reader, writer)
        except ConnectionError:
            self.cut += 1
        finally:
            writer.close()

    async def _answer(
        self, answer: int | bytes | str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if answer == HANG:
            await reader.read()
            raise ConnectionError
        if answer == ENDLESS:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(bytes(65536))
                await writer.drain()
        writer.write(answer if isinstance(answer, bytes) else b"HTTP/1.1 %d X\r\n\r\n" % int(answer))
        await writer.drain()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    yield receiver
    server.close()
