"""`python -m service`: the whole service on one machine, as child processes in a given order.

A private Valkey unless REDIS_URL names a server, workers, and the API. A worker that crashes is started again, less and less often;
the end of the API or of Valkey is the end of everything. Stopping goes the other way: first the API, which finishes what it
waits for, then the workers, then Valkey.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import structlog
from pydantic import SecretStr

from model.bundle import Bundle, BundleError, Manifest
from service import logs, metrics
from service.children import Child
from service.errors import ServiceError
from service.keyring import KeyringError, admit
from service.queue.broker import Broker
from service.settings import Settings
from service.signals import stop_signals
from service.valkey import ValkeyFailed, start_valkey

CONFIG_ERROR, FAILED = 2, 1
LAST_GRACE_S = 5.0  # beyond the drain time, before a child is killed
FIRST_PAUSE_S, LONGEST_PAUSE_S, SOUND_S = (
    0.5,
    30.0,
    60.0,
)  # between starts of a worker; after SOUND_S it starts over

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serve until told to stop; returns the exit status. What cannot work is one sentence on stderr and status 2."""
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        manifest = Bundle.open(
            settings.bundle
        ).manifest  # before anything starts: a damaged file is one sentence
        admit(settings)
        port = free_port(settings.host, settings.port)
        with tempfile.TemporaryDirectory(prefix="dit-") as folder:
            here = settings.model_copy(update={"port": port, "verify": False})
            return asyncio.run(Supervisor(here, manifest, Path(folder)).run())
    except (BundleError, KeyringError, ServiceError, ValkeyFailed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIG_ERROR


class Supervisor:
    """Owner of the children. `folder` is scratch space of its own."""

    def __init__(self, settings: Settings, manifest: Manifest, folder: Path) -> None:
        self._settings, self._manifest, self._folder = settings, manifest, folder
        self._workers: dict[int, Child] = {}
        self._stopping = False
        self._ended: asyncio.Future[int]

    async def run(self) -> int:
        """The exit status of the service: 0 if it was told to stop."""
        stop, hurry = stop_signals()
        self._ended = asyncio.get_running_loop().create_future()
        valkey = await self._queue()
        try:
            shared = self._folder / "metrics"
            shared.mkdir()
            self._settings = self._settings.model_copy(update={"prometheus_multiproc_dir": shared})
            async with asyncio.TaskGroup() as group:
                api = await self._start("api")
                watching = [group.create_task(self._watch(child)) for child in (api, valkey) if child]
                working = [group.create_task(self._work(k)) for k in range(self._settings.workers)]
                announcing = group.create_task(self._announce())
                killing = group.create_task(self._kill(hurry, api))
                status = await self._until(stop)
                self._stopping = True
                announcing.cancel()
                limit = self._settings.drain_s + LAST_GRACE_S
                await api.stop(limit)
                for task in working:
                    task.cancel()
                await asyncio.wait(working)
                await asyncio.gather(*(worker.stop(limit) for worker in self._workers.values()))
                for task in (*watching, killing):
                    task.cancel()
            return status
        finally:
            if valkey is not None:
                await valkey.stop(LAST_GRACE_S)

    async def _queue(self) -> Child | None:
        """Have a queue that answers: the one of the settings, or a private one."""
        if self._settings.redis_url is not None:
            broker = await Broker.connect(self._settings.redis_url.get_secret_value())
            await broker.aclose()
            return None
        valkey, url = await start_valkey(self._folder)
        self._settings = self._settings.model_copy(update={"redis_url": SecretStr(url)})
        return valkey

    async def _start(self, command: str) -> Child:
        arguments = [sys.executable, "-m", "service", command]
        return await Child.start(command, arguments, self._settings.child_environment())

    async def _watch(self, child: Child) -> None:
        """A child without which there is no service."""
        status = await child.wait()
        if not self._stopping:
            log.error("ended unexpectedly", process=child.name, status=status)
        self._end(status if status > 0 else FAILED)

    async def _work(self, index: int) -> None:
        """Keep one worker running."""
        pause = FIRST_PAUSE_S
        while not self._stopping:
            started = time.monotonic()
            worker = self._workers[index] = await self._start("worker")
            status = await worker.wait()
            metrics.forget(worker.pid, shared=self._folder / "metrics")
            if status == CONFIG_ERROR:
                self._end(CONFIG_ERROR)
            if self._stopping or status == CONFIG_ERROR:
                return
            if time.monotonic() - started > SOUND_S:
                pause = FIRST_PAUSE_S
            log.warning("worker ended, starting another", status=status, pause_s=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _announce(self) -> None:
        while not await ready(self._settings.host, self._settings.port):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.05)
        print(greeting(self._manifest, self._settings), flush=True)

    async def _kill(self, hurry: asyncio.Event, api: Child) -> None:
        await hurry.wait()
        for child in (api, *self._workers.values()):
            child.signal(signal.SIGKILL)

    async def _until(self, stop: asyncio.Event) -> int:
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((stopped, self._ended), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        return self._ended.result() if self._ended.done() else 0

    def _end(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)


def free_port(host: str, port: int) -> int:
    """The port if the API can listen there, or a free one for 0. Raises `ValueError` with the remedy."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            found: int = probe.getsockname()[1]
            return found
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot listen on {host}:{port} ({reason}); choose another with --host or --port"
        ) from None


def greeting(manifest: Manifest, settings: Settings) -> str:
    """One line: what is served where, and how to try it."""
    base = f"http://{_reachable(settings.host)}:{settings.port}"
    condition = {factor.name: factor.classes[0] for factor in manifest.factors[:1]}
    body = shlex.quote(json.dumps({"condition": condition}, ensure_ascii=False))
    curl = f"curl -s {base}/generate -H 'content-type: application/json' -H 'accept: image/png' -d {body} -o image.png"
    return f"{manifest.name} {manifest.version} is ready on {base} — try: {curl}"


async def ready(host: str, port: int) -> bool:
    """Whether the API says that it can take work."""
    try:
        reader, writer = await asyncio.open_connection(_reachable(host).strip("[]"), port)
    except OSError:
        return False
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


def _reachable(host: str) -> str:
    """The address to reach a listener at, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
