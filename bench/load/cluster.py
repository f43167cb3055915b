"""The test cluster: the service as processes on this machine that can be killed, frozen and restarted.

A Valkey, an API and workers run as in production. Each is started again when it ends, and none outlives this
process.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from pydantic import SecretStr

from ditserve.bench.load.processes import free_port
from ditserve.service.launch.child_process import Child
from ditserve.service.launch.valkey import start_valkey
from ditserve.service.settings import Settings

READY_TIMEOUT_S = 120.0
POLL_S = 0.02
RESTART_S = 0.5


class TestCluster:
    """Processes by name: `valkey`, `api`, `worker-0`, …; their logs go to `folder`."""

    def __init__(
        self, folder: Path, settings: Settings, *, workers: int, durable: bool, worker: Sequence[str]
    ) -> None:
        self.workers = tuple(f"worker-{index}" for index in range(workers))
        self.url = f"http://127.0.0.1:{settings.port}"
        self.port = settings.port
        self._folder, self._settings = folder, settings
        self._durable = durable
        self._modules = {"api": ("service", "api"), "worker": worker}
        self._children: dict[str, Child] = {}
        self._restarts: list[asyncio.Task[None]] = []

    @property
    def redis_url(self) -> str:
        assert self._settings.redis_url is not None
        return self._settings.redis_url.get_secret_value()

    def pid(self, name: str) -> int:
        return self._children[name].pid

    async def start(self, name: str) -> None:
        """Start a process now, and again whenever it has ended."""
        await self._start(name)
        self._restarts.append(asyncio.create_task(self._restart_forever(name)))

    async def _restart_forever(self, name: str) -> None:
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
        self._children[name] = await Child.start(
            name, words, self._settings.child_environment(), log=self._folder / f"{name}.log"
        )

    def signal(self, name: str, number: signal.Signals) -> None:
        self._children[name].signal(number)

    async def wait_ready(self) -> None:
        """Wait until the API says that it can take work.

        Raises:
            RuntimeError: it does not become ready; the message holds the logs.
        """
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            for _ in range(round(READY_TIMEOUT_S / POLL_S)):
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
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        for name in reversed(self._children):
            if self._children[name].running:
                # A frozen process would not see the request to stop.
                self.signal(name, signal.SIGCONT)
                await self._children[name].stop(10.0)


@asynccontextmanager
async def running_cluster(
    folder: Path,
    settings: Settings,
    *,
    workers: int,
    durable: bool = True,
    worker: Sequence[str] = ("service", "worker"),
) -> AsyncIterator[TestCluster]:
    """Run a cluster that is ready, with `settings` except for the port and the queue, which are its own.

    Args:
        durable: the queue writes everything to disk before it answers; otherwise it only keeps it in memory.
        worker: the module that is run as each worker, and its arguments.
    """
    settings = settings.model_copy(update={"port": free_port(), "log_format": "json"})
    cluster = TestCluster(folder, settings, workers=workers, durable=durable, worker=worker)
    try:
        for name in ("valkey", *cluster.workers, "api"):
            await cluster.start(name)
        await cluster.wait_ready()
        yield cluster
    finally:
        await cluster.stop()
