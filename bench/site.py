"""The service as separate processes on this machine, each of which can be killed, frozen and started again.

A durable Valkey, an API and workers, as in production: each is started again when it ends, and none outlives this process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from pydantic import SecretStr

from ditserve.service.launch.child_process import Child
from ditserve.service.launch.valkey import start_valkey
from ditserve.service.settings import Settings

READY_S = 120.0
POLL_S = 0.02
RESTART_S = 0.5


class Site:
    """Processes by name: `valkey`, `api`, `worker-0`, … Their output goes to `folder`."""

    def __init__(
        self, folder: Path, settings: Settings, *, workers: int, durable: bool, worker: Sequence[str]
    ) -> None:
        self.workers = tuple(f"worker-{index}" for index in range(workers))
        self.url = f"http://127.0.0.1:{settings.port}"
        self._folder, self._settings = folder, settings
        self._durable = durable
        self._modules = {"api": ("service", "api"), "worker": worker}
        self._children: dict[str, Child] = {}
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def redis_url(self) -> str:
        assert self._settings.redis_url is not None
        return self._settings.redis_url.get_secret_value()

    def pid(self, name: str) -> int:
        return self._children[name].pid

    async def start(self, name: str) -> None:
        """Start a process, and from then on whenever it has ended."""
        await self._start(name)
        self._keepers.append(asyncio.create_task(self._keep(name)))

    async def _keep(self, name: str) -> None:
        while True:
            await self._children[name].wait()
            await asyncio.sleep(RESTART_S)
            await self._start(name)

    async def _start(self, name: str) -> None:
        if name == "valkey":
            self._children[name], url = await start_valkey(self._folder, durable=self._durable)
            self._settings = self._settings.model_copy(update={"redis_url": SecretStr(url)})
            return
        words = [sys.executable, "-m", *self._modules[name.partition("-")[0]]]
        log = self._folder / f"{name}.log"
        shell = ["/bin/sh", "-c", f'exec "$@" >>{log} 2>&1', name, *words]
        self._children[name] = await Child.start(name, shell, self._settings.child_environment())

    def signal(self, name: str, number: signal.Signals) -> None:
        self._children[name].signal(number)

    async def ready(self) -> None:
        """Until the API says that it can take work. Raises `RuntimeError` with its log when it does not."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            for _ in range(round(READY_S / POLL_S)):
                try:
                    if (await client.get("/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(POLL_S)
        raise RuntimeError("the service did not become ready:\n" + self.logs())

    def logs(self) -> str:
        return "\n".join(
            f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self._folder.glob("*.log"))
        )

    async def stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for name in reversed(self._children):
            if self._children[name].running:
                self.signal(name, signal.SIGCONT)
                await self._children[name].stop(10.0)


@asynccontextmanager
async def opened(
    folder: Path,
    settings: Settings,
    *,
    workers: int,
    durable: bool = True,
    worker: Sequence[str] = ("service", "worker"),
) -> AsyncIterator[Site]:
    """A site that is ready; `settings` but for the port and the queue, which are its own.

    A `durable` queue writes everything to disk before it answers, one that is not only keeps it. `worker`: the module that is
    run as each worker, and its arguments.
    """
    settings = settings.model_copy(update={"port": free_port(), "log_format": "json"})
    site = Site(folder, settings, workers=workers, durable=durable, worker=worker)
    try:
        for name in ("valkey", *site.workers, "api"):
            await site.start(name)
        await site.ready()
        yield site
    finally:
        await site.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resident_bytes(pid: int) -> int:
    """Memory a process holds, in bytes (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int) -> float:
    """Processor time a process has used, in all its threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
