"""The private queue server, Valkey or Redis, on a Unix socket of this user alone."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from urllib.parse import quote

import structlog

from ditserve.service.launch.child_process import Child
from ditserve.service.launch.server_program import ServerProgram, server_programs

START_S = 10.0
LONGEST_SOCKET = 103  # bytes of a socket's path, on macOS; Linux takes 107

log = structlog.get_logger()

_SOCKET, _LOG = "valkey.sock", "valkey.log"
# The server runs in its folder: no path stands here, which it might take for a pattern, or would have to be
# quoted.
_OPTIONS = {
    "port": "0",
    "unixsocket": _SOCKET,
    "unixsocketperm": "700",
    "daemonize": "no",
    "save": "",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
}


class ValkeyFailed(Exception):
    """The server cannot be started here; the message is one sentence with the remedy."""


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder in which `start_valkey` works.

    It is in TMPDIR, or in /tmp where the path of a socket there would be too long or is no text.
    """
    parent = Path(tempfile.gettempdir())
    return tempfile.TemporaryDirectory(
        prefix="dit-", dir=parent if _fits(_socket_in(parent / "dit-12345678")) else "/tmp"
    )


async def start_valkey(folder: Path, *, durable: bool = False) -> tuple[Child, str]:
    """Start a server; return it, once it answers, and its URL.

    `folder` is the server's own; `scratch_folder` makes one. A `durable` server keeps its data there and
    finds it again at the next start. Raise `ValkeyFailed`.
    """
    socket = _socket_in(folder)
    if not _fits(socket):
        raise ValkeyFailed(f"{socket} is too long for a socket, or no text: choose a shorter folder")
    passed_over: dict[str, str] = {}
    for program in server_programs(passed_over):
        try:
            child = await _start(program, socket, durable=durable)
        except ValkeyFailed as error:
            passed_over[str(program.path)] = str(error)
            continue
        for path, reason in passed_over.items():
            log.warning("queue server passed over", program=path, reason=reason)
        told = {"program": str(program.path), "version": program.version, "origin": program.origin}
        log.info("queue server", **told)
        return child, f"unix://{quote(str(socket))}"
    reasons = "; ".join(f"{path}: {reason}" for path, reason in passed_over.items())
    raise ValkeyFailed(f"no queue server can be started ({reasons}); set REDIS_URL to a server")


async def _start(program: ServerProgram, socket: Path, *, durable: bool) -> Child:
    """Start a server in the folder of `socket`; return it once it answers."""
    folder, output = socket.parent, socket.parent / _LOG
    options = {**_OPTIONS, "appendonly": "yes" if durable else "no"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    cause = ""
    try:
        child = await Child.start("valkey", [str(program.path), *arguments], folder=folder, log=output)
    except OSError as error:
        raise ValkeyFailed(str(error)) from error
    try:
        async with asyncio.timeout(START_S):
            while child.running and not await _answers(socket):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)
    except TimeoutError:
        cause = f"no answer within {START_S:g} s"
        await child.stop(1.0)
    if not child.running:
        child.release()
        raise ValkeyFailed(f"it did not start ({cause or _last_line(output)})")
    return child


def _socket_in(folder: Path) -> Path:
    return folder.absolute() / _SOCKET


def _fits(socket: Path) -> bool:
    try:
        return len(str(socket).encode()) <= LONGEST_SOCKET
    except UnicodeEncodeError:
        # Bytes that are no UTF-8 cannot stand in a URL that clients decode.
        return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it gave no reason")


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
