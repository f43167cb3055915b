"""The closed-loop HTTP/1.1 client: each connection asks again as soon as it is answered.

It spends as little of the client's own time as asyncio allows: one connection is kept open for one exchange
after the other.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class WireAnswer:
    status: int
    body: bytes
    seconds: float


class Wire:
    """A connection to a server on this machine, whose answers must have a Content-Length."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Wire:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))

    async def ask(self, request: bytes) -> WireAnswer:
        """Send a request and read its answer.

        Raises:
            RuntimeError: the answer is not a success.
        """
        began = time.perf_counter()
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        body = await self._reader.readexactly(int(length[1])) if length else b""
        status = int(head[9:12])
        if status >= 300:
            raise RuntimeError(f"answered {status}: {body.decode(errors='replace')[:500]}")
        return WireAnswer(status, body, time.perf_counter() - began)

    async def aclose(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


def post(path: str, body: Mapping[str, Any], *, accept: str) -> bytes:
    """Return the bytes of a POST request with a JSON body."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\naccept: {accept}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@dataclass(frozen=True, slots=True)
class Timings:
    """The seconds of each exchange, and of all together."""

    seconds: npt.NDArray[np.float64]
    wall_s: float

    @property
    def per_s(self) -> float:
        return len(self.seconds) / self.wall_s

    def milliseconds(self, percent: float) -> float:
        return 1e3 * float(np.percentile(self.seconds, percent))


async def exchange(port: int, requests: Iterator[bytes], *, connections: int, n: int) -> Timings:
    """Send `n` requests over that many connections, each of which asks again as soon as it is answered."""
    wires = [await Wire.open(port) for _ in range(connections)]
    seconds: list[float] = []
    left = iter(range(n))

    async def ask(wire: Wire) -> None:
        for _ in left:
            answer = await wire.ask(next(requests))
            seconds.append(answer.seconds)

    began = time.perf_counter()
    try:
        await asyncio.gather(*(ask(wire) for wire in wires))
        return Timings(np.array(seconds), time.perf_counter() - began)
    finally:
        for wire in wires:
            await wire.aclose()
