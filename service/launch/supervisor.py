"""`python -m service`: the whole service on one machine, as child processes in a given order.

A private Valkey unless REDIS_URL names a server, a crew of workers for each bundle, and the API. The end of the API or of Valkey is
the end of everything. Stopping goes the other way: first the API, which finishes what it waits for, then the workers, then Valkey.
SIGHUP opens the bundles anew: what changed gets new workers, then the API is told, then the old workers finish and go.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
from pydantic import SecretStr

from ditserve.model.spec.bundle import BundleError, Manifest
from ditserve.service.api_keys import KeyringError, open_keyring
from ditserve.service.errors import ServiceError
from ditserve.service.launch.child_process import Child
from ditserve.service.launch.valkey import ValkeyFailed, start_valkey
from ditserve.service.launch.worker_pool import CONFIG_ERROR, FAILED, Crew, start_child
from ditserve.service.queue.broker import Broker
from ditserve.service.served_models import ServedModel, open_served_models
from ditserve.service.settings import Settings
from ditserve.service.signals import on_hang_up, stop_signals
from ditserve.service.telemetry import logs

LAST_GRACE_S = 5.0  # beyond the drain time, before a child is killed

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serve until told to stop; returns the exit status. What cannot work is one sentence on stderr and status 2."""
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        lanes = open_served_models(
            settings, verify=settings.verify
        )  # at once: a damaged file is one sentence
        open_keyring(settings)
        port = free_port(settings.host, settings.port)
        with tempfile.TemporaryDirectory(prefix="dit-") as folder:
            here = settings.model_copy(update={"port": port})
            return asyncio.run(Supervisor(here, lanes, Path(folder)).run())
    except (BundleError, KeyringError, ServiceError, ValkeyFailed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIG_ERROR


class Supervisor:
    """Owner of the children. `folder` is scratch space of its own."""

    def __init__(self, settings: Settings, lanes: Sequence[ServedModel], folder: Path) -> None:
        self._settings, self._lanes, self._folder = settings, lanes, folder
        self._crews: list[Crew] = []
        self._stopping = False
        self._ended: asyncio.Future[int]

    async def run(self) -> int:
        """The exit status of the service: 0 if it was told to stop."""
        stop, hurry = stop_signals()
        reload = asyncio.Event()
        on_hang_up(reload.set, stop=stop.set)
        self._ended = asyncio.get_running_loop().create_future()
        valkey = await self._queue()
        try:
            shared = self._folder / "metrics"
            shared.mkdir()
            self._settings = self._settings.model_copy(update={"prometheus_multiproc_dir": shared})
            async with asyncio.TaskGroup() as group:
                api = await start_child("api", self._settings)
                watching = [group.create_task(self._watch(child)) for child in (api, valkey) if child]
                watching += [group.create_task(self._despair(self._begin(lane))) for lane in self._lanes]
                reloading = group.create_task(self._reload(reload, api))
                killing = group.create_task(self._kill(hurry, api))
                status = await self._until(stop)
                self._stopping = True
                reloading.cancel()
                limit = self._settings.drain_s + LAST_GRACE_S
                await asyncio.gather(api.stop(limit), asyncio.wait([reloading]))
                await asyncio.gather(*(crew.stop(limit) for crew in self._crews))
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

    def _begin(self, lane: ServedModel) -> Crew:
        """Start the workers of a lane, whose bundle was verified when it was opened."""
        settings = self._settings.model_copy(update={"verify": False})
        crew = Crew(lane, settings, metrics_folder=self._folder / "metrics")
        self._crews.append(crew)
        crew.begin()
        return crew

    async def _watch(self, child: Child) -> None:
        """A child without which there is no service."""
        status = await child.wait()
        if not self._stopping:
            log.error("ended unexpectedly", process=child.name, status=status)
        self._end(status if status > 0 else FAILED)

    async def _despair(self, crew: Crew) -> None:
        """A service whose workers cannot work ends."""
        await crew.hopeless.wait()
        self._end(CONFIG_ERROR)

    async def _reload(self, wish: asyncio.Event, api: Child) -> None:
        """Announce that all is ready, and from then on put new versions of the bundles in the place of the old when told to."""
        while not await ready(self._settings.host, self._settings.port):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.05)
        print(greeting([lane.bundle.manifest for lane in self._lanes], self._settings), flush=True)
        while True:
            await wish.wait()
            wish.clear()
            for crew in tuple(self._crews):
                await self._renew(crew, api)
            api.signal(signal.SIGHUP)  # should it have missed one

    async def _renew(self, old: Crew, api: Child) -> None:
        """Have what lies in a bundle's folder now served by new workers; if it cannot be, the old ones serve on."""
        fields = {"model": old.lane.name, "folder": str(old.lane.folder)}
        leaving: Crew | None = None
        try:
            lane = await asyncio.to_thread(old.lane.reopened, verify=self._settings.verify)
            if lane.digest == old.lane.digest:
                log.info("bundle unchanged", **fields)
            else:
                log.info("reloading", **fields, version=lane.bundle.manifest.version)
                leaving = new = self._begin(lane)
                await self._manned(new)
                leaving = old
                api.signal(signal.SIGHUP)
        except (BundleError, ServiceError, OSError) as error:
            log.error("bundle not reloaded, the old one serves on", **fields, reason=str(error))
        if leaving is not None:
            await leaving.stop(self._settings.drain_s + LAST_GRACE_S)
            self._crews.remove(leaving)

    async def _manned(self, crew: Crew) -> None:
        """Returns once the workers are ready. Raises `BundleError` if one ends instead."""
        assert self._settings.redis_url is not None
        url = self._settings.redis_url.get_secret_value()
        broker = await Broker.connect(url, namespace=crew.lane.namespace)
        try:
            if not await crew.ready(broker):
                raise BundleError("a worker of the new one ended before it was ready")
        finally:
            await broker.aclose()

    async def _kill(self, hurry: asyncio.Event, api: Child) -> None:
        await hurry.wait()
        api.signal(signal.SIGKILL)
        for crew in self._crews:
            crew.kill()

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


def greeting(manifests: Sequence[Manifest], settings: Settings) -> str:
    """One line: what is served where, and how to try it."""
    manifest, several = manifests[0], len(manifests) > 1
    base = f"http://{_reachable(settings.host)}:{settings.port}"
    condition = {factor.name: factor.classes[0] for factor in manifest.factors[:1]}
    body = shlex.quote(json.dumps({"condition": condition}, ensure_ascii=False))
    curl = f"curl -s {base}/generate -H 'content-type: application/json' -H 'accept: image/png' -d {body} -o image.png"
    names = ", ".join(f"{each.name} {each.version}" for each in manifests)
    return f"{names} {'are' if several else 'is'} ready on {base} — try: {curl}"


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
