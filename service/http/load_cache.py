"""The load of one model's queue and workers as the API knows it: read seldom, and corrected in between."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ditserve.service.jobs import Job, LoadSnapshot
from ditserve.service.planning.demand import demand_of
from ditserve.service.queue.queue_client import Queue

LOAD_FRESH_S = 0.1


class LoadCache:
    """The broker's load snapshot, read at most once per `LOAD_FRESH_S` seconds however many requests come.

    Between two reads the jobs that this process queues are added to the snapshot. Example: the snapshot says
    that the idlest worker has 5 rows to run, and two jobs of 40 rows arrive in the same millisecond. The
    first is admitted against 5 rows, the second against 45.

    Workers of other models than `model`, which a wrong `--namespace` brings here, are not its workers.
    """

    def __init__(self, queue: Queue, model: str) -> None:
        self._queue, self._model = queue, model
        self._load: LoadSnapshot | None = None
        self._read_at = 0.0
        self._reading: asyncio.Task[LoadSnapshot] | None = None
        self._reserved: dict[str, Job] = {}

    async def __call__(self) -> LoadSnapshot:
        """Return the load. Raises `QueueUnavailable`."""
        if self._load is not None and time.monotonic() - self._read_at <= LOAD_FRESH_S:
            return self._load
        if self._reading is None:
            self._reading = asyncio.create_task(self._queue.load())
            self._reading.add_done_callback(self._on_read)
        load = await asyncio.shield(self._reading)
        # Others that waited for the same read may have added their jobs to it by now.
        return self._load or self._own(load)

    @contextmanager
    def reserved(self, job: Job) -> Iterator[None]:
        """Count a job while it is being queued: a snapshot read meanwhile may not contain it yet."""
        self._reserved[job.id] = job
        self._add(job)
        try:
            yield
        finally:
            self._reserved.pop(job.id, None)

    def _add(self, job: Job) -> None:
        """Add a job to the snapshot, as work of the worker that has the least to do."""
        if self._load is None or not self._load.workers:
            return
        idlest, *others = sorted(self._load.workers, key=lambda worker: worker.backlog_rows)
        idlest = replace(
            idlest,
            backlog_rows=idlest.backlog_rows + job.cost_rows,
            dues=(*demand_of(idlest), job.demand),
            running_samples=idlest.running_samples + len(job.seeds),
        )
        self._load = replace(self._load, workers=(idlest, *others))

    def _own(self, load: LoadSnapshot) -> LoadSnapshot:
        """Return the load without the workers of other models."""
        workers = tuple(worker for worker in load.workers if self._model in worker.models)
        starting = tuple(worker for worker in load.starting if worker.model == self._model)
        return replace(load, workers=workers, starting=starting)

    def _on_read(self, reading: asyncio.Task[LoadSnapshot]) -> None:
        self._reading = None
        if not reading.cancelled() and reading.exception() is None:
            self._load, self._read_at = self._own(reading.result()), time.monotonic()
            for job in self._reserved.values():
                self._add(job)
