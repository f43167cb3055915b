"""`python -m service`: the whole service on one machine, as child processes.

They start in order: a private Valkey unless REDIS_URL names a server, a pool of workers for each bundle, and
the API. When the API or Valkey ends, everything ends. Stopping goes the other way: first the API, which
finishes the requests it has, then the workers, then Valkey.

SIGHUP opens the bundles anew. A bundle that changed gets new workers; once they are ready the API is told to
read it too, and then the old workers finish their jobs and end.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import structlog
from pydantic import SecretStr

from ditserve.model.spec.class_names import class_reference
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Manifest
from ditserve.service.api_keys import KeyringError, open_keyring
from ditserve.service.errors import ServiceError
from ditserve.service.exit_statuses import DONE, FAILED, MISCONFIGURED, refuse
from ditserve.service.launch.child_process import Child
from ditserve.service.launch.valkey import ValkeyFailed, scratch_folder, start_valkey
from ditserve.service.launch.worker_pool import WorkerPool, start_child, worker_gpus
from ditserve.service.listening import listen
from ditserve.service.queue.broker import Broker
from ditserve.service.served_models import ServedModel, open_served_models
from ditserve.service.settings import Settings
from ditserve.service.signals import first, on_hang_up, stop_signals
from ditserve.service.telemetry import logs
from ditserve.service.telemetry.faults import kept_running

LAST_GRACE_S = 5.0  # beyond the drain time, before a child is killed

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serve until told to stop; return the exit status.

    An error in the settings or bundles is one sentence on stderr and status 2.
    """
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        # Checked before anything is started, so that a damaged file is one sentence.
        models = open_served_models(settings, verify=settings.verify)
        open_keyring(settings)
        _check_ready_workers(settings)
        port = free_port(settings.host, settings.port)
        with scratch_folder() as folder:
            here = settings.model_copy(update={"port": port})
            return asyncio.run(Supervisor(here, models, Path(folder)).run())
    except (BundleError, KeyringError, ServiceError, ValkeyFailed, ValueError, OSError) as error:
        return refuse(error)


