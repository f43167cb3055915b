"""What a worker does before it can take jobs, told to everyone: /startupz lists it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import structlog

from ditserve.service.errors import QueueUnavailable
from ditserve.service.jobs import Starting
from ditserve.service.queue.broker import Broker
from ditserve.service.signals import first

EVERY_S = 1.0

log = structlog.get_logger()


@asynccontextmanager
async def starting(broker: Broker, worker: str, model: str) -> AsyncIterator[Callable[[str], None]]:
    """Gives a function that takes what the worker is doing; the last is published again and again until the block ends."""
    doing = "starting"
    changed = asyncio.Event()

    def tell(what: str) -> None:
        nonlocal doing
        doing = what
        changed.set()
        log.info("starting", worker=worker, model=model, doing=doing)

    async def publish() -> None:
        while True:
            changed.clear()
            with suppress(QueueUnavailable):  # nobody is told then, and the work goes on
                await broker.publish_state(Starting(worker, model, doing))
            await first(changed, timeout_s=EVERY_S)

    publishing = asyncio.create_task(publish())
    try:
        yield tell
    finally:
        publishing.cancel()
        await asyncio.wait([publishing])
        with suppress(QueueUnavailable):
            await broker.retire(worker)
