"""The API process: uvicorn around the application.

It drains on SIGTERM and reads its bundles again on SIGHUP.
"""

import asyncio
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from ditserve.model.spec.errors import BundleError
from ditserve.service.api_keys import KeyringError
from ditserve.service.errors import QueueUnavailable, ServiceError
from ditserve.service.exit_statuses import DONE, MISCONFIGURED, refuse
from ditserve.service.garbage import keep_what_is_there
from ditserve.service.http.app import create_app
from ditserve.service.http.protocol import RESERVE, ConnectionLimits, bounded
from ditserve.service.limits import Limits
from ditserve.service.listening import listen
from ditserve.service.queue.namespace import refuse_other_models
from ditserve.service.queue.patience import until_answered
from ditserve.service.queue.queue_client import open_queue_client
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from ditserve.service.signals import on_hang_up
from ditserve.service.telemetry import logs

_OTHER_FILES = 256  # files that a process has open besides its clients' connections
_log = structlog.get_logger()


class _Server(uvicorn.Server):
    """Calls `drain` before uvicorn waits for the requests in flight, and `reload` on SIGHUP.

    It ends if `check` raises `ValueError`, which is then the `refusal`.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], None],
        reload: Callable[[], None],
        *,
        check: Callable[[], Awaitable[None]] | None,
        keys: str,
    ) -> None:
        super().__init__(config)
        self.refusal: Exception | None = None
        self._drain, self._reload, self._check, self._keys = drain, reload, check, keys
        self._checking: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        keep_what_is_there()
        if self.started:
            on_hang_up(self._reload, stop=lambda: self.handle_exit(signal.SIGTERM, None))
            if self._check is not None:
                self._checking = asyncio.create_task(self._end_unless(self._check))
            _log.info("api ready", host=self.config.host, port=self.config.port, keys=self._keys)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._checking is not None:
            self._checking.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain()
        super().handle_exit(sig, frame)
        # Uvicorn would raise them again when it has drained, and this process end by one.
        self._captured_signals.clear()

    async def _end_unless(self, check: Callable[[], Awaitable[None]]) -> None:
        try:
            await check()
        except ValueError as error:
            self.refusal = error
            self.handle_exit(signal.SIGTERM, None)


def run(settings: Settings) -> int:
    """Serve until a signal stops the process; return the exit status.

    A configuration that cannot work ends with one sentence on stderr and status 2. While Redis is away the
    process waits for it, and says so when it is asked whether it is ready.
    """
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        _allow_open_files(settings.max_connections + RESERVE + _OTHER_FILES)
        app = create_app(settings)
        checked = asyncio.run(_checked(settings))
        listeners = listen(settings.host, settings.port)
        settings = settings.model_copy(update={"port": listeners[0].getsockname()[1]})
    except (BundleError, KeyringError, ServiceError, ValueError) as error:
        return refuse(error)
    keys = str(settings.keys_file) if settings.keys_file else "none asked: everybody may draw"
    server = _Server(
        configured(app, settings),
        app.state.draining.set,
        app.state.reload.set,
        check=None if checked else partial(_check_queues, settings, wait=True),
        keys=keys,
    )
    server.run(listeners)
    if server.refusal is not None:
        return refuse(server.refusal)
    return DONE if server.started else MISCONFIGURED


def configured(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration: bounded headers and keep-alives, and a graceful end.

    Uvicorn's own access log is off, because ours has more.
    """
    limits = ConnectionLimits(
        head_s=settings.body_timeout_s,
        body_bytes=settings.max_upload_bytes,
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


async def _checked(settings: Settings) -> bool:
    """Check the queues now, because uvicorn would print what is raised as a traceback.

    Return False while Redis cannot be used.
    """
    try:
        await _check_queues(settings)
    except QueueUnavailable:
        return False
    return True


async def _check_queues(settings: Settings, *, wait: bool = False) -> None:
    """Raise `ValueError` where workers of another model serve the namespace: they would not take its jobs.

    Where Redis cannot be used, wait for it, or raise `QueueUnavailable`.
    """
    for model in open_served_models(settings, verify=False):
        async with open_queue_client(model.settings(settings)) as client:
            check = partial(
                refuse_other_models,
                client.queue.load,
                namespace=model.namespace,
                model=model.name,
                patience_s=Limits().report_ttl_s,
            )
            await (until_answered(check) if wait else check())
