"""The load of one model's queue and workers as the API knows it: read seldom, and corrected in between."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf

from ditserve.service.errors import QueueUnavailable
from ditserve.service.fleet import LoadSnapshot
from ditserve.service.jobs import Job
from ditserve.service.planning.demand import demand_of
from ditserve.service.queue.queue_client import Queue

LOAD_FRESH_S = 0.1
# A caller that can do without the load waits so long for it.
PATIENCE_S = 0.5
# A snapshot is not used after so long, however long Redis is away.
KEPT_S = 60.0


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
        self._read_at = -inf
        self._reading: asyncio.Task[LoadSnapshot] | None = None
        self._reason = ""  # why the last read failed
        self._reserved: dict[str, Job] = {}

    async def __call__(self) -> LoadSnapshot:
        """Return the load. Raises `QueueUnavailable`."""
        if self._load is not None and self._age_s <= LOAD_FRESH_S:
            return self._load
        load = await asyncio.shield(self._read())
        # Others that waited for the same read may have added their jobs to it by now.
        return self._load or self._own(load)

    async def refresh(self) -> str:
        """Read the load. Return "", or why Redis does not tell it within `PATIENCE_S` seconds."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self()
        except QueueUnavailable as error:
            return error.detail
        except TimeoutError:
            # A connection that cannot be made may take longer than this, and is asked for again.
            return self._reason or f"Redis did not answer within {PATIENCE_S:g} s."
        return ""

    def last(self) -> LoadSnapshot | None:
        """Return the load that was read last, without waiting, and have it read for the next call.

        None where none was read in the last `KEPT_S` seconds.
        """
        if self._age_s > LOAD_FRESH_S:
            self._read()
        return self._load if self._age_s <= KEPT_S else None

    async def aclose(self) -> None:
        """End the read under way."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._read_at

    def _read(self) -> asyncio.Task[LoadSnapshot]:
        """Return the read under way, or begin one."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._queue.load())
            self._reading.add_done_callback(self._on_read)
        return self._reading

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
        fault = None if reading.cancelled() else reading.exception()
        self._reason = fault.detail if isinstance(fault, QueueUnavailable) else ""
        if not reading.cancelled() and reading.exception() is None:
            self._load, self._read_at = self._own(reading.result()), time.monotonic()
            for job in self._reserved.values():
                self._add(job)
