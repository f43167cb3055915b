"""The worker processes of one version of one model.

A worker that crashes is started again, less and less often.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from ditserve.commands import process_words
from ditserve.service.errors import QueueUnavailable
from ditserve.service.exit_statuses import FAILED, MISCONFIGURED
from ditserve.service.launch.child_process import Child
from ditserve.service.queue.broker import Broker
from ditserve.service.served_models import ServedModel
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.faults import kept_running
from ditserve.service.telemetry.gpus import gpus

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between starts of a worker
STABLE_S = 60.0  # after so long a run the next pause is the first again
POLL_S = 0.1

log = structlog.get_logger()


async def start_child(command: str, settings: Settings, gpu: str | None = None) -> Child:
    """Start `python -m service COMMAND` with exactly these settings; with `gpu` it sees that GPU alone.

    Raise `OSError` if it cannot be started.
    """
    words, environment = process_words("ditserve.service", command), settings.child_environment()
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return await Child.start(command, words, environment)


def worker_gpus(settings: Settings) -> tuple[str | None, ...]:
    """Return the GPU of each worker; None: it sees all that this process sees.

    With two GPUs and `per-gpu=2` the workers 0 and 1 have the first, 2 and 3 the second.

    Raises:
        ValueError: workers are wanted for each GPU, and there is none.
    """
    each = settings.workers_per_gpu
    if each is None:
        return (None,) * int(settings.workers)
    visible = settings.visible_gpus()
    if visible is None:
        visible = tuple(gpu.uuid for gpu in gpus())
    if not visible:
        raise ValueError(
            f"--workers {settings.workers} finds no GPU: pip install nvidia-ml-py, name the GPUs in "
            f"CUDA_VISIBLE_DEVICES, or give a number of workers"
        )
    return tuple(gpu for gpu in visible for _ in range(each))


class WorkerPool:
    """Owner of the processes that serve `model`, as many as `settings.workers` says.

    `crashed` is set once a worker has ended by itself, `misconfigured` once one has shown at its first start
    that no restart can help.
    """

    def __init__(self, model: ServedModel, settings: Settings, *, metrics_folder: Path) -> None:
        self.model = model
        self.crashed, self.misconfigured = asyncio.Event(), asyncio.Event()
        self._settings, self._metrics = model.settings(settings), metrics_folder
        self._gpus = worker_gpus(settings)
        self._workers: dict[int, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start the workers, and keep them running until `stop`."""
        keepers = [partial(self._keep_running, k) for k in range(len(self._gpus))]
        self._tasks = [asyncio.create_task(kept_running("keeping a worker", keep)) for keep in keepers]

    async def wait_ready(self, broker: Broker) -> bool:
        """Return True once all workers report that they serve this bundle, False if one ends before."""
        while not self.crashed.is_set():
            with suppress(QueueUnavailable):
                workers = (await broker.load()).workers
                if sum(worker.bundle == self.model.digest for worker in workers) >= len(self._gpus):
                    return True
            await asyncio.sleep(POLL_S)
        return False

    async def stop(self, limit_s: float) -> None:
        """Send SIGTERM to all workers, and SIGKILL after the limit; return when all have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await asyncio.gather(*(worker.stop(limit_s) for worker in self._workers.values()))
        for worker in self._workers.values():
            metrics.forget(worker.pid, shared=self._metrics)

    def kill(self) -> None:
        for worker in self._workers.values():
            worker.signal(signal.SIGKILL)

    async def _keep_running(self, index: int) -> None:
        """Run one worker again and again, unless it is misconfigured."""
        pause, starts = FIRST_PAUSE_S, 0
        while True:
            began, starts = time.monotonic(), starts + 1
            status = await self._run_once(index)
            self.crashed.set()
            if status == MISCONFIGURED and starts == 1:
                self.misconfigured.set()
                return
            if status == MISCONFIGURED:
                log.error(
                    "no start of a worker helps before its configuration is mended", model=self.model.name
                )
            if time.monotonic() - began > STABLE_S:
                pause = FIRST_PAUSE_S
            log.warning("worker ended, starting another", model=self.model.name, status=status, pause_s=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _run_once(self, index: int) -> int:
        """Run one worker from its start to its end; return its exit status."""
        try:
            worker = self._workers[index] = await start_child("worker", self._settings, self._gpus[index])
        except OSError as error:
            log.error("a worker cannot be started", model=self.model.name, reason=str(error))
            return FAILED
        status = await worker.wait()
        metrics.forget(worker.pid, shared=self._metrics)
        return status
