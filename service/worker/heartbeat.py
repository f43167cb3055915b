"""A worker's signs of life: its leases, its reports, and its activity before it can take jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from math import inf

import structlog

from ditserve.service.errors import QueueUnavailable
from ditserve.service.fleet import Starting, WorkerState
from ditserve.service.jobs import Lease, Renewal
from ditserve.service.planning.capacity import backlog_time
from ditserve.service.queue.broker import Broker
from ditserve.service.signals import first
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.faults import kept_running
from ditserve.service.worker.engine_thread import EngineThread

RETRY_S = 0.2
STARTING_EVERY_S = 1.0  # between two reports of a worker that is starting
NO_STATE_S = 0.01  # between two looks whether a worker has a state to report

log = structlog.get_logger()


class Leases:
    """The leases of a worker: renewed while it works, and taken from workers that no longer renew theirs."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._outage_at = -inf

    async def keep(
        self,
        held: Callable[[], list[Lease]],
        on_lost: Callable[[Renewal], None],
        *,
        predicted_s: Callable[[], float],
    ) -> None:
        """Renew the leases that `held` returns three times per lease time, call `on_lost`, and sweep.

        The longest of their jobs is predicted to run for `predicted_s` seconds.

        After an outage of Redis, and after its clock was set, no lease is swept until every worker has had
        the time to renew its own.
        """
        lease_s, clock = self._broker.limits.lease_s, self._broker.clock
        while True:
            leases = held()
            try:
                renewal = await self._broker.renew(leases, predicted_s=predicted_s())
                # A job may have ended during the renewal, and may even have been claimed again.
                current = set(held())
                ended = {lease.job_id for lease in leases if lease not in current}
                on_lost(Renewal(renewal.lost - ended, renewal.cancelled - ended))
                if time.monotonic() - max(self._outage_at, clock.moved_at) > lease_s:
                    metrics.LEASES_EXPIRED.inc(await self._broker.sweep())
            except QueueUnavailable as error:
                self._note_outage(error)
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(lease_s / 3)

    async def retry_until_published(self, publish: Callable[[], Awaitable[bool]]) -> bool:
        """Publish however long Redis is away. Return False if the lease was lost by then."""
        while True:
            try:
                return await publish()
            except QueueUnavailable as error:
                self._note_outage(error)
                await asyncio.sleep(RETRY_S)

    def _note_outage(self, error: QueueUnavailable) -> None:
        log.warning("queue away", detail=error.detail)
        self._outage_at = time.monotonic()


class Reporting:
    """The reports of a worker's state, on which admission rests.

    A report follows a change within `busy_s` seconds. Without a change one report in `every_s` seconds says
    that the worker lives. `peers` counts the workers of this queue, this one included. The idlest of
    the others has work for `idlest_peer_s` seconds, infinite without others.
    """

    def __init__(self, broker: Broker, *, every_s: float, busy_s: float) -> None:
        self.peers = 1
        self.idlest_peer_s = inf
        self._broker, self._every_s, self._busy_s = broker, every_s, min(busy_s, every_s)
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Note that the worker's state is another than in the last report."""
        self._changed.set()

    async def run(self, state: Callable[[], WorkerState | None], engine: EngineThread) -> None:
        """Publish `state`, and every `every_s` seconds give the engine this worker's share of the queue."""
        clock = asyncio.get_running_loop().time
        load_read_at = -inf
        while True:
            self._changed.clear()
            current = state()
            pause_s = self._busy_s if current is not None else NO_STATE_S
            try:
                if current is not None:
                    await self._broker.report(current)
                if current is None or clock() - load_read_at >= self._every_s:
                    await self._read_load(engine, current)
                    load_read_at = clock()
            except QueueUnavailable as error:
                log.warning("report failed", detail=error.detail)
                # In an outage one warning per `every_s`, however much changes.
                pause_s = self._every_s
            await asyncio.sleep(pause_s)
            await first(self._changed, timeout_s=self._every_s - self._busy_s)

    async def _read_load(self, engine: EngineThread, current: WorkerState | None) -> None:
        metrics.observe_memory("worker")
        load = await self._broker.load()
        self.peers = max(1, len(load.workers))
        own = current.worker if current is not None else None
        others = (worker for worker in load.workers if worker.worker != own)
        self.idlest_peer_s = min(map(backlog_time, others), default=inf)
        engine.queued_rows = load.queued_rows // self.peers

    async def retire(self, worker: str) -> None:
        """Withdraw the worker's report, so that admission no longer counts on it."""
        try:
            await self._broker.retire(worker)
        except QueueUnavailable:
            log.warning("left without saying so")


@asynccontextmanager
async def starting(broker: Broker, worker: str, model: str) -> AsyncIterator[Callable[[str], None]]:
    """Give a function that publishes the worker's current activity, such as "warming up"; /startupz lists it.

    The last activity is published again every second, until the block ends and the report is withdrawn.
    """
    activity = "starting"
    changed = asyncio.Event()

    def report(doing: str) -> None:
        nonlocal activity
        activity = doing
        changed.set()
        log.info("starting", worker=worker, model=model, doing=doing)

    async def publish() -> None:
        while True:
            changed.clear()
            # Without Redis nobody sees the report; the work it speaks of goes on.
            with suppress(QueueUnavailable):
                await broker.report(Starting(worker, model, activity))
            await first(changed, timeout_s=STARTING_EVERY_S)

    publishing = asyncio.create_task(kept_running("reporting", publish))
    try:
        yield report
    finally:
        publishing.cancel()
        await asyncio.wait([publishing])
        with suppress(QueueUnavailable):
            await broker.retire(worker)
