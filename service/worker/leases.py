"""A worker's leases: kept while it works, taken from workers that no longer renew theirs, and insisted on through outages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from ditserve.service.errors import QueueUnavailable
from ditserve.service.jobs import Lease, Renewal
from ditserve.service.queue.broker import Broker
from ditserve.service.telemetry import metrics

RETRY_S = 0.2

log = structlog.get_logger()


class Leases:
    def __init__(self, broker: Broker, *, clock: Callable[[], float]) -> None:
        self._broker, self._clock = broker, clock
        self._outage_at = float("-inf")

    async def keep(self, held: Callable[[], list[Lease]], lost: Callable[[Renewal], None]) -> None:
        """Renew what is `held` three times per lease, say what was `lost`, and sweep.

        After an outage nobody's leases are taken until all have had the time to renew.
        """
        lease_s = self._broker.limits.lease_s
        while True:
            leases = held()
            try:
                renewal = await self._broker.renew(leases)
                current = set(held())  # a job may have ended meanwhile, and even have come back
                ended = {lease.job_id for lease in leases if lease not in current}
                lost(Renewal(renewal.lost - ended, renewal.cancelled - ended))
                if self._clock() - self._outage_at > lease_s:
                    metrics.LEASES_EXPIRED.inc(await self._broker.sweep())
            except QueueUnavailable as error:
                self._outage(error)
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(lease_s / 3)

    async def insist(self, publish: Callable[[], Awaitable[bool]]) -> bool:
        """Publish however long Redis is away; the lease decides whether it still counts."""
        while True:
            try:
                return await publish()
            except QueueUnavailable as error:
                self._outage(error)
                await asyncio.sleep(RETRY_S)

    def _outage(self, error: QueueUnavailable) -> None:
        log.warning("queue away", detail=error.detail)
        self._outage_at = self._clock()
