"""A worker's report to everyone: how it stands; and what it learns back: what waits, and how many share it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

import structlog

from ditserve.service.errors import QueueUnavailable
from ditserve.service.jobs import WorkerState
from ditserve.service.queue.broker import Broker
from ditserve.service.signals import first
from ditserve.service.telemetry import metrics
from ditserve.service.worker.driver import Driver

log = structlog.get_logger()


class Reporting:
    """`peers`: workers of this queue, this one included. What is admitted rests on these reports, so one follows what has
    `changed` within `busy_s`; when nothing has, one in `every_s` says that the worker lives."""

    def __init__(self, broker: Broker, *, every_s: float, busy_s: float) -> None:
        self.peers = 1
        self._broker, self._every_s, self._busy_s = broker, every_s, min(busy_s, every_s)
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self._changed.set()

    async def run(self, state: Callable[[], WorkerState | None], driver: Driver) -> None:
        """Publish `state`, and every `every_s` tell the driver this worker's share of the queue."""
        clock = asyncio.get_running_loop().time
        asked_at = -inf
        while True:
            self._changed.clear()
            now = state()
            pause_s = self._busy_s if now is not None else 0.01
            try:
                if now is not None:
                    await self._broker.publish_state(now)
                if now is None or clock() - asked_at >= self._every_s:
                    await self._ask(driver)
                    asked_at = clock()
            except QueueUnavailable as error:
                log.warning("report failed", detail=error.detail)
                pause_s = self._every_s  # said once in that time, however much changes
            await asyncio.sleep(pause_s)
            await first(self._changed, timeout_s=self._every_s - self._busy_s)

    async def _ask(self, driver: Driver) -> None:
        metrics.observe_memory("worker")
        load = await self._broker.load()
        self.peers = max(1, len(load.workers))
        driver.queued_rows = load.queued_rows // self.peers

    async def retire(self, worker: str) -> None:
        """Stop being counted on."""
        try:
            await self._broker.retire(worker)
        except QueueUnavailable:
            log.warning("left without saying so")
