"""The test cluster: the service as processes on this machine that can be killed, frozen and restarted.

A Valkey, an API and workers run as in production. Each is started again when it ends, and none outlives this
process.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import httpx
from pydantic import SecretStr

from ditserve.bench.load.generator import connect
from ditserve.bench.load.processes import free_port
from ditserve.service.launch.child_process import Child
from ditserve.service.launch.valkey import scratch_folder, start_valkey
from ditserve.service.settings import Settings

READY_TIMEOUT_S = 120.0
POLL_S = 0.02
RESTART_S = 0.5


@dataclass(frozen=True, slots=True)
class Circumstances:
    """The circumstances of one process, where they are not those of all.

    `variables` are of its environment, `checkout` is the folder of another version of the code, and `log` is
    the file that it writes its log to.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    checkout: Path | None = None
    log: Path | None = None


COMMON: Mapping[str, Circumstances] = MappingProxyType({})


class TestCluster:
    """Processes by name: `valkey`, `api`, `worker-0`, …; their logs go to `folder`.

    `unlike` holds the circumstances of processes that are unlike the others, and of further APIs (`api-1`).
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        workers: int,
        durable: bool,
        worker: Sequence[str],
        unlike: Mapping[str, Circumstances] = COMMON,
    ) -> None:
        self.workers = tuple(f"worker-{index}" for index in range(workers))
        further = sorted(name for name in unlike if name.startswith("api-"))
        self.ports = {"api": settings.port} | {name: free_port() for name in further}
        self.urls = tuple(f"http://127.0.0.1:{port}" for port in self.ports.values())
        self.url, self.port = self.urls[0], settings.port
        self._folder, self._settings = folder, settings
        self._durable, self._unlike = durable, unlike
        self._modules = {"api": ("ditserve.service", "api"), "worker": worker}
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
        unlike = self._unlike.get(name, Circumstances())
        module, *words = self._modules[name.partition("-")[0]]
        # An earlier release has its packages at the top of its checkout alone.
        module = module if unlike.checkout is None else module.removeprefix("ditserve.")
        words = [sys.executable, "-m", module, *words]
        # A pipe that nobody reads any more could not be opened again.
        plain = unlike.log is None or name in self._children
        self._children[name] = await Child.start(
            name,
            words,
            self._environment(name, new=unlike.checkout is None) | dict(unlike.variables),
            folder=unlike.checkout,
            log=self._folder / f"{name}.log" if plain else unlike.log,
        )

    def _environment(self, name: str, *, new: bool) -> dict[str, str]:
        """Return the environment of a process; one that is not `new` may lack settings at their default."""
        settings = self._settings.model_copy(update={"port": self.ports.get(name, self.port)})
        environment = settings.child_environment()
        default = Settings.parse().child_environment()
        return {
            variable: value
            for variable, value in environment.items()
            if new or not variable.startswith("DIT_") or default.get(variable) != value
        }

    def signal(self, name: str, number: signal.Signals) -> None:
        self._children[name].signal(number)

    async def wait_ready(self) -> None:
        """Wait until every API says that it can take work.

        Raises:
            RuntimeError: one does not become ready; the message holds the logs.
        """
        await asyncio.gather(*map(self._wait_ready, self.urls))

    async def _wait_ready(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
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
    worker: Sequence[str] = ("ditserve.service", "worker"),
    unlike: Mapping[str, Circumstances] = COMMON,
) -> AsyncIterator[TestCluster]:
    """Run a cluster that is ready, with `settings` except for the port and the queue, which are its own.

    Args:
        durable: the queue writes everything to disk before it answers; otherwise it only keeps it in memory.
        worker: the module that is run as each worker, and its arguments.
        unlike: see `TestCluster`.
    """
    settings = settings.model_copy(update={"port": free_port(), "log_format": "json"})
    cluster = TestCluster(folder, settings, workers=workers, durable=durable, worker=worker, unlike=unlike)
    try:
        for name in ("valkey", *cluster.workers, *cluster.ports):
            await cluster.start(name)
        await cluster.wait_ready()
        yield cluster
    finally:
        await cluster.stop()


@asynccontextmanager
async def served(bundle: Path, *flags: str, workers: int) -> AsyncIterator[httpx.AsyncClient]:
    """Serve a bundle by workers of one thread each, in fp32, and yield a client of the service."""
    fixed = ["--threads=1", "--precision=fp32", f"--ready-workers={workers}", "--log-level=warning"]
    settings = Settings.parse([f"--bundle={bundle}", *fixed, *flags])
    with scratch_folder() as folder:
        async with (
            running_cluster(Path(folder), settings, workers=workers, durable=False) as cluster,
            connect(cluster.url) as http,
        ):
            yield http
