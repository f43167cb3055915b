"""A worker's report to everyone: how it stands; and what it learns back: what waits, and how many share it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from service import metrics
from service.errors import QueueUnavailable
from service.jobs import WorkerState
from service.queue.broker import Broker
from service.worker.driver import Driver

log = structlog.get_logger()


class Reporting:
    """`peers`: workers of this queue, this one included."""

    def __init__(self, broker: Broker, *, every_s: float) -> None:
        self.peers = 1
        self._broker, self._every_s = broker, every_s

    async def run(self, state: Callable[[], WorkerState | None], driver: Driver) -> None:
        """Publish `state`, and tell the driver this worker's share of the queue."""
        while True:
            metrics.observe_memory("worker")
            now = state()
            try:
                if now is not None:
                    await self._broker.publish_state(now)
                load = await self._broker.load()
            except QueueUnavailable as error:
                log.warning("report failed", detail=error.detail)
            else:
                self.peers = max(1, len(load.workers))
                driver.queued_rows = load.queued_rows // self.peers
            await asyncio.sleep(self._every_s if now is not None else 0.01)

    async def retire(self, worker: str) -> None:
        """Stop being counted on."""
        try:
            await self._broker.retire(worker)
        except QueueUnavailable:
            log.warning("left without saying so")
