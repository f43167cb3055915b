"""The connections of a client that does not take its own delay for the server's.

On a machine without processor time to spare a client reads an answer long after it came. Linux stamps what a
socket receives, and the stamp counts here; elsewhere the time of reading does.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

STAMPED = sys.platform == "linux"  # whether the delay of the client is left out
_SO_TIMESTAMPNS = 35  # of Linux, which Python does not name; also the type of the message that it asks for
_STAMP = struct.Struct("qq")  # seconds and nanoseconds since the epoch


@dataclass(frozen=True, slots=True)
class StampedAnswer:
    """An answer, `seconds` after its request was sent. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    seconds: float


class StampedConnection:
    """A connection to a server on this machine, whose answers must have a Content-Length."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    async def open(cls, port: int) -> StampedConnection:
        connection = socket.socket()
        connection.setblocking(False)
        if STAMPED:
            connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        return cls(connection)

    async def ask(self, request: bytes) -> StampedAnswer:
        """Send a request and read its answer. Raise `ConnectionError` if the server ends the connection."""
        sent_at, loop = time.time(), asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, request)
        read, missing = b"", 1
        while missing > 0:
            chunk, came_at = await self._receive()
            if not chunk:
                raise ConnectionError("the server ended the connection before its answer")
            read += chunk
            missing = _missing(read)
        head = read.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:])
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return StampedAnswer(int(head[0].split()[1]), headers, came_at - sent_at)

    async def _receive(self) -> tuple[bytes, float]:
        """Return what has come, and when the last of it did, in seconds since the epoch."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._socket, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._socket)
        chunk, messages, *_ = self._socket.recvmsg(1 << 16, socket.CMSG_SPACE(_STAMP.size))
        for level, kind, data in messages:
            if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                seconds, nanoseconds = _STAMP.unpack(data)
                return chunk, seconds + nanoseconds / 1e9
        return chunk, time.time()

    @property
    def ended(self) -> bool:
        """True if the server has ended the connection, as it does with one that was idle for long."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def close(self) -> None:
        self._socket.close()


def _missing(read: bytes) -> int:
    """Return how many bytes of an answer are missing, at least one while its head is not whole."""
    head, end, body = read.partition(b"\r\n\r\n")
    if not end:
        return 1
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2]) - len(body)
    return 0
