"""Faults that must not end a process: each is logged and counted, and the work around it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from ditserve.service.telemetry import metrics

RETRY_S = 0.5

log = structlog.get_logger()


@contextmanager
def surviving(activity: str, **fields: Any) -> Iterator[None]:
    """Log an error of the block, with these fields, and count it. What follows the block goes on."""
    faults = metrics.FAULTS.labels(activity)
    try:
        yield
    except Exception:
        faults.inc()
        log.exception("unforeseen error", activity=activity, **fields)


async def kept_running(activity: str, loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop until it ends by itself; after an error begin it anew."""
    while True:
        with surviving(activity):
            return await loop()
        await asyncio.sleep(RETRY_S)
