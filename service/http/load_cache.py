"""What waits, as the API knows it: asked seldom however many requests come, and counted on in between."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ditserve.service.jobs import Job, LoadSnapshot
from ditserve.service.planning.capacity import dues_of
from ditserve.service.queue.queue_client import Queue

LOAD_FRESH_S = 0.1


class LoadCache:
    """The broker's load snapshot, asked at most every `LOAD_FRESH_S` seconds, and once at a time, however many requests come."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._load: LoadSnapshot | None = None
        self._taken = 0.0
        self._asking: asyncio.Task[LoadSnapshot] | None = None
        self._coming: dict[str, Job] = {}

    async def __call__(self) -> LoadSnapshot:
        """Raises `QueueUnavailable`."""
        if self._load is not None and time.monotonic() - self._taken <= LOAD_FRESH_S:
            return self._load
        if self._asking is None:
            self._asking = asyncio.create_task(self._queue.load())
            self._asking.add_done_callback(self._answered)
        load = await asyncio.shield(self._asking)
        return self._load or load  # with what others who waited for it have had counted by now

    @contextmanager
    def counted(self, job: Job) -> Iterator[None]:
        """While a job is being queued: who comes before a snapshot that has it is to see it too."""
        self._coming[job.id] = job
        self._count(job)
        try:
            yield
        finally:
            self._coming.pop(job.id, None)

    def _count(self, job: Job) -> None:
        """As work of the worker that has the least to do."""
        if self._load is None or not self._load.workers:
            return
        least, *others = sorted(self._load.workers, key=lambda worker: worker.backlog_rows)
        backlog, dues = least.backlog_rows + job.cost_rows, (*dues_of(least), job.due)
        running = least.running_samples + len(job.seeds)
        least = replace(least, backlog_rows=backlog, dues=dues, running_samples=running)
        self._load = replace(self._load, workers=(least, *others))

    def _answered(self, asked: asyncio.Task[LoadSnapshot]) -> None:
        self._asking = None
        if not asked.cancelled() and asked.exception() is None:
            self._load, self._taken = asked.result(), time.monotonic()
            for job in self._coming.values():
                self._count(job)
