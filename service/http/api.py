"""The API process: uvicorn around the application.

It drains on SIGTERM and reads its bundles again on SIGHUP.
"""

import asyncio
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from ditserve.model.spec.bundle import BundleError
from ditserve.service.api_keys import KeyringError
from ditserve.service.errors import ServiceError
from ditserve.service.http.app import create_app
from ditserve.service.http.protocol import RESERVE, ConnectionLimits, bounded
from ditserve.service.limits import Limits
from ditserve.service.listening import listen
from ditserve.service.queue.namespace import refuse_other_models
from ditserve.service.queue.queue_client import open_queue_client
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from ditserve.service.signals import on_hang_up
from ditserve.service.telemetry import logs

CONFIG_ERROR = 2
_OTHER_FILES = 256  # files that a process has open besides its clients' connections
_log = structlog.get_logger()


class _Server(uvicorn.Server):
    """Calls `drain` before uvicorn waits for the requests in flight, and `reload` on SIGHUP."""

    def __init__(
        self, config: uvicorn.Config, drain: Callable[[], None], reload: Callable[[], None], *, keys: str
    ) -> None:
        super().__init__(config)
        self._drain, self._reload, self._keys = drain, reload, keys

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            on_hang_up(self._reload, stop=lambda: self.handle_exit(signal.SIGTERM, None))
            _log.info("api ready", host=self.config.host, port=self.config.port, keys=self._keys)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain()
        super().handle_exit(sig, frame)


def run(settings: Settings) -> int:
    """Serve until a signal stops the process; return the exit status.

    A configuration that cannot work ends with one sentence on stderr and status 2.
    """
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        _allow_open_files(settings.max_connections + RESERVE + _OTHER_FILES)
        app = create_app(settings)
        asyncio.run(_check_queues(settings))
        listeners = listen(settings.host, settings.port)
        settings = settings.model_copy(update={"port": listeners[0].getsockname()[1]})
    except (BundleError, KeyringError, ServiceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIG_ERROR
    keys = str(settings.keys_file) if settings.keys_file else "none asked: everybody may draw"
    server = _Server(configured(app, settings), app.state.draining.set, app.state.reload.set, keys=keys)
    server.run(listeners)
    return 0 if server.started else CONFIG_ERROR


def configured(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration: bounded headers and keep-alives, and a graceful end.

    Uvicorn's own access log is off, because ours has more.
    """
    limits = ConnectionLimits(
        head_s=settings.body_timeout_s,
        body_bytes=settings.max_body_bytes,
        connections=settings.max_connections,
    )
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        # `origin.Origin` does this, and believes nobody by default.
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(settings.drain_s) + 2,
        backlog=1024,
    )


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files to `count`; accepting fails for everybody beyond it.

    Raises `ValueError` where the machine allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and hard < count:
        raise ValueError(
            f"--max-connections needs {count} open files, and this process may have {hard}: "
            "lower it, or raise ulimit -Hn"
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


async def _check_queues(settings: Settings) -> None:
    """Raise what opening a model's queue raises, because uvicorn would print it as a traceback.

    Raises `ValueError` where workers of another model serve the namespace: they would never take its jobs.
    """
    for model in open_served_models(settings, verify=False):
        async with open_queue_client(model.settings(settings)) as client:
            await refuse_other_models(
                client.queue.load,
                namespace=model.namespace,
                model=model.name,
                patience_s=Limits().report_ttl_s,
            )
