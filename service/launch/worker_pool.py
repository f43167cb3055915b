"""The worker processes of one version of one model. One that crashes is started again, less and less often."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import structlog

from ditserve.service.errors import QueueUnavailable
from ditserve.service.launch.child_process import Child
from ditserve.service.queue.broker import Broker
from ditserve.service.served_models import ServedModel
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics

CONFIG_ERROR, FAILED = 2, 1  # exit statuses of what can never work, and of what may
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between starts of a worker
SOUND_S = 60.0  # a worker that ran so long is first paused for shortly again
LOOK_S = 0.1

log = structlog.get_logger()


async def start_child(command: str, settings: Settings) -> Child:
    """`python -m service COMMAND` with exactly these settings."""
    arguments = [sys.executable, "-m", "ditserve.service", command]
    return await Child.start(command, arguments, settings.child_environment())


class Crew:
    """Owner of `settings.workers` processes. `fallen` is set when one has ended by itself, `hopeless` when it never can work."""

    def __init__(self, lane: ServedModel, settings: Settings, *, metrics_folder: Path) -> None:
        self.lane = lane
        self.fallen, self.hopeless = asyncio.Event(), asyncio.Event()
        self._settings, self._metrics = lane.settings(settings), metrics_folder
        self._workers: dict[int, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Start the workers, and keep them running until `stop`."""
        self._tasks = [asyncio.create_task(self._keep(k)) for k in range(self._settings.workers)]

    async def ready(self, broker: Broker) -> bool:
        """Returns once so many workers of the lane say that they have this bundle; False if one of these ends before."""
        while not self.fallen.is_set():
            with suppress(QueueUnavailable):
                workers = (await broker.load()).workers
                if sum(each.bundle == self.lane.digest for each in workers) >= self._settings.workers:
                    return True
            await asyncio.sleep(LOOK_S)
        return False

    async def stop(self, limit_s: float) -> None:
        """SIGTERM to all, and SIGKILL after the limit."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await asyncio.gather(*(worker.stop(limit_s) for worker in self._workers.values()))
        for worker in self._workers.values():
            metrics.forget(worker.pid, shared=self._metrics)

    def kill(self) -> None:
        for worker in self._workers.values():
            worker.signal(signal.SIGKILL)

    async def _keep(self, index: int) -> None:
        """Keep one worker running."""
        pause, starts = FIRST_PAUSE_S, 0
        while True:
            began, starts = time.monotonic(), starts + 1
            status = await self._run(index)
            self.fallen.set()
            if status == CONFIG_ERROR and starts == 1:
                self.hopeless.set()
                return
            if time.monotonic() - began > SOUND_S:
                pause = FIRST_PAUSE_S
            log.warning("worker ended, starting another", model=self.lane.name, status=status, pause_s=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _run(self, index: int) -> int:
        """One worker from its start to its end; its exit status."""
        try:
            worker = self._workers[index] = await start_child("worker", self._settings)
        except OSError as error:
            log.error("a worker cannot be started", model=self.lane.name, reason=str(error))
            return FAILED
        status = await worker.wait()
        metrics.forget(worker.pid, shared=self._metrics)
        return status