class Supervisor:
    """Owner of the child processes. `folder` is scratch space of its own."""

    def __init__(self, settings: Settings, models: Sequence[ServedModel], folder: Path) -> None:
        self._settings, self._models, self._folder = settings, models, folder
        self._pools: list[WorkerPool] = []
        self._stopping = False
        self._ended = asyncio.Event()
        self._exit_status = DONE

    async def run(self) -> int:
        """Serve until told to stop; return the exit status of the service: 0 if it was told to stop."""
        stop, force_stop = stop_signals()
        reload = asyncio.Event()
        on_hang_up(reload.set, stop=stop.set)
        valkey = await self._connect_queue()
        try:
            shared = self._folder / "metrics"
            shared.mkdir()
            self._settings = self._settings.model_copy(update={"prometheus_multiproc_dir": shared})
            async with asyncio.TaskGroup() as group:
                api = await start_child("api", self._settings)
                watching = [group.create_task(self._watch(child)) for child in (api, valkey) if child]
                pools = [self._start_pool(model) for model in self._models]
                watching += [group.create_task(self._watch_pool(pool)) for pool in pools]
                reloading = group.create_task(self._announce_and_reload(reload, api))
                killing = group.create_task(self._kill_on(force_stop, api))
                await first(stop, self._ended)
                # Read now: the children that are stopped below would set another.
                status, self._stopping = self._exit_status, True
                reloading.cancel()
                limit = self._settings.drain_s + LAST_GRACE_S
                await asyncio.gather(api.stop(limit), asyncio.wait([reloading]))
                await asyncio.gather(*(pool.stop(limit) for pool in self._pools))
                for task in (*watching, killing):
                    task.cancel()
            return status
        finally:
            if valkey is not None:
                await valkey.stop(LAST_GRACE_S)

    async def _connect_queue(self) -> Child | None:
        """Start a private Valkey and return it, unless the settings name a Redis, for which all wait.

        Raises `ValueError` where its URL is malformed.
        """
        if self._settings.redis_url is not None:
            broker = Broker.open(self._settings.redis_url.get_secret_value())
            await broker.aclose()
            return None
        valkey, url = await start_valkey(self._folder)
        self._settings = self._settings.model_copy(update={"redis_url": SecretStr(url)})
        return valkey

    def _start_pool(self, model: ServedModel) -> WorkerPool:
        """Start the workers of a model.

        Its bundle was verified when it was opened, so they need not do it again. Their metrics are on the
        API's page, and one port would not do for several.
        """
        settings = self._settings.model_copy(update={"verify": False, "worker_metrics_port": 0})
        pool = WorkerPool(model, settings, metrics_folder=self._folder / "metrics")
        self._pools.append(pool)
        pool.start()
        return pool

    async def _watch(self, child: Child) -> None:
        """End the service when a child ends that it cannot do without."""
        status = await child.wait()
        # One that cannot work has said why.
        if not self._stopping and status != MISCONFIGURED:
            log.error("ended unexpectedly", process=child.name, status=status)
        self._end(status if status > 0 else FAILED)

    async def _watch_pool(self, pool: WorkerPool) -> None:
        """End the service when no restart can help its workers."""
        await pool.misconfigured.wait()
        self._end(MISCONFIGURED)

    async def _announce_and_reload(self, reload: asyncio.Event, api: Child) -> None:
        """Print the greeting once all is ready; then replace changed bundles whenever `reload` is set."""
        await kept_running("announcing", self._announce)
        await kept_running("reloading", partial(self._reload, reload, api))

    async def _announce(self) -> None:
        while not await ready(self._settings.host, self._settings.port):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.05)
        print(greeting([model.bundle.manifest for model in self._models], self._settings), flush=True)

    async def _reload(self, reload: asyncio.Event, api: Child) -> None:
        while True:
            await reload.wait()
            reload.clear()
            for pool in tuple(self._pools):
                await self._replace(pool, api)
            # Once more for all models: the API may have missed an earlier signal.
            api.signal(signal.SIGHUP)

    async def _replace(self, old: WorkerPool, api: Child) -> None:
        """Serve what lies in a bundle's folder now with new workers.

        If that fails, the old ones go on serving.
        """
        fields = {"model": old.model.name, "folder": str(old.model.folder)}
        leaving: WorkerPool | None = None
        try:
            model = await asyncio.to_thread(old.model.reopened, verify=self._settings.verify)
            if model.digest == old.model.digest:
                log.info("bundle unchanged", **fields)
            else:
                log.info("reloading", **fields, version=model.bundle.manifest.version)
                leaving = new = self._start_pool(model)
                await self._wait_ready(new)
                leaving = old
                api.signal(signal.SIGHUP)
        except (BundleError, ServiceError, OSError) as error:
            log.error("bundle not reloaded, the old one serves on", **fields, reason=str(error))
        if leaving is not None:
            await leaving.stop(self._settings.drain_s + LAST_GRACE_S)
            self._pools.remove(leaving)

    async def _wait_ready(self, pool: WorkerPool) -> None:
        """Return once the workers are ready. Raise `BundleError` if one ends instead."""
        assert self._settings.redis_url is not None
        url = self._settings.redis_url.get_secret_value()
        broker = await Broker.connect(url, namespace=pool.model.namespace)
        try:
            if not await pool.wait_ready(broker):
                raise BundleError("a worker of the new one ended before it was ready")
        finally:
            await broker.aclose()

    async def _kill_on(self, force_stop: asyncio.Event, api: Child) -> None:
        await force_stop.wait()
        api.signal(signal.SIGKILL)
        for pool in self._pools:
            pool.kill()

    def _end(self, status: int) -> None:
        """End the service with the exit status of what ended first."""
        if not self._ended.is_set():
            self._exit_status = status
            self._ended.set()


def _check_ready_workers(settings: Settings) -> None:
    """Raise `ValueError` where the API would wait for ever for workers of other machines."""
    started = len(worker_gpus(settings))
    if settings.redis_url is None and settings.ready_workers > started:
        raise ValueError(
            f"--ready-workers {settings.ready_workers} is above --workers {started}, "
            "and no other machine reaches the private queue: change one of them, or set REDIS_URL"
        )


def free_port(host: str, port: int) -> int:
    """Return the port if the API can listen there, or a free one for 0.

    Raise `ValueError` with the remedy.
    """
    with ExitStack() as stack:
        listeners = [stack.enter_context(listener) for listener in listen(host, port)]
        bound: int = listeners[0].getsockname()[1]
        return bound


def greeting(manifests: Sequence[Manifest], settings: Settings) -> str:
    """Return one line: the models, the address, and a command to try."""
    manifest, several = manifests[0], len(manifests) > 1
    base = f"http://{_reachable(settings.host)}:{settings.port}"
    condition = {factor.name: class_reference(factor, 0) for factor in manifest.factors}
    words = ", ".join(map(str, condition.values())) or "a red fox"
    asked = {"prompt": words} if manifest.config.text_size else {"condition": condition}
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    headers = "-H 'content-type: application/json' -H 'accept: image/png'"
    curl = f"curl -s {base}/generate {headers} -d {body} -o image.png"
    names = ", ".join(f"{served.name} {served.version}" for served in manifests)
    return f"{names} {'are' if several else 'is'} ready on {base} — try: {curl}"


async def ready(host: str, port: int) -> bool:
    """Return whether the API says that it can take work."""
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
    """Return the address to reach a listener at, as a URL writes it."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
